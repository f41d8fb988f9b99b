"""Launching a kernel for layer after layer, with arguments of which little changes.

Before each launch Triton works out from the arguments which compiled kernel is meant, which takes the host longer than
the launch itself. Where a step launches a kernel once per layer, only addresses differ; so `Launcher` remembers, by all
that Triton would look at and a little more, what it found the last time: numbers by their value, but for those that the
kernel is not specialised for. What it does not look at, such as a changed global constant of the module, Triton does
not see either until new arguments come.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.interpreting import INTERPRETING

# Steps have ever other sizes: remembering them all would only fill the memory.
_MAX_REMEMBERED = 64

_INT32 = 1 << 31


class Launcher:
    """A kernel, `launcher[grid](*arguments, **constants_and_options)` as with the kernel itself.

    The kernel's parameters are those that change at run time, given by position, and then its constants, by name.
    Constants and options are hashable; those that are made once for all can be compared by identity, where
    `by_identity` names them.
    """

    def __init__(self, kernel: Any, by_identity: tuple[str, ...] = ()) -> None:
        self._kernel, self._by_identity = kernel, by_identity
        unspecialised = set(getattr(kernel, "do_not_specialize", None) or ())
        self._unspecialised = [
            index for index, name in enumerate(kernel.arg_names) if name in unspecialised or index in unspecialised
        ]
        self._remembered: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if INTERPRETING:
            return self._kernel[grid]
        return lambda *arguments, **more: self._launch(grid, arguments, more)

    def _launch(self, grid: tuple[int, ...], arguments: tuple, more: dict[str, Any]) -> None:
        known = more
        if self._by_identity:
            known = more | {name: id(more[name]) for name in self._by_identity}
        kinds = list(map(_kind, arguments))
        for index in self._unspecialised:
            if type(arguments[index]) is int and abs(arguments[index]) < _INT32:
                kinds[index] = int  # the kernel is the same for all of them
        key = (torch.cuda.current_device(), *kinds, *known.items())
        found = self._remembered.get(key)
        if found is not None:
            compiled, constants = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
            return
        compiled = self._kernel[grid](*arguments, **more)
        names = self._kernel.arg_names[len(arguments) :]
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = compiled, tuple(more[name] for name in names)


def _kind(argument: Any) -> Any:
    """What Triton may compile another kernel for: of a tensor its dtype and whether 16 divides its address."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, (int, float)):
        return argument
    # A tensor descriptor. Layouts are made once for all.
    return argument.base.dtype, *argument.block_shape, id(argument.layout)
