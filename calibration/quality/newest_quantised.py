"""What int4 and int2 lose without their residual window: an emulation.

K of these formats has a scale per channel of a page, so the kernels cannot store a page before it is full; until then
its tokens wait in the residual window in full precision. Here the engine runs as it is, but what attention reads of the
window has been quantised and dequantised, by the format's own rules, with scales from the tokens that wait so far::

    position     0 ........ flushed_len ........ num_tokens
    engine       [ quantised pages ][ exact          ]
    here         [ quantised pages ][ quantised      ]

The window itself stays exact, so that the pages are the same bit for bit. This is the least that a cache without a
window would lose: one that stored each token at once would have to choose scales before it has seen the page.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from engine.core import EngineCore
from engine.kv.cache import LayerCache
from engine.kv.torch_attention import NOWHERE, TorchAttention
from kernels.pages import PageLayout
from kernels.reference.pages import quantise_channels, quantise_tokens

if TYPE_CHECKING:
    from engine.kv.triton_attention import TritonAttention


def quantise_newest(core: EngineCore) -> None:
    """Have attention of this engine read the newest tokens quantised. Call it before graphs are captured."""
    decoder = core._runner.decoder
    if isinstance(decoder.attention, TorchAttention):
        decoder.attention = TorchAttentionNewestQuantised(core.model_config, core._cache)
    else:
        decoder.attention = triton_attention_newest_quantised()(
            core.model_config, core._cache, dtype=core.dtype, max_model_len=core.max_model_len
        )


def read_back(tokens: torch.Tensor, waiting: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Tokens of an incomplete page as the format would keep them.

    Args:
        tokens: K and V [n, 2, num_kv_heads, page_size, head_dim], any floating-point dtype.
        waiting: bool [n, page_size], which of them are there: the first so many. What stands elsewhere has no effect.

    Returns:
        Of the same shape and dtype, dequantised.
    """
    # In place of what is not there yet, the first token: it changes no minimum and no maximum.
    tokens = torch.where(waiting[:, None, None, :, None], tokens, tokens[:, :, :, :1])
    key, value = tokens.unbind(1)
    k, v = quantise_channels(key, layout.kv_dtype), quantise_tokens(value, layout.kv_dtype)
    key = k.codes.float() * k.scale.float()[..., None, :] + k.minimum.float()[..., None, :]
    value = v.codes.float() * v.scale.float()[..., None] + v.minimum.float()[..., None]
    return torch.stack([key, value], 1).to(tokens.dtype)


class TorchAttentionNewestQuantised(TorchAttention):
    """The PyTorch backend, reading the newest tokens quantised."""

    def _read(self, cache, source):
        keys, values = super()._read(cache, source)
        if source.ring is not None:
            layout = cache.layout
            first = source.pages.shape[1] * layout.page_size
            newest = slice(first, first + layout.page_size)
            waiting = source.positions[:, newest] != NOWHERE
            shown = read_back(torch.stack([keys[:, :, newest], values[:, :, newest]], 1), waiting, layout)
            keys[:, :, newest], values[:, :, newest] = shown.unbind(1)
            values[:, :, newest] *= waiting[:, None, :, None]
        return keys, values


def triton_attention_newest_quantised() -> type[TritonAttention]:
    """The Triton backend, reading the newest tokens quantised; a function, as a CPU needs no Triton."""
    from engine.kv.triton_attention import TritonAttention

    class Attention(TritonAttention):
        def _decode(self, layer, cache, query):
            decodes = self._decodes
            if cache.layout.is_low_bit:
                cache = _shown(cache, **decodes.ring, ends=decodes.seq_lens)
            super()._decode(layer, cache, query)

        def _fill_scratch(self, cache, run):
            if cache.layout.is_low_bit:
                cache = _shown(cache, **run.copy.ring, ends=run.copy.context_lens)
            super()._fill_scratch(cache, run)

    return Attention


def _shown(
    cache: LayerCache, residual_slots: torch.Tensor, flushed_lens: torch.Tensor, ends: torch.Tensor
) -> LayerCache:
    """The layer's cache with another residual window: positions flushed_len to end of each sequence quantised."""
    layout = cache.layout
    positions = flushed_lens[:, None] + torch.arange(layout.page_size, device=ends.device)
    slots, offsets = residual_slots.long()[:, None], (positions % layout.residual_size).long()
    tokens = cache.residual[slots, :, :, offsets].permute(0, 3, 2, 1, 4)  # [n, 2, num_kv_heads, page_size, head_dim]
    residual = cache.residual.clone()
    shown = read_back(tokens, positions < ends[:, None], layout)
    residual[slots, :, :, offsets] = shown.permute(0, 3, 2, 1, 4)
    return replace(cache, residual=residual)
