"""MegaBlocks' names over our operations: mixture-of-experts layers and the permutations that they are made of.

    from ava_kernels.compat.megablocks import Arguments, MoE, dMoE     # was: from megablocks... import ...
    from ava_kernels.compat.megablocks import ops                      # ops.gather, ops.sort, ...

    layer = dMoE(Arguments(hidden_size=512, ffn_hidden_size=1024, moe_num_experts=8, moe_top_k=2, num_layers=1))
    out, bias = layer(x)                                               # x (sequence, batch, hidden)
    (loss(out + bias) + batched_load_balancing_loss(layer.args)).backward()
    clear_load_balancing_loss()

The same are the signatures, defaults, parameter names, shapes and dtypes (a `state_dict` goes either way), returned
values, which pairs a full expert drops (`MoE`), and how the losses are collected. MegaBlocks' own `Arguments` object
is taken too. Read from MegaBlocks 0.11.0.dev0 (Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with
Mixture-of-Experts"); neither it, stk nor grouped_gemm need be installed.

What differs:
- Everything runs on the CPU too, in float64 too, for every size; sizes need not be multiples of 128.
- Nothing here waits for the GPU: not `dMoE`, whose token counts stay on the device, and not `MoE` with
  `moe_capacity_factor=0`, which runs without capacity instead of padding to the fullest expert. (In
  float64 both do: their products are then PyTorch's.)
- The router's scores, weights and both losses are float32 also in half precision. Equal scores go to the lower expert.
- With 0 tokens the losses are 0. Layers may see different numbers of tokens before their losses are read together.
- A token whose router logits hold a NaN or +Inf asks for no expert: its weights are 0, and it is not in the counts.
- `MoE(args, overflow="next_best")` sends what a full expert rejects to the token's next-best expert instead of
  dropping it.
- A shared expert also works where the bias is returned, and `torch.nn.Linear` is made in the layer's dtype.
- Expert parallelism is refused with a ValueError: `moe_expert_model_parallelism`, `expert_parallel_group`.
- Sums of a token's K rows have a fixed order and are kept in float32: the same input gives the same bits.
- The cumulative sums of one element stay 1-D; any dimension can be summed along.
"""

from ava_kernels.compat.megablocks import ops
from ava_kernels.compat.megablocks.arguments import Arguments
from ava_kernels.compat.megablocks.layers import MoE, dMoE
from ava_kernels.compat.megablocks.losses import (
    batched_load_balancing_loss,
    batched_router_zloss,
    clear_load_balancing_loss,
    clear_router_zloss,
    get_load_balancing_loss,
    save_load_balancing_loss,
)
from ava_kernels.compat.megablocks.ops import (
    binned_gather,
    binned_scatter,
    exclusive_cumsum,
    gather,
    histogram,
    inclusive_cumsum,
    scatter,
    sort,
)

__all__ = [
    "Arguments",
    "MoE",
    "batched_load_balancing_loss",
    "batched_router_zloss",
    "binned_gather",
    "binned_scatter",
    "clear_load_balancing_loss",
    "clear_router_zloss",
    "dMoE",
    "exclusive_cumsum",
    "gather",
    "get_load_balancing_loss",
    "histogram",
    "inclusive_cumsum",
    "ops",
    "save_load_balancing_loss",
    "scatter",
    "sort",
]
