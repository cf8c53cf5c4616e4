"""The public attention operation, and which implementation it takes."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from ava_kernels.attention import reference, sdpa, tiles
from ava_kernels.backend import as_autocast, check_triton, is_known, runs_on_triton, without_autocast
from ava_kernels.rotary.op import check_cu_seqlens, check_position_ids, check_table, places

MAX_HEAD_DIM = 256
TINY = torch.finfo(torch.float32).tiny
Backend = Literal["triton", "hopper", "sdpa", "torch"]


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float = ...,
    interleaved: bool = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    position_ids: Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float = ...,
    interleaved: bool = ...,
    cu_seqlens: Tensor | None = ...,
    max_seqlen: int | None = ...,
    position_ids: Tensor | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · R(q) R(k)ᵀ + mask) v, with R the rotation by position; without cos, plain attention.

    q (B, S_q, H_q, D), k and v (B, S_k, H_kv, D) with H_q a multiple of H_kv, D ≤ 256, one float dtype, which autocast
    makes its own, any strides → (B, S_q, H_q, D). cos, sin (positions, rotary_dim / 2), as `rope_table` makes them;
    `interleaved` rotates elements (2i, 2i+1) instead of (i, i + rotary_dim/2). A token's position is its place in its
    own sequence, in q and in k, or what `position_ids` (B or 1, S) or (S,) says.

    Masks are aligned to the bottom right: query i is at i + S_k − S_q. `causal` hides the keys behind it;
    `window_size` (left, right) those further than `left` before and `right` behind, −1 for no limit. A query that sees
    no key gives 0. `softcap` c makes c·tanh(s/c) of a score s (Gemma 2); `softmax_scale` defaults to 1/√D.

    With `cu_seqlens` (documents + 1) int32, 0 and the documents' ends, q, k and v are packed, (T, H, D): no document
    sees another, and positions begin anew with each unless `position_ids` (T,) says otherwise. Rows behind the last end
    give 0. `max_seqlen`, the longest document's length, spares work; T is assumed without it.

    On a GPU the numbers in `cu_seqlens` and `position_ids` are not looked at, as that would be to wait for it; with
    AVA_KERNELS_CHECK=1 in the environment they are.

    `return_lse` also returns log Σ exp of each query's scores, (B, H_q, S_q), packed (H_q, T), float32 (float64 for
    float64), −∞ where no key is seen. Differentiable once in q, k and v, through both.

    `backend`: "triton", the kernels of `kernels.py`; "hopper", those of `hopper.py`, for H100 and H200, 16 bits and D
    of a multiple of 8 up to 128; "sdpa", a rotation and torch's fastest attention, which has neither windows other than
    causal ones, nor softcap, lse or packing; "torch", the definition (`reference.py`). By default "torch" without a
    GPU, and on one the first that has what is asked for, in the order that a table gives (`tiles.py`): as it ships
    "sdpa", then "triton". All but "sdpa" give the same bits for the same input; `deterministic` refuses "sdpa", whose
    gradient need not.

    Raises ValueError, naming the argument.
    """
    packed = cu_seqlens is not None
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, cos, sin, softmax_scale, window_size, softcap, cu_seqlens, max_seqlen, position_ids)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    left, right = window_size or (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    plain = not packed and left < 0 and right <= 0 and not softcap and not return_lse
    chosen = _choose(backend, q, left, right, packed, plain and not deterministic)
    if chosen == "sdpa":
        if not plain or deterministic:
            raise ValueError(
                "backend is 'sdpa', which has no window_size, softcap, cu_seqlens, return_lse and deterministic: "
                "leave them out, or take backend='triton'"
            )
        return sdpa.attention(q, k, v, cos, sin, right == 0, scale, interleaved, position_ids)
    if chosen == "hopper":
        _check_hopper(q)
    if packed:
        q, k, v = (t[None] for t in (q, k, v))
    if position_ids is not None:
        position_ids = position_ids.contiguous().expand(q.shape[:2])
    arguments = cos, sin, position_ids, cu_seqlens, cu_seqlens, scale, left, right, float(softcap), interleaved
    longest = q.shape[1] if max_seqlen is None else max_seqlen
    lse: Tensor | None
    if chosen == "torch":
        with without_autocast(q):
            out, lse = reference.attention(q, k, v, *arguments, return_lse)
    else:
        lengths = (longest, longest) if packed else (q.shape[1], k.shape[1])
        out, lse = attention(q, k, v, *arguments, *lengths, chosen == "hopper")
    if packed:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None or not return_lse else (out, lse)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
    max_q: int,
    max_k: int,
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernels, of `hopper.py` or `kernels.py`. q (B, S_q, H_q, D), k, v (B, S_k, H_kv, D), position (B, S) int or
    None, B = 1 where `cu_q` and `cu_k` pack documents of at most max_q and max_k tokens; left and right −1 for no limit
    → out like q, and lse (B, H_q, S_q)."""
    if not softcap and scale < TINY:  # the kernels' running maximum is one of q · k
        q, scale = (-q, -scale) if scale <= -TINY else (q * 0.0, 1.0)
    keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if position is None and cu_q is not None and cos is not None:
        position = places(cu_q, q.shape[1])[None]
    out, lse, _, _ = torch.ops.ava_kernels.attention(
        q, k, v, cos, sin, position, cu_q, cu_k, scale, left, right, softcap, interleaved, max_q, max_k, keep, hopper
    )
    return out, lse


def _choose(backend: str | None, q: Tensor, left: int, right: int, packed: bool, sdpa_has_it: bool) -> str:
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend is {backend!r}; it must be 'triton', 'hopper', 'sdpa' or 'torch', or None")
    if backend == "triton":
        check_triton(q, "backend is 'triton'")
    if backend is not None:
        return backend
    if not runs_on_triton(q):
        return "torch"
    if q.is_cuda:
        problem = tiles.order_problem(q.element_size(), q.shape[-1], left, right, packed)
        for name in _order(q.device.index, problem):
            if name == "sdpa" and sdpa_has_it:
                return name
            if name == "hopper" and _hopper_takes(q):
                return name
            if name == "triton":
                break
    return "triton"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a table is read
def _order(index: int, problem: str) -> tuple[str, ...]:
    return tiles.order_for(torch.device("cuda", index), problem)


def _hopper_takes(q: Tensor) -> bool:
    from ava_kernels.attention import hopper  # triton is not installed everywhere

    return hopper.takes(q) and hopper.runs_on(q)


def _check_hopper(q: Tensor) -> None:
    from ava_kernels.attention import hopper

    if not _hopper_takes(q):
        raise ValueError(
            f"backend is 'hopper', which is for float16 and bfloat16, heads of a multiple of 8 up to "
            f"{hopper.PADDED[-1]}, and a GPU of compute capability 9; given are {q.dtype}, heads of {q.shape[-1]}, on "
            f"{q.device}: take backend='triton'"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float | None,
    window_size: tuple[int, int] | None,
    softcap: float,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    position_ids: Tensor | None,
) -> None:
    dims = 4 if cu_seqlens is None else 3
    shape = "(B, S, H, D)" if cu_seqlens is None else "(T, H, D), as cu_seqlens is given"
    if not q.dim() == k.dim() == v.dim() == dims or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: they must be {shape}, "
            "k and v alike, with one head dimension"
        )
    if (dims == 4 and q.shape[0] != k.shape[0]) or (dims == 3 and q.shape[0] != k.shape[0]):
        raise ValueError(f"q has {q.shape[0]} {'sequences' if dims == 4 else 'tokens'}, k and v have {k.shape[0]}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must be the same float dtype")
    H_q, H_kv, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if H_kv == 0 or H_q % H_kv:
        raise ValueError(f"{H_q} query heads cannot share {H_kv} key/value heads: H_q must be a multiple of H_kv")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension is {D}; it must lie between 1 and {MAX_HEAD_DIM}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    if window_size is not None and not is_window(window_size):
        raise ValueError(f"window_size is {window_size}; it must be (left, right), each 0 or more, or -1 for no limit")
    for name, number in (("softmax_scale", 1.0 if scale is None else scale), ("softcap", softcap)):
        if not isinstance(number, (int, float)) or not -math.inf < number < math.inf:
            raise ValueError(f"{name} is {number!r}; it must be a finite number")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be 0, for none, or more")
    tokens = q.shape[: dims - 2]
    if cu_seqlens is None and max_seqlen is not None:
        raise ValueError("max_seqlen is given without cu_seqlens, which pack the documents that it is about")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, max_seqlen)
    if position_ids is not None:
        if cos is None:
            raise ValueError("position_ids are given without cos and sin, the tables that they point into")
        if dims == 4 and q.shape[1] != k.shape[1]:
            raise ValueError("position_ids are given, which say where queries and keys are: q and k must be as long")
        check_position_ids(position_ids, tokens, len(cos))
    if cos is None or sin is None:
        return
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > D or not cos.is_floating_point():
        raise ValueError(
            f"cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} do not fit a head dimension of "
            f"{D}: both must be floats (positions, at most {D // 2})"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin require a gradient, and get none here: detach them")
    if position_ids is None:
        check_table(cos, max(q.shape[1], k.shape[1]), cu_seqlens, max_seqlen)


def is_window(window_size: Any) -> bool:
    """Whether it is (left, right), each an int from −1 on."""
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    return pair and all(isinstance(side, int) and side >= -1 for side in window_size)


@torch.library.custom_op("ava_kernels::attention_by_document", mutates_args=())
def _by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The definition with packed documents for torch.compile, which must not see their ends read. lse may have no
    element."""
    out, lse = reference.by_document(q, k, v, cu_q, cu_k, (scale, left, right, softcap, return_lse))
    return out.contiguous(), q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32)) if lse is None else lse


@_by_document.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (1, q.shape[2], q.shape[1]) if rest[-1] else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("ava_kernels::attention_by_document_backward", mutates_args=())
def _by_document_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.by_document_backward(dout, dlse, q, k, v, cu_q, cu_k, (scale, left, right, softcap))


@_by_document_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_documents(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, left, right, softcap, return_lse = inputs
    ctx.set_materialize_grads(False)
    if not return_lse:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)
    ctx.options = scale, left, right, softcap


def _documents_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[0])
    gradients = torch.ops.ava_kernels.attention_by_document_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 7


_by_document.register_autograd(_documents_backward, setup_context=_save_documents)


@torch.library.custom_op("ava_kernels::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
    max_q: int,
    max_k: int,
    keep: bool,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ out, lse, and the rotated queries and keys: without a table, or (queries) unless `keep`, with no element."""
    from ava_kernels.attention import kernels  # triton is not installed everywhere

    if cu_q is not None and cu_k is not None and is_known(cu_q):
        reference.check_documents(q, k, cu_q, cu_k)
    shape = kernels.Shape(scale, left, right, softcap, interleaved, max_q, max_k)
    with torch.cuda.device_of(q):
        if hopper:
            from ava_kernels.attention import hopper as for_hopper

            return for_hopper.forward(q, k, v, cos, sin, position, cu_q, cu_k, shape, keep)
        return kernels.forward(q, k, v, cos, sin, position, cu_q, cu_k, shape, keep)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, H, _ = q.shape
    keep = rest[-2]
    return (
        q.new_empty(q.shape),
        q.new_empty((B, H, S), dtype=torch.float32),
        q.new_empty(q.shape if keep and cos is not None else 0),
        k.new_empty(k.shape if cos is not None else 0),
    )


@torch.library.custom_op("ava_kernels::attention_backward", mutates_args=())
def _attention_backward(
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
    scale: float,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
    max_q: int,
    max_k: int,
    hopper: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ava_kernels.attention import kernels

    shape = kernels.Shape(scale, left, right, softcap, interleaved, max_q, max_k)
    with torch.cuda.device_of(q):
        if hopper:
            from ava_kernels.attention import hopper as for_hopper

            return for_hopper.backward(dout, dlse, q, k, v, out, lse, cos, sin, position, cu_q, cu_k, shape)
        return kernels.backward(dout, dlse, q, k, v, out, lse, cos, sin, position, cu_q, cu_k, shape)


@_attention_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cos, sin, position, cu_q, cu_k, *shape, _, hopper = inputs
    out, lse, rotated_q, rotated_k = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rotated_q, rotated_k)
    if cos is not None:
        q, k = rotated_q, rotated_k
    ctx.save_for_backward(q, k, v, out, lse, cos, sin, position, cu_q, cu_k)
    ctx.options = *shape, hopper


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 17
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[3])
    gradients = torch.ops.ava_kernels.attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 14


_attention.register_autograd(_backward, setup_context=_setup_context)
