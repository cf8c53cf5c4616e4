"""The public rotation: one pass over the elements on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_kernels.backend import is_known, runs_on_triton
from ava_kernels.rotary import reference


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first 2·cos.shape[-1] features of every head by its token's position; the rest pass through.

    x (B, S, H, D), or (T, H, D) with `cu_seqlens` (documents + 1) int32, 0 and the ends of the documents that are
    packed in it → the same shape and dtype. cos, sin (positions, rotary_dim / 2). A token's position is its place in
    its sequence, or what `position_ids` (B or 1, S), (S,) or (T,) says; on a GPU positions beyond the table are noticed
    with AVA_KERNELS_CHECK=1 alone. Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) if `interleaved` (Su et al., 2021,
    "RoFormer"). `conjugate` rotates the other way, which is also the gradient. Computed in float32 (float64 for
    float64). `inplace` writes into x and returns it. Differentiable in x. Raises ValueError, naming the argument.
    """
    dims = 4 if cu_seqlens is None else 3
    if x.dim() != dims:
        shape = "(B, S, H, D)" if dims == 4 else "(T, H, D), as cu_seqlens is given"
        raise ValueError(f"x has the shape {tuple(x.shape)}; it must be {shape}")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; it must be floats, as rotated features are")
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        raise ValueError("cos and sin are the tables to rotate by: give both, as rope_table makes them")
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1] or not cos.is_floating_point():
        raise ValueError(
            f"cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} do not fit x "
            f"{tuple(x.shape)}: both must be floats (positions, at most {x.shape[-1] // 2})"
        )
    tokens = x.shape[: dims - 2]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, None)
    if position_ids is not None:
        check_position_ids(position_ids, tokens, len(cos))
    else:
        check_table(cos, tokens[-1], cu_seqlens, None)
        if cu_seqlens is not None:
            position_ids = places(cu_seqlens, tokens[0])
    batched = x if dims == 4 else x[None]
    if position_ids is not None:
        position_ids = position_ids.expand(batched.shape[:2])
    if inplace and not (torch.is_grad_enabled() and x.requires_grad):
        if runs_on_triton(x):
            torch.ops.ava_kernels.rotate_(batched, cos, sin, position_ids, interleaved, conjugate)
            return x
        return x.copy_(reference.rotate(batched, cos, sin, position_ids, interleaved, conjugate).view_as(x))
    if runs_on_triton(x):
        out = torch.ops.ava_kernels.rotate(batched, cos, sin, position_ids, interleaved, conjugate)
    else:
        out = reference.rotate(batched, cos, sin, position_ids, interleaved, conjugate)
    out = out if dims == 4 else out[0]
    return x.copy_(out) if inplace else out


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int | None) -> None:
    """Raises ValueError if it is not int32 (documents + 1,), or has a document longer than max_seqlen, if known."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it must be int32 (documents + 1,)"
        )
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, (float, str, Tensor)) or max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen!r}; it must be an int, the length of the longest document")
    if is_known(cu_seqlens) and len(cu_seqlens) > 1 and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a document of cu_seqlens has {longest} tokens")


def check_position_ids(position_ids: Tensor, tokens: tuple[int, ...], length: int) -> None:
    """Raises ValueError if they are not integers (B or 1, S) or (S,), or outside a table of this length, if known.
    `tokens` is (B, S) or (T,)."""
    allowed = {tuple(tokens), tuple(tokens[-1:]), (1, tokens[-1])} if len(tokens) == 2 else {tuple(tokens)}
    if position_ids.is_floating_point() or tuple(position_ids.shape) not in allowed:
        raise ValueError(
            f"position_ids is {position_ids.dtype} of shape {tuple(position_ids.shape)}; it must be integers "
            f"{tuple(tokens)}"
        )
    if is_known(position_ids) and position_ids.numel():
        first, last = int(position_ids.min()), int(position_ids.max())
        if first < 0 or last >= length:
            raise ValueError(
                f"position_ids are {first} to {last}; cos and sin have the positions 0 to {length - 1} alone: make "
                "longer tables"
            )


def check_table(cos: Tensor, tokens: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    """Raises ValueError where the longest sequence is longer than the table, if known."""
    longest = tokens if cu_seqlens is None else max_seqlen
    if cu_seqlens is not None and is_known(cu_seqlens) and len(cu_seqlens) > 1:
        longest = int(cu_seqlens.diff().max())
    if longest is not None and len(cos) < longest:
        raise ValueError(f"cos and sin have {len(cos)} positions; the longest sequence has {longest}")


def places(cu_seqlens: Tensor, T: int) -> Tensor:
    """(T,): each token's place in its document, 0 behind the last one; `cu_seqlens` (documents + 1,) holds 0 and the
    documents' ends."""
    token = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[document]) * (token < cu_seqlens[-1])


@torch.library.custom_op("ava_kernels::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool) -> Tensor:
    from ava_kernels.rotary import kernels  # triton is not installed everywhere

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernels.rotate(x, cos, sin, position, interleaved, conjugate, out)
    return out


@_rotate.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("ava_kernels::rotate_", mutates_args=("x",))
def _rotate_in_place(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, conjugate: bool
) -> None:
    from ava_kernels.rotary import kernels

    with torch.cuda.device_of(x):
        kernels.rotate(x, cos, sin, position, interleaved, conjugate, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, position, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, position)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.ava_kernels.rotate(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate)
    return dx, None, None, None, None, None


_rotate.register_autograd(_backward, setup_context=_setup_context)
