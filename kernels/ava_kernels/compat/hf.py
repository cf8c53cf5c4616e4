"""Our expert matmuls and attention inside transformers' models: importing this registers "ava" with transformers.

    import ava_kernels.compat.hf

    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="ava", attn_implementation="ava")
    model.set_experts_implementation("ava")     # or later, at any time
    model.set_attn_implementation("ava")

transformers 5.8 or newer; older ones (5.4) refuse experts that are not their own. The parameters stay where they are:
transformers 5 keeps a layer's experts as (E, 2I, M) and (E, M, I), gate first, and `moe_mlp` takes them so, or
transposed. The router stays the model's own.

Experts: gated by silu or the exact gelu, or gelu or relu² without a gate; with autocast, and behind transformers'
expert parallelism, whose choices of other ranks' experts take no work. A layer with biases, interleaved weights, its
own gate, a norm behind its experts or another activation is refused with a ValueError that says so.

Attention: plain causal and full attention is `rope_attention`, of queries and keys that the model has rotated.
Everything that transformers expresses as a mask (padding, sliding windows, chunks, packed sequences, your own 4-D
mask), and dropout, is torch's scaled_dot_product_attention with that mask. A query that sees no key, such as padding on
the left, gives zeros, where "eager" gives the mean of all values. Attention with sinks, a soft cap, a position bias,
sparse indices or a paged cache is refused with a ValueError, and so is `output_attentions`. Without a mask,
`cu_seq_lens_q` and `cu_seq_lens_k`, which transformers' collators give for packed sequences, keep those apart.

    handle = ava_kernels.compat.hf.fuse_rotary(model)     # handle.remove() undoes it

gives `rope_attention` the queries and keys of Llama, Mistral, Mixtral, Qwen3 and Qwen3-MoE before their rotation, which
then costs less (`docs/attention.md`); for training, with `use_cache=False`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import GELUActivation, ReLUSquaredActivation, SiLUActivation
from transformers.integrations import moe
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from ava_kernels import moe_mlp, rope_attention, routing_from
from ava_kernels.compat.flash_attn import flash_attn_varlen_func

_GATED: dict[Any, Literal["swiglu", "geglu"]] = {
    SiLUActivation: "swiglu",
    torch.nn.SiLU: "swiglu",
    F.silu: "swiglu",
    GELUActivation: "geglu",
    F.gelu: "geglu",
}
_PLAIN: dict[Any, Literal["gelu", "relu2"]] = {
    GELUActivation: "gelu",
    F.gelu: "gelu",
    ReLUSquaredActivation: "relu2",
}
_REFUSED_LAYOUTS = {  # what transformers' decorator says of an experts class, and the only value that we take
    "has_bias": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_REFUSED_ATTENTION = ("s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices", "cache")


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Σ_k top_k_weights · expert(hidden_states) over each token's experts, by `moe_mlp`.

    hidden_states (T, M), top_k_index (T, K) int, where numbers of no expert of this rank are left out, top_k_weights
    (T, K) float → (T, M). Differentiable in hidden_states, top_k_weights and the module's weights. Raises ValueError
    for modules that compute something else.
    """
    activation = _activation(module)
    gate_up = module.gate_up_proj if getattr(module, "has_gate", True) else module.up_proj
    down = module.down_proj
    if module.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
    routing = routing_from(top_k_index, top_k_weights, len(gate_up))
    out = moe_mlp(hidden_states.to(dtype), gate_up.to(dtype), down.to(dtype), routing, activation=activation)
    return out.to(hidden_states.dtype)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · query keyᵀ + mask) value, and None for the attention weights, which are never formed.

    query (B, H_q, S_q, D), key and value (B, H_kv, S_k, D), H_q a multiple of H_kv; attention_mask None, or bool or
    float (B or 1, H_q or 1, S_q, S_k) → (B, S_q, H_q, D). Without a mask attention is causal, where `is_causal` or else
    the module says so, and a first step's keys beyond S_q, which a static cache has yet to fill, are left out.
    `sliding_window` is not read: the mask has it. Raises ValueError for what is not computed.
    """
    for name in _REFUSED_ATTENTION:
        if kwargs.get(name) is not None:
            raise ValueError(_refusal(module, "attn", f"{name} is given", f"attention without {name}"))
    if kwargs.get("output_attentions"):
        raise ValueError(_refusal(module, "attn", "output_attentions is set", "attention that returns no weights"))
    (H_q, S_q), (H_kv, S_k) = query.shape[1:3], key.shape[1:3]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        return _packed(module, query, key, value, causal, scaling, dropout, kwargs), None
    causal = causal and attention_mask is None and S_q > 1
    if causal and S_k > S_q:
        key, value = key[:, :, :S_q], value[:, :, :S_q]
    if attention_mask is None and not dropout and key.shape[-1] == value.shape[-1]:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return rope_attention(q, k, v, causal=causal, softmax_scale=scaling), None
    if H_q != H_kv:  # fused kernels that take a mask do not share heads
        key, value = (t.repeat_interleave(H_q // H_kv, dim=1) for t in (key, value))
    out_BHSD = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return out_BHSD.transpose(1, 2), None


def _packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """Of one row of sequences, whose ends kwargs tell."""
    if len(query) != 1 or dropout or key.shape[-1] != value.shape[-1]:
        given = f"cu_seq_lens_q is given with {len(query)} rows, dropout {dropout} and values of {value.shape[-1]}"
        raise ValueError(_refusal(module, "attn", given, "one row, without dropout, keys and values of one size"))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    cu_q, cu_k = (kwargs[name].to(torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    longest_q, longest_k = kwargs.get("max_length_q") or len(q), kwargs.get("max_length_k") or len(k)
    window = (kwargs.get("sliding_window") or 0) - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        softmax_scale=scaling,
        causal=causal,
        window_size=(window, window),
    )
    assert isinstance(out, Tensor)
    return out[None]


FUSED = (LlamaAttention, MistralAttention, MixtralAttention, Qwen3Attention, Qwen3MoeAttention)


class Fused:
    """What `fuse_rotary` did, and its undoing."""

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self.modules = modules

    def remove(self) -> None:
        for module in self.modules:
            module.__dict__.pop("forward", None)


def fuse_rotary(model: torch.nn.Module) -> Fused:
    """From now on the model's attention layers leave the rotation to `rope_attention`, until `remove()` of the result.

    Calls with a mask (padding, windows, packed sequences), a cache, dropout or another attention implementation are
    computed as before. Raises ValueError for a model without a layer of a kind that is known here (Llama, Mistral,
    Mixtral, Qwen3, Qwen3-MoE), one that does not use "ava", or one that is fused already.
    """
    modules: list[Any] = [module for module in model.modules() if type(module) in FUSED]
    if not modules:
        known = ", ".join(kind.__name__ for kind in FUSED)
        raise ValueError(f"{type(model).__name__} has no attention layer that is known here: {known}")
    for module in modules:
        if (name := module.config._attn_implementation) != "ava":
            raise ValueError(f"attn_implementation is {name!r}: call model.set_attn_implementation('ava') first")
        if "forward" in module.__dict__:
            raise ValueError(f"{type(module).__name__} has a forward of its own already: remove that first")
    for module in modules:
        module.forward = functools.partial(_rotate_and_attend, module, module.forward)
    return Fused(modules)


def _rotate_and_attend(
    module: Any,
    separate: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`separate`, the layer's own forward, where this can be computed together; and else by it."""
    # A cache is "past_key_values" up to transformers 5.23, and "cache", which is refused anyhow, from 5.24 on.
    asked = [*_REFUSED_ATTENTION, "past_key_values", "output_attentions", "is_causal", "cu_seq_lens_q"]
    if (
        attention_mask is not None
        or (module.training and module.attention_dropout)
        or module.config._attn_implementation != "ava"
        or any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in asked)
    ):
        return separate(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
    q, k, v = (
        project(hidden_states).unflatten(-1, (-1, module.head_dim))
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    # (B or 1, S, D), either half the same: tables of as many positions as there are tokens
    cos, sin = (t[..., : t.shape[-1] // 2].flatten(0, 1) for t in position_embeddings)
    B, S = q.shape[:2]
    position_ids = torch.arange(B * S, device=q.device).view(B, S) if len(cos) > S else None
    out = rope_attention(
        q, k, v, cos, sin, causal=module.is_causal, softmax_scale=module.scaling, position_ids=position_ids
    )
    return module.o_proj(out.flatten(2)), None


def _activation(module: Any) -> Literal["swiglu", "geglu", "gelu", "relu2"]:
    """moe_mlp's name for what the experts do between their two products."""
    for name, only in _REFUSED_LAYOUTS.items():
        given = getattr(module, name, only)
        if given != only:
            raise ValueError(_refusal(module, "experts", f"{name} is {given}", f"experts where it is {only}"))
    gated = getattr(module, "has_gate", True)
    if gated and type(module)._apply_gate is not moe._default_apply_gate:
        raise ValueError(_refusal(module, "experts", "it has an _apply_gate of its own", "transformers' default one"))
    known, act = (_GATED if gated else _PLAIN), getattr(module, "act_fn", None)
    activation = known.get(act) or known.get(type(act))
    if activation is None:
        names = ", ".join(sorted({getattr(a, "__name__", str(a)) for a in known}))
        gate = "with" if gated else "without"
        raise ValueError(_refusal(module, "experts", f"its act_fn is {act}", f"these {gate} a gate: {names}"))
    return activation


def _refusal(module: torch.nn.Module, kind: str, given: str, allowed: str) -> str:
    return (
        f'{type(module).__name__}: {given}; {kind}_implementation="ava" computes only {allowed}. '
        f'Take another one: model.set_{kind}_implementation("eager")'
    )


moe.ExpertsInterface.register("ava", experts)
AttentionInterface.register("ava", attention)
AttentionMaskInterface.register("ava", sdpa_mask)  # without one, transformers would pass no mask, not even padding
