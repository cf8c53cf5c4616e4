"""The engine against a plain PyTorch loop: two gloo ranks, every ZeRO stage, fp32 and bf16."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ava_fast.checkpoint.shards import Shards, read_weights
from ava_fast.config import Config
from ava_fast.engine import Engine, StepResult, init_distributed
from ava_fast.errors import UserError

WORLD_SIZE, MICRO_BATCHES, STEPS = 2, 2, 8
OFFLOADED = 4  # as a stage: ZeRO-2 with its optimizer on the host
STAGES = range(5)
CASES = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]
MAX_NORM, WEIGHT_DECAY = 0.5, 0.2


class Experts(nn.Module):
    """Top-1 experts in fused weights; with 8 experts and 12 tokens, every rank leaves some unused."""

    z3_leaf = True

    def __init__(self, num_experts: int = 8, width: int = 16, inner: int = 6):
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * inner, width) / 4)
        self.down = nn.Parameter(torch.randn(num_experts, width, inner) / 2)

    def forward(self, x_TM: Tensor) -> Tensor:
        weight_T, expert_T = self.router(x_TM).softmax(dim=-1).max(dim=-1)
        y_TM = torch.zeros_like(x_TM)
        for expert in expert_T.unique().tolist():
            token = (expert_T == expert).nonzero().squeeze(1)
            gate, up = (x_TM[token] @ self.gate_up[expert].T).chunk(2, dim=-1)
            y_TM = y_TM.index_add(0, token, (nn.functional.silu(gate) * up) @ self.down[expert].T)
        return y_TM * weight_T[:, None]


class TinyModel(nn.Module):
    """Tied embedding → norm → experts → head, with 1-d weights and a buffer as real models have."""

    scale: Tensor

    def __init__(self, activation_checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 16)
        self.norm = nn.LayerNorm(16)
        self.experts = Experts()
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(1.1))
        self.activation_checkpointing = activation_checkpointing

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TM = self.embedding(tokens_T)
        normed_TM = self.norm(x_TM)
        if self.activation_checkpointing:
            y_TM = checkpoint(self.experts, normed_TM, use_reentrant=False)
        else:
            y_TM = self.experts(normed_TM)
        logits_TV = self.head(x_TM + y_TM).float() * self.scale
        return nn.functional.cross_entropy(logits_TV, (3 * tokens_T + 1) % 13)


def tokens(step: int, micro_batch: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + rank)
    return torch.randint(0, 13, (12,), generator=generator)


def rate(step: int) -> float:
    return 0.02 / (1 + step)


def make_config(
    stage: int, precision: str, max_grad_norm: float = MAX_NORM, weight_decay: float = WEIGHT_DECAY
) -> Config:
    training = {
        "precision": precision,
        "max_grad_norm": max_grad_norm,
        "weight_decay": weight_decay,
        "adam_beta1": 0.8,
    }
    zero = {"zero_stage": 2 if stage == OFFLOADED else stage, "bucket_elements": 1001}
    memory = {"offload_optimizer": stage == OFFLOADED}
    return Config.model_validate({"training": training, "deepspeed": zero, "memory": memory})


def plain_loop(
    precision: str, max_norm: float = MAX_NORM, steps: int = STEPS
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms before clipping and final fp32 weights of the same training without any engine."""
    model = TinyModel()
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    master = copy.deepcopy(model).float()
    decayed = [p for p in master.parameters() if p.ndim >= 2]
    others = [p for p in master.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.8, 0.95),
        eps=1e-8,
        foreach=False,
    )
    losses, norms = [], []
    for step in range(steps):
        for p in master.parameters():
            p.grad = torch.zeros_like(p)
        total = 0.0
        for rank in range(WORLD_SIZE):
            for micro_batch in range(MICRO_BATCHES):
                model.zero_grad()
                loss = model(tokens(step, micro_batch, rank)) / MICRO_BATCHES
                loss.backward()
                total += loss.item() / WORLD_SIZE
                for p, low in zip(master.parameters(), model.parameters(), strict=True):
                    assert p.grad is not None
                    assert low.grad is not None
                    p.grad += low.grad.float() / WORLD_SIZE
        losses.append(total)
        norms.append(nn.utils.clip_grad_norm_(master.parameters(), max_norm or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        for p, low in zip(master.parameters(), model.parameters(), strict=True):
            low.data.copy_(p.data)
    return losses, norms, {name: tensor.detach() for name, tensor in master.state_dict(keep_vars=True).items()}


def train(engine: Engine, steps: range, poison: bool = False, veto: bool = False) -> list[tuple[float, StepResult]]:
    """Each step's (mean loss of this rank, result). `poison`: rank 1's second micro-batch has an infinite loss;
    `veto`: no gradient is taken."""
    history = []
    for step in steps:
        total = 0.0
        for micro_batch in range(MICRO_BATCHES):
            with torch.no_grad():
                engine.model(tokens(step, 7, engine.rank))  # an evaluation in between must not matter
            loss = engine(tokens(step, micro_batch, engine.rank)) / MICRO_BATCHES
            if poison and engine.rank == 1 and micro_batch == 1:
                loss = loss * math.inf
            engine.backward(loss)
            total += loss.item()
        lr = None if veto else rate(step)
        history.append((total, engine.step(lambda _, lr=lr: lr)))
    return history


def blamed(engine: Engine, broken: str | None) -> list[str]:
    """Whose gradients are reported where rank 1's of one parameter is infinite; the step is then dropped."""
    hook = None
    if broken is not None and engine.rank == 1:
        hook = engine.model.get_parameter(broken).register_hook(lambda gradient: gradient * math.inf)
    with engine.nonfinite_gradients() as names:
        engine.backward(engine(tokens(0, 0, engine.rank)))
    if hook is not None:
        hook.remove()
    engine.step(lambda _: None)
    return names


def held_out(engine: Engine) -> float:
    with torch.no_grad():
        return float(engine.model(tokens(99, 0, 0)))


@contextlib.contextmanager
def elements_read() -> Iterator[list[int]]:
    """What each reading of weights or moments from a checkpoint takes, in elements."""
    counted, read = list[int](), Shards.read

    def count(self: Shards, kind: str, name: str, start: int, length: int) -> Tensor:
        counted.append(length)
        return read(self, kind, name, start, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "read", count)
        yield counted


def exercise(root: Path) -> dict[Any, dict[str, Any]]:
    """Runs on every rank: everything the tests below look at, for every case, in one process group."""
    init_distributed(make_config(0, "fp32"))
    seen: dict[Any, dict[str, Any]] = {}
    for stage, precision in CASES:
        config, folder, half = make_config(stage, precision), root / f"{stage}{precision}", STEPS // 2
        engine = Engine(TinyModel(), config)
        history = train(engine, range(half))
        engine.save(folder)
        case: dict[str, Any] = {"at_save": engine.gather_weights(), "held_out_at_save": held_out(engine)}
        history += train(engine, range(half, STEPS))
        case["history"], case["weights"] = history, engine.gather_weights()

        resumed = Engine(TinyModel(), config)
        with elements_read() as counted:
            resumed.load(folder)
        case["read"] = sum(counted)
        case["after_load"], case["held_out_after_load"] = resumed.gather_weights(), held_out(resumed)
        case["poisoned"] = train(resumed, range(1), poison=True)[0][1]
        case["vetoed"] = train(resumed, range(1), veto=True)[0][1]
        case["after_poison"] = resumed.gather_weights()
        case["resumed_history"], case["resumed"] = train(resumed, range(half, STEPS)), resumed.gather_weights()

        fresh = Engine(TinyModel(), config)
        case["first_vetoed"] = train(fresh, range(5, 6), veto=True)[0][1]
        case["after_first_veto"] = train(fresh, range(half))
        case["blamed"], case["blamed_for_nothing"] = blamed(fresh, "experts.gate_up"), blamed(fresh, None)
        case["after_blame"], fresh = train(fresh, range(half, STEPS)), None

        resumed.load(folder)  # into an engine that has trained: a roll-back
        case["replayed_history"], case["replayed"] = train(resumed, range(half, STEPS)), resumed.gather_weights()

        changed = Engine(TinyModel(), make_config(stage, precision, weight_decay=0.3))
        changed.load(folder)
        case["weight_decay"] = [group["weight_decay"] for group in changed._optimizer.param_groups]

        # The optimizer's state of another stage: training goes on as if there had been no change.
        moved = Engine(TinyModel(), config)
        moved.load(root / f"{max(stage - 1, 0)}{precision}")
        case["moved"], case["moved_history"] = moved.gather_weights(), train(moved, range(half, STEPS))

        other = root / ("0fp32" if precision == "fp32" else "0bf16")  # another stage's checkpoint, for the weights
        resumed.load(other, optimizer=False)
        case["other"], case["held_out_other"] = resumed.gather_weights(), held_out(resumed)
        case["moments_after_weights"] = len(resumed._optimizer.state)
        seen[stage, precision] = case
    for stage in STAGES:
        unclipped = Engine(TinyModel(), make_config(stage, "fp32", max_grad_norm=0.0))
        seen[stage, "unclipped"] = {"history": train(unclipped, range(3)), "weights": unclipped.gather_weights()}
        checkpointed = Engine(TinyModel(activation_checkpointing=True), make_config(stage, "fp32", max_grad_norm=0.0))
        seen[stage, "checkpointed"] = {"history": train(checkpointed, range(3))}
    smaller = TinyModel()
    del smaller.norm.bias
    smaller.norm.bias = None
    for key, model, folder, optimizer in (
        ("missing", TinyModel(), root / "nothing", True),
        ("other model", smaller, root / "3fp32", False),
    ):
        engine = Engine(model, make_config(2, "fp32"))
        try:
            engine.load(folder, optimizer=optimizer)
        except UserError as error:
            seen[key] = {"error": str(error)}
    engine.close()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(exercise, WORLD_SIZE, root)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, ranks: list[dict[Any, dict[str, Any]]]) -> tuple[int, str, list[Any]]:
    return *request.param, [rank[request.param] for rank in ranks]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_training_equals_the_plain_loop(case: tuple[int, str, list[Any]]) -> None:
    _, precision, by_rank = case
    losses, norms, weights = plain_loop(precision)
    # fp32: rounding of another order of summation. bf16: that rounding may move a weight to the neighbouring bf16
    # value, a relative change of 2^-8 in some terms of every later sum; the first step has seen no such change.
    tolerance = 1e-5 if precision == "fp32" else 2**-8
    mean_losses = [sum(rank["history"][step][0] for rank in by_rank) / WORLD_SIZE for step in range(STEPS)]
    assert mean_losses == pytest.approx(losses, rel=tolerance)
    for rank in by_rank:
        assert [result.grad_norm for _, result in rank["history"]] == pytest.approx(norms, rel=tolerance)
        assert rank["history"][0][1].grad_norm == pytest.approx(norms[0], rel=1e-5 if precision == "fp32" else 2**-10)
        assert all(result.applied for _, result in rank["history"])
    assert min(norms) > MAX_NORM, "clipping must have been active"
    assert by_rank[0]["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        scale = weight.abs().max().item()
        torch.testing.assert_close(by_rank[0]["weights"][name], weight, rtol=0, atol=tolerance * 5 * scale, msg=name)


def test_weights_are_gathered_on_rank_0_only(case: tuple[int, str, list[Any]]) -> None:
    _, _, (first, second) = case
    assert second["weights"] is None
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in first["weights"].values())
    assert first["weights"]["head.weight"].data_ptr() == first["weights"]["embedding.weight"].data_ptr()
    assert any(not torch.equal(t, t.bfloat16().float()) for t in first["weights"].values()), "masters, not bf16 copies"


def test_saved_weights_are_the_gathered_ones(case: tuple[int, str, list[Any]], root: Path) -> None:
    stage, precision, (first, _) = case
    weights = read_weights(root / f"{stage}{precision}")
    assert_same(weights, first["at_save"])
    assert weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr()


def test_resume_and_skip_are_bitwise(case: tuple[int, str, list[Any]]) -> None:
    """Half the steps, a new engine, a step with inf on one rank, the other half: as if never interrupted."""
    _, _, by_rank = case
    for rank in by_rank:
        assert rank["held_out_after_load"] == rank["held_out_at_save"]
        assert not rank["poisoned"].applied
        assert not math.isfinite(rank["poisoned"].grad_norm)
        assert rank["resumed_history"] == rank["replayed_history"] == rank["history"][STEPS // 2 :]
    assert_same(by_rank[0]["after_load"], by_rank[0]["at_save"])
    assert_same(by_rank[0]["after_poison"], by_rank[0]["at_save"])
    assert_same(by_rank[0]["resumed"], by_rank[0]["weights"])
    assert_same(by_rank[0]["replayed"], by_rank[0]["weights"])


def test_a_finite_gradient_can_be_dropped_even_the_first(case: tuple[int, str, list[Any]]) -> None:
    _, _, by_rank = case
    for rank in by_rank:
        for result in (rank["vetoed"], rank["first_vetoed"]):
            assert not result.applied
            assert 0 < result.grad_norm < math.inf
        assert rank["after_first_veto"] == rank["history"][: STEPS // 2]


def test_the_parameter_and_the_rank_of_a_gradient_that_is_not_finite_are_found(
    case: tuple[int, str, list[Any]],
) -> None:
    _, _, (first, second) = case
    assert (first["blamed"], second["blamed"]) == ([], ["experts.gate_up"])
    assert first["blamed_for_nothing"] == second["blamed_for_nothing"] == []
    for rank in (first, second):
        assert rank["after_blame"] == rank["history"][STEPS // 2 :]


def test_the_configuration_outranks_the_checkpoint(case: tuple[int, str, list[Any]]) -> None:
    _, _, (first, _) = case
    assert first["weight_decay"] == [0.3, 0.0]


def test_weights_load_without_the_optimizer_from_any_stage(
    case: tuple[int, str, list[Any]], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    _, precision, by_rank = case
    assert_same(by_rank[0]["other"], ranks[0][0, precision]["at_save"])
    for rank in by_rank:
        assert rank["held_out_other"] == ranks[0][0, precision]["held_out_at_save"]
        assert rank["moments_after_weights"] == 0


def test_training_goes_on_from_another_stage(
    case: tuple[int, str, list[Any]], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    stage, precision, by_rank = case
    source = max(stage - 1, 0), precision
    assert_same(by_rank[0]["moved"], ranks[0][source]["at_save"])
    tolerance = 1e-5 if precision == "fp32" else 2**-8
    for rank, other in zip(by_rank, ranks, strict=True):
        for (loss, result), (expected, before) in zip(
            rank["moved_history"], other[source]["history"][STEPS // 2 :], strict=True
        ):
            assert loss == pytest.approx(expected, rel=tolerance)
            assert result.grad_norm == pytest.approx(before.grad_norm, rel=tolerance)


def carry(root: Path, stages: list[int], suffix: str) -> None:
    """Loads what two ranks saved in one stage into another and saves it again, untouched."""
    init_distributed(make_config(0, "fp32"))
    for source, stage in itertools.pairwise(stages):
        engine = Engine(TinyModel(), make_config(stage, "fp32"))
        engine.load(root / f"{source}{suffix if source != stages[0] else 'fp32'}")
        engine.save(root / f"{stage}{suffix}")
    engine.close()


def test_weights_and_moments_survive_any_number_of_ranks_and_stages_bitwise(
    ranks: list[dict[Any, dict[str, Any]]], root: Path
) -> None:
    run_on_ranks(carry, 3, root, [2, 0, OFFLOADED, 3, 1], "three")  # three does not divide the sizes
    before = Shards(root / "2fp32")
    for folder in ("0three", f"{OFFLOADED}three", "3three", "1three"):
        after = Shards(root / folder)
        assert after.description["adam_step"] == before.description["adam_step"] == STEPS // 2
        assert after.description["world_size"] == 3
        assert_same(after.weights(), before.weights())
        for name, shape in before.shapes.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(*(each.read(kind, name, 0, math.prod(shape)) for each in (before, after))), name


def test_ranks_read_each_value_once(case: tuple[int, str, list[Any]]) -> None:
    stage, _, by_rank = case
    elements = 3 * sum(parameter.numel() for parameter in TinyModel().parameters())
    read = [rank["read"] for rank in by_rank]
    assert read == [elements] * WORLD_SIZE if stage == 0 else sum(read) == elements  # in stage 0 each has them all


@pytest.mark.parametrize("stage", STAGES)
def test_zero_max_grad_norm_does_not_clip(stage: int, ranks: list[dict[Any, dict[str, Any]]]) -> None:
    _losses, norms, weights = plain_loop("fp32", max_norm=0.0, steps=3)
    history = ranks[0][stage, "unclipped"]["history"]
    assert [result.grad_norm for _, result in history] == pytest.approx(norms, rel=1e-5)
    torch.testing.assert_close(ranks[0][stage, "unclipped"]["weights"], weights, rtol=1e-4, atol=1e-5)
    clipped = plain_loop("fp32", steps=3)[2]
    assert not torch.allclose(clipped["norm.weight"], weights["norm.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_changes_nothing(stage: int, ranks: list[dict[Any, dict[str, Any]]]) -> None:
    for rank in ranks:
        plain, checkpointed = (rank[stage, key]["history"] for key in ("unclipped", "checkpointed"))
        assert [loss for loss, _ in checkpointed] == pytest.approx([loss for loss, _ in plain], rel=1e-6)
        assert [r.grad_norm for _, r in checkpointed] == pytest.approx([r.grad_norm for _, r in plain], rel=1e-6)


def test_what_cannot_be_loaded_is_refused(ranks: list[dict[Any, dict[str, Any]]], root: Path) -> None:
    assert "nothing: holds no weights" in ranks[0]["missing"]["error"]
    assert "norm.bias" in ranks[0]["other model"]["error"]
    with pytest.raises(UserError, match=r"engine\.json is missing"):
        read_weights(root)


def alone(root: Path) -> list[dict[str, Tensor] | None]:
    """A process that no launcher started, on a machine without compilers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(PATH=str(root), TORCH_EXTENSIONS_DIR=str(root / "extensions"))
    init_distributed(make_config(0, "fp32"))
    weights = []
    for stage in STAGES:
        for _ in range(2):
            engine = Engine(TinyModel(), make_config(stage, "fp32"))
            assert (engine.rank, engine.world_size, torch.distributed.get_backend()) == (0, 1, "gloo")
            train(engine, range(3))
            weights.append(engine.gather_weights())
    engine.close()
    assert not torch.distributed.is_initialized()
    return weights


def test_one_process_needs_no_launcher_and_no_compiler_and_repeats_bitwise(tmp_path: Path) -> None:
    weights = run_on_ranks(alone, 1, tmp_path)[0]
    assert not (tmp_path / "extensions").exists(), "DeepSpeed built an operator"
    for first, second in zip(weights[::2], weights[1::2], strict=True):
        assert_same(first, second)
    for other in weights[2::2]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-5)


def save_where_rank_1_cannot_write(root: Path) -> str | None:
    config = make_config(1, "fp32")
    init_distributed(config)
    engine = Engine(TinyModel(), config)
    if engine.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # fails as a full disk does
    try:
        engine.save(root / "full")
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        engine.close()
    return None


def test_a_rank_that_cannot_write_fails_alone_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    rank_0, rank_1 = run_on_ranks(save_where_rank_1_cannot_write, 2, tmp_path, timeout=60.0)
    assert rank_0 is None
    assert rank_1
