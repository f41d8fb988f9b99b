"""From a plan to a launch command."""

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from planner import cli
from planner.basis import Basis
from planner.catalog import load_gpu, load_model
from planner.deployment import Deployment
from planner.errors import UserError
from planner.export import export_plan, length_remark, vllm_flags
from planner.memory import KVCacheDtype
from planner.plan_report import Loads, Plan
from planner.records import DeploymentRecord
from planner.simulation import AcceptanceProcess
from planner.speculation import SpeculationConfig
from planner.step_time import Evidence

# Names that `vllm serve` 0.33.0 accepts, as far as we use them; boolean flags also as --no-….
VLLM_FLAGS = {
    "--block-size",
    "--disable-hybrid-kv-cache-manager",
    "--enable-chunked-prefill",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--num-gpu-blocks-override",
    "--quantization",
    "--speculative-config",
    "--tensor-parallel-size",
}
VLLM_KV_DTYPES = {"auto", "fp8", "int4_per_token_head", "int8_per_token_head"}
VLLM_SPECULATIVE_KEYS = {"method", "model", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"}

NGRAM = SpeculationConfig("ngram", 3, AcceptanceProcess((0.8, 0.7, 0.6)))
DRAFT = SpeculationConfig("draft_model", 2, AcceptanceProcess((0.8, 0.7)), load_model("llama-3.2-1b"), "llama-3.2-1b")
PLAIN = Deployment(load_model("llama-3.1-70b"), load_gpu("h100_sxm"), 4, 2, max_model_len=16384)
VARIANTS = {
    "plain": PLAIN,
    "fp8": replace(PLAIN, kv_cache_dtype=KVCacheDtype.FP8, enable_prefix_caching=True),
    "int8": replace(PLAIN, kv_cache_dtype=KVCacheDtype.INT8, enforce_eager=True),
    "int4": replace(PLAIN, kv_cache_dtype=KVCacheDtype.INT4, num_gpu_blocks_override=999),
    "unified": replace(PLAIN, kv_cache_policy="unified", enable_chunked_prefill=False),
    "ngram": replace(PLAIN, speculation=NGRAM),
    "draft": replace(PLAIN, speculation=DRAFT),
}


def exported(
    deployment: Deployment,
    quantization: str | None = None,
    rank: int = 1,
    evidence=Evidence.UNCALIBRATED,
    basis=Basis.UNCALIBRATED,
    loads: Loads | None = None,
):
    record = DeploymentRecord.from_deployment(deployment, quantization)
    rest = {"loads": loads, "step_times": SimpleNamespace(basis=basis)}
    result = SimpleNamespace(evidence=evidence, step_time="profile of this, transferred from that")
    return export_plan(Plan.model_construct(rank=rank, deployment=record, result=result, **rest), "vllm")


def words_of(script: str) -> list[str]:
    """The arguments that a shell gives to vllm."""
    shell = f"vllm() {{ printf '%s\\n' \"$@\"; }}\n{script}"
    return subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()


def parsed(script: str) -> tuple[list[str], dict[str, str | None]]:
    """The words before the first flag, and flags with their values."""
    words = words_of(script)
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    flags: dict[str, str | None] = {}
    for word in words[first:]:
        if word.startswith("--"):
            flags[name := word] = None
        else:
            flags[name] = word
    return words[:first], flags


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_flags_that_vllm_knows(variant):
    head, flags = parsed(exported(VARIANTS[variant], quantization="fp8"))
    assert head == ["serve", "meta-llama/Llama-3.1-70B"]
    assert {name.replace("--no-enable", "--enable") for name in flags} <= VLLM_FLAGS
    assert flags["--kv-cache-dtype"] in VLLM_KV_DTYPES
    assert flags["--quantization"] == "fp8"
    speculation = json.loads(flags.get("--speculative-config", "{}"))
    assert set(speculation) <= VLLM_SPECULATIVE_KEYS


def test_values():
    _, flags = parsed(exported(PLAIN))
    assert flags == {
        "--tensor-parallel-size": "4",
        "--max-model-len": "16384",
        "--gpu-memory-utilization": "0.92",
        "--kv-cache-dtype": "auto",
        "--block-size": "16",
        "--max-num-seqs": "256",
        "--max-num-batched-tokens": "8192",
        "--no-enable-prefix-caching": None,
        "--enable-chunked-prefill": None,
    }
    _, flags = parsed(exported(VARIANTS["fp8"]))
    assert flags["--kv-cache-dtype"] == "fp8"
    assert "--enable-prefix-caching" in flags
    _, flags = parsed(exported(VARIANTS["int8"]))
    assert flags["--kv-cache-dtype"] == "int8_per_token_head"
    assert "--enforce-eager" in flags
    _, flags = parsed(exported(VARIANTS["int4"]))
    assert (flags["--kv-cache-dtype"], flags["--block-size"]) == ("int4_per_token_head", "64")
    assert flags["--num-gpu-blocks-override"] == "999"
    _, flags = parsed(exported(VARIANTS["unified"]))
    assert {"--disable-hybrid-kv-cache-manager", "--no-enable-chunked-prefill"} <= set(flags)


def test_speculative_config():
    _, flags = parsed(exported(VARIANTS["ngram"]))
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
    assert json.loads(flags["--speculative-config"]) == ngram
    _, flags = parsed(exported(VARIANTS["draft"]))
    draft = {"method": "draft_model", "model": "meta-llama/Llama-3.2-1B", "num_speculative_tokens": 2}
    assert json.loads(flags["--speculative-config"]) == draft


def test_two_bit_kv_has_no_export():
    record = DeploymentRecord.from_deployment(replace(PLAIN, kv_cache_dtype=KVCacheDtype.INT2))
    with pytest.raises(UserError, match="no int2 KV cache"):
        vllm_flags(record)


def test_remarks():
    script = exported(PLAIN, rank=3)
    assert script.startswith("#!/bin/sh\n# Rank 3 of a memwall plan: llama-3.1-70b")
    for words in ("2 replicas, each on 4 x h100_sxm", "run this 2 times", "Uncalibrated"):
        assert words in script
    single = exported(replace(PLAIN, replicas=1), evidence=Evidence.MEASURED)
    assert "One replica on 4 x h100_sxm" in single
    assert "ncalibrated" not in single
    assert "Not sure" not in script and "Transferred" not in script
    unsure = comment(exported(PLAIN, basis=Basis.TRANSFERRED, loads=Loads(met=7, of=16)))
    assert "Not sure: it met the SLO in 7 of 16 simulations of such loads." in unsure
    assert "Transferred: the plan's step times are of a profile of this, transferred from that." in unsure
    assert "Not sure" not in exported(PLAIN, loads=Loads(met=16, of=16))


def comment(script: str) -> str:
    """The remarks as one text."""
    return " ".join(line.removeprefix("# ") for line in script.splitlines() if line.startswith("# "))


def test_remarks_on_the_length_and_the_weights():
    said = comment(exported(PLAIN))
    assert "--max-model-len 16384 is what was planned for" in said
    assert "Longer requests are refused; the model takes up to 131072 tokens, if the KV cache holds them." in said
    assert "meta-llama/Llama-3.1-70B can be replaced by any fine-tune of the same shape, e.g. an -Instruct" in said
    whole = comment(exported(replace(PLAIN, max_model_len=131072)))
    assert "Longer requests are refused." in whole
    before = DeploymentRecord.from_deployment(PLAIN).model_copy(update={"max_position_embeddings": None})
    assert "refused." in length_remark(before)
    own = replace(PLAIN, model=replace(PLAIN.model, hf_repo=None))
    assert "Instruct" not in comment(exported(own))
    assert all(len(line) <= 102 for line in exported(PLAIN).splitlines())


def test_the_script_is_one_shell_command():
    own = replace(PLAIN, model=replace(PLAIN.model, hf_repo=None, name="my model; rm -rf $HOME"), speculation=NGRAM)
    script = exported(own)
    assert "replace the model's name" in script
    words = words_of(script)
    assert words[:2] == ["serve", "my model; rm -rf $HOME"]
    assert json.loads(words[words.index("--speculative-config") + 1])["method"] == "ngram"


def test_record_fills_in_defaults():
    record = DeploymentRecord.from_deployment(Deployment(load_model("llama-3.1-8b"), load_gpu("h200_sxm")))
    assert (record.max_model_len, record.block_size, record.kv_cache_dtype) == (
        131072,
        64,
        "bfloat16",
    )
    assert (record.num_speculative_tokens, record.speculative_method, record.draft_model) == (0, None, None)
    assert DeploymentRecord.model_validate_json(record.model_dump_json()) == record


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory, commands):
    """What `memwall plan` writes: two engines, each on one to two GPUs."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    load = "--request-rate 4 --num-prompts 20 --isl 64 --osl 4"
    space = "--total-gpus 2 -tp 1,2 --kv-cache-dtype auto --max-num-seqs 64 --finalists 0 --jobs 1"
    assert cli.run(["plan", *load.split(), *space.split(), "--output-file", str(file)], commands) == 0
    return file


def test_export_of_a_plan(memwall, plan_file, tmp_path):
    best = memwall("export", plan_file, "--target", "vllm")
    assert best.code == 0
    head, flags = parsed(best.out)
    assert head == ["serve", "meta-llama/Llama-3.1-8B"]
    assert flags["--tensor-parallel-size"] == "1"
    second = memwall("export", plan_file, "--rank", 2, "--output-file", tmp_path / "launch.sh")
    assert parsed(second.out)[1]["--tensor-parallel-size"] == "2"
    assert (tmp_path / "launch.sh").read_text() == second.out


def test_bad_export(memwall, plan_file, tmp_path):
    text = plan_file.read_text()
    report = json.loads(text)

    def outcome(content: str | bytes, *flags):
        (tmp_path / "plan.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return memwall("export", tmp_path / "plan.json", *flags)

    memwall("export", tmp_path / "none.json").check_bad_input("no such file", "memwall plan")
    memwall("export", tmp_path).check_bad_input("cannot be read")
    outcome(text, "--target", "vlm").check_bad_input("unknown export target 'vlm'", "vllm")
    for rank in (0, -1, len(report["plans"]) + 1):
        outcome(text, "--rank", rank).check_bad_input(f"--rank is {rank}", f"1 to {len(report['plans'])}")
    for content in ("", text[: len(text) // 2], "not JSON", "[]", "{}", '{"plans": 3}', b"\xff\xfe\x00"):
        outcome(content).check_bad_input("plan.json")
    del report["plans"][0]["deployment"]["block_size"]
    outcome(json.dumps(report)).check_bad_input("plans.0.deployment.block_size")
    outcome(json.dumps(json.loads(text) | {"plans": []})).check_bad_input("no plan in it is feasible")
