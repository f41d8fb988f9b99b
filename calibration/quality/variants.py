"""The KV formats that are compared.

A name is a format and what is different about it:

    int4                     as the engine runs it: newest tokens in the residual window, all layers quantised
    int4-no-window           the newest tokens quantised too (`calibration.quality.newest_quantised`, an emulation)
    int4-skip                first and last layer in the model's own dtype
    int4-no-window-skip      both
    bfloat16-page32          the reference's format in pages of 32 tokens: sums are taken in another order, no more
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UserError
from kernels.pages import LOW_BIT

REFERENCE = "bfloat16"
PAGE_SIZE = 64
QUANTISED = ("fp8", "int8", "int4", "int2")


@dataclass(frozen=True)
class Variant:
    """One way to keep keys and values.

    Attributes:
        kv_cache_dtype: format of `kernels.pages`.
        block_size: tokens per page.
        no_window: quantise the newest tokens too, where the engine keeps them in a residual window.
        skips_layers: first and last layer stay in the model's dtype.
    """

    kv_cache_dtype: str
    block_size: int = PAGE_SIZE
    no_window: bool = False
    skips_layers: bool = False

    @property
    def name(self) -> str:
        parts = [self.kv_cache_dtype]
        parts += [f"page{self.block_size}"] * (self.block_size != PAGE_SIZE)
        parts += ["no-window"] * self.no_window + ["skip"] * self.skips_layers
        return "-".join(parts)

    def skip_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that are not quantised."""
        return tuple(sorted({0, num_layers - 1})) if self.skips_layers else ()

    @property
    def has_window(self) -> bool | None:
        """Whether the newest tokens are kept in full precision; None for formats that quantise token by token."""
        return not self.no_window if self.kv_cache_dtype in LOW_BIT else None


def _all() -> dict[str, Variant]:
    found = [Variant(REFERENCE), Variant(REFERENCE, block_size=32)]
    for kind in QUANTISED:
        for no_window in (False, True)[: 1 + (kind in LOW_BIT)]:
            found += [Variant(kind, no_window=no_window, skips_layers=skips) for skips in (False, True)]
    return {variant.name: variant for variant in found}


VARIANTS = _all()


def chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    """The variants of these names, in the order of `VARIANTS`; all for none.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in VARIANTS:
            nearest = difflib.get_close_matches(name, VARIANTS, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise UserError(f"there is no variant {name!r}: {hint}there are {', '.join(VARIANTS)}")
    return tuple(variant for name, variant in VARIANTS.items() if not names or name in names)
