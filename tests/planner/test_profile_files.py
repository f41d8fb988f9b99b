"""Profiles as files: read, refused, found for a deployment, and used by the command line."""

import copy
import gzip
import json
import math
from dataclasses import replace

import pytest
from profiles_for_tests import Physics, profile, write

from engine.scheduling import StepShape
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.kv_format import KVCacheDtype
from planner.profile import library
from planner.profile.library import find_profile, load_profiles
from planner.profile.schema import load_profile
from planner.profile.step_time import ProfileStepTime
from planner.roofline import RooflineStepTime
from planner.simulation import AcceptanceProcess
from planner.speculation import DraftedStepTime, SpeculationConfig
from planner.step_time import Evidence
from planner.workload import SyntheticSpec, synthesize

LLAMA, H200 = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
BF16 = KVCacheDtype.BFLOAT16


SHIPPED = library.shipped_profiles


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """What is shipped would stand behind every profile here, and sometimes be nearer."""
    monkeypatch.setattr(library, "shipped_profiles", lambda: ())


@pytest.fixture(scope="module")
def good() -> dict:
    return profile(noise=0.003)


@pytest.fixture
def content(good) -> dict:
    return copy.deepcopy(good)


@pytest.fixture
def path(tmp_path, good):
    return write(tmp_path, good)


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_profile_is_read(path, good):
    read = load_profile(path)
    assert read.name == "profile.json"
    assert read.record.gpu == "h200_sxm"
    assert read.kv_cache_dtypes == (BF16,)
    assert read.tables.kv["bfloat16"].decode[0].to_json() == good["kv"]["bfloat16"]["decode"][0]
    step_time = read.step_time("bfloat16")
    assert step_time.predict(StepShape(decode_contexts=[128])) == pytest.approx(
        good["kv"]["bfloat16"]["decode"][0]["step_s"]
    )
    assert step_time.evidence is Evidence.INTERPOLATED
    assert "llama-3.1-8b on NVIDIA H200, bfloat16 KV" in step_time.description


def test_a_gzipped_profile_is_read(tmp_path, good):
    path = tmp_path / "profile.json.gz"
    path.write_bytes(gzip.compress(json.dumps(good).encode()))
    assert load_profile(path).tables == load_profile(write(tmp_path, good)).tables
    misnamed = path.rename(tmp_path / "misnamed.json")
    assert load_profile(misnamed).tables == load_profile(write(tmp_path, good)).tables
    data = bytearray(misnamed.read_bytes())
    data[-6] ^= 1  # of its check sum
    for broken in (data, data[:500]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"profile\.json\.gz is damaged: "):
            load_profile(path)


def test_stored_errors_are_used(tmp_path, content):
    fit = load_profile(write(tmp_path, content)).fitted("bfloat16")
    stored = json.loads(json.dumps(fit.errors()))
    stored["decode"]["leave_one_out"] = {"median": 0.1, "p90": 0.2, "max": 0.3}
    content["kv"]["bfloat16"]["fit"] = stored
    assert load_profile(write(tmp_path, content)).uncertainty("bfloat16").decode > 0.04
    content["kv"]["bfloat16"]["fit"] = {"decode": "hand-edited"}
    assert load_profile(write(tmp_path, content)).uncertainty("bfloat16") == fit.uncertainty()


def points(content, table="decode"):
    return content["kv"]["bfloat16"][table]


def decode_at(content, context, batch):
    return next(p for p in points(content) if p["decodes"] == [[context, batch]])


def set_times(point, seconds):
    point |= {"step_s": seconds, "low_s": 0.99 * seconds, "high_s": 1.01 * seconds}


def other_gpu(content):
    content["gpu"] = "h900"


def swap(name, value):
    return lambda content: content.update({name: value})


def drop(*names):
    def change(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return change


BAD = {
    "another version": (swap("version", 2), "version 2.*calibrate again"),
    "no version": (drop("version"), "version None"),
    "another kind": (swap("kind", "memwall-plan"), "no profile of `memwall calibrate`"),
    "no tables": (swap("kv", {}), "no tables"),
    "an unknown format": (lambda c: c["kv"].update(int3=c["kv"]["bfloat16"]), "'int3'"),
    "a missing table": (drop("kv", "bfloat16", "decode"), "decode"),
    "an empty table": (lambda c: c["kv"]["bfloat16"].update(prefill=[]), "prefill table of bfloat16 KV is missing"),
    "NaN": (lambda c: points(c)[3].update(step_s=float("nan")), "decode.3.step_s"),
    "a negative time": (lambda c: points(c)[0].update(step_s=-1.0), "decode.0.step_s"),
    "no time at all": (lambda c: points(c)[0].update(step_s=0.0), "greater than 0"),
    "a string": (lambda c: points(c)[0].update(step_s="fast"), "number"),
    "an endless step": (lambda c: points(c)[0].update(high_s=1e9), "3600"),
    "quantiles upside down": (lambda c: points(c)[0].update(low_s=1.0), "between low_s and high_s"),
    "nothing in a step": (lambda c: points(c)[0].update(decodes=[]), "neither"),
    "a prompt among decodes": (lambda c: points(c)[0].update(prefills=[[5, 0]]), "with prompt chunks"),
    "two chunks alone": (lambda c: points(c, "prefill")[0].update(prefills=[[5, 0], [6, 0]]), "one prompt chunk alone"),
    "decodes alone in mixed": (lambda c: points(c, "mixed")[0].update(prefills=[], decodes=[[4, 4]]), "mixed table"),
    "less time for more context": (
        lambda c: set_times(decode_at(c, 8192, 1), 0.001),
        "a step of 8192 tokens of context takes 1 ms",
    ),
    "less time for more requests": (lambda c: set_times(decode_at(c, 128, 256), 0.002), "256 requests takes 2 ms"),
    "less time for more tokens": (lambda c: set_times(points(c, "prefill")[7], 0.002), "new tokens takes 2 ms"),
    "an unknown GPU": (other_gpu, "'h900', which the catalog does not know"),
    "a model that is none": (lambda c: c["model"]["config"].update(hidden_size=-4), "hidden_size"),
    "an unknown quantization": (swap("quantization", "fp3"), "quantization"),
    "a list": (lambda c: c.update(engine=[]), "engine"),
    "no bandwidth": (lambda c: c["limits"].update(copy_bytes_per_s=0), "copy_bytes_per_s"),
    "text for a size": (lambda c: c["engine"].update(graph_sizes=["a"]), "graph_sizes"),
    "a clock of no time": (lambda c: clock_of(c)["points"][0].update(cool_s=0.0), "clock.points.0.cool_s"),
    "faster when hot": (lambda c: clock_of(c)["points"][1].update(cool_s=0.06), "on a hot device and 60 ms on a cool"),
    "far slower when hot": (
        lambda c: clock_of(c)["decode_points"][0].update(hot_s=0.09),
        "times as long on a hot device as on a cool one",
    ),
    "far from steady": (lambda c: clock_of(c)["points"][1].update(steady_s=0.09), "times steady_s"),
    "a clock of text": (lambda c: clock_of(c)["points"][0].update(tokens="many"), "clock.points.0.tokens"),
    "a series with an end missing": (lambda c: clock_of(c)["series"][0]["gpu_s"].pop(), "begin 3 times"),
    "a series out of order": (
        lambda c: clock_of(c)["series"][0]["begin_s"].__setitem__(1, 1.0),
        "before the one before",
    ),
    "a list for a clock": (swap("clock", []), "clock"),
    "an all-reduce of one": (
        lambda c: c["allreduce"].append({"world_size": 1, "bytes": 8, "time_s": 1e-5}),
        "allreduce.0.world_size",
    ),
    "less time for more bytes": (
        lambda c: c["allreduce"].extend({"world_size": 2, "bytes": n, "time_s": 0.1 / n} for n in (1024, 8192)),
        "of 8,192 bytes between 2 GPUs takes 12.2 us, and one of 1,024 bytes 97.7 us",
    ),
    "the same bytes twice": (
        lambda c: c["allreduce"].extend({"world_size": 2, "bytes": 8192, "time_s": t} for t in (1e-5, 2e-5)),
        "of 8,192 bytes between 2 GPUs is there twice",
    ),
    "a link of no time": (
        lambda c: c["allreduce"].append({"world_size": 2, "bytes": 1 << 20, "time_s": 1e-8}),
        "of 1,048,576 bytes between 2 GPUs takes 1e-08 s, which no link",
    ),
    "a link that hardly works": (
        lambda c: c["allreduce"].append({"world_size": 2, "bytes": 8192, "time_s": 1.0}),
        "of 8,192 bytes between 2 GPUs takes 1 s, which no link",
    ),
    "a CPU that is busier than there is time": (
        lambda c: points(c)[0].update(host_s=1000.0),
        "host_s 1000 is of steps",
    ),
}


def clock_of(content):
    """A clock section that is in order, put into the profile."""
    points = [{"tokens": n, "steady_s": n * 2e-5, "cool_s": n * 1.8e-5, "hot_s": n * 2e-5} for n in (256, 512)]
    series = [{"tokens": 512, "decode_batch": 16, "gpu_s": [0.01, 0.01, 0.011], "begin_s": [0.0, 0.01, 0.02]}]
    decode = [{"batch": 64, "context": 1024, "cool_s": 0.01, "hot_s": 0.0103}]
    return content.setdefault("clock", {"points": points, "decode_points": decode, "series": series})


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused_in_a_sentence(name, content, tmp_path):
    change, words = BAD[name]
    change(content)
    with pytest.raises(UserError, match=words) as refused:
        load_profile(write(tmp_path, content))
    message = str(refused.value)
    assert "profile.json" in message
    assert "\n" not in message


def test_a_clock_is_read_and_goes_along(tmp_path, content):
    assert load_profile(write(tmp_path, content, "a.json")).step_time("bfloat16").clock is None
    clock_of(content)
    path = write(tmp_path, content, "b.json")
    clock = load_profile(path).step_time("bfloat16").clock
    assert (clock.tokens, clock.ratios(512)) == ((256, 512), (pytest.approx(0.9), pytest.approx(1.0)))
    assert clock.decode == pytest.approx(1.03)
    assert predicted(path, StepShape(prefills=[(512, 0)]), kv_cache_dtype=KVCacheDtype.FP8)[0].clock == clock
    assert predicted(path, StepShape(prefills=[(512, 0)]), gpu=load_gpu("h100_sxm"))[0].clock == clock
    # A calibration that ran out of time: without points neither cool nor hot times are known.
    for missing in (["points"], ["points", "series"], ["points", "series", "decode_points"]):
        content["clock"] = {name: rows for name, rows in content["clock"].items() if name not in missing}
        assert load_profile(write(tmp_path, content, "c.json")).clock("bfloat16") is None


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, "\x00"])
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"profile\.json"):
        load_profile(path)


def test_absent_and_damaged_files_are_refused(tmp_path, path):
    with pytest.raises(UserError, match="No such file"):
        load_profiles([tmp_path / "nowhere.json"])
    with pytest.raises(UserError, match="cannot read"):
        load_profile(tmp_path)
    damaged = tmp_path / "profile.json.gz"
    damaged.write_bytes(gzip.compress(path.read_bytes())[:500])
    with pytest.raises(UserError, match="damaged"):
        load_profile(damaged)


def test_noise_is_no_nonsense(content, tmp_path):
    """On a CPU steps vary by half: what overlaps is not refused."""
    for point in points(content):
        point["low_s"], point["high_s"] = 0.3 * point["step_s"], 3 * point["step_s"]
    slow = decode_at(content, 512, 8)
    slow["step_s"] *= 1.5
    load_profile(write(tmp_path, content))


# ---- finding -------------------------------------------------------------------------------------------------------


def test_nothing_is_shipped_that_cannot_be_used():
    for each in SHIPPED():
        for dtype in each.kv_cache_dtypes:
            assert each.step_time(dtype).predict(StepShape(decode_contexts=[100])) > 0


def test_which_profile_serves(tmp_path, good):
    eight = load_profile(write(tmp_path, {**good, "kv": {"bfloat16": good["kv"]["bfloat16"]}}, "8b.json"))
    one = load_profile(write(tmp_path, profile(model="llama-3.2-1b", kv=("bfloat16", "int4")), "1b.json"))
    both = (eight, one)

    def found(model, gpu="h200_sxm", kv="bfloat16", tp=1, quantization=None):
        match = find_profile(load_model(model, quantization), load_gpu(gpu), KVCacheDtype(kv), tp, both)
        return match and (match.profile, match.changes)

    assert found("llama-3.1-8b") == (eight, ())
    assert found("llama-3.2-1b", kv="int4") == (one, ())
    assert found("llama-3.1-8b", kv="fp8") == (eight, ("kv_cache_dtype",))
    assert found("llama-3.1-8b", tp=2) == (eight, ("tensor_parallel_size",))
    assert found("llama-3.1-8b", gpu="h100_sxm") == (eight, ("gpu",))
    assert found("llama-3.1-8b", quantization="fp8") == (eight, ("quantization",))
    assert found("llama-3.1-70b", tp=4) == (eight, ("model", "tensor_parallel_size"))
    assert found("llama-3.2-3b")[1] == ("model",)
    assert found("mixtral-8x7b") is None
    assert find_profile(LLAMA, H200, BF16, 1, ()) is None


def test_a_gpu_without_a_name_is_told_by_its_memory(tmp_path, content):
    content["gpu"] = None
    read = load_profile(write(tmp_path, content))
    assert find_profile(LLAMA, H200, BF16, 1, (read,)).changes == ()
    assert library.why_unusable(read, LLAMA, H200, False) is None
    assert "NVIDIA H200" in library.why_unusable(read, LLAMA, load_gpu("h100_sxm"), False)


# ---- deployments ---------------------------------------------------------------------------------------------------


def test_a_deployment_takes_its_profile(path, good):
    deployment = Deployment(LLAMA, H200, max_model_len=8192, profiles=(str(path),))
    step_time = deployment.step_time()
    assert isinstance(step_time, ProfileStepTime)
    assert step_time.evidence is Evidence.INTERPOLATED
    memory = deployment.memory()
    assert memory.num_kv_blocks == 12_345
    assert memory.block_size == 64
    workload = synthesize(SyntheticSpec(request_rate=5.0, num_requests=20), seed=0)
    system = deployment.system(workload)
    assert system.pipeline_depth == 2
    assert system.cache.num_blocks == 12_346
    assert system.cache.block_size == 64


def test_other_settings_have_other_blocks(path):
    deployment = Deployment(LLAMA, H200, max_model_len=8192, profiles=(str(path),))
    for changed in (
        {"gpu_memory_utilization": 0.8},
        {"max_num_seqs": 64},
        {"block_size": 16},
        {"kv_cache_dtype": KVCacheDtype.FP8},
        {"tensor_parallel_size": 2},
        {"num_gpu_blocks_override": 999},
        {"profiles": ("none",)},
    ):
        assert replace(deployment, **changed).memory().num_kv_blocks != 12_345
    assert replace(deployment, block_size=64).memory().num_kv_blocks == 12_345


def test_without_a_profile_it_is_the_roofline(path):
    none = Deployment(LLAMA, H200, max_model_len=8192, profiles=("none",))
    assert isinstance(none.step_time(), RooflineStepTime)
    assert none.step_time().uncertainty is None
    workload = synthesize(SyntheticSpec(request_rate=5.0, num_requests=20), seed=0)
    assert none.system(workload).pipeline_depth == 1
    with pytest.raises(UserError, match="--profile none"):
        load_profiles(["none", str(path)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enforce_eager": True}, "measured with CUDA graphs"),
        ({"model": load_model("mixtral-8x7b")}, "experts"),
        ({"gpu": load_gpu("h100_sxm")}, "data sheet"),
    ],
)
def test_a_profile_that_tells_nothing_is_refused(tmp_path, content, changes, words):
    content["gpu"] = None
    path = write(tmp_path, content)
    deployment = replace(Deployment(LLAMA, H200, max_model_len=8192, profiles=(str(path),)), **changes)
    with pytest.raises(UserError, match=words):
        deployment.step_time()


def test_speculation_waits_for_its_drafts(path):
    acceptance = AcceptanceProcess((0.8, 0.7))
    ngram = SpeculationConfig("ngram", 2, acceptance)
    deployment = Deployment(LLAMA, H200, max_model_len=8192, speculation=ngram, profiles=(str(path),))
    workload = synthesize(SyntheticSpec(request_rate=5.0, num_requests=20), seed=0)
    assert deployment.system(workload).pipeline_depth == 1
    drafted = replace(
        deployment, speculation=SpeculationConfig("draft_model", 2, acceptance, load_model("llama-3.2-1b"))
    )
    step_time = drafted.step_time()
    assert isinstance(step_time, DraftedStepTime)
    step = StepShape(verifies=[(3, 100)] * 4)
    assert step_time.ticks(step) > deployment.step_time().ticks(step)
    assert step_time.alone_ticks(step) - step_time.ticks(step) == deployment.step_time().host_ticks(step)


# ---- transfers -----------------------------------------------------------------------------------------------------


def predicted(path, step, **changes):
    deployment = replace(Deployment(LLAMA, H200, max_model_len=8192, profiles=(str(path),)), **changes)
    step_time = deployment.step_time()
    assert isinstance(step_time, ProfileStepTime)
    return step_time, step_time.predict(step)


def test_a_transfer_to_the_same_thing_changes_nothing(path):
    """By its own way: the shapes of both sides are equal."""
    from planner.profile.shape import ModelShape
    from planner.profile.transfer import Scaling, transferred

    read = load_profile(path)
    fit, limits = read.fitted("bfloat16"), read.tables.limits
    shape = ModelShape.of(LLAMA, BF16, 64)
    assert shape == fit.shape
    same = transferred(fit, Scaling(shape, shape, limits, limits, lambda tokens: 0.0))
    for step in (
        StepShape(decode_contexts=[700] * 30),
        StepShape(prefills=[(300, 0), (40, 900)], decode_contexts=[50] * 9),
        StepShape(prefills=[(2000, 4000)]),
    ):
        assert same.seconds(step) == pytest.approx(fit.seconds(step), rel=1e-6)
        assert same.evidence(step) is Evidence.EXTRAPOLATED


def test_transfers_scale_as_physics_does(path):
    one, long_context, prompt = (
        StepShape(decode_contexts=[100]),
        StepShape(decode_contexts=[8000] * 64),
        StepShape(prefills=[(8192, 0)]),
    )
    plain, decode_s = predicted(path, one)
    keys_s = plain.predict(long_context) - plain.predict(StepShape(decode_contexts=[0] * 64))

    # fp8 KV: half of the bytes of the keys, everything else as it was.
    fp8, fp8_decode_s = predicted(path, one, kv_cache_dtype=KVCacheDtype.FP8)
    fp8_keys_s = fp8.predict(long_context) - fp8.predict(StepShape(decode_contexts=[0] * 64))
    assert fp8_keys_s == pytest.approx(keys_s / 2, rel=0.02)
    assert fp8_decode_s == pytest.approx(decode_s, rel=0.01)

    # A slower GPU: by its bandwidth where bytes decide, hardly at all where FLOPs do (an H100 has the same).
    h100 = load_gpu("h100_sxm")
    slower = H200.memory_bandwidth_bytes_per_s / h100.memory_bandwidth_bytes_per_s
    other, _ = predicted(path, one, gpu=h100)
    other_keys_s = other.predict(long_context) - other.predict(StepShape(decode_contexts=[0] * 64))
    assert other_keys_s == pytest.approx(keys_s * slower, rel=0.02)
    assert other.predict(prompt) == pytest.approx(plain.predict(prompt), rel=0.03)

    # Two ranks: half the work each, and the exchange.
    two, _ = predicted(path, prompt, tensor_parallel_size=2)
    assert plain.predict(prompt) / 2 < two.predict(prompt) < 0.8 * plain.predict(prompt)

    # A smaller model: by its weights, less the launch gaps of its layers.
    small, small_s = predicted(path, one, model=load_model("llama-3.2-1b"))
    assert decode_s * 2.47 / 16.06 * 0.9 < small_s < decode_s * 0.35

    # fp8 weights read half as much.
    eight, eight_s = predicted(path, one, model=load_model("llama-3.1-8b", "fp8"))
    assert 0.5 * decode_s < eight_s < 0.7 * decode_s
    for transferred in (fp8, other, two, small, eight):
        assert transferred.evidence is Evidence.EXTRAPOLATED
        assert transferred.evidence_of(one) is Evidence.EXTRAPOLATED
        assert transferred.uncertainty.decode > plain.uncertainty.decode + 0.01
        assert transferred.uncertainty.prefill > plain.uncertainty.prefill + 0.005
        assert transferred.description.startswith("from the profile of llama-3.1-8b")
        assert transferred.pipeline_depth == 2


def test_the_exchange_of_ranks_is_measured_where_it_was(tmp_path, content):
    step = StepShape(prefills=[(1024, 0)])
    without, _ = predicted(write(tmp_path, content, "a.json"), step, tensor_parallel_size=2)
    for size, seconds in ((8192, 1e-3), (1 << 23, 2e-3)):
        row = {"world_size": 2, "bytes": size, "time_s": seconds, "low_s": seconds, "high_s": seconds, "samples": 9}
        content["allreduce"].append(row)
    slow, _ = predicted(write(tmp_path, content, "b.json"), step, tensor_parallel_size=2)
    # 1,024 tokens are 8 MiB: 64 exchanges of 2 ms.
    assert slow.predict(step) == pytest.approx(without.predict(step) + 64 * 2e-3, rel=0.05)


def test_beyond_measured_sizes_the_data_sheet_goes_on(tmp_path, content):
    """From one size far below those that are asked for, at its distance from the data sheet."""
    step = StepShape(prefills=[(1024, 0)])
    _, sheet_s = predicted(write(tmp_path, content, "a.json"), step, tensor_parallel_size=2)
    link = RooflineStepTime(load_model("llama-3.1-8b"), load_gpu("h200_sxm"), 2)
    row = {"world_size": 2, "bytes": 8192, "time_s": 2 * link.all_reduce_s(1) / 64}
    content["allreduce"].append(row | {"low_s": row["time_s"], "high_s": row["time_s"], "samples": 9})
    _, found_s = predicted(write(tmp_path, content, "b.json"), step, tensor_parallel_size=2)
    assert found_s == pytest.approx(sheet_s + link.all_reduce_s(1024), rel=1e-3)


def test_other_numbers_of_ranks_keep_the_measured_ones_distance_from_the_data_sheet(tmp_path, content):
    step = StepShape(prefills=[(1024, 0)])
    sheet = {n: predicted(write(tmp_path, content, f"{n}.json"), step, tensor_parallel_size=n)[1] for n in (2, 4)}
    gpu, model = load_gpu("h200_sxm"), load_model("llama-3.1-8b")
    link_s = {n: RooflineStepTime(model, gpu, n).all_reduce_s(1024) for n in (2, 4)}
    size, seconds = 1024 * 4096 * 2, 3 * link_s[2] / 64  # three times as slow as the data sheet has it
    row = {"world_size": 2, "bytes": size, "time_s": seconds, "low_s": seconds, "high_s": seconds, "samples": 9}
    content["allreduce"].append(row)
    for ranks in (2, 4):
        _, found_s = predicted(write(tmp_path, content, "slow.json"), step, tensor_parallel_size=ranks)
        assert found_s == pytest.approx(sheet[ranks] + 2 * link_s[ranks], rel=1e-3)
    # An H100 has the same link; a GPU that talks over PCIe has another one, of which nothing is known.
    for other, times in (("h100_sxm", 2.0), ("rtx_pro_6000", 0.0)):
        gpu = load_gpu(other)
        more_s = times * RooflineStepTime(model, gpu, 2).all_reduce_s(1024)
        found_s = predicted(write(tmp_path, content, "slow.json"), step, gpu=gpu, tensor_parallel_size=2)[1]
        plain = content | {"allreduce": []}
        without_s = predicted(write(tmp_path, plain, "plain.json"), step, gpu=gpu, tensor_parallel_size=2)[1]
        assert found_s == pytest.approx(without_s + more_s, rel=1e-3)


def test_what_is_beyond_the_roofline_is_kept(tmp_path):
    """To itself everything stays; to as many layers of half the width, what is beyond the weights' reading does."""
    from dataclasses import replace

    from planner.profile.fit import fit_kv
    from planner.profile.shape import ModelShape
    from planner.profile.tables import ProfileTables
    from planner.profile.transfer import Scaling, transferred

    tables = ProfileTables.from_json(profile(Physics()))
    shape = ModelShape.of(LLAMA, BF16, 64)
    fit = fit_kv(tables.kv["bfloat16"], shape, tables.limits, tables.engine)
    none = lambda tokens: 0.0  # noqa: E731
    same = transferred(fit, Scaling(shape, shape, tables.limits, tables.limits, none))
    assert same.decode.base_s == pytest.approx(fit.decode.base_s)
    assert same.prompt.dense_s == pytest.approx(fit.prompt.dense_s)
    # Half of every weight: at one token nothing else matters to the roofline.
    products = shape.products
    halves = {name: getattr(products, name) / 2 for name in ("layer_bytes", "layer_flops", "head_bytes", "head_flops")}
    half = transferred(
        fit,
        Scaling(
            shape,
            replace(shape, products=replace(products, **halves), hidden_size=shape.hidden_size // 2),
            tables.limits,
            tables.limits,
            none,
        ),
    )
    read_s = (products.layer_bytes + products.head_bytes) / tables.limits.copy_bytes_per_s
    # And products read a little more slowly than a copy does.
    assert fit.decode.base_s[0] - 1.09 * read_s / 2 <= half.decode.base_s[0] <= fit.decode.base_s[0] - read_s / 2
    # At 8,192 tokens nothing but FLOPs does.
    assert half.prompt.dense_s[-1] == pytest.approx(fit.prompt.dense_s[-1] / 2, rel=0.02)


def _made_dense_s(of, limits, tokens: int) -> float:
    """Dense work: once a step, per layer, weight and activation, and beyond the FLOPs' limit by a factor."""
    rates = limits.copy_bytes_per_s, limits.flops_per_s(fp8=False)
    roof_s = of.products.seconds(tokens, 1, *rates)
    bound_by_flops = 1 - (of.products.seconds(tokens, 1, rates[0], math.inf) / roof_s) ** 2
    activations_s = 45 * of.hidden_size * tokens * of.num_layers / rates[0]
    slower_s = 0.09 * (1 - bound_by_flops) * of.products.seconds(1, 1, rates[0], math.inf)
    return 0.2e-3 + 35e-6 * of.num_layers + slower_s + activations_s + roof_s * (1 + 0.2 * bound_by_flops**4)


def _with_made_dense(fit, shape, limits):
    dense_s = tuple(_made_dense_s(shape, limits, size) for size in fit.prompt.sizes)
    return replace(fit, shape=shape, prompt=replace(fit.prompt, dense_s=dense_s))


def test_dense_work_is_taken_apart_into_what_scales_in_its_own_way(path):
    from planner.profile.shape import ModelShape
    from planner.profile.transfer import Scaling, transferred

    read = load_profile(path)
    limits = read.tables.limits
    large, small = ModelShape.of(LLAMA, BF16, 64), ModelShape.of(load_model("llama-3.2-1b"), BF16, 64)
    for source, target in ((large, small), (small, large)):
        fit = _with_made_dense(read.fitted("bfloat16"), source, limits)
        found = transferred(fit, Scaling(source, target, limits, limits, lambda tokens: 0.0)).prompt
        for size, seconds in zip(found.sizes, found.dense_s, strict=True):
            bound_by_one = size <= 64 or size >= 2048  # by weights on both sides, or by FLOPs
            assert seconds == pytest.approx(_made_dense_s(target, limits, size), rel=0.02 if bound_by_one else 0.08)


def test_a_clock_is_transferred_by_the_power_that_steps_draw(path):
    from planner.profile.clock import USUAL_TAU_S, ClockModel
    from planner.profile.shape import ModelShape
    from planner.profile.transfer import Scaling, transferred_clock

    read = load_profile(path)
    limits = read.tables.limits
    large, small = ModelShape.of(LLAMA, BF16, 64), ModelShape.of(load_model("llama-3.2-1b"), BF16, 64)
    fits = {shape: _with_made_dense(read.fitted("bfloat16"), shape, limits) for shape in (large, small)}
    clock = ClockModel(0.01, 0.2, 0.5, (64, 1024), (0.98, 0.9), (1.0, 1.0), decode=1.05)

    def found(source, target) -> ClockModel:
        return transferred_clock(clock, fits[source], Scaling(source, target, limits, limits, lambda tokens: 0.0))

    same = found(large, large)
    assert same.cool == pytest.approx(clock.cool)
    assert same.hot == pytest.approx(clock.hot)
    assert (same.tau_s, same.decode) == (USUAL_TAU_S, 1.05)
    # A small model's steps are made of gaps between kernels and of activations, too, and draw less power.
    to_small, to_large = found(large, small), found(small, large)
    for index in range(2):
        slowed = clock.hot[index] / clock.cool[index]
        assert 1.0 <= to_small.hot[index] / to_small.cool[index] < slowed
        assert slowed < to_large.hot[index] / to_large.cool[index]


def test_models_further_apart_tell_less_of_each_other():
    from planner.profile.transfer import widened
    from planner.step_time import Uncertainty

    known = Uncertainty(0.01, 0.02, host=0.14)
    near, far = (widened(known, ["model"], ratio) for ratio in (1.5, 8.0))
    assert near.decode == pytest.approx((0.01**2 + 0.03**2) ** 0.5)
    assert far.decode == pytest.approx((0.01**2 + 3 * 0.03**2) ** 0.5)
    assert far.host == pytest.approx((0.14**2 + 3 * 0.10**2) ** 0.5)
    assert far == widened(known, ["model"], 1 / 8)
    assert widened(known, ["gpu"], 8.0) == widened(known, ["gpu"])
    assert widened(known, ["gpu"]).host > known.host  # another machine, another CPU
    assert widened(known, ["kv_cache_dtype"]).host == known.host


def test_another_device_of_the_type_is_known_less_well(tmp_path, content):
    content["environment"] = {"device_id": "0a1b2c3d"}
    found = load_profile(write(tmp_path, content))
    same, other, unknown = (found.uncertainty("bfloat16", of) for of in ("0a1b2c3d", "ffffffff", None))
    assert other == unknown == found.step_time("bfloat16").uncertainty
    assert same == found.step_time("bfloat16", device_id="0a1b2c3d").uncertainty
    assert other.decode > same.decode + 0.002 and other.prefill > same.prefill + 0.005
    content["environment"] = {}
    assert load_profile(write(tmp_path, content, "b.json")).uncertainty("bfloat16", None) == other


def test_a_short_service_is_read(tmp_path, content):
    """Of this format only; what is wrong with it is told."""
    clock_of(content)
    before = load_profile(write(tmp_path, content, "a.json"))
    steps = 200
    run = {
        "concurrency": 4,
        "start_s": [0.012 * n for n in range(steps)],
        "gpu_s": [0.012] * steps,
        "host_s": [1e-3] * steps,
        "prefills": [[[500, 0]] if n % 2 else [] for n in range(steps)],
        "decodes": [4] * steps,
        "keys": [32 * 4 * 300] * steps,
        "excess": [0] * steps,
    }
    content["kv"]["bfloat16"]["served"] = [run]
    after = load_profile(write(tmp_path, content, "b.json"))
    step = StepShape(prefills=[(500, 0)], decode_contexts=[299] * 4)

    def took(found):
        step_time = found.step_time("bfloat16")
        return step_time.heated_ticks(step, step_time.ticks(step), 0.3) / 1e15

    assert abs(took(after) - 0.012) < 0.3 * abs(took(before) - 0.012)
    for change, words in (
        (lambda: run["gpu_s"].pop(), "not of one length"),
        (lambda: run["start_s"].__setitem__(9, 0.0), "before the one before it"),
        (lambda: run.update(lead_s=3.0), "its lead of 3 s is longer than all of it"),
        (lambda: run.update(lead_s=-1.0), "lead_s"),
        (lambda: (run["prefills"].__setitem__(2, []), run["decodes"].__setitem__(2, 0)), "neither prompt chunks nor"),
        (lambda: run.update(decodes=[1 << 20] * steps), "decodes"),
        (lambda: run.update({name: each * 150 for name, each in run.items() if name != "concurrency"}), "10,?000"),
        (lambda: run.update(gpu_s=[6.0] * steps), "times what its points say in the median"),
        (lambda: run.update(gpu_s=[1e-6] * steps), "times what its points say in the median"),
    ):
        saved = json.dumps(content)
        change()
        with pytest.raises(UserError, match=words) as refused:
            load_profile(write(tmp_path, content, "c.json")).step_time("bfloat16")
        assert "\n" not in str(refused.value)
        run.clear()
        run.update(json.loads(saved)["kv"]["bfloat16"]["served"][0])
    # Points that are far too fast for the service.
    hastened = copy.deepcopy(content)
    for table in ("prefill", "mixed"):
        for point in points(hastened, table):
            point |= {name: value * 1e-4 for name, value in point.items() if name.endswith("_s")}
    with pytest.raises(UserError, match=r"steps with prompts take .* times what its points say"):
        load_profile(write(tmp_path, hastened, "c.json")).step_time("bfloat16")
    # Points that say that the CPU takes nothing say nothing of how much more it takes in a service.
    for table in ("decode", "prefill", "mixed"):
        for point in points(content, table):
            point["host_s"] = 0.0
    assert load_profile(write(tmp_path, content, "c.json")).step_time("bfloat16").predict(step) > 0.0


@pytest.mark.parametrize(
    ("measured", "other"),
    [
        ("llama-3.1-8b", "llama-3.2-1b"),
        ("llama-3.2-1b", "llama-3.1-8b"),
        ("llama-3.1-8b", "llama-3.1-8b_fp8"),
        ("llama-3.1-8b_fp8", "llama-3.1-8b"),
    ],
)
def test_another_model_is_padded_as_the_engine_pads_it(measured, other):
    """As far as the engine's own profile of it says: it leaves out sizes that a larger one beats."""
    source, target = (
        next(each for each in SHIPPED() if each.name.startswith(f"{name}_h200.json")) for name in (measured, other)
    )
    match = find_profile(target.spec, H200, BF16, 1, (source,))
    step_time = library.step_time_of(match, target.spec, H200, BF16, 1, 64, 256, 8192)
    sizes = step_time.fitted.engine.piece_sizes
    assert set(target.tables.engine.piece_sizes) <= set(sizes)
    assert sizes[-1] == target.tables.engine.piece_sizes[-1]
    assert step_time.fitted.prompt.piece_sizes == step_time.fitted.host.piece_sizes == sizes
    within, beyond = (StepShape(prefills=[(tokens, 0)]) for tokens in (sizes[-1], sizes[-1] + 1))
    assert [step_time.fitted.host.kind(step) for step in (within, beyond)] == ["pieces", "eager"]


def test_windows_are_transferred():
    """gemma-3 has windows of 1,024 tokens in most layers: contexts beyond cost little."""
    from planner.profile.fit import fit_kv
    from planner.profile.shape import ModelShape
    from planner.profile.tables import ProfileTables
    from planner.profile.transfer import Scaling, transferred

    tables = ProfileTables.from_json(profile(Physics()))
    shape = ModelShape.of(LLAMA, BF16, 64)
    fit = fit_kv(tables.kv["bfloat16"], shape, tables.limits, tables.engine)
    target = ModelShape.of(load_model("gemma-3-27b"), BF16, 64)
    gemma = transferred(fit, Scaling(shape, target, tables.limits, tables.limits, lambda tokens: 0.0))
    assert {window for window, _ in target.layers} == {None, 1024}
    at = {c: gemma.seconds(StepShape(decode_contexts=[c] * 8)) for c in (512, 1024, 9216)}
    full = sum(count for window, count in target.layers if window is None)
    rate = 26.6e-9 / 32 * target.kv_bytes / shape.kv_bytes
    assert at[9216] - at[1024] == pytest.approx(8 * 8192 * full * rate, rel=0.05)
    assert at[1024] - at[512] == pytest.approx(8 * 512 * target.num_layers * rate, rel=0.2)
    assert gemma.seconds(StepShape(prefills=[(2048, 30_000)])) > 0


# ---- the command line ----------------------------------------------------------------------------------------------

LOAD = ("--request-rate", 4, "--num-prompts", 40, "--isl", 512, "--osl", 64, "--max-model-len", 8192)


def test_simulate_with_a_profile(memwall, path):
    outcome = memwall("simulate", *LOAD, "--profile", path, "--output", "json")
    result = json.loads(outcome.out)["result"]
    assert result["evidence"] == "interpolated"
    assert sum(result["evidence_shares"].values()) == pytest.approx(1)
    assert "NVIDIA H200" in result["step_time"]
    text = memwall("simulate", *LOAD, "--profile", path).out
    assert "profile of llama-3.1-8b on NVIDIA H200" in text
    assert "uncalibrated" not in text


def test_simulate_without_one(memwall):
    result = json.loads(memwall("simulate", *LOAD, "--profile", "none", "--output", "json").out)["result"]
    assert result["evidence"] == "uncalibrated"
    assert result["evidence_shares"] == {"uncalibrated": 1.0}


def test_a_transfer_is_told(memwall, path):
    text = memwall("simulate", *LOAD, "--profile", path, "--kv-cache-dtype", "fp8").out
    assert text.startswith("step times: transferred: from the profile of")
    assert "transferred from another KV format" in " ".join(text.split())


def test_plan_with_a_profile(memwall, path):
    flags = ("--profile", path, "--max-num-seqs", 64, "-tp", 1, "--total-gpus", 2, "--finalists", 0, "-j", 1)
    report = json.loads(memwall("plan", *LOAD, *flags, "--output", "json").out)
    assert report["evidence"] == "extrapolated"  # fp8 KV was not measured
    by_dtype = {plan["deployment"]["kv_cache_dtype"]: plan["result"]["evidence"] for plan in report["plans"]}
    assert by_dtype == {"bfloat16": "interpolated", "fp8": "extrapolated"}


def test_bad_profiles_on_the_command_line(memwall, tmp_path, content):
    content["version"] = 7
    for command in ("simulate", "plan"):
        memwall(command, "--profile", write(tmp_path, content)).check_bad_input("version 7")
        memwall(command, "--profile", tmp_path / "none.json").check_bad_input("cannot read")
