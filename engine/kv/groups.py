"""Which layers share block tables, and so pages of one pool.

All groups have the same number of layers. A block id belongs to one group at a time, and layer i of each group keeps
its KV in the same storage as layer i of every other group, so that one pool of block ids serves them all:

    layers        0     1     2     3     4     5          (1 and 5 full attention, the others sliding)
    group 0       full     1, 5        storage 0: layers 1, 0, 3
    group 1       sliding  0, 2        storage 1: layers 5, 2, 4
    group 2       sliding  3, 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KVGroups:
    """How layers share one pool of equal blocks.

    Attributes:
        windows: one entry per group: its sliding window in tokens, None for full attention. Full groups come first,
            then windows in ascending order.
        layers: one entry per group: the ids of its layers, ascending.
        layers_per_group: the most layers of any group; the last group of a kind may have fewer.
    """

    windows: tuple[int | None, ...]
    layers: tuple[tuple[int, ...], ...]
    layers_per_group: int

    @property
    def group_of_layer(self) -> tuple[int, ...]:
        """The group of each layer."""
        owner = {layer: group for group, layers in enumerate(self.layers) for layer in layers}
        return tuple(owner[layer] for layer in range(len(owner)))


def kv_groups(layer_windows: Sequence[int | None]) -> KVGroups:
    """Group layers of equal window, in order of layer id, all groups of the same size.

    The size is that of the smallest kind, or of the largest if it is less than 25 % larger, so that little is padded
    (vLLM's rule, v1/core/kv_cache_utils.py). The planner sizes memory by it too.

    Args:
        layer_windows: the sliding window of each layer in tokens, None for full attention.

    Raises:
        ValueError: no layers.
    """
    if not layer_windows:
        raise ValueError("layer_windows is empty; a model has at least one layer")
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(layer_windows):
        kinds.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
    windows: list[int | None] = []
    members: list[tuple[int, ...]] = []
    for window in sorted(kinds, key=lambda window: (window is not None, window or 0)):
        layers = kinds[window]
        for start in range(0, len(layers), size):
            windows.append(window)
            members.append(tuple(layers[start : start + size]))
    return KVGroups(tuple(windows), tuple(members), size)
