"""Drop-in operations for mixture-of-experts transformers: rotary attention, routing, expert matmuls.

    from ava_kernels import moe_mlp, rope_attention, route

Depends on torch, and on a GPU on triton. Each folder holds `op.py`, the public operation, `reference.py`, its plain
PyTorch definition, which runs on every device, and `kernels.py`, its Triton kernels, which run on CUDA tensors;
`gradients` has a C++ and CUDA extension instead (`csrc/`).
Shape suffixes: B batch, S sequence, T tokens, H heads, D head dim, M model dim, I expert width, E experts,
K choices per token, N = T·K (token, choice) pairs.
"""

from ava_kernels.attention.op import rope_attention
from ava_kernels.experts.op import grouped_mm, moe_mlp
from ava_kernels.gradients.op import GradStats, clip_, clip_coefficient, grad_stats
from ava_kernels.rotary.op import apply_rotary
from ava_kernels.rotary.tables import rope_table
from ava_kernels.routing.op import (
    Routing,
    load_balancing_loss,
    route,
    router_z_loss,
    routing_from,
    update_expert_bias,
)

__all__ = [
    "GradStats",
    "Routing",
    "apply_rotary",
    "clip_",
    "clip_coefficient",
    "grad_stats",
    "grouped_mm",
    "load_balancing_loss",
    "moe_mlp",
    "rope_attention",
    "rope_table",
    "route",
    "router_z_loss",
    "routing_from",
    "update_expert_bias",
]
