"""The public gradient operations: `grad_stats`, `clip_coefficient`, `clip_`.

Two custom ops, opaque to torch.compile. They run the C++ extension (`csrc/`) where its half for the tensors' device is
built, and `reference.py`, which is also the definition, elsewhere. `AVA_KERNELS_BACKEND=torch` asks for the latter.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ava_kernels import backend
from ava_kernels.gradients import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GradStats:
    """Statistics of N tensors, on their device. Norms and magnitudes are float32, float64 if a tensor is float64."""

    norm: Tensor
    """0-d: the L2 norm of all values together; NaN if one is NaN, else Inf if one is infinite."""
    max_abs: Tensor
    """0-d: the largest magnitude; NaN if a value is NaN."""
    nonfinite: Tensor
    """0-d int64: how many values are NaN or infinite."""
    first_nonfinite: Tensor
    """0-d int64: the index of the first tensor that has such a value, −1 if none has."""
    tensor_norm: Tensor | None = None
    """(N,): the norm of each tensor, if asked for."""
    tensor_max_abs: Tensor | None = None
    """(N,): the largest magnitude of each tensor, if asked for."""
    tensor_nonfinite: Tensor | None = None
    """(N,) int64: the number of non-finite values of each tensor, if asked for."""


def grad_stats(tensors: Iterable[Tensor], *, per_tensor: bool = False) -> GradStats:
    """L2 norm, largest magnitude and non-finite values of several tensors, read once.

    tensors: any number, of any shapes and strides, float32, float64, float16 or bfloat16, mixed at will, on one device.
    Those whose memory has gaps or overlaps are copied, others are read where they lie. With `per_tensor`, the same for
    each tensor. An empty list has norm 0 on the CPU.

    The norm is right to float32 rounding for every finite value: the CPU sums squares in float64; a GPU thread sums
    those of 64 bytes in float32 if their largest magnitude lies between 2^-40 and 2^60, in float64 otherwise, and these
    sums in float64. (The cheaper of the two ideas behind Blue's algorithm, 1978, "A portable Fortran program to find
    the Euclidean norm of a vector": tell safe values from the rest by their size.) A norm above the largest float32 is
    Inf though no value is, so ask `norm`, not only `nonfinite`, whether a step is safe.

    Never waits for the device and can be captured in a CUDA graph. The same tensors give the same bits on one device,
    whatever the number of threads. Not differentiable. Of tensors on "meta" the results are on "meta", too. Raises
    ValueError, naming the tensor.
    """
    tensors = _listed(tensors)
    if not tensors:
        zero, none = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        each = (zero.new_zeros(0), zero.new_zeros(0), none.new_zeros(0)) if per_tensor else ()
        return GradStats(zero, zero.clone(), none, none - 1, *each)
    _check(tensors)
    with torch.no_grad():
        run = torch.ops.ava_kernels.grad_stats if _runs_op(tensors[0].device.type) else reference.stats
        found = run(tensors, per_tensor)
    return GradStats(*(found if per_tensor else found[:4]))


def clip_coefficient(stats: GradStats, max_norm: float) -> Tensor:
    """The factor that brings the norm down to `max_norm`, 1 if it is no larger. 0-d, of the norm's device and dtype.

    min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it. Where the norm is not finite the factor
    is 1: that formula would give 0 or NaN there, and erase the finite gradients or spoil them. Such a step must not
    be taken, and `stats` says so; scaling cannot repair it. Raises ValueError unless max_norm > 0 (Inf never clips).
    """
    if not isinstance(max_norm, Real) or not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm!r}; it must be a number above 0 (float('inf') never clips)")
    coefficient = (max_norm / (stats.norm + 1e-6)).clamp(max=1.0)
    return torch.where(stats.norm.isfinite(), coefficient, 1.0)


def clip_(tensors: Iterable[Tensor], coefficient: Tensor | float) -> None:
    """Multiplies tensors in place by a factor that stays on the device.

    tensors: as for `grad_stats`, but none may share memory with itself or another. coefficient: 0-d, float32 or
    float64, on the tensors' device, or a number. Products are made in float32, in float64 for float64 tensors, and
    rounded to the tensor's dtype. If the coefficient is 1 the extension sees that on the device, and neither reads nor
    writes a tensor (on a GPU it does copy those with gaps in memory, forth and back).

    Never waits for the device and can be captured in a CUDA graph. Outside autograd. Raises ValueError, naming the
    argument or the tensor.
    """
    tensors = _listed(tensors)
    if isinstance(coefficient, Tensor):
        if coefficient.dim() or coefficient.dtype not in (torch.float32, torch.float64):
            shape = tuple(coefficient.shape)
            raise ValueError(f"coefficient is {coefficient.dtype} of shape {shape}; it must be one float32 or float64")
    elif not isinstance(coefficient, Real):
        raise ValueError(f"coefficient is {coefficient!r}; it must be a number, or a tensor of one")
    if not tensors:
        return
    _check(tensors)
    _check_overlaps(tensors)
    if not isinstance(coefficient, Tensor):  # as exact as it was; filled, as a copy would be waited for
        coefficient = torch.full((), float(coefficient), dtype=torch.float64, device=tensors[0].device)
    if coefficient.device != tensors[0].device:
        raise ValueError(
            f"coefficient is on {coefficient.device}, the tensors on {tensors[0].device}: move one of them"
        )
    with torch.no_grad():
        run = torch.ops.ava_kernels.clip_ if _runs_op(tensors[0].device.type) else reference.scale_
        run(tensors, coefficient)
        torch.autograd.graph.increment_version(tensors)  # the extension writes behind autograd's back


def _listed(tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise ValueError(f"tensors is one tensor of shape {tuple(tensors.shape)}; it must be a list of them: [tensor]")
    return list(tensors)


def _check(tensors: list[Tensor]) -> None:
    # Quick, for lists of thousands.
    kinds = {(t.device, t.dtype, t.layout) if isinstance(t, Tensor) else None for t in tensors}
    devices = {kind[0] for kind in kinds if kind}
    if len(devices) == 1 and all(kind and kind[1] in DTYPES and kind[2] == torch.strided for kind in kinds):
        return
    for index, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            given = "None: leave out parameters that have no gradient" if t is None else f"{t!r}; it must be a tensor"
            raise ValueError(f"tensors[{index}] is {given}")
        if t.device != tensors[0].device:
            raise ValueError(
                f"tensors[{index}] is on {t.device}, tensors[0] on {tensors[0].device}: they must be on one device"
            )
        if t.dtype not in DTYPES or t.layout != torch.strided:
            raise ValueError(
                f"tensors[{index}] is {t.dtype}, {t.layout}; it must be strided, float32, float64, float16 or bfloat16"
            )


def _check_overlaps(tensors: list[Tensor]) -> None:
    for index, t in enumerate(tensors):
        if not t.is_contiguous() and any(n > 1 and not stride for n, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"tensors[{index}] is expanded, {tuple(t.shape)} with strides {t.stride()}: its elements share memory; "
                "give what it was expanded from, or a clone()"
            )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_op(device: str) -> bool:
    """Whether to call the op, or the reference itself where it was asked for; says so if the op is the reference."""
    by_torch = backend.asked_for() == "torch"
    if not by_torch and device != "meta":  # of which torch describes the results, whatever is built
        _find_extension(device)
    return not by_torch


@functools.cache
def _find_extension(device: str) -> bool:
    """Whether the extension has a half for this kind of device; says so, once, if it has none."""
    problem = _load()
    if not problem:
        if torch._C._dispatch_has_kernel_for_dispatch_key("ava_kernels::grad_stats", device.upper()):
            return True
        problem = f"ava_kernels' extension was built without {device.upper()}"
    needs = "a C++ compiler, nvcc and a CUDA build of torch" if device == "cuda" else "a C++ compiler"
    warnings.warn(
        f"{problem}: gradient statistics run in plain PyTorch, with the same results but several times slower. "
        f"To build it, install {needs}, then run: pip install --no-build-isolation --force-reinstall --no-deps -e .",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def _load() -> str:
    """Loads the extension → what is wrong, or nothing."""
    libraries = sorted(Path(__file__).parent.glob("_extension*.so"))
    if not libraries:
        return "ava_kernels' extension is not built"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"ava_kernels' extension cannot be loaded ({error})"
    return ""


# Declared without the Python layer of torch.library.custom_op: for thousands of tensors it takes longer than the rest.
_library = torch.library.Library("ava_kernels", "FRAGMENT")
_library.define(
    "grad_stats(Tensor[] tensors, bool per_tensor) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("clip_(Tensor(a!)[] tensors, Tensor coefficient) -> ()")
_library.impl("grad_stats", reference.stats, "CompositeExplicitAutograd")
_library.impl("clip_", reference.scale_, "CompositeExplicitAutograd")


def _fake_stats(tensors: Sequence[Tensor], per_tensor: bool) -> reference.Outputs:
    wide = any(t.dtype == torch.float64 for t in tensors)
    device, kept = tensors[0].device, len(tensors) if per_tensor else 0

    def empty(*shape: int, count: bool = False) -> Tensor:
        dtype = torch.int64 if count else torch.float64 if wide else torch.float32
        return torch.empty(shape, dtype=dtype, device=device)

    return reference.Outputs(
        norm=empty(),
        max_abs=empty(),
        nonfinite=empty(count=True),
        first_nonfinite=empty(count=True),
        tensor_norm=empty(kept),
        tensor_max_abs=empty(kept),
        tensor_nonfinite=empty(kept, count=True),
    )


def _fake_clip(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    return None


torch.library.register_fake("ava_kernels::grad_stats", _fake_stats, lib=_library)
torch.library.register_fake("ava_kernels::clip_", _fake_clip, lib=_library)
