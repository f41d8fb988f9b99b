"""Runs a Gluon kernel on the CPU: Triton's interpreter knows no Gluon, so this plays the operations that ours use.

The kernel's Python functions are called as they are, with the names of Gluon replaced: tensors are numpy arrays,
shared memory is an array addressed as TMA and wgmma do, each partition of `warp_specialize` is a thread, and an
mbarrier counts arrivals and bytes and waits as the PTX manual says. What is asynchronous stays so as long as it may: a
tensor-core operation reads its operands when it is waited for. A kernel that releases a buffer too early computes
garbage here, one that waits for what never comes raises `DeadlockError`. Layouts, registers and the memory model are
not played.
"""

import math
import operator
import threading
import types
from dataclasses import fields

import numpy as np
import torch
from triton.experimental.gluon._runtime import GluonJITFunction

TIMEOUT_S = 20


class DeadlockError(Exception):
    """A partition waited for a barrier that nobody completed."""


# ---- tensors and pointers ------------------------------------------------------------------------------------------


class Tensor:
    """A numpy array with the methods of a Gluon tensor. Division of integers truncates there: none may be negative."""

    def __init__(self, data):
        self.data = np.asarray(data)

    def to(self, dtype):
        return Tensor(self.data.astype(dtype))

    def __getitem__(self, index):
        return Tensor(self.data[index])

    def __bool__(self):
        return bool(self.data)

    def __index__(self):
        return int(self.data)


def raw(value):
    return value.data if isinstance(value, Tensor) else value


def _binary(function, flipped):
    def method(self, other):
        if isinstance(other, Pointer | Pending):
            return NotImplemented
        left, right = (raw(other), self.data) if flipped else (self.data, raw(other))
        if function in (operator.floordiv, operator.mod):
            assert np.all(np.asarray(left) >= 0) and np.all(np.asarray(right) > 0), "rounds differently on the GPU"
        with np.errstate(all="ignore"):
            return Tensor(function(left, right))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor"):
    _method = _name.strip("_")
    setattr(Tensor, f"__{_method}__", _binary(getattr(operator, _name), False))
    setattr(Tensor, f"__r{_method}__", _binary(getattr(operator, _name), True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _binary(getattr(operator, _name), False))


class Pointer:
    """Elements of a torch tensor's storage from where the tensor begins."""

    def __init__(self, storage, offset=0):
        self.storage, self.offset = storage, offset

    @staticmethod
    def to_tensor(tensor):
        flat = torch.as_strided(tensor.detach(), (_reach(tensor),), (1,))
        return Pointer(flat.numpy())

    def __add__(self, offset):
        return Pointer(self.storage, np.asarray(self.offset) + raw(offset))


def _reach(tensor):
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def load(pointer, mask=True, other=0):
    offset, mask = np.broadcast_arrays(pointer.offset, raw(mask))
    assert np.all(~mask | ((offset >= 0) & (offset < len(pointer.storage)))), "a load outside the tensor"
    return Tensor(np.where(mask, pointer.storage[np.where(mask, offset, 0)], other))


def store(pointer, value, mask=True):
    offset, mask, value = np.broadcast_arrays(pointer.offset, raw(mask), raw(value))
    assert np.all(~mask | ((offset >= 0) & (offset < len(pointer.storage)))), "a store outside the tensor"
    pointer.storage[offset[mask]] = value[mask]


def atomic_add(pointer, value, mask=True, sem=None):
    offset, mask, value = np.broadcast_arrays(pointer.offset, raw(mask), raw(value))
    old = load(pointer, mask)
    np.add.at(pointer.storage, offset[mask], value[mask])
    return old


# ---- shared memory, barriers, asynchronous operations --------------------------------------------------------------


class Shared:
    """Shared memory in TMA's order: columns of 128 bytes, all rows of one behind the other. `rank` is a tile's."""

    def __init__(self, flat, base, shape, rank, first_row=0, rows=None):
        self.flat, self.base, self.shape, self.rank = flat, base, tuple(shape), rank
        self.first_row = first_row
        self.rows = rows if rows is not None else math.prod(self.shape[-rank:-1])  # of a tile

    def index(self, i):
        assert 0 <= operator.index(i) < self.shape[0], "a stage that does not exist"
        inner = self.shape[1:]
        return Shared(self.flat, self.base + operator.index(i) * math.prod(inner), inner, self.rank)

    def slice(self, start, length):
        return Shared(self.flat, self.base, (length, self.shape[1]), 2, self.first_row + start, self.rows)

    def permute(self, order):
        assert order == (1, 0)
        return Transposed(self)

    def _reinterpret(self, dtype, shape, layout):
        assert self.first_row == 0 and math.prod(shape) == math.prod(self.shape)
        return Shared(self.flat, self.base, shape, layout.rank)

    def _places(self):
        height, width = math.prod(self.shape[:-1]), self.shape[-1]
        assert len(self.shape) == self.rank and height <= self.rows
        row, column = np.arange(height)[:, None] + self.first_row, np.arange(width)
        return self.base + column // 64 * (self.rows * 64) + row * 64 + column % 64

    def load(self, layout=None):
        return Tensor(self.flat[self._places()].reshape(self.shape))

    def store(self, value):
        self.flat[self._places()] = raw(value).reshape(-1, self.shape[-1])


class Transposed:
    def __init__(self, shared):
        self.shared = shared

    def load(self):
        return Tensor(self.shared.load().data.T)


class Barrier:
    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.missing = count

    def _update(self, arrivals, num_bytes):
        with self.changed:
            self.missing -= arrivals
            self.bytes += num_bytes
            assert self.missing >= 0, "more arrivals than the barrier was made for"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, TIMEOUT_S):
                raise DeadlockError


class Barriers:
    def __init__(self, number):
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, i):
        return self.barriers[operator.index(i)]


class mbarrier:  # noqa: N801
    MBarrierLayout = staticmethod(lambda: "barriers")
    init = staticmethod(lambda barrier, count: barrier.init(count))
    arrive = staticmethod(lambda barrier, count: barrier._update(count, 0))
    expect = staticmethod(lambda barrier, num_bytes: barrier._update(1, operator.index(num_bytes)))
    wait = staticmethod(lambda barrier, phase: barrier.wait(operator.index(phase)))


class tma:  # noqa: N801
    @staticmethod
    def async_copy_global_to_shared(desc, coordinates, barrier, shared):
        start = [operator.index(c) for c in coordinates]
        assert shared.shape == tuple(desc.block_type.shape)
        grids = np.ix_(*(np.arange(s, s + n) for s, n in zip(start, shared.shape, strict=True)))
        inside = np.all([(g >= 0) & (g < n) for g, n in zip(np.broadcast_arrays(*grids), desc.shape, strict=True)], 0)
        offset = sum(g * stride for g, stride in zip(grids, desc.strides, strict=True))
        shared.store(np.where(inside, desc.storage[np.where(inside, offset, 0)], 0))
        barrier._update(0, -inside.size * desc.storage.itemsize)


class Descriptor:
    def __init__(self, host):
        self.shape, self.strides, self.layout = host.shape, host.strides, host.layout
        self.block_type = types.SimpleNamespace(shape=host.block_shape)
        self.storage = Pointer.to_tensor(host.base).storage


class Pending:
    """A tensor-core operation that has begun; its operands are read when it is waited for."""

    def __init__(self, a, b, acc, use_acc):
        self.inputs, self.result = (a, b, acc if use_acc else None), None

    def finish(self):
        a, b, acc = self.inputs
        a, b = (raw(x.load() if isinstance(x, Shared | Transposed) else x).astype(np.float32) for x in (a, b))
        with np.errstate(all="ignore"):
            product = a @ b
        self.result = Tensor(product if acc is None else raw(acc) + product)


_thread = threading.local()


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async and not isinstance(acc, Pending)
    _thread.pending.append(Pending(a, b, acc, use_acc))
    return _thread.pending[-1]


def warpgroup_mma_wait(num_outstanding, deps):
    while len(_thread.pending) > num_outstanding:
        _thread.pending.pop(0).finish()
    assert all(dep.result is not None for dep in deps), "a result is used that was not waited for"
    results = [dep.result for dep in deps]
    return results[0] if len(results) == 1 else results


# ---- the language --------------------------------------------------------------------------------------------------


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0]) if len(shape) == 2 else Barrier()
    # NaN, so that nothing that was never written passes unseen.
    fill = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min
    return Shared(np.full(math.prod(shape), fill, dtype), 0, shape, len(shape) - 1)


def _warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
    errors = []

    def run(function, args):
        _thread.pending = []
        try:
            function(*args)
            assert not _thread.pending, "an operation was never waited for"
        except BaseException as error:
            errors.append(error)

    assert len(worker_num_warps) == len(worker_num_regs) == len(functions_and_args) - 1
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in functions_and_args]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda error: isinstance(error, DeadlockError))


def _language(program, num_programs):
    def unary(function):
        def call(x):
            with np.errstate(all="ignore"):
                return Tensor(function(raw(x)))

        return call

    return types.SimpleNamespace(
        float32=np.float32,
        int32=np.int32,
        int64=np.int64,
        program_id=lambda axis: Tensor(np.int32(program)),
        num_programs=lambda axis: Tensor(np.int32(num_programs)),
        to_tensor=Tensor,
        load=load,
        store=store,
        atomic_add=atomic_add,
        arange=lambda start, stop, layout: Tensor(np.arange(start, stop, dtype=np.int32)),
        full=lambda shape, value, dtype, layout: Tensor(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, dtype)),
        zeros_like=unary(np.zeros_like),
        where=lambda condition, a, b: Tensor(np.where(raw(condition), raw(a), raw(b))),
        minimum=lambda a, b: Tensor(np.minimum(raw(a), raw(b))),
        maximum=lambda a, b: Tensor(np.maximum(raw(a), raw(b))),
        cdiv=lambda a, b: (a + (b - 1)) // b,
        max=lambda x, axis: Tensor(raw(x).max(axis)),
        sum=lambda x, axis: Tensor(raw(x).sum(axis)),
        exp2=unary(np.exp2),
        log2=unary(np.log2),
        convert_layout=lambda x, layout: x,
        SliceLayout=lambda dim, parent: None,
        BlockedLayout=lambda *args: None,
        SwizzledSharedLayout=lambda *args: None,
        static_range=range,
        thread_barrier=lambda: None,
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
    )


def _argument(value):
    if isinstance(value, torch.Tensor):
        return Pointer.to_tensor(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return value


def names(module, program, num_programs):
    """The names in a module of Gluon functions, as one program of so many has them here."""
    found = dict(
        vars(module),
        gl=_language(program, num_programs),
        mbarrier=mbarrier,
        tma=tma,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        fence_async_shared=lambda: None,
    )
    for name, value in vars(module).items():
        if isinstance(value, GluonJITFunction):
            found[name] = types.FunctionType(value.fn.__code__, found, name, value.fn.__defaults__)
    return found


class OnCpu:
    """Stands where a module's Gluon kernel stands, and is launched like it: `kernel[(programs,)](*args, c=shape)`.

    Args:
        module: where the kernel and the functions that it calls are.
        name: the kernel's.
    """

    def __init__(self, module, name):
        self.module, self.kernel = module, getattr(module, name)

    def __getitem__(self, grid):
        def run(*args, c, **options):
            shape = c
            constants = {field.name: getattr(shape, field.name).value for field in fields(shape)}
            constants["dtype"] = np.float16
            shape = types.SimpleNamespace(
                **constants,
                tokens=shape.tokens.value,
                stage_in_queries=shape.stage_in_queries.value,
                **dict.fromkeys(("scores", "output", "weights", "rowwise", "shared")),
            )
            for program in range(grid[0]):
                found = names(self.module, program, grid[0])
                types.FunctionType(self.kernel.fn.__code__, found)(*map(_argument, args), shape)

        return run
