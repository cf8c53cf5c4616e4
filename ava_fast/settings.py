"""Every setting of a run: its type, its bounds, its default and, below it, what it means.

docs/configuration.md is made from here. `ava_fast.config` reads and checks trees of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(ge=1, le=2**53)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Frozen, strict, and closed: no coercion of "8" to 8, no unknown key, no NaN."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The decoder's shape. A block is dense or a mixture of experts (see `moe`)."""

    vocab_size: Positive = 1024
    """Rows of the embedding. A tokenizer trained by ava-fast gets this many tokens; a given one may have fewer."""
    hidden_size: Positive = 128
    """Width of the residual stream (M)."""
    num_layers: Positive = 3
    """Decoder blocks."""
    num_heads: Positive = 4
    """Query heads (H)."""
    num_kv_heads: Positive | None = None
    """Key/value heads; fewer than `num_heads` gives grouped-query attention. None: as many as `num_heads`."""
    head_dim: Positive | None = None
    """Width of a head (D). None: `hidden_size / num_heads`."""
    intermediate_size: Positive = 384
    """Width of the SwiGLU in dense blocks."""
    num_dense_layers: Count = 0
    """The first blocks that use a dense MLP in place of experts. With `moe.num_experts: 0` all do."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the output head."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding's wavelengths."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream are scaled by 1/√(2·layers)."""


class MoeConfig(Section):
    """Router and experts, the same in every mixture-of-experts block."""

    num_experts: Annotated[int, Field(ge=0, le=1024)] = 8
    """Routed experts per block (E). 0: every block is dense."""
    top_k: Annotated[int, Field(ge=1, le=32)] = 2
    """Experts that each token is sent to (K)."""
    intermediate_size: Positive = 192
    """Width of one expert's SwiGLU (I)."""
    shared_experts: Count = 0
    """Experts that see every token; they act as one MLP of width `shared_experts · intermediate_size`."""
    shared_expert_gate: bool = False
    """Scale the shared experts' output by a learned sigmoid gate per token (Qwen2-MoE)."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns the router's logits into scores: softmax over the experts, or a sigmoid for each (DeepSeek-V3)."""
    normalize: bool = True
    """Renormalise the chosen experts' weights so that they add up to 1."""
    scale: PositiveFloat = 1.0
    """Multiplies the routed experts' weights (DeepSeek-V3's `routed_scaling_factor`)."""
    num_groups: Positive | None = None
    """Equal groups of neighbouring experts; with `group_top_k`, a token only asks experts of its best groups. None: no
    groups."""
    group_top_k: Positive | None = None
    """Groups that a token may ask; a group is as good as the sum of its two best scores."""
    capacity_factor: PositiveFloat | None = None
    """In training, an expert accepts at most ceil(factor · T · K / E) requests of the T tokens of a micro-batch on one
    rank, so what overflows depends on both. None: no limit, no token is dropped."""
    eval_capacity_factor: PositiveFloat | None = None
    """The same in evaluation and generation. None: no limit, whatever `capacity_factor` is: a held-out loss must not
    depend on how sequences share batches."""
    overflow: Literal["next_best", "drop"] = "next_best"
    """What a full expert rejects asks the token's next-best expert, or is dropped."""
    priority: Literal["choice", "probability"] = "choice"
    """Who is served first where an expert fills up: first choices, in the order of tokens, or the highest scores."""
    max_reroutes: Count | None = None
    """Times that a rejected request may ask on, with `overflow: next_best`. None: until its candidates run out."""
    jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """In training, multiply the router's input by uniform noise in [1 − jitter, 1 + jitter] (Switch Transformer)."""
    aux_loss_weight: NonNegative = 0.01
    """Weight of the load-balancing loss. It is made for softmax scores; sigmoid ones it also pushes towards 0: prefer
    `expert_bias_rate` there."""
    z_loss_weight: NonNegative = 0.001
    """Weight of the router z-loss (ST-MoE), which keeps router logits small."""
    expert_bias_rate: NonNegative = 0.0
    """Balancing without a loss (Wang et al., 2024): every step moves a bias on each expert's score by this much, up
    where it had fewer requests than the mean, down where more. It takes part in the choice of experts alone, not in
    their weights. 0: there is no bias."""


class SourceConfig(Section):
    """One of several data sets that are trained on at once."""

    data_dir: str
    """A folder of text or of shards."""
    weight: PositiveFloat
    """Its share of all sequences, in proportion to the other weights; proportions are exact."""


class DataConfig(Section):
    """Where text comes from and how it becomes sequences."""

    data_dir: str | None = None
    """A folder of text, or of shards that `ava-fast prepare` wrote. None: the Python standard library's source."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    """In place of `data_dir`, several such folders, each with a weight. They need one tokenizer; without
    `tokenizer_name` it is the first one's. Each is shuffled on its own and begins anew when it is through."""
    cache_dir: str = "outputs/data"
    """Where tokenizers and shards made from a text folder are kept; made once per distinct input."""
    tokenizer_name: str | None = None
    """A `tokenizer.json` or a folder that holds one. None: train a byte-level BPE of `model.vocab_size` tokens."""
    max_length: Annotated[int, Field(ge=2, le=2**31 - 1)] = 128
    """Tokens per training sequence (S)."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of documents held out, chosen by a hash of their path, or of their text where a file holds many: never
    trained on."""
    document_attention: bool = False
    """Tokens attend only to their own document, with positions counted from its start, in training and evaluation."""
    prefetch_batches: Annotated[int, Field(ge=0, le=1024)] = 2
    """Batches that a thread reads ahead, into page-locked memory where there is CUDA. 0: none."""
    text_column: str | None = None
    """Where a record of JSON, Parquet or Arrow has its text. None: `text`, or else `content`."""
    max_loss: Fraction = 0.01
    """Share of the data that may be unreadable, by bytes and by records; more is refused before anything is written."""


class FiltersConfig(Section):
    """Which documents of a folder of text are left out; the standard library's source is not filtered."""

    min_length: Count = 0
    """Characters that a document needs."""
    max_repetition: Fraction | None = None
    """Share of a document's runs of four words that occur in it before. None: any."""
    max_consecutive_repeats: Positive | None = None
    """Times that the same word, or the same line, may follow itself. None: any."""
    exact_duplicates: bool = True
    """Leave out documents that equal an earlier one."""
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Leave out documents whose set of five-word runs has about this much in common (Jaccard) with an earlier one's.
    None: keep them. Needs `pip install 'ava-fast[near-duplicates]'`."""
    hook: str | None = None
    """`module:function`, called with each text; returns why to leave it out (a language, a low quality) or None."""


class AdaptiveLrConfig(Section):
    """An overlay on the schedule: a factor that moves when the loss no longer falls."""

    enabled: bool = False
    """Raise the rate on a plateau with steady gradients, lower it on one with unsteady ones. Off: only emergencies."""
    plateau_patience: Annotated[int, Field(ge=2, le=1_000_000)] = 100
    """Healthy steps after warmup in which the mean loss must fall."""
    min_improvement: NonNegative = 0.001
    """Share of the best such mean by which the next must lie below it."""
    growth_factor: Annotated[float, Field(ge=1.0, le=10.0)] = 1.15
    """Of the rate, on a plateau with steady gradients."""
    plateau_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Of the rate, on a plateau with unsteady gradients."""
    min_lr: PositiveFloat | None = None
    """The overlay lowers the rate no further. None: a hundredth of `learning_rate`."""
    max_lr: PositiveFloat | None = None
    """The overlay raises the rate no further. None: twice `learning_rate`."""
    emergency_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """An emergency cut, which follows on repeated bad steps, multiplies the rate by this, enabled or not."""


class TrainingConfig(Section):
    """The optimisation run."""

    mode: Literal["fast", "standard", "debug"] = "standard"
    """How much a run tells and checks: `fast` records every `logging.log_steps` steps, `debug` looks into every module.
    docs/modes.md has what each costs."""
    detect_anomaly: bool = False
    """With `mode: debug`, have autograd name the operation whose backward pass made a NaN; it doubles a step's time."""
    max_steps: Positive = 1000
    """Optimizer steps, which also drive the schedule. A skipped batch is none."""
    batch_size: Positive = 8
    """Sequences in one forward pass, over all ranks together: a world of N gets `batch_size / N` each."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step; a step sees `batch_size · gradient_accumulation_steps` sequences."""
    learning_rate: PositiveFloat = 4e-3
    """Peak rate, reached at the end of warmup."""
    lr_scheduler_type: Literal[
        "cosine", "cosine_with_restarts", "linear", "polynomial", "onecycle", "sgdr", "wsd", "constant"
    ] = "cosine"
    """Shape after warmup: docs/learning-rate.md shows each."""
    warmup_steps: Count | None = None
    """Steps of warmup. None: `warmup_ratio` of the run."""
    warmup_ratio: Fraction = 0.03
    """Share of `max_steps` spent in warmup, unless `warmup_steps` is set."""
    warmup_type: Literal["linear", "cosine", "polynomial", "exponential"] = "linear"
    """Shape of the warmup; exponential begins at a hundredth of the peak. `onecycle` has a cosine of its own."""
    warmup_power: PositiveFloat = 2.0
    """Exponent of a polynomial warmup."""
    lr_end: NonNegative = 0.0
    """Rate at the last step, and at the end of every cycle (ignored by `constant`)."""
    num_cycles: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Equal cycles of `cosine_with_restarts`."""
    restart_steps: Positive = 100
    """Length of the first cycle of `sgdr`."""
    restart_factor: Annotated[int, Field(ge=1, le=1000)] = 2
    """Every cycle of `sgdr` is this many times as long as the one before."""
    cycle_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Peak of a cycle as a share of the one before, with restarts of either kind."""
    power: PositiveFloat = 1.0
    """Exponent of `polynomial`."""
    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the run in which `wsd` decays."""
    adaptive_lr: AdaptiveLrConfig = AdaptiveLrConfig()
    """What adapts the rate to how training goes."""
    noise_scale_steps: Count = 0
    """Steps between measurements of the gradient noise scale, which says what batch size pays (McCandlish et al.,
    2018). 0: never. Needs two ranks or `gradient_accumulation_steps` of two."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's decay rate of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's denominator term."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient norm to this. 0: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; with bf16 the optimizer keeps fp32 master weights."""
    compile: bool = False
    """Run every block through `torch.compile`: some seconds to a minute before the first step, and faster ones after.
    On a CPU it needs a C++ compiler. Not with ZeRO-3, which fetches a block's weights in the midst of it."""
    attention_backend: Literal["auto", "sdpa", "triton", "hopper", "torch"] = "auto"
    """What computes attention: torch's fastest after a rotation, our kernels with the rotation inside (on a GPU; hopper
    on an H100 or H200, in bf16), or plain PyTorch. `auto`: by docs/attention.md."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Of initial weights, data order and router noise."""
    init_from: str | None = None
    """A folder written by `ava-fast import`: start from these weights instead of random ones."""


class LengthConfig(Section):
    """Shorter sequences first: every row of `data.max_length` tokens is cut into equal pieces, and nothing is lost."""

    shape: Literal["constant", "linear", "exponential", "stages"] = "constant"
    """How the length rises from `start` to `data.max_length`, in lengths that divide it; or by `stages`."""
    start: Annotated[int, Field(ge=2, le=2**31 - 1)] = 32
    """The first length of `linear` and `exponential`."""
    stages: Annotated[list[Positive], Field(min_length=1)] | None = None
    """The lengths of `stages` before `data.max_length`, each for an equal part: [128, 256, 512]."""
    ratio: Fraction = 0.5
    """Share of `max_steps` after which sequences have their full length."""


class StageConfig(Section):
    """From a step on, so many micro-batches."""

    step: Count
    """Optimizer steps taken before it."""
    micro_batches: Positive
    """Forward passes per optimizer step from then on."""


class BatchConfig(Section):
    """How many micro-batches of `training.batch_size` sequences a step takes, in place of
    `training.gradient_accumulation_steps`."""

    shape: Literal["constant", "stages", "cyclical", "noise_scale"] = "constant"
    """By `stages`; up and down in a triangle between the bounds; or following the gradient noise scale."""
    stages: Annotated[list[StageConfig], Field(min_length=1)] | None = None
    """Of `stages`, in the order of their steps; before the first, `training.gradient_accumulation_steps` holds."""
    min_micro_batches: Positive = 1
    """The fewest, of `cyclical` and `noise_scale`."""
    max_micro_batches: Positive = 8
    """The most, of `cyclical` and `noise_scale`."""
    period: Annotated[int, Field(ge=2, le=2**53)] = 100
    """Steps from one smallest batch to the next, with `cyclical`."""
    learning_rate: Literal["keep", "sqrt"] = "keep"
    """`sqrt`: the rate is multiplied by the root of micro-batches over `training.gradient_accumulation_steps`."""


class DifficultyConfig(Section):
    """Easy rows first. A row's difficulty is the mean over its tokens; it is worked out once per data set and kept
    beside the shards."""

    measure: Literal["none", "length", "rarity", "loss"] = "none"
    """Of a token: its document's length; the surprisal of the token alone, −log of its share of the split; or its
    cross-entropy by a `reference` model."""
    mode: Literal["threshold", "order"] = "threshold"
    """`threshold`: draw from the easiest share, which rises from `start` to all; easy rows come more often. `order`: in
    the first epoch every row once, in 32 buckets from easy to hard. Either is shuffled within, and an ordinary shuffle
    follows."""
    pacing: Literal["linear", "root", "step"] = "linear"
    """How the threshold rises: evenly, fast at first, or in four jumps."""
    start: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the rows, the easiest, that the threshold begins with."""
    ratio: Fraction = 0.5
    """When the threshold admits all: after this share of `max_steps · batch_size · gradient_accumulation_steps`
    sequences, whatever `curriculum.batch` makes of them."""
    reference: str | None = None
    """A run, a checkpoint or an imported folder, for `measure: loss`; it has to use the data's tokenizer."""


class CurriculumConfig(Section):
    """What a run sees when: see docs/curricula.md."""

    length: LengthConfig = LengthConfig()
    """Sequence lengths."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    difficulty: DifficultyConfig = DifficultyConfig()
    """Which rows."""


class StabilityConfig(Section):
    """What happens to a step whose loss or gradient is not usable: see docs/when-training-misbehaves.md."""

    window: Annotated[int, Field(ge=2, le=100_000)] = 64
    """Steps whose losses and gradient norms say what is usual, and in which bad steps are counted."""
    deviations: PositiveFloat | None = 50.0
    """A norm or a loss this many robust standard deviations above the window's median is bad; at 50 that is at least
    six times the median norm, or twice the median loss. None: only `max_norm` and what is not finite count."""
    max_norm: PositiveFloat | None = None
    """A gradient norm, before clipping, above this is bad, from the first step on. None: no such limit."""
    max_skips: Count = 5
    """Bad steps in the window that are only skipped. One more, and the learning rate is cut; again, and the run rolls
    back or stops."""
    recovery_steps: Positive = 100
    """Good steps over which the rate climbs back after a cut."""
    max_rollbacks: Count = 2
    """Times that a run may go back to its last good checkpoint before it stops instead."""
    gradient_surgery: Literal["none", "pcgrad", "adaptive"] = "none"
    """Where the gradients of a step's micro-batches pull against each other, project that away before adding them up:
    PCGrad (Yu et al., 2020), or by targets that adapt (GradVac, Wang et al., 2021). Every micro-batch's gradient is
    kept and averaged over ranks by itself, so it takes their number times the memory and the communication."""
    dump_batches: Count = 8
    """The run's first bad batches that are kept in `bad_batches/` of its folder, for `ava-fast replay`."""


class MemoryConfig(Section):
    """Trades of time for memory, and what is done before there is none left."""

    thresholds: Annotated[list[Fraction], Field(min_length=4, max_length=4)] | None = [0.75, 0.8, 0.85, 0.9]
    """Shares of the memory that a rank may have at which there is a warning, advice on what takes less, an emptied
    cache, and once a checkpoint ahead of its time. None: nothing is measured."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in backward."""
    micro_batch: Positive | None = None
    """Sequences of a rank in one forward pass, at most: its share of `training.batch_size` is taken in as many passes
    as that needs, and the batch of a step stays what it is. None: all in one."""
    offload_optimizer: bool = False
    """Keep the fp32 weights, their gradients and AdamW's moments in the host's memory, and update them there: for
    ZeRO-2, which copies gradients to the host and weights back in every step."""
    on_out_of_memory: Literal["ladder", "stop"] = "ladder"
    """What follows when a step does not fit: activation checkpointing, a smaller micro-batch, ZeRO-2, the optimizer on
    the host, one after the other, and the same step again; or a clean stop."""


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    save_steps: Count = 500
    """Steps between checkpoints. 0: only at the end and on interruption."""
    save_total_limit: Positive | None = 3
    """The newest checkpoints that are kept. None: all."""
    keep_every: Count = 0
    """Checkpoints at multiples of this many steps are kept as well. 0: none."""
    keep_best: Count = 1
    """Of those saved at a step that was evaluated, so many with the lowest held-out loss are kept as well."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in the host's memory: 12 bytes per parameter, shared by the ranks."""
    remote: str | None = None
    """A URL, as s3://bucket/folder, that finished checkpoints are copied to while training goes on."""
    when_busy: Literal["wait", "skip"] = "wait"
    """When a checkpoint is due while the last one is still being written: wait for that, or leave this one out."""


class EvaluationConfig(Section):
    """Held-out loss during and after training, and a sample of text at the end."""

    eval_steps: Count = 500
    """Steps between evaluations. 0: only at the end."""
    max_sequences: Positive | None = 512
    """Held-out sequences per evaluation, always the same ones. None: all."""
    ngram_baselines: bool = True
    """At the end, compare with a unigram and a bigram model of the training tokens; reads that split once."""
    prompt: str | None = None
    """Continue this text after training and show the result."""
    max_new_tokens: Positive = 64
    """Length of that continuation."""
    temperature: NonNegative = 0.0
    """Of its sampling. 0: the most likely token each time."""


class DistributedConfig(Section):
    """Between ranks."""

    timeout_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """A collective that takes longer ends the run. With nccl the limits of the phases below do: torch's own would end
    the process without a word."""
    heartbeat_seconds: Annotated[int, Field(ge=0, le=86400)] = 60
    """A rank whose process gives no sign of life for so long is ended. 0: never."""
    timeout_start: Annotated[int, Field(ge=1, le=10**6)] = 1800
    """Seconds that loading and the first step may take; a rank that takes longer is ended. Preparing data may take any
    time."""
    timeout_step: Annotated[int, Field(ge=1, le=10**6)] = 900
    """Seconds that each later step may take."""
    timeout_evaluate: Annotated[int, Field(ge=1, le=10**6)] = 3600
    """Seconds that an evaluation may take."""
    timeout_save: Annotated[int, Field(ge=1, le=10**6)] = 3600
    """Seconds that a checkpoint may take."""
    health_checks: Literal["off", "quick", "full"] = "quick"
    """What of each rank's machine is measured and compared before the run: in a tenth of a second, or in some seconds.
    GPUs are asked for their state through NVML, if nvidia-ml-py is installed, and through dcgmi."""
    health_ratio: Annotated[float, Field(gt=1)] = 3.0
    """A rank that computes or copies so many times slower than the others' median is refused."""
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5
    """A rank whose own work in a step takes more than so many times the others' median is named."""


class DeepspeedConfig(Section):
    """What DeepSpeed shards."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """0 replicates everything; 1 shards optimizer states; 2 gradients as well; 3 parameters as well."""
    bucket_elements: Annotated[int, Field(ge=1000, le=10**10)] = 50_000_000
    """Elements per reduce and all-gather bucket: larger is faster and takes more memory."""


class LoggingConfig(Section):
    """What a run leaves behind and what it prints."""

    output_dir: str = "outputs"
    """Runs go to `<output_dir>/runs/run_<timestamp>[_name]/`."""
    experiment_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] | None = None
    """Appended to the run's folder name."""
    log_steps: Positive = 10
    """Steps between step lines; metrics.jsonl gets every step."""
    progress: bool = True
    """A progress bar with ETA, on rank 0 and only on a terminal."""


class Config(Section):
    """Everything a run is."""

    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    data: DataConfig = DataConfig()
    filters: FiltersConfig = FiltersConfig()
    training: TrainingConfig = TrainingConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    stability: StabilityConfig = StabilityConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def head_dim(self) -> int:
        """Width of an attention head, resolved."""
        return self.model.head_dim or self.model.hidden_size // self.model.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.model.num_kv_heads or self.model.num_heads

    @property
    def sources(self) -> list[tuple[str | None, float]]:
        """Every folder that is trained on, and its weight."""
        if self.data.sources is None:
            return [(self.data.data_dir, 1.0)]
        return [(source.data_dir, source.weight) for source in self.data.sources]
