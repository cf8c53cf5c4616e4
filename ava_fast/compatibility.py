"""Which settings exclude or need each other: the combinations that are refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ava_fast.config import Config, Fault, saved_config
from ava_fast.data.order import LONGEST_CYCLE, cycle

MAX_HEAD_DIM = 256  # ava_kernels.attention's, without the second that importing torch takes

# Of sections `model` and `moe`: what changes how a model is trained, not what it is. The last three also say how an
# evaluation with a capacity overflows, but it is `eval_capacity_factor` that makes it another function.
TUNABLE = {"jitter", "aux_loss_weight", "z_loss_weight", "initializer_range", "capacity_factor"}
TUNABLE |= {"overflow", "priority", "max_reroutes"}


def conflicts(config: Config) -> list[Fault]:
    """Every impossible combination in a tree whose single values are valid."""
    model, moe, training = config.model, config.moe, config.training
    faults = []

    def refuse(key: str, given: object, allowed: str) -> None:
        faults.append(Fault(key, "does not go with the other settings", given=str(given), allowed=allowed))

    if model.head_dim is None and model.hidden_size % model.num_heads:
        refuse(
            "model.num_heads",
            model.num_heads,
            f"a divisor of model.hidden_size ({model.hidden_size}), or set model.head_dim",
        )
    elif config.head_dim % 2:
        refuse("model.head_dim", config.head_dim, "an even number: the rotation turns pairs")
    elif config.head_dim > MAX_HEAD_DIM:
        refuse("model.head_dim", config.head_dim, f"at most {MAX_HEAD_DIM}, as attention has it: more model.num_heads")
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        refuse("model.num_kv_heads", model.num_kv_heads, f"a divisor of model.num_heads ({model.num_heads})")
    if model.num_dense_layers > model.num_layers:
        refuse("model.num_dense_layers", model.num_dense_layers, f"at most model.num_layers ({model.num_layers})")
    if moe.num_experts > 0:
        _routing_conflicts(config, refuse)
    if moe.shared_expert_gate and not moe.shared_experts:
        refuse("moe.shared_expert_gate", "true", "false, or set moe.shared_experts")
    if training.warmup_steps is not None and training.warmup_steps > training.max_steps:
        refuse("training.warmup_steps", training.warmup_steps, f"at most training.max_steps ({training.max_steps})")
    if training.lr_end > training.learning_rate:
        refuse("training.lr_end", training.lr_end, f"at most training.learning_rate ({training.learning_rate})")
    adaptive = training.adaptive_lr
    if adaptive.max_lr is not None and adaptive.max_lr < training.learning_rate:
        at_least = f"at least training.learning_rate ({training.learning_rate})"
        refuse("training.adaptive_lr.max_lr", adaptive.max_lr, at_least)
    if adaptive.min_lr is not None and adaptive.min_lr > training.learning_rate:
        at_most = f"at most training.learning_rate ({training.learning_rate})"
        refuse("training.adaptive_lr.min_lr", adaptive.min_lr, at_most)
    if training.compile and config.deepspeed.zero_stage == 3:
        refuse("training.compile", "true", "false, or deepspeed.zero_stage below 3, as 3 fetches weights on the way")
    if config.memory.offload_optimizer and config.deepspeed.zero_stage != 2:
        refuse(
            "memory.offload_optimizer", "true", f"false, or deepspeed.zero_stage 2 (now {config.deepspeed.zero_stage})"
        )
    if config.data.document_attention and training.attention_backend == "sdpa":
        allowed = "auto, triton or torch, or set data.document_attention to false"
        refuse("training.attention_backend", "sdpa", allowed)
    if training.attention_backend == "hopper":
        if training.precision != "bf16":
            allowed = f"auto, or set training.precision to bf16 (now {training.precision})"
            refuse("training.attention_backend", "hopper", allowed)
        if config.head_dim % 8 or config.head_dim > 128:
            allowed = f"auto, or heads of 8, 16 … 128 elements (now {config.head_dim})"
            refuse("training.attention_backend", "hopper", allowed)
    thresholds = config.memory.thresholds or []
    if thresholds != sorted(set(thresholds)):
        refuse("memory.thresholds", thresholds, "four shares that rise")
    _source_conflicts(config, refuse)
    _curriculum_conflicts(config, refuse)
    if training.mode == "debug" and training.compile:
        refuse("training.mode", "debug", "fast or standard, or set training.compile to false: debug looks into modules")
    if training.detect_anomaly and training.mode != "debug":
        refuse("training.detect_anomaly", "true", f"false, or set training.mode to debug (now {training.mode})")
    stability = config.stability
    if stability.max_skips >= stability.window:
        refuse("stability.max_skips", stability.max_skips, f"below stability.window ({stability.window})")
    if stability.gradient_surgery != "none":
        given = stability.gradient_surgery
        if config.deepspeed.zero_stage > 0:
            zero = f"none, or deepspeed.zero_stage 0 (now {config.deepspeed.zero_stage}): it needs whole gradients"
            refuse("stability.gradient_surgery", given, zero)
        if training.gradient_accumulation_steps < 2:
            losses = "none, or training.gradient_accumulation_steps of 2 or more: its losses are the micro-batches'"
            refuse("stability.gradient_surgery", given, losses)
    return faults


def _routing_conflicts(config: Config, refuse: Callable[[str, object, str], None]) -> None:
    moe = config.moe
    groups, group_top_k = moe.num_groups, moe.group_top_k
    if moe.top_k > moe.num_experts:
        refuse("moe.top_k", moe.top_k, f"at most moe.num_experts ({moe.num_experts})")
    if moe.max_reroutes and moe.overflow == "drop":
        refuse("moe.max_reroutes", moe.max_reroutes, "null, or set moe.overflow to next_best")
    if groups is None and group_top_k is None:
        return
    if groups is None or group_top_k is None:
        missing, given = ("num_groups", "group_top_k") if groups is None else ("group_top_k", "num_groups")
        refuse(f"moe.{missing}", "null", f"an integer, as moe.{given} is one")
    elif moe.num_experts % groups:
        refuse("moe.num_groups", groups, f"a divisor of moe.num_experts ({moe.num_experts})")
    elif group_top_k > groups:
        refuse("moe.group_top_k", group_top_k, f"at most moe.num_groups ({groups})")
    elif group_top_k * (moe.num_experts // groups) < moe.top_k <= moe.num_experts:
        experts = moe.num_experts // groups
        refuse("moe.group_top_k", group_top_k, f"enough groups of {experts} experts for moe.top_k ({moe.top_k})")


def _source_conflicts(config: Config, refuse: Callable[[str, object, str], None]) -> None:
    folders = [folder for folder, _ in config.sources]
    if config.data.sources is None:
        return
    if config.data.data_dir is not None:
        refuse("data.data_dir", config.data.data_dir, "null, as data.sources names the folders")
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        refuse("data.sources", twice[0], "each data_dir once")
    weights = [weight for _, weight in config.sources]
    if (length := sum(cycle(weights))) > LONGEST_CYCLE:
        given = ", ".join(map(str, weights))
        allowed = (
            f"weights of fewer digits: these repeat after {length:,} sequences, at most {LONGEST_CYCLE:,} may pass"
        )
        refuse("data.sources", given, allowed)


def _curriculum_conflicts(config: Config, refuse: Callable[[str, object, str], None]) -> None:
    length, batch, difficulty = config.curriculum.length, config.curriculum.batch, config.curriculum.difficulty
    whole = config.data.max_length
    if length.shape in ("linear", "exponential") and whole % length.start:
        refuse("curriculum.length.start", length.start, f"a divisor of data.max_length ({whole})")
    if (length.stages is not None) != (length.shape == "stages"):
        allowed = "a list of lengths, as curriculum.length.shape is stages"
        allowed = allowed if length.stages is None else f"null, or curriculum.length.shape stages (now {length.shape})"
        refuse("curriculum.length.stages", "null" if length.stages is None else length.stages, allowed)
    elif (stages := length.stages) and (any(each < 2 or whole % each for each in stages) or stages != sorted(stages)):
        refuse("curriculum.length.stages", stages, f"divisors of data.max_length ({whole}) of 2 or more that rise")
    if (batch.stages is not None) != (batch.shape == "stages"):
        allowed = "a list of {step, micro_batches}, as curriculum.batch.shape is stages"
        allowed = allowed if batch.stages is None else f"null, or curriculum.batch.shape stages (now {batch.shape})"
        refuse("curriculum.batch.stages", "null" if batch.stages is None else "a list", allowed)
    elif (steps := [stage.step for stage in batch.stages or []]) != sorted(set(steps)):
        refuse("curriculum.batch.stages", f"steps {steps}", "steps that rise")
    if batch.shape in ("cyclical", "noise_scale") and batch.min_micro_batches > batch.max_micro_batches:
        most = f"at most curriculum.batch.max_micro_batches ({batch.max_micro_batches})"
        refuse("curriculum.batch.min_micro_batches", batch.min_micro_batches, most)
    if batch.shape == "noise_scale" and not config.training.noise_scale_steps:
        refuse("curriculum.batch.shape", "noise_scale", "another, or training.noise_scale_steps above 0")
    if batch.shape != "constant" and config.stability.gradient_surgery != "none":
        allowed = f"constant, or stability.gradient_surgery none (now {config.stability.gradient_surgery})"
        refuse("curriculum.batch.shape", batch.shape, f"{allowed}: its losses are the micro-batches'")
    if (difficulty.reference is not None) != (difficulty.measure == "loss"):
        given, allowed = difficulty.reference, f"null, or curriculum.difficulty.measure loss (now {difficulty.measure})"
        if given is None:
            allowed = "a run, a checkpoint or an imported folder, as curriculum.difficulty.measure is loss"
        refuse("curriculum.difficulty.reference", given or "null", allowed)


def world_size_conflicts(config: Config, world_size: int) -> list[Fault]:
    """What a number of ranks does not go with."""
    training, faults = config.training, []
    if training.noise_scale_steps and world_size * training.gradient_accumulation_steps == 1:
        faults.append(
            Fault(
                "training.noise_scale_steps",
                "compares gradients of two sizes, and there is one",
                given=str(training.noise_scale_steps),
                allowed="0, or two ranks, or training.gradient_accumulation_steps of 2 or more",
            )
        )
    batch = config.curriculum.batch
    if batch.shape == "noise_scale" and world_size * batch.min_micro_batches == 1:
        faults.append(
            Fault(
                "curriculum.batch.min_micro_batches",
                "leaves nothing to measure the noise scale by: it compares gradients of two sizes",
                given="1",
                allowed="2 or more, or two ranks",
            )
        )
    if training.batch_size % world_size:
        faults.append(
            Fault(
                "training.batch_size",
                f"cannot be shared out over {world_size} ranks",
                given=str(config.training.batch_size),
                allowed=f"a multiple of the world size ({world_size})",
            )
        )
    return faults


def model_differences(config: Config, saved: dict[str, Any]) -> list[str]:
    """Settings in which weights with the sections `model` and `moe` of `saved` are another model than `config`'s."""
    own = _identity(config)
    other = _identity(saved_config({section: saved[section] for section in ("model", "moe")}))
    return [f"{key} is {own[key]}, there it is {other[key]}" for key in own if own[key] != other[key]]


def _identity(config: Config) -> dict[str, Any]:
    """`section.key` → what tells one model from another, with defaults that follow from other keys filled in."""
    resolved = {
        "model.head_dim": config.head_dim,
        "model.num_kv_heads": config.num_kv_heads,
        # The rate may change; that there is a bias may not.
        "moe.expert_bias_rate": "above 0" if config.moe.expert_bias_rate else "0",
    }
    keys = {
        f"{section}.{key}": value
        for section, values in config.model_dump(include={"model", "moe"}).items()
        for key, value in values.items()
        if key not in TUNABLE
    }
    return {**keys, **resolved}
