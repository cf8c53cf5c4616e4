"""The experts' public operations: `moe_mlp` and `grouped_mm`.

Each is a custom op, opaque to torch.compile, and so is its gradient. On CUDA tensors they launch the kernels of
`kernels.py`, elsewhere they run `reference.py`, which is also the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ava_kernels.backend import as_autocast, asked_for, check_triton, is_known, runs_on_triton
from ava_kernels.experts import reference, tiles
from ava_kernels.routing.op import Routing

Backend = Literal["triton", "hopper", "torch"]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    *,
    activation: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu",
    gradient_sums: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Σ_k weight · down_e · a(gate_up_e · x) over each token's experts, without the pairs that `routing` dropped.

    x (T, M), gate_up (E, 2I, M) with the gate's rows first, down (E, M, I), all of one float dtype, which autocast
    makes its own, and of any strides (a transposed view costs no copy) → (T, M) in that dtype. a is silu(gate) · up for
    "swiglu" (Shazeer, 2020), gelu(gate) · up for "geglu"; for "gelu" (exact, by erf) and "relu2" (relu squared; So et
    al., 2021) there is no gate, and gate_up is (E, I, M). Products are summed in float32 (float64 for float64), and so
    are a token's experts.

    Kept for backward: x and the pre-activations (T·K, 2I), besides the weights and the routing; the activation is
    recomputed, the experts' outputs are not needed. Differentiable once in x, gate_up, down and routing.weight.

    `gradient_sums`, float32 tensors of gate_up's and down's shapes: backward adds those gradients to them instead of
    returning them, so that micro-batches sum up in float32 whatever the weights' dtype. Not under torch.compile.

    `backend`: "triton", the kernels of `kernels.py`; "hopper", those of `hopper.py` in their place where it has some,
    for H100 and H200 and 16 bits; "torch", the definition (`reference.py`). By default "torch" without a GPU, and on
    one the first that takes x, in the order that a table gives (`tiles.py`): as it ships, "triton".

    Never waits for a GPU, except in float64 and by "torch", which read on the host how many tokens each expert has. The
    same input gives the same bits. Raises ValueError, naming the argument, and RuntimeError where Triton is asked for
    and cannot run.
    """
    x, gate_up, down = as_autocast(x, gate_up, down)
    _check(x, gate_up, down, routing, activation, gradient_sums)
    if backend is None:
        asked_for()  # what cannot be understood is refused whatever is computed
    else:
        _check_backend(backend, x)
    return torch.ops.ava_kernels.moe_mlp(
        x,
        gate_up,
        down,
        routing.weight,
        routing.token,
        routing.slot,
        routing.offsets[1:],
        activation,
        *(gradient_sums or (None, None)),
        backend,
    )[0]


def grouped_mm(
    x: Tensor,
    w: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm`, in every float dtype and stride: a product for each of E experts.

    x (N, M), w (E, M, P) → (N, P)     each expert's rows of x times its w; 0 in the rows of none
    x (M, N), w (N, P) → (E, M, P)     each expert's columns of x times its rows of w
    x (E, M, L), w (L, N) → (M, N)     each expert's x times its columns of w; 0 in the columns of none
    x (E, M, L), w (E, L, P) → (E, M, P)

    offs (E,) int32 says where each expert's share of N ends, and the next one's begins; in the last form, which has no
    N, it is None. `bias` and another `out_dtype` than x's are refused, as torch refuses them. Differentiable, any
    number of times. On a GPU it never waits for the device, except in float64 or with AVA_KERNELS_BACKEND=torch, where
    PyTorch (`reference.py`) reads `offs` on the host, or with AVA_KERNELS_CHECK=1, which looks at its numbers. Raises
    ValueError, naming the argument.
    """
    asked_for()  # what cannot be understood is refused whatever is computed
    _check_grouped(x, w, offs, bias, out_dtype)
    if offs is None:
        return torch.bmm(x, w)
    if x.dim() == 3:
        return torch.ops.ava_kernels.grouped_mm(w.mT, x.mT, offs).mT.contiguous()
    return torch.ops.ava_kernels.grouped_mm(x, w, offs)


def _check_grouped(
    x: Tensor, w: Tensor, offs: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    if x.dtype != w.dtype or x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; both must be the same float dtype")
    shapes = f"x {tuple(x.shape)} and w {tuple(w.shape)}"
    fits = x.dim() in (2, 3) and w.dim() in (2, 3) and x.shape[-1] == w.shape[-2]
    if not fits or (x.dim() == w.dim() == 3 and len(x) != len(w)):
        raise ValueError(
            f"{shapes} do not fit: they must be (N, M) and (E, M, P), or (M, N) and (N, P), or (E, M, L) and (L, N), "
            "or (E, M, L) and (E, L, P)"
        )
    if x.dim() == w.dim() == 3:
        if offs is not None:
            raise ValueError(f"offs is given; with {shapes} every expert has all of its own, and it must be None")
    else:
        E = len(w) if w.dim() == 3 else len(x) if x.dim() == 3 else None  # None: as many as offs says
        experts = "(E,)" if E is None else f"({E},)"
        if offs is None:
            raise ValueError(f"offs is None; with {shapes} it must be int32 {experts}")
        if offs.dtype != torch.int32 or offs.dim() != 1 or (E is not None and len(offs) != E):
            raise ValueError(f"offs is {offs.dtype} of shape {tuple(offs.shape)}; it must be int32 {experts}")
    if bias is not None:
        raise ValueError("bias is given; it must be None: add it to the result")
    if out_dtype not in (None, x.dtype):
        raise ValueError(f"out_dtype is {out_dtype}; it must be x's, {x.dtype}, or None")


def _check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    activation: str,
    gradient_sums: tuple[Tensor, Tensor] | None,
) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(reference.ACTIVATIONS)}")
    if not isinstance(routing, Routing):
        raise ValueError(f"routing is {routing!r}; it must be a Routing, as route and routing_from make them")
    gated = activation in reference.GATED
    experts, rows = len(routing.offsets) - 1, "2I" if gated else "I"
    fits = x.dim() == 2 and gate_up.dim() == down.dim() == 3
    if fits:
        M, I = down.shape[1:]
        fits = x.shape[1] == M and len(down) == experts and gate_up.shape == (experts, 2 * I if gated else I, M)
    if not fits or len(x) != len(routing.expert):
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} and a routing of "
            f"{len(routing.expert)} tokens over {experts} experts do not fit: they must be (T, M), (E, {rows}, M), "
            f"(E, M, I), T and E for the activation {activation}"
        )
    if not x.dtype == gate_up.dtype == down.dtype or x.dtype not in FLOATS:
        raise ValueError(
            f"x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}; all three must be the same float dtype"
        )
    for name, total, weight in zip(("gate_up", "down"), gradient_sums or (), (gate_up, down), strict=False):
        if total.shape != weight.shape or total.dtype != torch.float32 or total.device != weight.device:
            raise ValueError(
                f"gradient_sums: that of {name} is {total.dtype} {tuple(total.shape)} on {total.device}; it must be "
                f"float32 {tuple(weight.shape)} on {weight.device}"
            )


def _check_backend(backend: str, x: Tensor) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; it must be 'triton', 'hopper' or 'torch', or None")
    if backend == "triton":
        check_triton(x, "backend is 'triton'")
    if backend == "hopper" and not _hopper_takes(x):
        raise ValueError(
            f"backend is 'hopper', which is for float16 and bfloat16 and a GPU of compute capability 9; given are "
            f"{x.dtype} on {x.device}: take backend='triton'"
        )


def _hopper_takes(x: Tensor) -> bool:
    from ava_kernels.experts import hopper  # triton is not installed everywhere

    return hopper.takes(x) and hopper.runs_on(x)


def _implementation(x: Tensor, down: Tensor, backend: str | None, direction: str) -> Callable[..., Any]:
    chosen = backend or _choose(x, down)
    if chosen == "torch":
        return getattr(reference, direction)
    from ava_kernels.experts import kernels

    return partial(getattr(kernels, direction), on_hopper=chosen == "hopper")


def _choose(x: Tensor, down: Tensor) -> str:
    if not runs_on_triton(x):
        return "torch"
    if x.is_cuda:
        for name in tiles.order_for(x, *down.shape):
            if name == "hopper" and _hopper_takes(x):
                return name
            if name == "triton":
                break
    return "triton"


@torch.library.custom_op("ava_kernels::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    activation: str,
    gate_up_sum: Tensor | None,
    down_sum: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if not weight.numel() or not gate_up.numel():
        return torch.zeros_like(x, memory_format=torch.contiguous_format), x.new_empty(len(token), gate_up.shape[1])
    with torch.cuda.device_of(x):
        forward = _implementation(x, down, backend, "forward")
        return forward(x, gate_up, down, weight, token, slot, ends, activation)


@_moe_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, token: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(token.shape[0], gate_up.shape[1])


@torch.library.custom_op("ava_kernels::moe_mlp_backward", mutates_args=("gate_up_sum", "down_sum"))
def _moe_mlp_backward(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    h: Tensor,
    activation: str,
    needs: list[bool],
    gate_up_sum: Tensor | None,
    down_sum: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A gradient that is not needed, or was added to a sum, is returned with no element."""
    tensors, sums = (x, gate_up, down, weight), (None, gate_up_sum, down_sum, None)
    if not weight.numel() or not gate_up.numel():
        gradients = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
    else:
        with torch.cuda.device_of(x):
            backward = _implementation(x, down, backend, "backward")
            gradients = backward(
                dout, x, gate_up, down, weight, token, slot, ends, h, activation, needs, gate_up_sum, down_sum
            )
    dx, dgate_up, ddown, dweight = (
        t.new_empty(0) if gradient is None or total is not None else gradient
        for t, gradient, total in zip(tensors, gradients, sums, strict=True)
    )
    return dx, dgate_up, ddown, dweight


@_moe_mlp_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    token: Tensor,
    slot: Tensor,
    ends: Tensor,
    h: Tensor,
    activation: str,
    needs: list[bool],
    gate_up_sum: Tensor | None,
    down_sum: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_gate_up, needs_down, needs_weight = needs
    return (
        x.new_empty(x.shape if needs_x else 0),
        torch.empty_like(gate_up) if needs_gate_up and gate_up_sum is None else gate_up.new_empty(0),
        torch.empty_like(down) if needs_down and down_sum is None else down.new_empty(0),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, gate_up_sum, down_sum, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.activation, ctx.backend = activation, backend
    ctx.sums = gate_up_sum, down_sum  # not saved: it is their purpose to change before backward


def _backward(ctx: Any, dout: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:4])
    options = ctx.activation, needs, *ctx.sums, ctx.backend
    gradients = torch.ops.ava_kernels.moe_mlp_backward(dout, *ctx.saved_tensors, *options)
    sums = None, *ctx.sums, None
    returned = (
        gradient if need and total is None else None
        for gradient, need, total in zip(gradients, needs, sums, strict=True)
    )
    return *returned, *[None] * 7


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.ava_kernels.moe_mlp)
def _moe_mlp_flops(x: Any, gate_up: Any, down: Any, weight: Any, *rest: Any, **named: Any) -> int:
    """For torch's FlopCounterMode, which sees shapes alone: as if no choice was dropped."""
    (_, H, M), I, (T, K) = gate_up, down[2], weight
    return 2 * T * K * M * (H + I)


@register_flop_formula(torch.ops.ava_kernels.moe_mlp_backward)
def _moe_mlp_backward_flops(dout: Any, x: Any, gate_up: Any, down: Any, weight: Any, *rest: Any, **named: Any) -> int:
    return 2 * _moe_mlp_flops(x, gate_up, down, weight)


@torch.library.custom_op("ava_kernels::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    if is_known(offs):
        _check_ends(offs.tolist(), x.shape[0] if w.dim() == 3 else x.shape[1])
    if not x.numel() or not w.numel():
        return x.new_zeros(_grouped_shape(x, w, offs))
    with torch.cuda.device_of(x):
        if runs_on_triton(x):
            from ava_kernels.experts import kernels

            return kernels.grouped_mm(x, w, offs)
        return reference.grouped_mm(x, w, offs)


def _check_ends(ends: list[int], rows: int) -> None:
    if sorted([0, *ends, rows]) != [0, *ends, rows]:
        some = ends if len(ends) < 20 else f"{ends[:8]} … {ends[-8:]}"
        raise ValueError(
            f"offs is {some}; it must say where each expert's rows end, each end as large as the one before it, the "
            f"last at most {rows}"
        )


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(_grouped_shape(x, w, offs))


def _grouped_shape(x: Tensor, w: Tensor, offs: Tensor) -> tuple[int, ...]:
    return (x.shape[0], w.shape[2]) if w.dim() == 3 else (offs.shape[0], x.shape[0], w.shape[1])


def _save_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, offs = ctx.saved_tensors
    needs_x, needs_w, _ = ctx.needs_input_grad
    mm = torch.ops.ava_kernels.grouped_mm
    if w.dim() == 3:
        return mm(dout, w.mT, offs) if needs_x else None, mm(x.mT, dout, offs) if needs_w else None, None
    return mm(w, dout.mT, offs).mT if needs_x else None, mm(x.mT, dout, offs) if needs_w else None, None


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_operands)
