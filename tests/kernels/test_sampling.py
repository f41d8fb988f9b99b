"""Sampling and speculative verification: random numbers, thresholds, distributions, and the reference's very tokens.

Distributions are tested with 200,000 draws on a GPU. In the interpreter a row takes 30 ms: there the kernels draw a
hundred, must agree with the reference token by token, and the reference draws the many.
"""

import re

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from kernels import sampling
from kernels.aot import Compiled
from kernels.interpreting import INTERPRETING
from kernels.reference import sampling as reference

# The interpreter's own, of a loop's bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

DRAWS = 250 if INTERPRETING else 200_000
VERIFY_DRAWS = 150 if INTERPRETING else 200_000
REFERENCE_DRAWS = 50_000

# A correct sampler fails a test at this level once in ten thousand seeds, and the seeds are fixed.
SIGNIFICANCE = 1e-4


def assert_drawn_from(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square test of tokens against the exact distribution they should follow."""
    counts = torch.bincount(tokens.cpu(), minlength=len(probs)).double()
    probs = probs.double().cpu()
    assert not counts[probs == 0].any()
    # Cells that expect fewer than 5 are pooled, as the test asks.
    expected = probs / probs.sum() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    cells = expected > 0
    assert cells.sum() > 1, "too few draws to say anything"
    assert chisquare(observed[cells].numpy(), expected[cells].numpy()).pvalue > SIGNIFICANCE


def keys(num_rows: int, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arbitrary seeds and positions, both beyond 32 bits and the seeds of either sign."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**40, (num_rows,), generator=generator)
    return {"seeds": seeds.to(device), "positions": positions.to(device)}


# ---- random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers published with the generator (Random123, kat_vectors).
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    words_out = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words_out) == words


@triton.jit
def bits_kernel(seeds_ptr, positions_ptr, bits_ptr, size: tl.constexpr):
    row = tl.program_id(0)
    indices = tl.arange(0, size)
    bits = sampling._random_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), indices, 2, 1)
    tl.store(bits_ptr + row * size + indices, bits.to(tl.int64))


def test_random_bits_are_the_references(device):
    row_keys = keys(6, device)
    bits = torch.empty(6, 64, dtype=torch.int64, device=device)
    bits_kernel[(6,)](row_keys["seeds"], row_keys["positions"], bits, size=64)
    seeds, positions = row_keys["seeds"][:, None], row_keys["positions"][:, None]
    indices = torch.arange(64, device=device)[None]
    assert torch.equal(bits, reference.random_bits(seeds, positions, indices, 2, 1))


@triton.jit
def exponential_kernel(bits_ptr, out_ptr, size: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(out_ptr + i, sampling._exponential(tl.load(bits_ptr + i).to(tl.uint32)))


def test_exponentials_are_exact_where_races_are_won(device):
    bits = torch.cat(
        [torch.arange(16), 2 ** torch.arange(32), torch.randint(0, 2**32, (200,)), 2**26 + torch.arange(8)]
    )
    bits = bits.to(device)
    out = torch.empty(256, device=device)
    exponential_kernel[(1,)](bits, out, size=256)
    exact = reference.exponentials(bits)
    assert ((out.double() - exact).abs() <= 3e-5 * exact).all()
    small = exact < 1 / 64
    assert ((out.double() - exact).abs() <= 3e-7 * exact)[small].all()


def test_uniforms_times_q_stay_below_q():
    """The largest u must not round u·q up to q, or equal probabilities would reject."""
    u = reference.uniforms(torch.tensor(2**32 - 1)).float()
    q = torch.cat([torch.rand(100_000), torch.tensor([1.0, 1.5, 2**-126])])
    assert (u * q < q).all()


# ---- distributions -------------------------------------------------------------------------------------------------

parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 40, 10_000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.013, 0.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.0625, 0.7, 1.0]),
    }
)


def batch_of(rows: list[dict[str, float]], device: torch.device) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}
    return {name: value.to(torch.int32 if name == "top_k" else torch.float32) for name, value in batch.items()}


def assert_same_distribution(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The kernel's probabilities against the reference's, whose top_p may move by float32's rounding of the mass."""
    probs = sampling.processed_probs(logits, **batch)
    assert probs.dtype == torch.float32
    candidates = []
    for change in (0.0, -2e-6, 2e-6):
        top_p = batch["top_p"].double()
        moved = torch.where(top_p < 1, (top_p + change).clamp(0, 1 - 1e-7), 1.0)
        candidates.append(reference.processed_probs(logits, **batch | {"top_p": moved}))
    errors = torch.stack([(probs - exact).abs().amax(1) for exact in candidates])
    assert (errors.amin(0) < 3e-6).all()
    # What float32 cannot tell from 0 may be in or out.
    support = torch.stack([(((probs > 0) == (exact > 0)) | (exact < 1e-30)).all(1) for exact in candidates])
    assert support.any(0).all()
    return candidates[0]


# A row takes a tenth of a second in the interpreter: shrinking would take minutes.
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    rows=st.lists(parameters, min_size=1, max_size=4),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([160, 1111])),
    gap=st.sampled_from([0, 3]),
    spread=st.sampled_from([0.1, 2.0, 12.0]),
    step=st.sampled_from([0.0, 0.0, 0.5]),
    num_masked=st.integers(0, 9),
    seed=st.integers(0, 2**30),
)
def test_probs_follow_the_sort_based_reference(rows, vocab, gap, spread, step, num_masked, seed, device):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(rows), vocab + gap, generator=generator)
    if step:  # ties, at every threshold
        logits = (logits / step).round() * step
    logits[:, torch.randint(0, vocab, (num_masked,), generator=generator)] = -torch.inf
    logits[:, int(torch.randint(0, vocab, (1,), generator=generator))] = 1.0
    logits[:, vocab:] = torch.nan
    assert_same_distribution(logits.to(device)[:, :vocab], batch_of(rows, device))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50257, 128256, 151936, 262144])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_probs_of_real_vocabularies(vocab, logits_dtype, spread, device):
    torch.manual_seed(0)
    choices = [
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for temperature in (0.0, 0.6, 1.0)
        for top_k in (0, 1, 50, 5000, vocab - 1)
        for top_p in (1.0, 0.95, 0.3)
        for min_p in (0.0, 0.05)
    ]
    logits = (spread * torch.randn(len(choices), vocab, device=device)).to(logits_dtype)
    assert_same_distribution(logits, batch_of(choices, device))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # tokens 2 and 3 tie for the third place
        ({"top_p": 0.4}, [0]),  # exactly the mass of token 0
        ({"top_p": 0.41}, [0, 1]),
        ({"top_p": 0.7}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [0]),  # 0.4 of the 0.65 that top_k kept are 0.615
        ({"min_p": 0.3}, [0, 1, 2, 3]),
        ({"min_p": 0.6}, [0, 1]),
        ({"top_k": 3, "min_p": 0.6}, [0, 1]),
        ({"top_p": 0.0}, [0]),
    ],
)
def test_thresholds_by_hand(filters, kept, device):
    probs = torch.tensor([0.4, 0.25, 0.125, 0.125, 0.1])
    row = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    out = sampling.processed_probs(probs.log()[None].to(device), **batch_of([row], device))[0].cpu()
    expected = torch.zeros(5)
    expected[kept] = probs[kept] / probs[kept].sum()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


def test_token_logprobs(device, dtype):
    torch.manual_seed(0)
    logits = 5 * torch.randn(4, 100, device=device)
    logits[0, 3] = -torch.inf
    tokens = torch.tensor([3, 0, 99, 40], device=device)
    for values in (logits, logits.to(dtype)):
        expected = reference.token_logprobs(values, tokens)
        torch.testing.assert_close(sampling.token_logprobs(values, tokens).double(), expected, rtol=1e-6, atol=2e-6)


# ---- sample --------------------------------------------------------------------------------------------------------

MIXED = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.0},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


def test_sample_draws_the_references_tokens(device, dtype):
    torch.manual_seed(1)
    rows = MIXED * (4 if INTERPRETING else 2000)
    batch, row_keys = batch_of(rows, device), keys(len(rows), device)
    logits = (3 * torch.randn(len(rows), 300, device=device)).to(dtype)
    tokens = sampling.sample(logits, **batch, **row_keys)
    expected = reference.sample(logits, **batch, **row_keys)
    assert tokens.dtype == torch.int64
    # Only where two candidates arrive together, to float32's precision, may the kernel call another winner.
    assert (tokens != expected).float().mean() <= (0 if INTERPRETING else 1e-3)


def test_sample_is_the_same_alone_and_in_a_crowd(device):
    torch.manual_seed(2)
    batch, row_keys = batch_of(MIXED, device), keys(len(MIXED), device)
    logits = 3 * torch.randn(len(MIXED), 288, device=device)
    crowd = sampling.sample(logits, **batch, **row_keys)
    for i in range(len(MIXED)):
        one = slice(i, i + 1)
        mine = {name: value[one] for name, value in (batch | row_keys).items()}
        assert torch.equal(sampling.sample(logits[one], **mine), crowd[one])
    # The first row filters nothing, so it must not matter whether others might.
    mine = {name: value[:1] for name, value in (batch | row_keys).items()}
    for absent in ({"filtered": False}, {"top_k": None, "top_p": None, "min_p": None}):
        assert torch.equal(sampling.sample(logits[:1], **mine | absent), crowd[:1])


SMALL = torch.tensor([0.3, 0.15, 0.2, 0.05, 0.05, 0.05, 0.2])


def small_logits(device: torch.device) -> torch.Tensor:
    """Seven tokens that have a chance, in three groups of 32."""
    logits = torch.full((70,), -torch.inf)
    logits[[0, 5, 31, 32, 40, 63, 69]] = SMALL.log()
    return logits.to(device)


FILTERS = [{"top_k": 4}, {"top_p": 0.8}]


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize("filters", [{}, *(pytest.param(one, marks=pytest.mark.gpu) for one in FILTERS)])
def test_sample_follows_the_distribution(vary, filters, device):
    """Among requests with different seeds, and along one request's text."""
    row = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    batch = {name: value.expand(DRAWS).contiguous() for name, value in batch_of([row], device).items()}
    row_keys = {name: torch.full((DRAWS,), 11, device=device) for name in ("seeds", "positions")}
    row_keys[vary] = torch.arange(DRAWS, device=device)
    logits = small_logits(device)
    tokens = sampling.sample(logits.expand(DRAWS, -1), **batch, **row_keys, filtered=bool(filters))
    exact = reference.processed_probs(logits[None], **{name: value[:1] for name, value in batch.items()})[0]
    assert_drawn_from(tokens, exact)


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_the_reference_follows_the_distribution(vary):
    row_keys = {name: torch.full((REFERENCE_DRAWS,), 11) for name in ("seeds", "positions")}
    row_keys[vary] = torch.arange(REFERENCE_DRAWS)
    probs = small_logits(torch.device("cpu")).softmax(0).double()
    assert_drawn_from(reference.race(probs.expand(REFERENCE_DRAWS, -1), **row_keys), probs)


def test_streams_are_independent():
    """A draft model's draw says nothing about the target's at the same position."""
    row_keys = {"seeds": torch.arange(REFERENCE_DRAWS), "positions": torch.zeros(REFERENCE_DRAWS, dtype=torch.int64)}
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows = probs.expand(REFERENCE_DRAWS, -1)
    first, second = (reference.race(rows, **row_keys, stream=stream) for stream in (0, 1))
    assert_drawn_from(3 * first + second, (probs[:, None] * probs).flatten())


def test_greedy_takes_the_first_of_equals(device, dtype):
    logits = torch.zeros(5, 200, device=device)
    logits[0, [70, 71, 150]] = 1.0  # a tie within a group and between groups
    logits[1] = -torch.inf
    logits[1, 33] = -5.0
    logits[2, 199] = 2.0
    logits[3] = -0.0
    logits[3, 100] = 0.0  # equal to the others
    logits[4] = -torch.inf
    expected = [70, 33, 199, 0, 0]
    row_keys, zeros = keys(5, device), torch.zeros(5, device=device)
    for values in (logits, logits.to(dtype)):
        for temperature in (zeros, zeros + 9e-6):
            assert sampling.sample(values, temperature=temperature, **row_keys).tolist() == expected
    out = torch.empty(5, dtype=torch.int32, device=device)
    top_k = torch.ones(5, dtype=torch.int32, device=device)
    assert sampling.sample(logits, temperature=zeros, top_k=top_k, **row_keys, out=out) is out
    assert out.tolist() == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_nan_gives_some_token(device):
    logits = torch.randn(4, 50, device=device)
    logits[0] = torch.nan
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = torch.nan
    batch = batch_of([MIXED[0], MIXED[1], MIXED[3], MIXED[2]], device)
    tokens = sampling.sample(logits, **batch, **keys(4, device))
    assert ((tokens >= 0) & (tokens < 50)).all()


def test_no_rows(device):
    logits, nothing = torch.zeros(0, 50, device=device), torch.zeros(0, device=device)
    row_keys = keys(0, device)
    assert sampling.sample(logits, temperature=nothing, **row_keys).shape == (0,)
    assert sampling.processed_probs(logits, nothing).shape == (0, 50)
    assert sampling.token_logprobs(logits, row_keys["seeds"]).shape == (0,)
    drafts, lens = torch.zeros(0, 3, dtype=torch.int64, device=device), nothing.int()
    tokens, num_emitted = sampling.verify(
        drafts, None, lens, target_logits=torch.zeros(0, 4, 50, device=device), temperature=nothing, **row_keys
    )
    assert tokens.shape == (0, 4) and num_emitted.shape == (0,)


@pytest.mark.gpu
def test_sample_and_verify_in_a_cuda_graph(device):
    torch.manual_seed(3)
    num_rows, vocab, k = 8, 128256, 3
    logits = torch.randn(num_rows, vocab, device=device)
    targets = torch.randn(num_rows, k + 1, vocab, device=device)
    drafts = targets[:, :k].argmax(-1)
    lens = torch.full((num_rows,), k, dtype=torch.int32, device=device)
    batch, row_keys = batch_of((MIXED * 2)[:num_rows], device), keys(num_rows, device)

    def step():
        tokens = sampling.sample(logits, **batch, **row_keys, check=False)
        return tokens, *sampling.verify(drafts, None, lens, target_logits=targets, **batch, **row_keys, check=False)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        logits.normal_()
        row_keys["positions"] += 1
        graph.replay()
        torch.cuda.synchronize()
        for ours, expected in zip(captured, step(), strict=True):
            assert torch.equal(ours, expected)


# ---- verify --------------------------------------------------------------------------------------------------------


def exact_targets(target_logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = [reference.processed_probs(target_logits[:, i], **batch) for i in range(target_logits.shape[1])]
    return torch.stack(rows, dim=1)


def verification(num_seqs: int, k: int, vocab: int, device: torch.device, with_probs: bool):
    """Drafts near the target's mind, ragged, with garbage behind each sequence's last."""
    torch.manual_seed(num_seqs + k)
    logits = 2 * torch.randn(num_seqs, k + 1, vocab, device=device)
    probs = (logits[:, :k] + 0.5 * torch.randn(num_seqs, k, vocab, device=device)).softmax(-1)
    drafts = (
        torch.multinomial(probs.flatten(0, 1), 1).view(num_seqs, k) if k else torch.zeros(num_seqs, 0, device=device)
    )
    lens = torch.arange(num_seqs, device=device).int() % (k + 1)
    drafts = torch.where(torch.arange(k, device=device) < lens[:, None], drafts, 10**6).long()
    return logits, probs if with_probs else None, drafts, lens


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_verify_emits_the_references_tokens(k, with_probs, device):
    num_seqs = 10 if INTERPRETING else 500
    logits, probs, drafts, lens = verification(num_seqs, k, 75, device, with_probs)
    batch = batch_of((MIXED * num_seqs)[:num_seqs], device)
    row_keys = keys(num_seqs, device)
    targets = exact_targets(logits, batch)
    expected, expected_num = reference.verify(drafts, probs, lens, targets, **row_keys)
    for target in ({"target_logits": logits, **batch}, {"target_probs": targets.float()}):
        tokens, num_emitted = sampling.verify(drafts, probs, lens, **target, **row_keys)
        assert tokens.shape == (num_seqs, k + 1)
        wrong = (tokens != expected).any(1) | (num_emitted != expected_num)
        assert wrong.float().mean() <= (0 if INTERPRETING else 2e-3)


def test_verify_reads_flat_rows(device):
    """Ragged rows behind one another, with a spare row between two sequences, are the dense ones."""
    num_seqs, k = 7, 3
    logits, _, drafts, lens = verification(num_seqs, k, 75, device, False)
    batch, row_keys = batch_of((MIXED * 2)[:num_seqs], device), keys(num_seqs, device)
    flat, starts = [], [0]
    for b in range(num_seqs):
        flat += [logits[b, : int(lens[b]) + 1], torch.full((b % 2, 75), torch.nan, device=device)]
        starts.append(starts[-1] + int(lens[b]) + 1 + b % 2)
    query_start = torch.tensor(starts, dtype=torch.int32, device=device)
    dense = sampling.verify(drafts, None, lens, target_logits=logits, **batch, **row_keys)
    ragged = sampling.verify(
        drafts, None, lens, target_logits=torch.cat(flat), query_start=query_start, **batch, **row_keys
    )
    assert all(torch.equal(a, b) for a, b in zip(dense, ragged, strict=True))


def test_verify_without_drafts_is_sample(device):
    logits, _, drafts, _ = verification(5, 2, 75, device, False)
    batch, row_keys = batch_of(MIXED, device), keys(5, device)
    none = torch.zeros(5, dtype=torch.int32, device=device)
    tokens, num_emitted = sampling.verify(drafts, None, none, target_logits=logits, **batch, **row_keys)
    assert torch.equal(tokens[:, 0], sampling.sample(logits[:, 0], **batch, **row_keys))
    assert (tokens[:, 1:] == -1).all() and (num_emitted == 1).all()


def test_verify_accepts_every_draft_of_its_own_distribution(device):
    num_seqs, k = (6, 3) if INTERPRETING else (3000, 3)
    logits, _, _, lens = verification(num_seqs, k, 75, device, True)
    batch, row_keys = batch_of((MIXED * num_seqs)[:num_seqs], device), keys(num_seqs, device)
    drafts, probs = torch.zeros(num_seqs, k, dtype=torch.int64, device=device), []
    for i in range(k):
        at = {"seeds": row_keys["seeds"], "positions": row_keys["positions"] + i}
        drafts[:, i] = sampling.sample(logits[:, i], **batch, **at, stream=1)
        probs.append(sampling.processed_probs(logits[:, i], **batch))
    tokens, num_emitted = sampling.verify(
        drafts, torch.stack(probs, 1), lens, target_logits=logits, **batch, **row_keys
    )
    assert torch.equal(num_emitted, lens + 1)
    drafted = torch.arange(k, device=device) < lens[:, None]
    assert torch.equal(tokens[:, :k][drafted], drafts[drafted])


def test_greedy_verify_is_greedy_decoding(device):
    """Emitted are the target's largest logits, as far as the drafts before them were right."""
    logits, _, _, _ = verification(4, 3, 75, device, False)
    best = logits.argmax(-1)
    drafts = best[:, :3].clone()
    for b in range(3):
        drafts[b, b] = (drafts[b, b] + 1) % 75
    lens = torch.full((4,), 3, dtype=torch.int32, device=device)
    zeros = torch.zeros(4, device=device)
    tokens, num_emitted = sampling.verify(
        drafts, None, lens, target_logits=logits, temperature=zeros, **keys(4, device)
    )
    assert num_emitted.tolist() == [1, 2, 3, 4]
    for b, count in enumerate(num_emitted.tolist()):
        assert tokens[b].tolist() == best[b, :count].tolist() + [-1] * (4 - count)


def test_verify_emits_the_draft_where_no_residual_is_left(device):
    """p below q everywhere happens by rounding only; half of q makes it happen often."""
    num_seqs = 20
    q = torch.rand(num_seqs, 1, 40, device=device).softmax(-1)
    drafts = torch.arange(num_seqs, device=device)[:, None]
    lens = torch.ones(num_seqs, dtype=torch.int32, device=device)
    p = torch.cat([q / 2, q], dim=1)
    row_keys = keys(num_seqs, device)
    tokens, num_emitted = sampling.verify(drafts, q, lens, target_probs=p, **row_keys)
    assert torch.equal(tokens[:, :1], drafts)
    assert sorted(set(num_emitted.tolist())) == [1, 2]
    expected = reference.verify(drafts, q, lens, p, **row_keys)
    assert torch.equal(tokens, expected[0]) and torch.equal(num_emitted, expected[1])


P = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.05, 0.05, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]])
Q = torch.tensor([[0.2, 0.3, 0.2, 0.3], [0.5, 0.1, 0.3, 0.1]])


@pytest.mark.parametrize("drawn", [True, False])
def test_verify_follows_the_target(drawn, device):
    """Every emitted position follows the target, whatever the drafts; and the first draft is accepted as often as said.

    Drawn drafts come from `sample` with the same seeds, so this is also the test that its stream 1 is independent.
    """
    num_seqs = VERIFY_DRAWS
    seeds = torch.arange(num_seqs, device=device)
    positions = torch.full_like(seeds, 5)
    lens = torch.full((num_seqs,), 2, dtype=torch.int32, device=device)
    if drawn:
        drafts = torch.stack(
            [reference.race(Q[i].double().expand(num_seqs, -1).to(device), seeds, positions + i, 1) for i in (0, 1)], 1
        )
        accepted_share = torch.minimum(P[0], Q[0]).sum()
    else:
        drafts = torch.tensor([[3, 2]], device=device).expand(num_seqs, -1).contiguous()
        accepted_share = P[0, 3]
    tokens, num_emitted = sampling.verify(
        drafts,
        Q.to(device).expand(num_seqs, -1, -1) if drawn else None,
        lens,
        target_probs=P.to(device).expand(num_seqs, -1, -1),
        seeds=seeds,
        positions=positions,
    )
    for i in range(3):
        # That position i is reached depends on the drafts and random numbers before it only.
        assert_drawn_from(tokens[num_emitted > i, i], P[i])
    share = torch.tensor([1 - accepted_share, accepted_share])
    assert_drawn_from((num_emitted > 1).long(), share)
    assert ((tokens >= 0).sum(1) == num_emitted).all()


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named(device):
    logits, ones = torch.zeros(2, 50, device=device), torch.ones(2, device=device)
    row_keys = keys(2, device)
    drafts, lens = (
        torch.zeros(2, 3, dtype=torch.int64, device=device),
        torch.full((2,), 3, dtype=torch.int32, device=device),
    )
    targets = torch.zeros(2, 4, 50, device=device)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)

    def sample(logits=logits, temperature=ones, **more):
        sampling.sample(logits, **{"temperature": temperature, **row_keys, **more})

    def verify(draft_tokens=drafts, draft_probs=None, draft_lens=lens, **more):
        sampling.verify(
            draft_tokens, draft_probs, draft_lens, **{"target_logits": targets, "temperature": ones, **row_keys, **more}
        )

    for message, call in [
        ("logits is a NoneType", lambda: sample(None)),
        ("logits is a NoneType", lambda: sampling.processed_probs(None, ones)),
        ("logits is a NoneType", lambda: sampling.token_logprobs(None, ones.long())),
        (r"logits has shape \[2, 4, 50\]", lambda: sample(targets)),
        ("logits is int64", lambda: sample(logits.long())),
        ("logits has a vocabulary of 262145", lambda: sample(torch.zeros(1, 262145, device=device))),
        (r"logits has stride 2", lambda: sample(logits[:, ::2])),
        (r"temperature has shape \[1\]", lambda: sample(temperature=ones[:1])),
        ("temperature holds -1.0", lambda: sample(temperature=-ones)),
        ("temperature holds nan", lambda: sample(temperature=ones * torch.nan)),
        ("top_k is float32", lambda: sample(top_k=ones)),
        ("top_k holds -1", lambda: sample(top_k=-ones.int())),
        ("top_p holds 2.0", lambda: sample(top_p=2 * ones)),
        ("min_p holds -1.0", lambda: sample(min_p=-ones)),
        ("seeds is int32", lambda: sample(seeds=ones.int())),
        (r"positions has shape \[1\]", lambda: sample(positions=ones[:1].long())),
        ("stream is 7", lambda: sample(stream=7)),
        ("stream is None", lambda: sample(stream=None)),
        ("out is float32", lambda: sample(out=ones)),
        (
            "out has strides .* must not overlap",
            lambda: sampling.processed_probs(logits, ones, out=logits[:1].expand(2, -1)),
        ),
        ("out is float64", lambda: sampling.processed_probs(logits, ones, out=logits.double())),
        ("tokens holds 50", lambda: sampling.token_logprobs(logits, 50 * ones.long())),
        ("draft_tokens is a NoneType", lambda: verify(None)),
        ("target_logits is a int", lambda: verify(target_logits=3)),
        ("draft_tokens is float32", lambda: verify(drafts.float())),
        ("draft_tokens holds 50", lambda: verify(drafts + 50)),
        ("draft_tokens holds -1", lambda: verify(drafts - 1)),
        ("draft_lens holds 4", lambda: verify(draft_lens=lens + 1)),
        (r"draft_probs has shape \[2, 4, 50\]", lambda: verify(draft_probs=targets)),
        ("target_logits and target_probs are both", lambda: verify(target_probs=targets)),
        ("target_logits and target_probs are both", lambda: verify(target_logits=None)),
        (r"target_logits has shape \[2, 3, 50\]", lambda: verify(target_logits=targets[:, :3])),
        ("target_probs is float16", lambda: verify(target_logits=None, target_probs=targets.half())),
        (r"target_logits has shape \[2, 4, 50\]", lambda: verify(query_start=starts)),
        ("query_start holds 8", lambda: verify(target_logits=targets.flatten(0, 1)[:7], query_start=starts)),
        (
            "query_start leaves sequence 0 with 2 rows; .* at least 4",
            lambda: verify(target_logits=targets.flatten(0, 1), query_start=starts // 2),
        ),
        ("temperature is a NoneType", lambda: verify(temperature=None)),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- machine code --------------------------------------------------------------------------------------------------

SHAPE = dict.fromkeys(("seq_stride", "row_stride", "vocab", "num_groups"), "i32")


def _specimen_group_stats() -> Compiled:
    from kernels.aot import compile_for_hopper

    return compile_for_hopper(
        sampling.group_stats_kernel,
        {"logits_ptr": "*fp32", "temperature_ptr": "*fp32", "max_ptr": "*fp32", "sum_ptr": "*fp32", **SHAPE},
        {"query_start_ptr": None, "draft_lens_ptr": None, "TILE": sampling.STATS_TILE},
        num_warps=4,
        divisible_by_16=tuple(SHAPE),
    )


def _specimen_finish_rows(filtered: bool = False) -> Compiled:
    from kernels.aot import compile_for_hopper

    filters = {"top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
    return compile_for_hopper(
        sampling.finish_rows_kernel,
        {"logits_ptr": "*fp32", "temperature_ptr": "*fp32", "seeds_ptr": "*i64", "positions_ptr": "*i64"}
        | {"max_ptr": "*fp32", "sum_ptr": "*fp32", "lists_ptr": "*i32", "rows_ptr": "*fp32", "tokens_ptr": "*i64"}
        | (filters if filtered else {})
        | SHAPE,
        {"query_start_ptr": None, "draft_lens_ptr": None, "GROUPS_TILE": 4096, "FILTERED": filtered, "STREAM": 0}
        | ({} if filtered else dict.fromkeys(filters)),
        num_warps=8,
        divisible_by_16=tuple(SHAPE),
    )


def _specimen_finish_filtered_rows() -> Compiled:
    return _specimen_finish_rows(filtered=True)


def _specimen_residual() -> Compiled:
    from kernels.aot import compile_for_hopper

    strides = ("draft_seq_stride", "draft_probs_seq_stride", "draft_probs_row_stride", "k")
    return compile_for_hopper(
        sampling.residual_kernel,
        {"draft_tokens_ptr": "*i64", "draft_probs_ptr": "*fp32", "draft_lens_ptr": "*i32", "target_ptr": "*fp32"}
        | {"temperature_ptr": "*fp32", "rows_ptr": "*fp32", "accepted_ptr": "*i32", "sum_ptr": "*fp32"}
        | dict.fromkeys(strides, "i32")
        | SHAPE,
        {"query_start_ptr": None, "TILE": sampling.STATS_TILE},
        num_warps=4,
        divisible_by_16=(*SHAPE, "draft_probs_seq_stride", "draft_probs_row_stride"),
    )


@pytest.mark.parametrize(
    ("specimen", "registers", "wide_loads"),
    [
        (_specimen_group_stats, 40, 4),  # 16 logits per thread
        (_specimen_finish_rows, 128, 8),  # 16 maxima and sums per thread
        (_specimen_finish_filtered_rows, 128, 16),  # and 8 logits in each of four loops
        (_specimen_residual, 80, 8),  # 16 logits and draft probabilities
    ],
)
def test_machine_code(specimen, registers, wide_loads, compile_for_hopper):
    compiled = compile_for_hopper(specimen)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= registers
    assert len(re.findall(r"LDG\.E\S*\.128", compiled.sass)) == wide_loads
