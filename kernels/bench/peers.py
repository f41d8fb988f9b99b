"""What torch offers for the same work. Every peer takes what a user of it would hold: contiguous tensors."""

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

SDPA = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(
    backend: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention [batch, heads, tokens, head_dim] by one backend, or by torch's own choice."""
    grouped = query.shape[1] != key.shape[1]
    if backend is None:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(SDPA[backend]):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


class Flex:
    """FlexAttention with a causal block mask, made and compiled at the first call."""

    _mask = _attention = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self._mask is None:
            tokens = query.shape[2]
            self._mask = create_block_mask(
                lambda batch, head, row, column: row >= column, None, None, tokens, tokens, device=str(query.device)
            )
            self._attention = torch.compile(flex_attention, dynamic=False)
        return self._attention(query, key, value, block_mask=self._mask, enable_gqa=query.shape[1] != key.shape[1])


def naive_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention with the N² matrix in memory: [batch, heads, tokens, head_dim], 16 bits as the inputs."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2)
    scores *= query.shape[-1] ** -0.5
    tokens = query.shape[2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
    scores.masked_fill_(future, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value.repeat_interleave(group, dim=1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, width] as e4m3 with a float32 scale per token, [tokens, 1]."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def product_fp8(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """(codes · scale) · (weight · weight_scale)ᵀ in bfloat16: e4m3 [m, k] and [n, k], scales [m, 1] and [n, 1]."""
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.view(1, -1),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim], cos and sin [tokens, head_dim / 2]: halves (c, c + head_dim / 2) are rotated."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Temperature, then top-k and top-p by sorting: logits [batch, vocab] to tokens [batch]."""
    scaled = logits.float() / temperature
    if top_k is None and top_p is None:
        return _race(scaled.softmax(-1))
    ordered, tokens = scaled.sort(-1, descending=True) if top_k is None else scaled.topk(top_k)
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        probabilities.masked_fill_(probabilities.cumsum(-1) - probabilities >= top_p, 0.0)
    return tokens.gather(-1, _race(probabilities)[:, None])[:, 0]


def verify(draft_tokens: torch.Tensor, draft_probs: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """Speculative sampling at temperature 1: the tokens that follow, [batch, k + 1], of which the emitted count.

    Args:
        draft_tokens: int64 [batch, k].
        draft_probs: float32 [batch, k, vocab].
        target_logits: [batch, k + 1, vocab].
    """
    k = draft_tokens.shape[1]
    p, q = target_logits.float().softmax(-1), functional.pad(draft_probs, (0, 0, 0, 1))
    p_draft, q_draft = (x[:, :k].gather(-1, draft_tokens[..., None])[..., 0] for x in (p, q))
    accepted = (torch.rand_like(p_draft) * q_draft < p_draft).int().cumprod(-1).sum(-1, keepdim=True)
    at = accepted[..., None].expand(-1, 1, p.shape[-1])
    last = _race((p.gather(1, at) - q.gather(1, at)).clamp_(min=0)[:, 0])
    return functional.pad(draft_tokens, (0, 1)).scatter(1, accepted, last[:, None])


def _race(weights: torch.Tensor) -> torch.Tensor:
    """Draw in proportion to the weights, by exponential race: torch.multinomial would ask the host to check them."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)
