"""Triton's interpreter, closer to a GPU and in half the time.

    install()       once, before kernels are interpreted
    ORDER.seed(…)   before what is to run as it ran before

A launch's programs run in an order drawn anew for each, where the interpreter's own is always the same: a program that
relies on what another of its launch has done, or a sum by atomics that should give the same bits, fails.

Of the time that the tests of kernels take, a third went into replacing every function of `triton.language` anew at each
call of one jitted function by another, a sixth into asking six tensors whether an int32 overflowed, which numpy tells
of two arrays. What is not as in the Triton this was written for is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

POINTER = np.dtype(np.uint64)
ORDER = random.Random(0)
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    number = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: POINTER if kind.scalar.is_ptr() else number(kind.scalar)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor.__call__ = _during_a_launch(interpreter.GridExecutor.__call__)
    _shuffle(interpreter.interpreter_builder)
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _shuffle(builder: Any) -> None:
    """The interpreter counts programs up in three loops; each is given another's number."""
    set_size, set_program = builder.set_grid_dim, builder.set_grid_idx
    size, programs = (1, 1, 1), [0]

    def set_grid_dim(*grid: int) -> None:
        nonlocal size, programs
        size, programs = grid, list(range(math.prod(grid)))
        ORDER.shuffle(programs)
        set_size(*grid)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        program = programs[(x * size[1] + y) * size[2] + z]
        set_program(program // (size[1] * size[2]), program // size[2] % size[1], program % size[2])

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


_replaced: set[Any] = set()  # modules whose functions the current launch has replaced


def _during_a_launch(launch: Any) -> Any:
    @functools.wraps(launch)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        _replaced.clear()
        _replaced.update(_languages(self.fn))
        launch(self, *args, **kwargs)

    return run


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """One jitted function calls another."""
    languages = _languages(self.fn)
    if not languages <= _replaced:
        interpreter._patch_lang(self.fn)
        _replaced.update(languages)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@functools.cache
def _languages(function: Any) -> frozenset[Any]:
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(module for module in modules if module in (tl, tl.core))


def _check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """The sum, difference or product of integers of fewer than 64 bits must be one of theirs."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    exact = EXACT[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
    fits = exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"
