"""Attention for Hopper in Gluon, forward and backward, by warps that specialise.

    (rotary) _rotate   forward   keys, once
    _hopper_forward    forward   rotates its queries as it loads them and keeps them rotated for backward; out and lse
    (kernels) _delta   backward  ⟨out, dout⟩ of every query
    _hopper_dkdv       backward  dk and dv of 128 keys, dk rotated back before it is stored
    _hopper_dq         backward  dq of 128 queries, rotated back likewise

In each, a producer warp loads tiles by TMA into a ring of stages, and two consumer warp groups compute 64 rows each. In
the forward pass a consumer issues the product with the next keys before it waits for that with the last values, so that
its softmax runs while tensor cores work; a pair of barriers lets one issue while the other is at its softmax (the
ping-pong schedule of Shah et al., 2024, "FlashAttention-3"). The weights of the softmax stay in registers. Sums are in
a fixed order, so the same input gives the same bits.

The formulas of `kernels.py`, with tiles of other sizes, so not the same bits as there. It is for 16 bits and heads of
up to 128 elements, with any mask, cap and rotation, packed or not. A packed document gives the bits that it gives
alone: a tile that reaches into the next one has what is not its own set to 0 in shared memory, where TMA would have
set it to 0 at the end of a sequence.

Not run on a GPU yet, so taken only where `backend="hopper"` asks for it or a table of what was measured has it first
(`tiles.py`). What is known of it: it compiles for sm_90
without spills (`python -m bench.sm90`), and its tests run every warp of it on a CPU, against the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ava_kernels.attention import hopper_backward, hopper_forward
from ava_kernels.attention.tiles import ring_for
from ava_kernels.hopper import GROUP, runs_on
from ava_kernels.rotary import kernels as rotary

if TYPE_CHECKING:
    from ava_kernels.attention.kernels import Shape

__all__ = ["backward", "forward", "runs_on", "takes"]
OWN = GROUP.value  # rows of a warp group
PADDED = (32, 64, 128)  # elements that a head has in shared memory


def takes(q: Tensor) -> bool:
    """Whether such queries can be taken."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and 0 < q.shape[-1] <= PADDED[-1]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    shape: Shape,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.forward`, for what `takes` lets through."""
    (B, S_q, H_q, D), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H_q, S_q), dtype=torch.float32)
    rotated_k = k.new_empty(0 if cos is None else k.shape)
    if cos is not None and sin is not None:
        cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
        rotary.rotate(k, cos, sin, position, shape.interleaved, False, rotated_k)
        k = rotated_k
    rotated_q = q.new_empty(q.shape if keep and cos is not None else 0)
    q = q if q.stride(3) == 1 else q.contiguous()
    sequences = B if cu_q is None else len(cu_q) - 1
    blocks = triton.cdiv(shape.max_q, 2 * OWN)
    if cu_q is not None or not (blocks and sequences and S_k):
        out, lse = out.zero_(), lse.fill_(float("-inf"))  # behind the last document there may be rows
    if blocks and sequences and S_k:
        ring = ring_for("hopper_forward", q, shape.softcap)
        hopper_forward._hopper_forward[(blocks * sequences * H_q,)](
            q,
            *q.stride()[:3],
            _heads(_for_tma(k), ring.rows),
            _heads(_for_tma(v), ring.rows),
            *_table(cos, sin, position),
            out,
            rotated_q if rotated_q.numel() else None,
            lse,
            cu_q,
            cu_k,
            blocks,
            S_q,
            S_k,
            H_q,
            H_q // H_kv,
            *_numbers(shape),
            **_constants(shape, D, cos),
            PACKED=cu_k is not None,
            BN=ring.rows,
            STAGES=ring.stages,
        )
    return out, lse, rotated_q, rotated_k


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.backward`, for what `takes` lets through."""
    from ava_kernels.attention import kernels

    (B, S_q, H_q, D), S_k, H_kv = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    sequences = B if cu_q is None else len(cu_q) - 1
    some = sequences > 0 and min(shape.max_q, shape.max_k, dq.numel(), dk.numel()) > 0
    if cu_q is not None or not some:
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
    if not some:
        return dq, dk, dv
    delta = kernels.delta(out, dout, dlse)
    q, k, v, dout = (_for_tma(t) for t in (q, k, v, dout))
    fused = cos is not None and 2 * cos.shape[1] == D and D in PADDED
    table = (cos, sin, position) if fused else (None, None, None)
    arguments = lse, delta, *_table(*table)
    numbers = H_q // H_kv, *_numbers(shape)
    constants = _constants(shape, D, table[0])
    ring = ring_for("hopper_dkdv", q, shape.softcap)
    blocks = triton.cdiv(shape.max_k, 2 * OWN)
    hopper_backward._hopper_dkdv[(blocks * sequences * H_kv,)](
        *(_heads(k, OWN), _heads(v, OWN), _heads(q, ring.rows), _heads(dout, ring.rows)),
        *(*arguments, dk, dv, cu_q, cu_k, blocks, S_q, S_k, H_kv, *numbers),
        **constants,
        PACKED=cu_q is not None,
        BM=ring.rows,
        STAGES=ring.stages,
    )
    ring = ring_for("hopper_dq", q, shape.softcap)
    blocks = triton.cdiv(shape.max_q, 2 * OWN)
    hopper_backward._hopper_dq[(blocks * sequences * H_q,)](
        *(_heads(q, OWN), _heads(dout, OWN), _heads(k, ring.rows), _heads(v, ring.rows)),
        *(*arguments, dq, cu_q, cu_k, blocks, S_q, S_k, H_q, *numbers),
        **constants,
        PACKED=cu_k is not None,
        BN=ring.rows,
        STAGES=ring.stages,
    )
    if cos is not None and sin is not None and not fused:
        for gradient in (dq, dk):
            rotary.rotate(gradient, cos, sin, position, shape.interleaved, True, gradient)
    return dq, dk, dv


def _for_tma(x: Tensor) -> Tensor:
    """x (B, S, H, D), or a copy of what TMA cannot fetch. (Not `contiguous`: it has nothing against where x begins, nor
    against any stride of a dimension of one.)"""
    strides = [stride * x.element_size() for stride in x.stride()[:3]]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride % 16 or stride == 0 for stride in strides):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x


def _heads(x: Tensor, rows: int) -> TensorDescriptor:
    """What `_for_tma` gives as tiles of so many rows of one head, padded to a power of two; what lies outside is 0."""
    tile = [1, rows, 1, _padded(x.shape[3])]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout)


def _padded(D: int) -> int:
    return next(padded for padded in PADDED if padded >= D)


def _table(cos: Tensor | None, sin: Tensor | None, position: Tensor | None) -> tuple[Any, ...]:
    strides = (0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))
    return cos, sin, *strides, position, 0 if position is None else position.stride(0)


def _numbers(shape: Shape) -> tuple[Any, ...]:
    return shape.scale, shape.softcap, max(shape.left, 0), max(shape.right, 0)


def _constants(shape: Shape, D: int, cos: Tensor | None) -> dict[str, Any]:
    return {
        "HEAD": D,
        "D": _padded(D),
        "ROTARY_DIM": 0 if cos is None else 2 * cos.shape[1],
        "INTERLEAVED": shape.interleaved,
        "HAS_LEFT": shape.left >= 0,
        "HAS_RIGHT": shape.right >= 0,
        "HAS_SOFTCAP": shape.softcap > 0,
        "num_warps": 4,
        "maxnreg": 168,  # of all warps together, before they are shared out
    }
