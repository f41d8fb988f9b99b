"""The decoder of every family against transformers, with a dense attention in place of the paged one."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from models_for_tests import FAMILIES, VOCAB_SIZE, save_tiny_model

from engine.batch import StepBatch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.hf import read_config
from engine.models.loading import load_weights
from engine.ops import ops_for
from kernels.reference.attention import attention as attend
from kernels.reference.attention import start_of
from kernels.reference.pages import rotate

CPU = torch.device("cpu")
LENGTHS = (1, 7, 90, 33)  # longer and shorter than the windows, which are 24, 32 and 40
# What no family has by default.
VARIANTS = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, full": ("mistral", {"sliding_window": None}),
    "gemma2, untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3, soft cap": ("gemma3_text", {"final_logit_softcapping": 2.0}),
}
MODELS = {family: (family, {}) for family in FAMILIES} | VARIANTS


@dataclass
class DenseAttention:
    """Attention among the new tokens of each sequence, in float32; there is no cache. Logs what it is asked."""

    config: ModelConfig
    calls: list[str | int] = field(default_factory=list)
    ropes: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=list)

    def begin_step(self, batch: StepBatch) -> None:
        self.calls.append("begin_step")

    def write(self, layer, query, key, value, places, rope, *, keeps_key):
        self.ropes.append(rope)
        if rope is not None:
            for x in (query, key):
                x.copy_(rotate(x, *rope, places.positions))

    def attend(self, layer, query, key, value, batch):
        self.calls.append(layer)
        out, _ = attend(
            query,
            key,
            value,
            query_start=batch.query_start,
            softmax_scale=self.config.softmax_scale,
            window=self.config.layer_windows[layer],
            soft_cap=self.config.attention_soft_cap,
            dtype=torch.float32,
        )
        return out.to(query.dtype)


class FirstTokenAttention:
    """Attention of sequences of one token: its value. Fit for a CUDA graph."""

    def begin_step(self, batch):
        pass

    def write(self, layer, query, key, value, places, rope, *, keeps_key):
        pass

    def attend(self, layer, query, key, value, batch):
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def flat_batch(sequences: list[torch.Tensor], device: torch.device = CPU) -> StepBatch:
    """Whole sequences without context, one after the other."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return StepBatch(
        token_ids=torch.cat(sequences).to(device),
        positions=torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device),
        seq_lens=lengths.int().to(device),
        query_start=start_of(lengths).to(device),
        num_decode_seqs=0,
        num_decode_tokens=0,
        max_decode_query_len=1,
        groups=(),
    )


def decoder_of(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    quantization: str | None = None,
    attention: object = None,
) -> Decoder:
    config = read_config(folder)
    return Decoder(
        config,
        load_weights(folder, config, dtype=dtype, device=device, quantization=quantization),
        num_positions=128,
        attention=attention or DenseAttention(config),
        ops=ops_for(device),
        dtype=dtype,
    )


@torch.no_grad()
def transformers_results(model: transformers.PreTrainedModel, sequences: list[torch.Tensor]):
    """Hidden states behind the final norm, and logits: each sequence alone, then in one flat batch."""
    results = [model(sequence[None].to(model.device), output_hidden_states=True) for sequence in sequences]
    return torch.cat([r.hidden_states[-1][0] for r in results]), torch.cat([r.logits[0] for r in results])


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory) -> tuple[Path, transformers.PreTrainedModel]:
    family, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    return folder, save_tiny_model(family, folder, **overrides)


def saved_model(family: str, folder: Path) -> Path:
    save_tiny_model(family, folder)
    return folder


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_hidden_states_and_logits_are_those_of_transformers(saved):
    folder, model = saved
    wanted = transformers_results(model, prompts())
    decoder = decoder_of(folder)
    hidden = decoder.forward(flat_batch(prompts()))
    for found, exact in zip((hidden, decoder.logits(hidden)), wanted, strict=True):
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        assert float((found - exact).abs().max() / exact.std()) < 1e-4


@pytest.mark.gpu
def test_bf16_is_as_exact_as_transformers(saved):
    """Error against float32 at most twice that of transformers' own bfloat16."""
    folder, model = saved
    _, exact = transformers_results(model, prompts())
    plain_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    _, plain = transformers_results(plain_model.cuda(), prompts())
    cuda = torch.device("cuda")
    decoder = decoder_of(folder, dtype=torch.bfloat16, device=cuda)
    found = decoder.logits(decoder.forward(flat_batch(prompts(), cuda)))
    assert found.dtype == torch.bfloat16
    error, plain_error = ((logits.float().cpu() - exact).norm() for logits in (found, plain))
    assert error <= 2 * plain_error


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_fp8_weights_change_little(family, tmp_path):
    """Rounding weights and activations to 3 bits of mantissa moves logits by some percent, and not by nothing."""
    folder = saved_model(family, tmp_path)
    batch = flat_batch(prompts())
    exact, found = (
        decoder.logits(decoder.forward(batch))
        for decoder in (decoder_of(folder), decoder_of(folder, quantization="fp8"))
    )
    assert 0.01 < float((found - exact).norm() / exact.norm()) < 0.2


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_of_some_rows(family, tmp_path):
    decoder = decoder_of(saved_model(family, tmp_path))
    hidden = decoder.forward(flat_batch(prompts()))
    before = hidden.clone()
    rows = torch.tensor([0, 7, 97, 130])
    torch.testing.assert_close(decoder.logits(hidden, rows), decoder.logits(hidden)[rows], rtol=1e-5, atol=1e-5)
    assert decoder.logits(hidden, rows[:0]).shape == (0, VOCAB_SIZE)
    assert hidden.equal(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_leaves_weights_alone(family, tmp_path):
    decoder = decoder_of(saved_model(family, tmp_path))
    layer = decoder.weights.layers[0]
    tensors = (decoder.weights.embedding, layer.qkv.weight, layer.input_norm, decoder.weights.final_norm)
    before = [tensor.clone() for tensor in tensors]
    first = decoder.forward(flat_batch(prompts()))
    assert first.equal(decoder.forward(flat_batch(prompts())))
    assert all(tensor.equal(copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attention_is_asked(family, tmp_path):
    """One begin_step, then every layer in order; RoPE comes along unless it is done, with the norm of the heads."""
    decoder = decoder_of(saved_model(family, tmp_path))
    config, attention = decoder.config, decoder.attention
    decoder.forward(flat_batch(prompts((3, 5))))
    assert attention.calls == ["begin_step", *range(config.num_layers)]
    if family in ("qwen3", "gemma3_text"):
        assert attention.ropes == [None] * config.num_layers
        return
    for rope in attention.ropes:
        cos, sin = rope
        assert cos.shape == sin.shape == (128, config.head_dim // 2)
        assert cos[0].eq(1).all()
        assert sin[0].eq(0).all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 128**0.5), (torch.bfloat16, 11.3125)])
def test_embedding_scale_is_rounded_to_the_models_dtype(dtype, scale, tmp_path):
    decoder = decoder_of(saved_model("gemma2", tmp_path), dtype=dtype)
    seen = []
    embed = decoder.ops.embed

    def spy(token_ids, table, scale):
        seen.append(scale)
        return embed(token_ids, table, scale)

    decoder.ops.embed = spy
    decoder.forward(flat_batch(prompts((2,))))
    assert seen == [pytest.approx(scale, rel=1e-7)]


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("quantization", [None, "fp8"])
@torch.inference_mode()
def test_forward_and_sampling_in_a_cuda_graph(family, quantization, tmp_path):
    cuda = torch.device("cuda")
    folder = saved_model(family, tmp_path)
    decoder = decoder_of(
        folder, dtype=torch.bfloat16, device=cuda, quantization=quantization, attention=FirstTokenAttention()
    )
    batch = flat_batch([prompt[:1] for prompt in prompts((1,) * 5)], cuda)
    seeds = torch.arange(5, device=cuda)
    temperature = torch.ones(5, device=cuda)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logits = decoder.logits(decoder.forward(batch))
        keys = {"temperature": temperature, "seeds": seeds, "positions": batch.positions}
        return logits, decoder.ops.sample(logits, **keys, filtered=False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, tokens = step()
    batch.token_ids.copy_(torch.tensor([5, 9, 0, 100, 5]))
    graph.replay()
    replayed = logits.clone(), tokens.clone()
    for found, wanted in zip(replayed, step(), strict=True):
        assert found.equal(wanted)
