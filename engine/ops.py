"""A step's arithmetic outside of attention, on either device: norms, linear layers, activation, sampling.

`Ops` says what there is and composes it; `TritonOps` and `TorchOps` bring the pieces, the kernels or their references.
Kernels are launched without looking at their arguments, which would wait for the GPU, so that a step can be captured in
a CUDA graph. Plain PyTorch imports no triton.

A decoder calls composites, so that what is fused into what is decided here. The input of a float8 linear layer is
quantised with one scale per token, in the kernel that makes it:

                          16- or 32-bit weight          float8 weight
    norm_linear           rms_norm ──> product          rms_norm_fp8 ─────────> product_fp8
    activation_linear     silu_mul ──> product          silu_mul_fp8 ─────────> product_fp8
    linear                             product          quantise_tokens_fp8 ──> product_fp8
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812

from engine.errors import UserError
from engine.models.modules import Linear

Quantised = tuple[torch.Tensor, torch.Tensor]  # float8_e4m3fn [num_tokens, channels], scale float32 [num_tokens, 1]


class Ops(ABC):
    """What both devices share. Tokens lie in rows: x is [num_tokens, channels]; nothing waits for the device.

    Attributes:
        elementwise, quantise, sampling: modules of `kernels` or `kernels.reference`; their docstrings are the
            specification of the pieces.
        unchecked: keyword arguments that keep a kernel from looking at its arguments.
    """

    elementwise: ModuleType
    quantise: ModuleType
    sampling: ModuleType
    unchecked: ClassVar[dict[str, bool]]

    # ---- composites ------------------------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Rows of the embedding table times scale, in the table's dtype: a new tensor [num_tokens, hidden].

        Args:
            token_ids: int64 [num_tokens]. table: [vocab, hidden].
            scale: rounded to the table's dtype by the caller, as Gemma wants it.
        """
        embedded = F.embedding(token_ids, table)
        return embedded if scale == 1.0 else embedded.mul_(scale)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """x · weightᵀ + bias: [num_tokens, out_features] in x's dtype."""
        if linear.scale is None:
            return self.product(x, linear)
        return self.product_fp8(self.quantise.quantise_tokens_fp8(x, **self.unchecked), linear, x.dtype)

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        linear: Linear,
        eps: float,
        *,
        residual: torch.Tensor | None = None,
        weight_offset: float = 0.0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`linear` of `rms_norm`; a residual becomes residual + x in place, and that is what is normalised.

        Args:
            out: [num_tokens, out_features] in x's dtype, contiguous, to put the result in; a new tensor if None.
        """
        if linear.scale is None:
            normed = self.rms_norm(x, norm_weight, eps, residual=residual, weight_offset=weight_offset)
            return self.product(normed, linear, out)
        quantised = self.quantise.rms_norm_fp8(
            x, norm_weight, eps, residual=residual, weight_offset=weight_offset, **self.unchecked
        )
        return self.product_fp8(quantised, linear, x.dtype, out)

    def activation_linear(self, gate_up: torch.Tensor, linear: Linear, activation: str = "silu") -> torch.Tensor:
        """`linear` of activation(gate) · up, the second half of a gated MLP. gate_up: [num_tokens, 2 · in_features]."""
        if linear.scale is None:
            return self.product(self.silu_mul(gate_up, activation=activation), linear)
        quantised = self.quantise.silu_mul_fp8(gate_up, activation=activation, **self.unchecked)
        return self.product_fp8(quantised, linear, gate_up.dtype)

    def gated_mlp(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        gate_up: Linear,
        down: Linear,
        eps: float,
        *,
        residual: torch.Tensor | None = None,
        weight_offset: float = 0.0,
        activation: str = "silu",
    ) -> torch.Tensor:
        """`activation_linear` of `norm_linear`: a whole MLP, the norm before it included."""
        hidden = self.norm_linear(x, norm_weight, gate_up, eps, residual=residual, weight_offset=weight_offset)
        return self.activation_linear(hidden, down, activation)

    def soft_cap(self, logits: torch.Tensor, cap: float) -> torch.Tensor:
        """cap · tanh(logits / cap) in float32, rounded to the dtype of the logits, which may be overwritten."""
        return logits.float().div_(cap).tanh_().mul_(cap).to(logits.dtype)

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        residual: torch.Tensor | None = None,
        weight_offset: float = 0.0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`kernels.elementwise.rms_norm`."""
        return self.elementwise.rms_norm(
            x, weight, eps, residual=residual, weight_offset=weight_offset, out=out, **self.unchecked
        )

    def qk_norm_rope(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        *,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> None:
        """`kernels.elementwise.qk_norm_rope`: norm of every head and RoPE, in place."""
        self.elementwise.qk_norm_rope(
            query,
            key,
            cos,
            sin,
            positions,
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
            weight_offset=weight_offset,
            **self.unchecked,
        )

    def silu_mul(self, gate_up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
        """`kernels.elementwise.silu_mul` into a new tensor."""
        return self.elementwise.silu_mul(gate_up, activation=activation, **self.unchecked)

    def product(self, x: torch.Tensor, linear: Linear, out: torch.Tensor | None = None) -> torch.Tensor:
        """x · weightᵀ + bias, where the weight has x's dtype; into `out`, or a new tensor if None."""
        if out is None:
            return F.linear(x, linear.weight, linear.bias)
        if linear.bias is None:
            return torch.mm(x, linear.weight.t(), out=out)
        return torch.addmm(linear.bias, x, linear.weight.t(), out=out)

    @abstractmethod
    def product_fp8(
        self, quantised: Quantised, linear: Linear, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x · weightᵀ + bias in `dtype`, where x = codes · scale and the weight's rows are scaled by linear.scale."""

    def sample(
        self,
        logits: torch.Tensor,
        *,
        temperature: torch.Tensor,
        top_k: torch.Tensor | None = None,
        top_p: torch.Tensor | None = None,
        min_p: torch.Tensor | None = None,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        filtered: bool = True,
    ) -> torch.Tensor:
        """`kernels.sampling.sample`: one token per row, int64 [num_rows].

        Args:
            logits: [num_rows, vocab]. Of the others each has [num_rows] elements.
            filtered: False promises that no row filters by top_k, top_p or min_p, and saves finding out.
        """
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p} if filtered else {}
        return self.sampling.sample(
            logits, temperature=temperature, **filters, seeds=seeds, positions=positions, **self.unchecked
        )

    @abstractmethod
    def slot_mapping(
        self,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        num_tokens: int,
        page_size: int,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kernels.cache.slot_mapping`: position and slot of each new token, int64 [num_tokens]; padding: 0 and -1."""


class TorchOps(Ops):
    """Plain PyTorch. A float8 product is emulated: exact codes, summed in float32."""

    unchecked: ClassVar[dict[str, bool]] = {}

    def __init__(self) -> None:
        from kernels.reference import elementwise, sampling

        self.elementwise, self.sampling = elementwise, sampling

    @cached_property
    def quantise(self) -> ModuleType:
        from kernels.reference import quantise

        return quantise

    def product_fp8(
        self, quantised: Quantised, linear: Linear, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        codes, scale = quantised
        result = F.linear(codes.float(), linear.weight.float()) * scale * linear.scale
        result = (result if linear.bias is None else result + linear.bias.float()).to(dtype)
        return result if out is None else out.copy_(result)

    def slot_mapping(self, block_tables, query_start, seq_lens, num_tokens, page_size, out=None):
        positions, slots = out or (torch.empty(num_tokens, dtype=torch.int64) for _ in range(2))
        positions.zero_()
        slots.fill_(-1)
        owner = torch.repeat_interleave(torch.arange(len(seq_lens)), query_start.diff())
        count = owner.shape[0]  # rows behind are padding
        positions[:count] = (seq_lens - query_start[1:])[owner] + torch.arange(count)
        pages = block_tables[owner, positions[:count] // page_size].long()
        slots[:count] = pages * page_size + positions[:count] % page_size
        return positions, slots


class TritonOps(Ops):
    """Triton kernels, and torch's matrix products.

    Attributes:
        use_skinny: send products of few rows to kernels.skinny where it is faster than cuBLAS: on Hopper GPUs.
    """

    unchecked: ClassVar[dict[str, bool]] = {"check": False}

    def __init__(self, *, use_skinny: bool = False) -> None:
        from kernels import cache, elementwise, sampling

        self.cache, self.elementwise, self.sampling = cache, elementwise, sampling
        self.use_skinny = use_skinny

    @cached_property
    def quantise(self) -> ModuleType:
        from kernels import quantise

        return quantise

    @cached_property
    def skinny(self) -> ModuleType:
        from kernels import skinny

        return skinny

    def product(self, x: torch.Tensor, linear: Linear, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._is_skinny(x, linear):
            # Nothing writes weights, so they may be read before the kernel in front has ended.
            return self.skinny.skinny_linear(x, linear.weight, bias=linear.bias, out=out, pdl=True, check=False)
        return super().product(x, linear, out)

    def _is_skinny(self, x: torch.Tensor, linear: Linear) -> bool:
        return self.use_skinny and x.dtype != torch.float32 and self.skinny.is_faster(x.shape[0], *linear.weight.shape)

    def gated_mlp(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        gate_up: Linear,
        down: Linear,
        eps: float,
        *,
        residual: torch.Tensor | None = None,
        weight_offset: float = 0.0,
        activation: str = "silu",
    ) -> torch.Tensor:
        norm = {"residual": residual, "weight_offset": weight_offset}
        if gate_up.scale is not None or gate_up.bias is not None or not self._is_skinny(x, gate_up):
            return super().gated_mlp(x, norm_weight, gate_up, down, eps, activation=activation, **norm)
        normed = self.rms_norm(x, norm_weight, eps, **norm)
        hidden = self.skinny.skinny_gate_up(normed, gate_up.weight, activation=activation, pdl=True, check=False)
        return self.product(hidden, down)

    def product_fp8(
        self, quantised: Quantised, linear: Linear, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        codes, scale = quantised
        if self.use_skinny and codes.shape[0] <= self.skinny.MAX_ROWS:
            more = {"dtype": dtype, "bias": linear.bias, "out": out}
            return self.skinny.skinny_linear_fp8(
                codes, scale, linear.weight, linear.scale, **more, pdl=True, check=False
            )
        # One scale per row and per column. Both sizes of the weight must be multiples of 16. With such scales torch
        # writes bfloat16 only, and not for every shape has cuBLAS a product that adds the bias.
        is_whole = dtype == torch.bfloat16 and linear.bias is None
        result = torch._scaled_mm(
            codes,
            linear.weight.t(),
            scale_a=scale,
            scale_b=linear.scale[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            **({"out": out} if is_whole and out is not None else {}),
        )
        if is_whole:
            return result
        result = result.to(dtype) if linear.bias is None else result.to(dtype) + linear.bias
        return result if out is None else out.copy_(result)

    def slot_mapping(self, block_tables, query_start, seq_lens, num_tokens, page_size, out=None):
        return self.cache.slot_mapping(block_tables, query_start, seq_lens, num_tokens, page_size, out=out, check=False)


def ops_for(device: torch.device) -> Ops:
    """The operations of a device.

    Raises:
        UserError: a device that is neither CUDA nor CPU.
    """
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device is {device}; the engine runs on cuda or cpu")
    if device.type == "cpu":
        return TorchOps()
    return TritonOps(use_skinny=torch.cuda.get_device_capability(device) == (9, 0))
