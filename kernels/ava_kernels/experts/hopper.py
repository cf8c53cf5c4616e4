"""The experts' grouped GEMMs for Hopper in Gluon, warp-specialised, in the place of those of `kernels.py`.

Two consumer warp groups multiply 64 rows each and run the epilogue of their tile; producer warps load what they
multiply next into a ring of stages, across the ends of tiles: weights and contiguous rows by TMA, rows that are named
by token by cp.async, whose indices are in registers before a tile begins. A consumer has one wgmma in flight while it
issues the next. Tiles, their order and every formula are those of `kernels.py`.

Not run on a GPU yet, so taken only where `backend="hopper"` asks for it or a table of what was measured has it first
(`tiles.py`). What is known of it: it compiles for sm_90
without spills (`python -m bench.sm90`), and its tests run every warp of it on a CPU, against a loop over the experts.

What TMA cannot fetch, because it does not begin at multiples of 16 bytes or has no side that lies side by side,
activations without a gate, and gradients that are added to sums are left to `kernels.py`, product by product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ava_kernels.experts import hopper_kernels, hopper_weight_grad
from ava_kernels.experts.reference import GATED
from ava_kernels.hopper import GROUP, runs_on

__all__ = ["down_backward", "grouped_mm", "runs_on", "takes", "up", "weight_grad"]
OWN, COLUMNS, DEPTH = GROUP.value, hopper_kernels.COLUMNS.value, hopper_kernels.DEPTH.value
STAGES = {1: 6, 2: 4}  # by halves of columns: as many as shared memory has room for
REGISTERS = 168  # of a thread, before groups share them out
UNIT = 8  # elements of 16 bytes, which divide every size and stride


def takes(x: Tensor) -> bool:
    """Whether there are kernels for such tensors."""
    return x.dtype in (torch.float16, torch.bfloat16)


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor, out: Tensor) -> bool:
    """out (N, P) = each expert's rows of x (N, L) times its w (E, L, P), or False, and nothing is done."""
    right = _right(w)
    if right is None or not _is_aligned(x) or out.shape[1] % UNIT:
        return False
    tile = [OWN, DEPTH]
    left = TensorDescriptor(x, list(x.shape), list(x.stride()), tile, _layout(tile, x.dtype))
    (E, L, P), columns = w.shape, triton.cdiv(w.shape[2], 2 * COLUMNS)
    programs = _programs(x, E, columns)
    hopper_kernels._hopper_grouped_mm[(programs,)](
        left, right[0], ends, out, E, L, P, programs, UNIT=UNIT, **_constants(2, right[1])
    )
    return True


def up(x: Tensor, gate_up: Tensor, token: Tensor, ends: Tensor, h: Tensor, a: Tensor, activation: str) -> bool:
    """h (N, 2I) = the rows of x (T, M) that `token` names times gate_up (E, 2I, M), and a (N, I) its activation; or
    False, and nothing is done."""
    right = _right(gate_up.mT)
    I = a.shape[1]
    if right is None or not _is_aligned(x) or I % UNIT or activation not in GATED:
        return False
    E, _, M = gate_up.shape
    programs = _programs(h, E, triton.cdiv(I, COLUMNS))
    hopper_kernels._hopper_up[(programs,)](
        x,
        x.stride(0),
        right[0],
        token,
        ends,
        h,
        a,
        E,
        M,
        I,
        programs,
        ACTIVATION=activation,
        UNIT=UNIT,
        **_constants(2, right[1]),
    )
    return True


def down_backward(
    dout: Tensor,
    down: Tensor,
    h: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    dh: Tensor,
    weighted_a: Tensor | None,
    needs_weight: bool,
    activation: str,
) -> tuple[bool, Tensor | None]:
    """dh (N, 2I) and weighted_a (N, I) from the rows of dout (T, M) that `token` names times down (E, M, I), and the
    parts (·, N) of weight's gradient, float32; or False, and nothing is done."""
    right = _right(down)
    E, M, I = down.shape
    if right is None or not _is_aligned(dout) or I % UNIT or activation not in GATED:
        return False, None
    N, columns = len(token), triton.cdiv(I, COLUMNS)
    parts = dout.new_empty(columns, N, dtype=torch.float32) if needs_weight else None
    programs = _programs(h, E, columns)
    hopper_kernels._hopper_down_backward[(programs,)](
        dout,
        dout.stride(0),
        right[0],
        h,
        weight,
        token,
        slot,
        ends,
        dh,
        weighted_a,
        parts,
        E,
        M,
        I,
        N,
        programs,
        K=weight.shape[1],
        ACTIVATION=activation,
        UNIT=UNIT,
        **_constants(1, right[1]),
    )
    return True, parts


def weight_grad(
    x: Tensor, x_token: Tensor | None, y: Tensor, y_token: Tensor | None, ends: Tensor, out: Tensor
) -> bool:
    """out (E, M, P) = Σ over an expert's rows of x (·, M)ᵀ · y (·, P), the rows of one of them named by token (N,); or
    False, and nothing is done."""
    gathered, token, other = (x, x_token, y) if x_token is not None else (y, y_token, x)
    aligned = _is_aligned(gathered) and _is_aligned(other)
    if not aligned or out.stride(2) != 1 or any(stride % UNIT for stride in out.stride()[:2]) or out.data_ptr() % 16:
        return False
    E, M, P = out.shape
    tile = [DEPTH, COLUMNS if x_token is not None else OWN]
    descriptor = TensorDescriptor(other, list(other.shape), list(other.stride()), tile, _layout(tile, other.dtype))
    tiles = E * triton.cdiv(M, 2 * OWN) * triton.cdiv(P, 2 * COLUMNS)
    programs = min(_processors(out.device), tiles)
    hopper_weight_grad._hopper_weight_grad[(programs,)](
        gathered,
        gathered.stride(0),
        token,
        descriptor,
        ends,
        out,
        *out.stride()[:2],
        E,
        M,
        P,
        programs,
        GATHERED=int(x_token is None),
        STAGES=STAGES[2],
        UNIT=UNIT,
        num_warps=4,
        maxnreg=REGISTERS,
    )
    return True


def _is_aligned(x: Tensor) -> bool:
    """A matrix whose rows can be fetched in units of 16 bytes."""
    return x.stride(1) == 1 and not (x.shape[1] % UNIT or x.stride(0) % UNIT or x.data_ptr() % 16) and x.stride(0) > 0


def _right(w: Tensor) -> tuple[TensorDescriptor, bool] | None:
    """w (E, L, P) as the kernels fetch it, and whether its columns lie side by side; None if TMA cannot."""
    if wide := w.stride(2) == 1:
        tile = [1, DEPTH, COLUMNS]
    elif w.stride(1) == 1:
        w, tile = w.mT, [1, COLUMNS, DEPTH]
    else:
        return None
    if any(stride % UNIT or stride <= 0 for stride in w.stride()[:2]) or w.data_ptr() % 16:
        return None
    return TensorDescriptor(w, list(w.shape), list(w.stride()), tile, _layout(tile, w.dtype)), wide


def _layout(tile: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _programs(x: Tensor, E: int, columns: int) -> int:
    """As many as there are processors, or can be tiles."""
    return min(_processors(x.device), (len(x) // (2 * OWN) + min(E, len(x))) * columns)


@functools.cache
def _processors(device: torch.device) -> int:
    """Without a GPU: an H200's, or on a CPU so few that a program has several tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3


def _constants(halves: int, wide: bool) -> dict[str, Any]:
    return {
        "WIDE": wide,
        "STAGES": STAGES[halves],
        "num_warps": 4,
        "maxnreg": REGISTERS,
    }
