"""Runs Gluon kernels for Hopper on a CPU, which Triton's interpreter does not: every warp group as a thread.

    with emulated():
        hopper.forward(q, k, v, …)   # on CPU tensors; launches run here

Blocks are torch tensors, shared memory starts as NaN, barriers have phases, counts and bytes to come. What a GPU may do
in any order is done early or late at random: a fetch lands at some time before its barrier says so, an asynchronous
product reads its operands when it is issued or as late as when it is waited for. So a stage that is given back too
early, a phase that is off by one or a token that is never passed on shows as a wrong number or as a deadlock, which
ends after a few seconds. A product or a fetch must not meet what was stored without a fence.

Layouts, and what registers they need, are not looked at: the compiler does that (`test_sm90.py`).
"""

from __future__ import annotations

import builtins
import functools
import inspect
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PATIENCE = 20.0  # seconds without a sign of life: a deadlock

_program = threading.local()  # of this thread: program, pending products, memory stored to without a fence, randomness


class Pointer:
    """To the elements of a tensor's storage."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0):
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + offset)


class Memory:
    """A piece of shared memory."""

    def __init__(self, data: torch.Tensor, whole: Memory | None = None):
        self.data = data
        self._whole = whole or self
        self._parts: dict[int, Memory] = {}
        self.unfenced: set[int] = set()  # threads that stored to it
        self.copied: set[int] = set()  # threads whose asynchronous copies landed in it

    def index(self, i: Any) -> Memory:
        return self._parts.setdefault(int(i), Memory(self.data[int(i)]))

    def reshape(self, shape: list[int]) -> Memory:
        return Memory(self.data.view(shape), self._whole)

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.data.permute(order), self._whole)

    def store(self, value: torch.Tensor) -> None:
        assert self.data.shape == value.shape
        assert self.data.dtype == value.dtype
        self.data.copy_(value)
        self._whole.unfenced.add(threading.get_ident())
        _program.stored.append(self._whole)

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def slice(self, first: int, size: int) -> Memory:
        return Memory(self.data[first : first + size], self._whole)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def for_tensor_cores(self) -> torch.Tensor:
        """As products of this group see it: another group may store the same, and reads it for itself."""
        assert threading.get_ident() not in self._whole.unfenced, "stored to without fence_async_shared()"
        assert not self._whole.copied, "copied to without fence_async_shared()"
        return self.data

    def for_fetching(self) -> torch.Tensor:
        """As TMA sees it."""
        assert not self._whole.unfenced, "stored to without fence_async_shared()"
        return self.data

    def land(self, values: torch.Tensor) -> None:
        """Of an asynchronous copy, which somebody waited for."""
        self.data.copy_(values)
        self._whole.copied.add(threading.get_ident())
        _program.stored.append(self._whole)


class Barrier:
    """An mbarrier: a phase ends once `count` have arrived and no bytes are to come."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._missing = self._bytes = self._phases = 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, number: int = 1, expected: int = 0, landed: int = 0) -> None:
        with self._changed:
            assert self._missing >= number, "more arrivals than the barrier was made for"
            self._missing -= number
            self._bytes += expected - landed
            if self._missing == 0 and self._bytes == 0:
                self._phases, self._missing = self._phases + 1, self._count
            self._changed.notify_all()

    def wait(self, phase: Any) -> None:
        """Until the phase of this parity is over."""
        with self._changed:
            over = self._changed.wait_for(lambda: self._phases & 1 != int(phase) & 1, PATIENCE)
        assert over, f"deadlock: waited for phase {int(phase)}"


class Product:
    """An asynchronous a·b + acc: reads shared memory as late as it likes."""

    def __init__(self, compute: Callable[[], torch.Tensor]):
        self._compute, self.value = compute, None
        if _program.random.random() < 0.5:
            self.finish()

    def finish(self) -> torch.Tensor:
        if self.value is None:
            self.value = self._compute()
        return self.value

    def _too_early(self, *_: Any) -> Any:
        raise AssertionError("a product is used that is still under way")

    __getattr__ = __add__ = __mul__ = __truediv__ = _too_early


def _warpgroup_mma(a: Any, b: Memory, acc: torch.Tensor, *, use_acc: bool = True, is_async: bool = False) -> Any:
    def compute() -> torch.Tensor:
        left = a.for_tensor_cores() if isinstance(a, Memory) else a
        right = b.for_tensor_cores()
        assert left.dtype == right.dtype
        product = left.float() @ right.float()
        if not use_acc:
            return product
        return product + (acc.finish() if isinstance(acc, Product) else acc)

    if not is_async:
        return compute()
    product = Product(compute)
    _program.pending.append(product)
    return product


def _warpgroup_mma_wait(number: int, deps: tuple[Product, ...]) -> Any:
    while len(_program.pending) > number:
        _program.pending.pop(0).finish()
    under_way = set(map(id, _program.pending))
    values = tuple(dep if id(dep) in under_way or not isinstance(dep, Product) else dep.value for dep in deps)
    return values[0] if len(values) == 1 else values


def _fence_async_shared() -> None:
    while _program.stored:
        memory = _program.stored.pop()
        memory.unfenced.discard(threading.get_ident())
        memory.copied.discard(threading.get_ident())


def _copy(target: Memory, pointer: Pointer, mask: Any = True) -> None:
    _program.copies.append((target, _load(pointer, mask)))


def _commit_group() -> None:
    _program.groups.append(_program.copies)
    _program.copies = []


def _wait_group(number: int) -> None:
    while len(_program.groups) > number:
        for target, values in _program.groups.pop(0):
            target.land(values)


def _fetch(descriptor: Any, place: list[Any], barrier: Barrier, target: Memory) -> None:
    tile = torch.zeros(descriptor.block_shape, dtype=descriptor.dtype)
    wanted, there = [], []
    for first, size, length in zip(place, descriptor.block_shape, descriptor.base.shape, strict=True):
        first, last = int(first), min(int(first) + size, length)
        assert first >= 0
        wanted.append(slice(first, max(first, last)))
        there.append(slice(0, max(0, last - first)))
    tile[tuple(there)] = descriptor.base[tuple(wanted)]
    late = _program.random.random() * 2e-3 if _program.random.random() < 0.3 else 0.0

    @torch.no_grad()
    def land() -> None:
        time.sleep(late)
        target.for_fetching().copy_(tile)
        barrier.arrive(0, landed=descriptor.block_type.nbytes)

    if late:
        threading.Thread(target=land, daemon=True).start()
    else:
        land()


def _masked(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """→ offsets and mask, of one shape."""
    offset, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
    return offset, mask


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> torch.Tensor:
    offset, mask = _masked(pointer, mask)
    values = torch.full(offset.shape, other, dtype=pointer.flat.dtype)
    values[mask] = pointer.flat[offset[mask]]
    return values


def _store(pointer: Pointer, value: torch.Tensor, mask: Any = True) -> None:
    offset, mask = _masked(pointer, mask)
    assert value.dtype == pointer.flat.dtype
    pointer.flat[offset[mask]] = value.expand(offset.shape)[mask]


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, mbarrier.MBarrierLayout):
        barriers = [Barrier() for _ in range(shape[0])]
        if len(shape) == 1:
            return barriers[0]
        return types.SimpleNamespace(index=lambda i: barriers[int(i)])
    return Memory(torch.full(shape, float("nan"), dtype=dtype))


def _warp_specialize(functions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    number, seed, failures = _program.number, _program.random.random(), []

    @torch.no_grad()  # which a thread does not inherit
    def run(function: Callable[..., None], arguments: tuple[Any, ...], partition: int) -> None:
        _begin(number, seed + partition)
        try:
            function(*arguments)
            assert not _program.pending, "a product is never waited for"
            assert not [*_program.copies, *_program.groups], "a copy is never waited for"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(*each, i), daemon=True) for i, each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE)
    if failures:
        raise failures[0]


def _begin(number: int, seed: float) -> None:
    _program.number, _program.random = number, random.Random(seed)
    _program.pending, _program.stored, _program.copies, _program.groups = [], [], [], []


def _both(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _of_a_layout(x: torch.Tensor) -> torch.Tensor:
    """For kernels that ask a block for its layout."""
    return x.as_subclass(_Block)


class _Block(torch.Tensor):
    type = types.SimpleNamespace(layout=None)  # type: ignore[assignment]
    __iadd__ = torch.Tensor.__add__  # names stand for values: another name for the same one keeps it


def _no_layout(*_: Any, **__: Any) -> None:
    return None


_no_layout.get_default_for = _no_layout  # type: ignore[attr-defined]
LANGUAGE = types.SimpleNamespace(
    **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "float16", "bfloat16", "where")},
    **{name: getattr(torch, name) for name in ("erf", "exp2", "log2", "rsqrt", "zeros_like")},
    **dict.fromkeys(
        ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "SwizzledSharedLayout"),
        _no_layout,
    ),
    NVMMASharedLayout=_no_layout,
    constexpr=lambda value: value,
    static_range=range,
    minimum=_both(torch.minimum),
    maximum=_both(torch.maximum),
    cdiv=lambda a, b: -(-a // b),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    convert_layout=lambda x, layout: x,
    reshape=lambda x, shape: x.reshape(shape),
    permute=lambda x, order: x.permute(order),
    split=lambda x: (_of_a_layout(x[..., 0]), _of_a_layout(x[..., 1])),
    join=lambda x, y: torch.stack((x, y), -1),
    program_id=lambda axis: _scalar(_program.number),
    load=_load,
    store=_store,
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
)
HOPPER = types.SimpleNamespace(
    fence_async_shared=_fence_async_shared,
    warpgroup_mma=_warpgroup_mma,
    warpgroup_mma_wait=_warpgroup_mma_wait,
)


def _arrive(barrier: Barrier, count: int = 1) -> None:
    barrier.arrive(count)
    if _program.random.random() < 0.2:
        time.sleep(1e-3)  # whoever waited for this gets ahead


BARRIERS = types.SimpleNamespace(
    MBarrierLayout=mbarrier.MBarrierLayout,
    init=lambda barrier, count: barrier.init(count),
    arrive=_arrive,
    expect=lambda barrier, size: barrier.arrive(1, expected=size),
    wait=lambda barrier, phase: barrier.wait(phase),
)
FETCH = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
COPIES = types.SimpleNamespace(async_copy_global_to_shared=_copy, commit_group=_commit_group, wait_group=_wait_group)
STAND_INS = {
    id(gl): LANGUAGE,
    id(hopper): HOPPER,
    id(mbarrier): BARRIERS,
    id(FETCH): _fetch,
    id(async_copy): COPIES,
}


@functools.cache
def _translated(module: types.ModuleType) -> dict[str, Any]:
    """The module's names as kernels are to see them."""
    names: dict[str, Any] = {"__builtins__": builtins}
    for name, value in vars(module).items():
        if isinstance(value, GluonJITFunction) and value.fn.__module__ == module.__name__:
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif isinstance(value, GluonJITFunction):
            names[name] = names_of(value)[value.fn.__name__]
        elif isinstance(value, gl.constexpr):
            names[name] = value.value
        else:
            names[name] = STAND_INS.get(id(value), value)
    return names


def names_of(kernel: GluonJITFunction) -> dict[str, Any]:
    """What it sees by its module's names, itself among them."""
    return _translated(sys.modules[kernel.fn.__module__])


def with_fault(monkeypatch: Any, kernel: GluonJITFunction, line: str, other: str) -> None:
    """Runs a kernel with one line of it changed, wherever it is called."""
    source = inspect.getsource(kernel.fn)
    assert source.count(line) == 1
    names: dict[str, Any] = names_of(kernel)
    changed: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + source[source.index("def ") :].replace(line, other), names, changed)
    callers = [
        _translated(module)  # all of them before the first is changed: one takes its names from another
        for name, module in list(sys.modules.items())
        if name.startswith("ava_kernels.") and vars(module).get(kernel.fn.__name__) is kernel
    ]
    for caller in callers:
        monkeypatch.setitem(caller, kernel.fn.__name__, changed[kernel.fn.__name__])


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(torch.as_strided(value, (value.untyped_storage().size() // value.element_size(),), (1,), 0)) + (
            value.storage_offset()
        )
    if isinstance(value, TensorDescriptor):
        size = torch.Size(value.block_shape).numel() * value.base.element_size()
        return types.SimpleNamespace(
            base=value.base.as_strided(value.shape, value.strides),
            block_shape=list(value.block_shape),
            block_type=types.SimpleNamespace(nbytes=size, shape=list(value.block_shape)),
            dtype=value.base.dtype,
            layout=value.layout,
        )
    return _scalar(value) if type(value) is int else value


def _scalar(value: int) -> torch.Tensor:
    """As wide as Triton makes it: 32 bits where they are enough, which then overflow."""
    number = torch.tensor([value], dtype=torch.int32 if -(2**31) <= value < 2**31 else torch.int64)
    return number.as_subclass(_Block)


@contextmanager
def emulated(seed: int = 0) -> Iterator[None]:
    """Within it, launches of Gluon kernels run here, programs one after the other."""

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = ("num_warps", "num_stages", "maxnreg")
        constants = {name: value for name, value in kwargs.items() if name not in options}
        names = names_of(self)
        for number in range(grid[0]):
            _begin(number, seed + number)
            names[self.fn.__name__](*map(_argument, args), **constants)

    original = GluonJITFunction.run
    GluonJITFunction.run = run
    try:
        yield
    finally:
        GluonJITFunction.run = original
