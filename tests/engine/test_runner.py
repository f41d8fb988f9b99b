"""What the runner does that whole texts would not show: packing, transfers, slots, and graphs without a GPU."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import FAMILIES, VOCAB_SIZE
from running import LogitsLog, Models, engine, prompts, reference_logits, request, run

from engine import pieces
from engine import runner as engine_runner
from engine.core import EngineCore
from engine.models.modules import Linear
from engine.padding import graph_sizes
from engine.runner import _pack
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.scheduling import Step
from engine.slots import Slots
from engine.transfer import DEPTH, PendingTokens, Upload

CPU = torch.device("cpu")


# ---- sizes of graphs -----------------------------------------------------------------------------------------------


@given(st.integers(1, 1100))
def test_graph_sizes(max_num_seqs):
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for number in range(1, max_num_seqs + 1):
        padded = min(size for size in sizes if size >= number)
        assert padded <= 2 * number
        assert padded - number < 8


# ---- packing -------------------------------------------------------------------------------------------------------


@st.composite
def steps(draw) -> Step:
    """Decodes and prompt chunks of any lengths, with two KV groups and pages of 4 tokens; every number tells whose."""
    step = Step(0)
    for index in range(draw(st.integers(0, 4)) + (draw(st.integers(0, 3)) << 8)):
        is_decode = index < 256
        if not is_decode and index >> 8 == 0:
            continue
        number = index % 256
        context = draw(st.integers(0, 30))
        query = 1 if is_decode else draw(st.integers(1, 30))
        if not is_decode and number > 3:
            break
        pages = -(-(context + query) // 4) + draw(st.integers(0, 1))
        sequence = SimpleNamespace(
            slot=50 * (not is_decode) + number,
            token_ids=[1000 * number + position for position in range(context + query)],
            block_tables=[[10_000 * group + 100 * number + page + 1 for page in range(pages)] for group in range(2)],
            num_prefill_tokens=context + query + draw(st.integers(0, 1)),
        )
        if is_decode:
            step.decode_requests.append(sequence)
            step.shape.decode_contexts.append(context)
        else:
            step.prefill_requests.append(sequence)
            step.shape.prefills.append((query, context))
    return step


@given(steps())
def test_pack(step):
    """Against what each sequence says, one by one."""
    packed = _pack(step, 4, 2)
    decodes, prefills = step.decode_requests, step.prefill_requests
    queries = [1] * len(decodes) + [query for query, _ in step.shape.prefills]
    contexts = step.shape.decode_contexts + [context for _, context in step.shape.prefills]
    assert packed.slots.tolist() == [each.slot for each in decodes + prefills]
    assert packed.seq_lens.tolist() == [query + context for query, context in zip(queries, contexts, strict=True)]
    assert packed.query_start.tolist() == [sum(queries[:i]) for i in range(len(queries) + 1)]
    assert packed.decode_pages.shape == (2, len(decodes))
    for i, each in enumerate(decodes):
        for group in range(2):
            assert packed.decode_pages[group, i] == each.block_tables[group][contexts[i] // 4]
    longest = max((len(each.block_tables[0]) for each in prefills), default=0)
    assert packed.prefill_pages.shape == (2, len(prefills), longest)
    for i, each in enumerate(prefills):
        for group in range(2):
            table = each.block_tables[group]
            assert packed.prefill_pages[group, i].tolist() == table + [0] * (longest - len(table))
    chunks = zip(prefills, step.shape.prefills, strict=True)
    assert packed.token_ids.tolist() == [token for each, (q, c) in chunks for token in each.token_ids[c : c + q]]
    assert packed.prefill_start.tolist() == [
        sum(queries[len(decodes) : len(decodes) + i]) for i in range(len(prefills) + 1)
    ]
    assert packed.prefill_contexts.tolist() == contexts[len(decodes) :]
    sampled = list(range(len(decodes)))
    for i, each in enumerate(prefills):
        if queries[len(decodes) + i] + contexts[len(decodes) + i] == each.num_prefill_tokens:
            sampled.append(len(decodes) + i)
    assert packed.sampled_seqs.tolist() == sampled
    assert packed.sampled_rows.tolist() == [sum(queries[: seq + 1]) - 1 for seq in sampled]
    assert packed.decode_columns == max((context // 4 + 1 for context in step.shape.decode_contexts), default=0)


# ---- transfers -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2000)), max_size=4), min_size=1, max_size=9))
def test_upload_keeps_values_and_shapes(sends):
    """Of every array of every send, although the host's buffers go round and grow."""
    upload, count, kept = Upload(CPU), 0, []
    for shapes in sends:
        arrays = []
        for shape in shapes:
            arrays.append(np.arange(count, count + shape[0] * shape[1], dtype=np.int32).reshape(shape))
            count += arrays[-1].size
        kept.append((arrays, upload.send(arrays)))
    for arrays, views in kept:
        for array, view in zip(arrays, views, strict=True):
            assert view.dtype == torch.int32
            assert view.shape == array.shape
            assert np.array_equal(view.numpy(), array)
            # Triton compiles a kernel anew for a pointer of another alignment.
            assert view.storage_offset() % 4 == 0


def test_upload_into_a_tensor_leaves_the_rest_of_it():
    out = torch.full((11,), -1, dtype=torch.int32)
    (view,) = Upload(CPU).send([np.arange(8, dtype=np.int32)], out=out)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1]
    assert view.data_ptr() == out.data_ptr()


def test_a_host_buffer_comes_round_after_two_steps_of_two_sends():
    """A step sends twice at most, and two steps are in flight: their buffers must be different ones."""
    upload = Upload(CPU)
    buffers = [upload._host(10).data_ptr() for _ in range(3 * DEPTH)]
    for i in range(len(buffers) - 3):
        assert len(set(buffers[i : i + 4])) == 4


def test_pending_logprobs():
    assert PendingTokens(torch.tensor([5])).logprobs() is None
    packed = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert PendingTokens(torch.tensor([5, 6]), None, packed).logprobs().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pending_tokens_on_the_cpu():
    pending = PendingTokens(torch.tensor([5, 7, 2**40]))
    assert pending.tokens() == [5, 7, 2**40]
    assert pending.gpu_s() is None


# ---- slots ---------------------------------------------------------------------------------------------------------


def test_slots_are_given_once_and_taken_back_once():
    slots = Slots(3, 1, 4, CPU)
    sequences = [SimpleNamespace(slot=-1) for _ in range(4)]
    for sequence in sequences[:3]:
        slots.assign(sequence)
    assert sorted(sequence.slot for sequence in sequences[:3]) == [0, 1, 2]
    assert slots.num_free == 0
    freed = sequences[1].slot
    slots.release(sequences[1])
    slots.release(sequences[1])
    assert (slots.num_free, sequences[1].slot) == (1, -1)
    slots.assign(sequences[3])
    assert sequences[3].slot == freed


def test_parameters_reach_their_slots():
    slots = Slots(4, 1, 4, CPU)
    chosen = [
        (SamplingParams(temperature=0.3, top_p=0.9, min_p=0.125, top_k=17), 2**63 - 1),
        (SamplingParams(temperature=0, top_k=-1), 0),
        (SamplingParams(temperature=2.0), 2**31 + 5),
    ]
    sequences = [SimpleNamespace(params=params, seed=seed) for params, seed in chosen]
    slots.set_parameters(torch.tensor([3, 0, 1]), torch.from_numpy(Slots.parameters(sequences)))
    rows = [3, 0, 1]
    assert slots.temperature[rows].tolist() == pytest.approx([0.3, 0, 2.0])
    assert slots.top_p[rows].tolist() == pytest.approx([0.9, 1, 1])
    assert slots.min_p[rows].tolist() == [0.125, 0, 0]
    assert slots.top_k[rows].tolist() == [17, 0, 0]
    assert slots.seeds[rows].tolist() == [2**63 - 1, 0, 2**31 + 5]
    # Nobody else's.
    assert slots.seeds[[2, 4]].tolist() == [0, 0]
    assert slots.top_p[[2, 4]].tolist() == [1, 1]


# ---- graphs --------------------------------------------------------------------------------------------------------


class Replayed:
    """In place of a CUDA graph: replaying it runs what was captured once more, into the same tensors."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, decode: Callable[[], tuple[torch.Tensor, ...]], outputs: tuple[torch.Tensor, ...]) -> None:
        self._decode, self._outputs = decode, outputs

    def replay(self) -> None:
        self.num_replays += 1
        for kept, new in zip(self._outputs, self._decode(), strict=True):
            kept.copy_(new)


def capture_on_cpu(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, num_tokens: Iterable[int] = ()
) -> dict[int, Replayed]:
    """`ModelRunner.capture` as on a GPU, with `Replayed` for graphs."""
    runner = core._runner
    decode, capturing = runner._decode, []

    def recording_decode(inputs: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        outputs = decode(inputs, size)
        if capturing:
            capturing[-1].record(lambda: decode(inputs, size), outputs)
        return outputs

    @contextmanager
    def capture(graph: Replayed, **_: object) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_decode", recording_decode)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "CUDAGraph", Replayed)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        runner.capture(graph_sizes(core.config.max_num_seqs), list(num_tokens))
    for graph in runner.graphs.values():
        graph.graph.num_replays = 0  # each was replayed once on padding
    # A GPU copies a graph's tokens to the host before the graph runs again.
    replay = runner._replay

    def copying_replay(*arguments: object) -> PendingTokens:
        pending = replay(*arguments)
        pending._host = pending._host.clone()
        return pending

    runner._replay = copying_replay
    return {size: graph.graph for size, graph in runner.graphs.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "int4"}], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES[:3], "gemma2"])
def test_padded_decodes_are_those_without_padding(family, settings, models, monkeypatch):
    """Texts of different lengths, so that every size of graph is used, full and not; greedy, sampled, and filtered."""
    folder, model = models(family)
    results = []
    for has_graphs in (True, False):
        with engine(folder, max_num_seqs=7, enable_prefix_caching=False, **settings) as core:
            graphs = capture_on_cpu(core, monkeypatch) if has_graphs else {}
            log = LogitsLog(core)
            core.step_log = []
            requests = [
                request(core, i, prompt, max_tokens=4 + 5 * i, temperature=i % 2, top_k=5 * (i == 5))
                for i, prompt in enumerate(prompts((1, 31, 32, 33, 90, 60, 61)))
            ]
            run(core, requests)
            used = [record.graph_size for record in core.step_log if record.graph_size]
            assert set(used) == set(graphs)
            assert sum(each.num_replays for each in graphs.values()) == len(used)
            results.append([each.output_token_ids for each in requests])
            if not settings:
                for each in requests:
                    assert float((log.rows(each) - reference_logits(model, each)).abs().max()) < 1e-4
    assert results[0] == results[1]


def test_graphs_are_followed_by_what_requests_ask_of_their_logits(models, monkeypatch):
    """Penalties, bias, min_tokens and log-probabilities in graphs of every size, beside requests that ask nothing."""
    folder, _ = models("llama")
    asked = [
        {},
        {"frequency_penalty": 0.9, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "presence_penalty": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "logprobs": 5},
        {"logit_bias": {7: 9.0}, "min_tokens": 9, "stop_token_ids": [7]},
        {"temperature": 1.0},
    ]
    results = []
    for has_graphs in (True, False):
        with engine(folder, max_num_seqs=7, enable_prefix_caching=False) as core:
            graphs = capture_on_cpu(core, monkeypatch) if has_graphs else {}
            requests = [
                request(core, i, prompt, max_tokens=12 + 3 * i, **asked[i])
                for i, prompt in enumerate(prompts((1, 31, 32, 33, 90, 60, 61)))
            ]
            updates = run(core, requests)
            assert all(each.num_replays for each in graphs.values())
            found = [(each.sequence.request_id, each.new_token_ids, each.logprobs) for each in updates]
            results.append(sorted(found, key=lambda each: each[0]))
    assert len(requests[5].output_token_ids) == 10  # the biased token as soon as it may be
    for with_graphs, without in zip(*results, strict=True):
        assert with_graphs[:2] == without[:2]
        assert (with_graphs[2] is None) == (without[2] is None)
        for one, other in zip(with_graphs[2] or (), without[2] or (), strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_a_dummy_step_samples_as_if_everything_were_asked_for(num_samples, models, monkeypatch):
    """What that takes is measured before the KV cache gets the rest; no request's counts are touched."""
    folder, _ = models("llama")
    with engine(folder, max_num_seqs=8) as core:
        runner, rows, packed = core._runner, [], []
        adjusted, pending = runner._processor.adjusted, engine_runner.token_logprobs
        monkeypatch.setattr(runner._processor, "adjusted", lambda *given: rows.append(adjusted(*given)) or rows[-1])
        monkeypatch.setattr(
            engine_runner, "token_logprobs", lambda *given: packed.append(pending(*given)) or packed[-1]
        )
        runner.run_dummy([(5, 0)], num_samples=num_samples)
        assert [row.shape for row in rows] == [(num_samples, VOCAB_SIZE)]
        assert [row.shape for row in packed] == [(num_samples, 2 + 2 * MAX_LOGPROBS)]
        assert runner._processor.counts[-1].any() and not runner._processor.counts[:-1].any()


class Rerun:
    """Stands for a CUDA graph of one of the decoder's pieces: runs it again where a graph would be replayed."""

    num_replays = 0

    def __init__(self, run: Callable[[], None], pool: object) -> None:
        self._run = run

    def replay(self) -> None:
        Rerun.num_replays += 1
        self._run()


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int4"}, {"quantization": "fp8"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_pieces_are_those_launched(family, settings, models, monkeypatch):
    """Padded, in buffers that were full of NaN: the same texts, of chunks alone and of chunks beside decodes."""
    monkeypatch.setattr(pieces, "_captured", Rerun)
    results = []
    for sizes in ((), (16, 48)):
        with engine(models(family)[0], max_num_seqs=4, max_num_batched_tokens=64, **settings) as core:
            Rerun.num_replays = 0
            if sizes:
                groups = core._runner._num_groups
                captured = core._runner._pieces = pieces.capture_pieces(core._runner.decoder, sizes, groups, None)
                assert [each.size for each in captured] == list(sizes)
                for buffer in (captured[-1]._qkv, captured[-1]._hidden, captured[-1]._attended):
                    buffer.fill_(torch.nan)
                captured[-1].places.positions.fill_(3)
                for slots in captured[-1].places.slots:  # somebody's page, which padding must not be written to
                    slots.fill_(core.config.block_size)
                by_place = settings.get("kv_cache_dtype") != "int4"
                assert captured[0].written == (set(range(core.model_config.num_layers)) if by_place else set())
            requests = [
                request(core, i, prompt, max_tokens=6, temperature=i % 2)
                for i, prompt in enumerate(prompts((1, 15, 16, 17, 47, 90)))
            ]
            run(core, requests)
            assert bool(Rerun.num_replays) == bool(sizes)
            results.append([each.output_token_ids for each in requests])
    assert results[0] == results[1]


@given(st.lists(st.floats(1e-4, 1e-1), min_size=1, max_size=12))
def test_a_size_that_a_larger_one_beats_is_not_used(seconds):
    made = [SimpleNamespace(size=16 * (index + 1), seconds=taken) for index, taken in enumerate(seconds)]
    kept = pieces.without_slower(made, lambda captured: [each.seconds for each in captured])
    assert kept == sorted(kept, key=lambda each: each.size)
    assert kept[-1] is made[-1]
    for each in made:
        used = next(other for other in kept if other.size >= each.size)
        assert used.seconds <= each.seconds  # nothing gets slower
        larger = [other.seconds for other in made if other.size > each.size]
        assert (used is each) == all(taken > 0.98 * each.seconds for taken in larger)


def test_noise_drops_no_size():
    """Of times that grow, and of small sizes that all take as long as reading the weights."""
    draw = random.Random(0)
    for _ in range(100):
        times = [max(5e-3, 2e-5 * size) * draw.uniform(0.995, 1.005) for size in (16, 32, 64, 128, 256, 512)]
        made = [SimpleNamespace(size=index) for index in range(len(times))]
        assert pieces.without_slower(made, lambda captured, times=times: times) == made


def test_an_engine_tells_which_sizes_it_uses(models, monkeypatch):
    """Of four captured ones: steps of 17 to 32 tokens run in 48."""
    seconds = {16: 1.0, 32: 2.0, 48: 1.5, 64: 3.0}
    monkeypatch.setattr(pieces, "_captured", Rerun)
    monkeypatch.setattr(pieces, "seconds_on_gpu", lambda captured: [seconds[each.size] for each in captured])
    with engine(models("llama")[0], max_num_seqs=4, max_num_batched_tokens=64) as core:
        capture_on_cpu(core, monkeypatch, seconds)
        assert core.piece_sizes == [16, 48, 64]
        used = [core._runner._pieces_for(count).size for count in (1, 16, 17, 32, 48, 49, 64)]
        assert used == [16, 16, 48, 48, 48, 64, 64]
        assert core._runner._pieces_for(65) is None
        run(core, [request(core, 0, prompts((30,))[0], max_tokens=3)])


@given(st.integers(1, 9000), st.integers(1, 14), st.booleans())
def test_piece_sizes(most, log_size, fp8):
    side = 2**log_size
    scale = torch.ones(1) if fp8 else None
    matrix = Linear(torch.empty(side, side, device="meta"), scale)
    layer = SimpleNamespace(qkv=matrix, output=matrix, gate_up=matrix, down=matrix)
    sizes = pieces.piece_sizes(SimpleNamespace(layers=[layer]), most)
    assert sizes == sorted(set(sizes))
    assert all(size <= most for size in sizes)
    assert most < 1024 or sizes[-1] >= 1024
    assert all(after - before <= max(before, 16) for before, after in itertools.pairwise(sizes))


def test_large_models_need_pieces_for_small_steps_only():
    """Llama-3.1-8B computes 1,024 tokens for longer than the host launches; Qwen3-0.6B does not even 8,192."""

    def weights(hidden, qkv, intermediate):
        shapes = {"qkv": (qkv, hidden), "output": (hidden, hidden), "gate_up": (2 * intermediate, hidden)}
        shapes["down"] = (hidden, intermediate)
        layer = {name: Linear(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
        return SimpleNamespace(layers=[SimpleNamespace(**layer)])

    assert pieces.piece_sizes(weights(4096, 6144, 14336), 8192)[-1] == 1024
    assert pieces.piece_sizes(weights(1024, 4096, 3072), 8192)[-1] == 8192
