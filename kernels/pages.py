"""The byte layout of a KV page, and the residual window of the low-bit formats.

The KV cache of one layer is one tensor, uint8 [num_pages, num_kv_heads, page_bytes]. A page is the run of `page_size`
tokens that one KV head keeps, with everything needed to read it:

    K        [page_size, W] words   token after token
    V        [page_size, W] words
    scales   fp16, by format:
             fp8, int8    k_scale[page_size]  v_scale[page_size]                            per token
             int4, int2   k_scale[head_dim]   k_min[head_dim]                               per channel of the page
                          v_scale[page_size]  v_min[page_size]                              per token
    padding  up to a multiple of 32 bytes

    value = float(word)                      bfloat16, float16, float32: one channel per word, no scales
    value = e4m3(byte) · scale               fp8
    value = (byte − 128) · scale             int8, offset binary, byte in 1..255
    value = code · scale + min               int4 (code in 0..15), int2 (0..3)

A word is 16 bits (32 for float32) and holds `planes` channels, W = head_dim / planes: bits [i·b, (i+1)·b) of word w are
channel w + i·W, where b is the format's bits per element. Plane i, the i-th b bits of every word, is therefore a run of
W neighbouring channels, and masking it out leaves a number in a 16-bit lane, which is what a tensor core's 16-bit
operand wants: no shuffle between lanes is needed for K nor for the transposed V. With RoPE's halves (c, c + D/2) both
ends of a rotated pair of an 8-bit format meet in one word.

K is quantised per channel because its outliers are channels (KIVI, arXiv 2402.02750); a channel's scale needs a whole
page of tokens, so the low-bit formats keep a sequence's newest tokens in full precision:

    position     0 ........ flushed_len ........ num_tokens
                 [ quantised pages ][ residual window ]

The window is a ring, 16-bit or float32 [num_slots, num_kv_heads, 2, residual_size, head_dim] (K, then V): the token at
position p stands at p % residual_size. flushed_len is a multiple of page_size and moves only past tokens that can no
longer be rejected, so rolling speculation back never touches a quantised page. The ring holds a page less one token
that wait to fill it and MAX_QUERY_LEN tokens that may yet be rejected.
"""

from dataclasses import dataclass

import torch

# The longest query of decode attention: one token and 15 drafts.
MAX_QUERY_LEN = 16

# Bits per element of each format.
KV_DTYPE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "fp8": 8, "int8": 8, "int4": 4, "int2": 2}
FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LOW_BIT = ("int4", "int2")
PAGE_SIZES = (32, 64, 128)
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class PageLayout:
    """Where what stands in a page. All offsets and sizes are in bytes unless the name says otherwise.

    Args:
        kv_dtype: bfloat16, float16, float32, fp8 (e4m3), int8, int4 or int2.
        head_dim: channels of a KV head, one of 64, 80, 96, 128, 256.
        page_size: tokens per page, 32, 64 or 128.

    Raises:
        ValueError: a format, head size or page size that there is no kernel for.
    """

    kv_dtype: str
    head_dim: int
    page_size: int = 64

    def __post_init__(self):
        for name, value, choices in (
            ("kv_dtype", self.kv_dtype, tuple(KV_DTYPE_BITS)),
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("page_size", self.page_size, PAGE_SIZES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")

    @property
    def bits(self) -> int:
        """Bits per element, scales not counted."""
        return KV_DTYPE_BITS[self.kv_dtype]

    @property
    def is_float(self) -> bool:
        """Whether elements are plain floating-point words without scales."""
        return self.kv_dtype in FLOAT_DTYPES

    @property
    def is_low_bit(self) -> bool:
        """Whether K is quantised per channel over whole pages, so that new tokens wait in the residual window."""
        return self.kv_dtype in LOW_BIT

    @property
    def word_dtype(self) -> torch.dtype:
        """The dtype to view K and V as: the elements' own, or int16 words of packed elements."""
        return FLOAT_DTYPES.get(self.kv_dtype, torch.int16)

    @property
    def planes(self) -> int:
        """Channels in a word."""
        return 1 if self.is_float else 16 // self.bits

    @property
    def words(self) -> int:
        """Words of one token's K (or V): channels of one plane."""
        return self.head_dim // self.planes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K (or V), scales not counted."""
        return self.words * self.word_dtype.itemsize

    @property
    def value_offset(self) -> int:
        """Where V begins. K begins at 0."""
        return self.page_size * self.row_bytes

    @property
    def scale_offset(self) -> int:
        """Where the scales begin."""
        return 2 * self.value_offset

    @property
    def scale_shapes(self) -> dict[str, int]:
        """The fp16 vectors behind V, in order, with their lengths in elements."""
        if self.is_float:
            return {}
        if self.is_low_bit:
            return {
                "k_scale": self.head_dim,
                "k_min": self.head_dim,
                "v_scale": self.page_size,
                "v_min": self.page_size,
            }
        return {"k_scale": self.page_size, "v_scale": self.page_size}

    @property
    def page_bytes(self) -> int:
        """Bytes of one KV head's page, a multiple of 32 (a sector of device memory)."""
        used = self.scale_offset + 2 * sum(self.scale_shapes.values())
        return -(-used // 32) * 32

    @property
    def residual_size(self) -> int:
        """Tokens in a sequence's residual window; 0 for formats that need none."""
        return self.page_size + MAX_QUERY_LEN if self.is_low_bit else 0

    def empty_cache(self, num_pages: int, num_kv_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """A cache for one layer, zeroed: uint8 [num_pages, num_kv_heads, page_bytes]."""
        return torch.zeros(num_pages, num_kv_heads, self.page_bytes, dtype=torch.uint8, device=device)

    def empty_residual(
        self,
        num_slots: int,
        num_kv_heads: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Residual windows for one layer, zeroed: [num_slots, num_kv_heads, 2, residual_size, head_dim]."""
        shape = (num_slots, num_kv_heads, 2, self.residual_size, self.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    def words_view(self, cache: torch.Tensor) -> torch.Tensor:
        """K and V words of a cache, as a view: word_dtype [num_pages, num_kv_heads, 2, page_size, words]."""
        packed = cache[..., : self.scale_offset].view(self.word_dtype)
        return packed.unflatten(-1, (2, self.page_size, self.words))

    def scale_views(self, cache: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scales of a cache, as views: fp16 [num_pages, num_kv_heads, length] for each of `scale_shapes`."""
        views, offset = {}, self.scale_offset
        for name, length in self.scale_shapes.items():
            views[name] = cache[..., offset : offset + 2 * length].view(torch.float16)
            offset += 2 * length
        return views
