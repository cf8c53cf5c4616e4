"""Which implementation an operation runs: Triton kernels or plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # no function: torch.compile would trace the search


def runs_on_triton(tensor: Tensor) -> bool:
    """Triton for CUDA tensors that are not float64, PyTorch otherwise.

    `AVA_KERNELS_BACKEND=triton|torch` in the environment decides instead; with `TRITON_INTERPRET=1`, set before the
    first import, Triton takes CPU tensors too. Raises ValueError for another value, RuntimeError where Triton is asked
    for and cannot run.
    """
    choice = asked_for()
    if choice == "torch" or tensor.dtype == torch.float64:  # kernels accumulate in float32
        return False
    if choice == "":
        return tensor.is_cuda and HAS_TRITON
    check_triton(tensor, "AVA_KERNELS_BACKEND=triton")
    return True


def asked_for() -> str:
    """What AVA_KERNELS_BACKEND asks for: "triton", "torch" or "". Raises ValueError for anything else."""
    choice = os.environ.get("AVA_KERNELS_BACKEND", "")
    if choice not in ("", "triton", "torch"):
        raise ValueError(f"AVA_KERNELS_BACKEND is {choice!r}; it must be triton or torch, or not be set")
    return choice


def is_known(numbers: Tensor) -> bool:
    """Whether to look at numbers that say where something lies: on a CPU, where that costs nothing, and on a GPU, where
    it is to wait for it, if AVA_KERNELS_CHECK=1 is in the environment. Never while there are none, as under
    torch.compile."""
    there = numbers.is_cpu or (numbers.is_cuda and os.environ.get("AVA_KERNELS_CHECK") == "1")
    return there and not torch.compiler.is_compiling() and not isinstance(numbers, FakeTensor)


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype where it is on, but for float64, as torch's own products and attention have it: norms and
    tables in float32 leave queries in another dtype than values, and weights are float32."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """For what is computed in float32 on purpose by products that autocast knows."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def check_triton(tensor: Tensor, asked_by: str) -> None:
    """Raises RuntimeError where Triton cannot run on a tensor; `asked_by` names what asked for it, as it was given."""
    if not HAS_TRITON:
        raise RuntimeError(f"{asked_by}, but triton is not installed: pip install triton")
    if not tensor.is_cuda and not tensor.is_meta and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{asked_by}, but a tensor is on {tensor.device}: move it to a GPU, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
