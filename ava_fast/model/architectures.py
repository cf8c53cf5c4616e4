"""How Mixtral, Qwen2-MoE and Qwen3-MoE name what the Transformer has: its tensors and its settings.

Nothing here touches a file or holds a weight; `huggingface.py` does.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

from torch import Tensor

from ava_fast.config import Config

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}

Index = EllipsisType | slice | tuple[int, slice] | int

_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.shared.down.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
}


def parts(name: str, ours: Tensor, config: Config, architecture: str, fused: bool) -> list[tuple[str, Index]]:
    """Hugging Face's names for one of our tensors, each with the part of ours that it holds.

    `fused` is the layout of transformers 5 in memory; on disk experts are kept one by one.
    """
    if name in _OUTER:
        return [(_OUTER[name], ...)]
    _, number, inner = name.split(".", 2)
    layer = f"model.layers.{number}"
    if inner in _INNER:
        return [(f"{layer}.{_INNER[inner]}", ...)]
    if inner.startswith("attention.qkv."):
        kind = inner.rpartition(".")[2]
        queries = config.model.num_heads * config.head_dim
        keys = queries + config.num_kv_heads * config.head_dim
        rows = {"q": slice(0, queries), "k": slice(queries, keys), "v": slice(keys, None)}
        return [(f"{layer}.self_attn.{letter}_proj.{kind}", part) for letter, part in rows.items()]
    gate_rows, up_rows = slice(0, ours.shape[-2] // 2), slice(ours.shape[-2] // 2, None)
    if inner in ("mlp.gate_up.weight", "mlp.shared.gate_up.weight"):
        mlp = f"{layer}.mlp.shared_expert" if "shared" in inner else f"{layer}.mlp"
        return [(f"{mlp}.gate_proj.weight", gate_rows), (f"{mlp}.up_proj.weight", up_rows)]

    separate_mixtral = architecture == "mixtral" and not fused
    mlp = f"{layer}.block_sparse_moe" if separate_mixtral else f"{layer}.mlp"
    gate, up, down = ("w1", "w3", "w2") if separate_mixtral else ("gate_proj", "up_proj", "down_proj")
    if inner == "mlp.router":
        return [(f"{mlp}.gate.weight", ...)]
    if fused:
        return [(f"{mlp}.experts.{inner.removeprefix('mlp.')}_proj", ...)]
    experts = range(config.moe.num_experts)
    if inner == "mlp.down":
        return [(f"{mlp}.experts.{e}.{down}.weight", e) for e in experts]
    halves = ((gate, gate_rows), (up, up_rows))
    return [(f"{mlp}.experts.{e}.{half}.weight", (e, rows)) for e in experts for half, rows in halves]


def obstacles(config: Config, architecture: str) -> list[str]:
    """The settings that an architecture would need to be different. What only acts in training is none: jitter, and
    the capacity there."""
    model, moe = config.model, config.moe
    mixtral, qwen2 = architecture == "mixtral", architecture == "qwen2_moe"
    needs = {
        "moe.num_experts above 0": moe.num_experts > 0,
        "model.norm: rmsnorm": model.norm == "rmsnorm",
        "model.num_dense_layers: 0": model.num_dense_layers == 0 or not mixtral,
        "moe.score: softmax": moe.score == "softmax",
        "moe.normalize: true": moe.normalize or not mixtral,
        "moe.scale: 1": moe.scale == 1.0,
        "moe.num_groups: null": moe.num_groups == moe.group_top_k,
        "moe.eval_capacity_factor: null": moe.eval_capacity_factor is None,
        "moe.expert_bias_rate: 0": moe.expert_bias_rate == 0.0,
        f"model.qk_norm: {str(architecture == 'qwen3_moe').lower()}": model.qk_norm == (architecture == "qwen3_moe"),
        "model.attention_bias: false": qwen2 or not model.attention_bias,
        "moe.shared_experts: 0": qwen2 or not moe.shared_experts,
        "moe.shared_experts above 0": not qwen2 or moe.shared_experts > 0,
        "moe.shared_expert_gate: true": not qwen2 or moe.shared_expert_gate,
    }
    return [need for need, met in needs.items() if not met]


def options(config: Config, architecture: str, eos_id: int | None) -> dict[str, Any]:
    """config.json. Transformers' balance loss is top_k times ours: it counts a token once per choice."""
    model, moe = config.model, config.moe
    options = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.max_length,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},  # transformers 5
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_loss_weight / moe.top_k,
        "bos_token_id": None,  # Mixtral's defaults are ids of its own tokenizer
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    if architecture == "mixtral":
        return options | {
            "num_local_experts": moe.num_experts,
            "intermediate_size": moe.intermediate_size,
            "router_jitter_noise": moe.jitter,
            "sliding_window": None,
        }
    options |= {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.intermediate_size,
        "intermediate_size": model.intermediate_size,
        "mlp_only_layers": list(range(model.num_dense_layers)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": moe.normalize,
        "use_sliding_window": False,
    }
    if architecture == "qwen3_moe":
        return options | {"attention_bias": False}
    shared_width = moe.shared_experts * moe.intermediate_size
    return options | {"qkv_bias": model.attention_bias, "shared_expert_intermediate_size": shared_width}


def sections(options: dict[str, Any], architecture: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """config.json as `model` and `moe` sections, and what in it cannot be expressed. Defaults are transformers' own."""
    mixtral, qwen2, qwen3 = (architecture == name for name in ("mixtral", "qwen2_moe", "qwen3_moe"))
    faults: list[str] = []

    def take(key: str, kind: type, default: Any = None) -> Any:
        value = options.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind:
            return value
        faults.append(f"{key}: {value!r} is not of type {kind.__name__}" if key in options else f"{key} is missing")
        return kind()

    def require(key: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            faults.append(f"{key}: {value!r} is not supported; must be {' or '.join(map(repr, allowed))}")

    rope = options.get("rope_scaling") or options.get("rope_parameters") or {}  # transformers 4, 5
    if not isinstance(rope, dict):
        faults.append(f"rope_parameters: {rope!r} is not an object")
        rope = {}
    require("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    require("partial_rotary_factor", rope.get("partial_rotary_factor", options.get("partial_rotary_factor", 1.0)), 1.0)
    options = {"rope_theta": 1e6 if mixtral else 1e4} | options | rope
    require("hidden_act", options.get("hidden_act", "silu"), "silu")
    require("attention_dropout", options.get("attention_dropout", 0.0), 0.0)
    require("quantization_config", options.get("quantization_config"), None)
    if mixtral:
        require("sliding_window", options.get("sliding_window"), None)
    else:
        require("use_sliding_window", options.get("use_sliding_window", False), False)
        for kind in set(map(str, options.get("layer_types") or [])):
            require("layer_types", kind, "full_attention")
        require("decoder_sparse_step", options.get("decoder_sparse_step", 1), 1)
    if qwen3:
        require("attention_bias", options.get("attention_bias", False), False)  # there it biases the output, too

    dense_layers = [] if mixtral else options.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or any(layer not in dense_layers for layer in range(len(dense_layers))):
        faults.append(f"mlp_only_layers: {dense_layers!r} is not supported; must be the first layers: [0, 1, …]")
        dense_layers = []
    num_experts = take("num_local_experts" if mixtral or "num_local_experts" in options else "num_experts", int)
    width = take("intermediate_size" if mixtral else "moe_intermediate_size", int)
    shared_width = take("shared_expert_intermediate_size", int) if qwen2 else 0
    if qwen2 and (width < 1 or shared_width < 1 or shared_width % width):
        faults.append(f"shared_expert_intermediate_size: {shared_width} must be a multiple of moe_intermediate_size")
    if num_experts < 1:
        faults.append(f"the number of experts is {num_experts}; must be at least 1")
    top_k = take("num_experts_per_tok", int)
    model = {
        "vocab_size": take("vocab_size", int),
        "hidden_size": take("hidden_size", int),
        "num_layers": take("num_hidden_layers", int),
        "num_heads": take("num_attention_heads", int),
        "num_kv_heads": options.get("num_key_value_heads"),
        "head_dim": options.get("head_dim"),
        "num_dense_layers": len(dense_layers),
        "norm": "rmsnorm",
        "norm_eps": take("rms_norm_eps", float, 1e-5 if mixtral else 1e-6),
        "qk_norm": qwen3,
        "attention_bias": qwen2 and take("qkv_bias", bool, True),
        "rope_theta": take("rope_theta", float),
        "tie_embeddings": take("tie_word_embeddings", bool, False),
        "initializer_range": take("initializer_range", float, 0.02),
    }
    if dense_layers:
        model["intermediate_size"] = take("intermediate_size", int)
    moe = {
        "num_experts": num_experts,
        "top_k": top_k,
        "intermediate_size": width,
        "shared_experts": shared_width // max(width, 1),
        "shared_expert_gate": qwen2,
        "normalize": mixtral or take("norm_topk_prob", bool, False),
        "jitter": take("router_jitter_noise", float, 0.0) if mixtral else 0.0,
        "aux_loss_weight": take("router_aux_loss_coef", float, 0.001) * top_k,
    }
    return {"model": model, "moe": moe}, faults
