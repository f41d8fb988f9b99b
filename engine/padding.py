"""What steps are padded to: rules that need no GPU."""

from __future__ import annotations

# What launching a layer kernel by kernel costs the host, and matrix products per second of a Hopper GPU: enough to tell
# from where on the GPU takes longer than the host. Products with fp8 weights are twice as fast, and dearer to launch.
_LAUNCH_S, _FLOPS_PER_S = 0.4e-3, 7e14
_LAUNCH_FP8_S, _FP8_FLOPS_PER_S = 1.0e-3, 12e14
# However large the model.
_LEAST_TOKENS = 1024


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batches that decodes are padded to, ascending: 1, 2, 4, and every eighth up to max_num_seqs."""
    sizes = [1, 2, 4, *range(8, max_num_seqs + 1, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def padded_sizes(weights_per_layer: float, has_fp8: bool, max_num_tokens: int) -> list[int]:
    """Numbers of tokens for which it is worth capturing what a step does outside of attention, ascending.

    That is up to where the GPU takes longer than the host.

    Args:
        weights_per_layer: elements of the matrices of a layer, on one rank.
        has_fp8: they are in fp8.
        max_num_tokens: of a step.
    """
    launch_s, rate = (_LAUNCH_FP8_S, _FP8_FLOPS_PER_S) if has_fp8 else (_LAUNCH_S, _FLOPS_PER_S)
    most = launch_s * rate / (2 * weights_per_layer)
    sizes = [16, 32, *range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256), *range(2048, 4096, 512)]
    sizes += range(4096, 8193, 1024)
    return [size for size in sizes if size <= min(max_num_tokens, max(1.3 * most, _LEAST_TOKENS))]
