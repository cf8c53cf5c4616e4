"""Which implementation an operation runs: Triton kernels or plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


def runs_on_triton(tensor: Tensor) -> bool:
    """Triton for CUDA tensors that are not float64, PyTorch otherwise.

    `AVA_KERNELS_BACKEND=triton|torch` in the environment decides instead; with `TRITON_INTERPRET=1`, set before the
    first import, Triton takes CPU tensors too. Raises ValueError for another value, RuntimeError where Triton is asked
    for and cannot run.
    """
    choice = os.environ.get("AVA_KERNELS_BACKEND", "")
    if choice not in ("", "triton", "torch"):
        raise ValueError(f"AVA_KERNELS_BACKEND is {choice!r}; it must be triton or torch, or not be set")
    if choice == "torch" or tensor.dtype == torch.float64:  # kernels accumulate in float32
        return False
    if choice == "":
        return tensor.is_cuda and _has_triton()
    if not _has_triton():
        raise RuntimeError("AVA_KERNELS_BACKEND=triton, but triton is not installed: pip install triton")
    if not tensor.is_cuda and not tensor.is_meta and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"AVA_KERNELS_BACKEND=triton, but a tensor is on {tensor.device}: move it to a GPU, or set "
            "TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
        )
    return True


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
