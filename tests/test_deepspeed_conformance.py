"""Each behaviour of DeepSpeed that engine.py builds on, so that a new version is judged by name before any run.

Every assertion's message says what ava-fast would get wrong if DeepSpeed differed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ava_fast.config import Config
from ava_fast.engine import Engine, init_distributed

CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
WORLD_SIZE = 2
# What a norm or a search for NaN is made of.
READS = {"linalg_vector_norm", "norm", "amax", "amin", "max", "isfinite", "isinf", "isnan", "abs", "eq", "ne", "pow"}
READS |= {"sum", "any", "mul", "_foreach_norm", "_foreach_mul_"}


class Block(nn.Module):
    """A leaf module with a matrix of which a rank uses only one row."""

    z3_leaf = True

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.linspace(0.1, 1.1, 12).view(2, 6))

    def forward(self, x_M: Tensor, expert: int) -> Tensor:
        return x_M * self.experts[expert]


class Probe(nn.Module):
    """Linear in its weights: the gradient is known, and does not depend on them."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.gain = nn.Parameter(torch.full((6,), 1 / 3))
        self.register_buffer("table", torch.full((3,), 1 / 3))

    def forward(self, x_M: Tensor, expert: int) -> Tensor:
        input_M = x_M + 0 * self.gain  # a leaf module's gradients are reduced by a hook that waits for its input's
        return (self.block(input_M, expert) + x_M * self.gain).sum()


def make_config(stage: int, precision: str, max_grad_norm: float = 0.0) -> Config:
    training = {"precision": precision, "max_grad_norm": max_grad_norm}
    return Config.model_validate({"training": training, "deepspeed": {"zero_stage": stage}})


def micro_step(engine: Engine, factor: float = 1.0) -> None:
    """One backward pass: rank r multiplies by r + 1 and uses expert r only."""
    x_M = torch.full((6,), engine.rank + 1.0, dtype=engine.model.gain.dtype)
    engine.backward(engine(x_M, engine.rank) * factor)


def at(lr: float | None) -> Callable[[float], float | None]:
    return lambda grad_norm: lr


class Odd(nn.Module):
    """Tied weights, a leaf module, and sizes that no number of ranks divides: every stage has to pad or split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.gain = nn.Parameter(torch.ones(5))
        self.block = Block()
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(7, 3)

    def forward(self, tokens_T: Tensor) -> Tensor:
        x_TM = self.embed(tokens_T) * self.gain
        y_TM = self.block(nn.functional.pad(x_TM, (0, 1)), 0)[:, :5]
        return self.out(self.head(y_TM)).float().square().sum()


class Passes(TorchDispatchMode):
    """Counts operators on whole tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > 2 for tensor in tensors):
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def deepspeeds_norm(engine: Engine) -> float:
    """What the code of DeepSpeed that the engine goes around would have said, at the place where it is asked."""
    from deepspeed.runtime import utils

    zero, optimizer = engine._engine.optimizer, engine._optimizer
    if engine._stage == 0:  # without bf16, DeepSpeed has none
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        return float(utils.get_global_norm(norm_list=[utils.get_weight_norm(gradients)]))
    kind = type(zero)
    if engine._stage == 3:
        return float(utils.combine_grad_norm_groups(kind._get_norm_groups(zero)))
    if hasattr(kind, "get_grads_for_norm"):
        return float(utils.get_global_norm_of_tensors(kind.get_grads_for_norm(zero)[0]))
    return float(kind.scaled_global_norm(zero))


def measure() -> dict[Any, dict[str, Any]]:
    """Runs on every rank: the norm of a step beside DeepSpeed's, and what reads the gradient on its way to AdamW."""
    init_distributed(make_config(0, "fp32"))
    seen: dict[Any, dict[str, Any]] = {}
    for stage, precision in CASES:
        engine = Engine(Odd(), make_config(stage, precision, max_grad_norm=0.01))
        case: dict[str, Any] = {"measure": engine._measure}

        def beside(gradients: list[Tensor], engine: Engine = engine, case: dict[str, Any] = case) -> Tensor:
            case["deepspeed"] = deepspeeds_norm(engine)
            return case["measure"](gradients)

        tokens_T = torch.tensor([1, 3, 3]) + engine.rank
        engine.backward(engine(tokens_T))
        passes = Passes()
        with passes:
            engine.step(at(0.0))
        case["passes"] = passes.count
        engine._measure = beside  # type: ignore[method-assign]
        for _ in range(2):
            engine.backward(engine(tokens_T))
        case["own"] = engine.step(at(0.0))
        engine._measure = case.pop("measure")  # type: ignore[method-assign]
        engine.backward(engine(tokens_T) * 1e25)
        case["huge"] = engine.step(at(0.0))
        seen[stage, precision] = case
    engine.close()
    return seen


# With one backward, rank 0's gradient is 1 for expert 0 and the gain, rank 1's is 2 for expert 1 and the gain; the
# average over ranks is ½, 1 and 1½, each six times.
UNIT_NORM = math.sqrt(6 * (0.5**2 + 1.0**2 + 1.5**2))


def stretches(engine: Engine) -> dict[str, list[tuple[int, int]]]:
    """Of each parameter, what the ranks save: where each stretch starts, and its length."""
    own = [(name, start, length) for name, start, _, _, length in engine._fragments(WORLD_SIZE)]
    everyone: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, own)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, start, length in itertools.chain(*everyone):
        found.setdefault(name, []).append((start, length))
    return found


def observe() -> dict[Any, dict[str, Any]]:
    """Runs on every rank."""
    init_distributed(make_config(0, "fp32"))
    import deepspeed

    seen: dict[Any, dict[str, Any]] = {"comm": {"shm_comm_op": deepspeed.comm.comm.cdb.shm_comm_op}}
    for stage, precision in CASES:
        config = make_config(stage, precision)
        engine = Engine(Probe(), config)
        inner, adamw = engine._engine, engine._optimizer
        case: dict[str, Any] = {
            "parameter_dtype": engine.model.gain.dtype,
            "buffer_dtype": engine.model.table.dtype,
            "first_masters": engine.gather_weights(),
            "same_groups": inner.optimizer.param_groups is adamw.param_groups,
            "states_at_start": len(adamw.state),
            "stretches": stretches(engine),
            "leaf": deepspeed.utils.z3_leaf_module(engine.model.block),
        }
        micro_step(engine)
        case["boundary_after_backward"] = inner.is_gradient_accumulation_boundary()
        case["norm_of_1"] = engine.step(at(0.0)).grad_norm
        case["states_after_step"] = sorted({int(state["step"]) for state in adamw.state.values()})
        case["masters_after_rate_0"] = engine.gather_weights()
        for _ in range(3):
            micro_step(engine)
        case["norm_of_3"] = engine.step(at(0.25)).grad_norm
        case["masters_after_rate_025"] = engine.gather_weights()
        micro_step(engine)
        norms: list[float] = []
        case["veto"] = engine.step(norms.append)
        case["norms_before_adamw"] = norms
        case["states_after_veto"] = sorted({int(state["step"]) for state in adamw.state.values()})
        case["masters_after_veto"] = engine.gather_weights()
        micro_step(engine)
        case["norm_after_veto"] = engine.step(at(0.0)).grad_norm
        case["states_before_nan"] = sorted({int(state["step"]) for state in adamw.state.values()})
        micro_step(engine, math.nan if engine.rank == 1 else 1.0)
        case["nan"], case["reported"] = engine.step(at(0.25)), inner.get_global_grad_norm()
        case["states_after_nan"] = sorted({int(state["step"]) for state in adamw.state.values()})
        case["masters_after_nan"] = engine.gather_weights()
        micro_step(engine)
        case["norm_after_nan"] = engine.step(at(0.0)).grad_norm
        micro_step(engine)
        micro_step(engine, 2**-9)  # 1 + 2^-9 needs more digits than bf16 has
        case["norm_of_fine_sum"] = engine.step(at(0.0)).grad_norm

        clipped = Engine(Probe(), make_config(stage, precision, max_grad_norm=0.01))
        micro_step(clipped)
        case["norm_before_clipping"] = clipped.step(at(0.0)).grad_norm
        moments = [state["exp_avg"].float().square().sum() for state in clipped._optimizer.state.values()]
        squares = torch.stack(moments).sum()
        if stage > 0:  # every rank holds its share of Adam's state
            dist.all_reduce(squares)
        case["norm_in_adam"] = squares.sqrt().item() / (1 - config.training.adam_beta1)

        seen[stage, precision] = case
    # What stage 0 does without the engine's hook.
    raw = Engine(Probe(), make_config(0, "fp32"))
    raw._optimizer._optimizer_step_pre_hooks.clear()
    micro_step(raw, math.nan)
    raw._optimizer.param_groups[1]["lr"] = 0.1
    raw._engine.step()
    seen["raw"] = {
        "gain": raw.model.gain.detach(),
        "norm": raw._engine.get_global_grad_norm(),
    }
    engine.close()
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(observe, WORLD_SIZE)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, ranks: list[dict[Any, dict[str, Any]]]) -> tuple[int, str, dict[str, Any]]:
    return *request.param, ranks[0][request.param]


def test_accumulation(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    assert not seen["boundary_after_backward"], "backward() took itself for the last one: it would reduce or step early"
    assert seen["norm_of_1"] == pytest.approx(UNIT_NORM, rel=1e-6), (
        "the gradient is no longer the mean over ranks, or an expert that only one rank used was lost"
    )
    assert seen["norm_of_3"] == pytest.approx(3 * UNIT_NORM, rel=1e-6), (
        "backward() no longer sums: the accumulated gradient would be scaled or overwritten"
    )
    assert seen["norm_of_fine_sum"] == pytest.approx((1 + 2**-9) * UNIT_NORM, rel=1e-6), (
        "gradients accumulate in bf16: small micro-batch gradients would vanish"
    )


def test_learning_rate(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    assert seen["same_groups"], (
        "DeepSpeed copies the parameter groups: the learning rate set in step() would be ignored"
    )
    for name, first in seen["first_masters"].items():
        assert torch.equal(first, seen["masters_after_rate_0"][name]), f"a step at rate 0 moved {name}"
    moved = (seen["masters_after_rate_025"]["gain"] - seen["first_masters"]["gain"]).abs()
    assert moved.max() > 0.2, "a rate set in step() did not reach AdamW"


def test_adam_starts_at_its_first_step(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    assert seen["states_at_start"] == 0, "DeepSpeed stepped AdamW while setting up: bias correction would be off by one"
    assert seen["states_after_step"] == [1], "one step() is no longer one AdamW step"


def test_norm_is_taken_before_clipping(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    assert seen["norm_before_clipping"] == pytest.approx(UNIT_NORM, rel=1e-6), (
        "the reported norm is the clipped one: an explosion would go unseen"
    )
    assert seen["norm_in_adam"] == pytest.approx(0.01, rel=1e-4), "what AdamW got was not clipped to max_grad_norm"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_read_once_and_its_norm_is_deepspeeds(world_size: int) -> None:
    for by_rank in run_on_ranks(measure, world_size):
        for case, seen in by_rank.items():
            assert seen["own"].applied
            assert seen["own"].grad_norm == pytest.approx(seen["deepspeed"], rel=5e-7), (
                f"{case}: a tied, padded or split parameter is counted twice or not at all"
            )
            passes = seen["passes"]
            assert passes["grad_stats"] == 1, f"{case}: {passes}"
            assert not passes.keys() & READS, f"{case}: DeepSpeed passes over the gradient again: {passes}"
            assert passes["mul_"] + passes["div_"] <= 1, f"{case}: DeepSpeed scales more than the average: {passes}"
            assert passes["clip_"] == (1 if case[0] == 0 or case == (1, "bf16") else 2), f"{case}: once per group"
            assert seen["huge"].applied, f"{case}: a finite norm above the root of the largest float32 was called inf"
            assert 1e25 < seen["huge"].grad_norm < 1e28


def test_a_nan_on_one_rank_skips_the_step(case: tuple[int, str, dict[str, Any]]) -> None:
    stage, _, seen = case
    assert not seen["nan"].applied, "a step on a NaN gradient was called applied"
    assert seen["nan"].nonfinite > 0
    assert not math.isfinite(seen["nan"].grad_norm), "a NaN gradient was given a finite norm"
    assert seen["states_after_nan"] == seen["states_before_nan"], "AdamW counted the skipped step"
    for name, before in seen["masters_after_rate_025"].items():
        assert torch.equal(before, seen["masters_after_nan"][name]), f"a NaN gradient moved {name}"
    assert seen["norm_after_nan"] == pytest.approx(UNIT_NORM, rel=1e-6), (
        "the skipped gradient leaked into the next step"
    )
    if stage > 0:
        assert seen["reported"] == math.inf, "get_global_grad_norm() no longer reports a skip as inf"


def test_a_finite_gradient_is_dropped_just_before_adamw(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    assert not seen["veto"].applied
    assert seen["norms_before_adamw"] == [pytest.approx(UNIT_NORM, rel=1e-6)], (
        "the norm is not known once, before AdamW: `_before_adamw` would judge another step's"
    )
    assert seen["states_after_veto"] == [2], "AdamW counted a step whose gradients were taken away"
    for name, before in seen["masters_after_rate_025"].items():
        assert torch.equal(before, seen["masters_after_veto"][name]), f"a dropped gradient moved {name}"
    assert seen["norm_after_veto"] == pytest.approx(UNIT_NORM, rel=1e-6), "a dropped gradient leaked into the next step"


def test_stage_0_still_needs_the_guard(ranks: list[dict[Any, dict[str, Any]]]) -> None:
    raw = ranks[0]["raw"]
    assert raw["norm"] is None, "DeepSpeed reports a norm in fp32 stage 0: `_before_adamw` may no longer be needed"
    assert raw["gain"].isnan().all(), "DeepSpeed skips NaN in fp32 stage 0: `_before_adamw` may no longer be needed"


def test_precision(case: tuple[int, str, dict[str, Any]]) -> None:
    _, precision, seen = case
    assert seen["parameter_dtype"] == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert seen["buffer_dtype"] == torch.float32, "buffers are cast to bf16: rotary tables would lose their precision"
    first = torch.full((6,), 1 / 3).to(seen["parameter_dtype"]).float()
    assert torch.equal(seen["first_masters"]["gain"], first), "masters no longer start from the cast weights"


def test_leaf_modules(case: tuple[int, str, dict[str, Any]]) -> None:
    stage, _, seen = case
    assert seen["leaf"] == (stage == 3), "the MoE block is no ZeRO-3 leaf: ranks that use different experts would hang"


def test_every_value_has_one_rank_that_saves_it(case: tuple[int, str, dict[str, Any]]) -> None:
    _, _, seen = case
    for name, stretches in seen["stretches"].items():
        ends = {start + length for start, length in stretches}
        assert all(start == 0 or start in ends for start, _ in stretches), f"{name}: a gap or an overlap"
        assert sum(length for _, length in stretches) == seen["first_masters"][name].numel(), (
            f"{name}: DeepSpeed's maps from flat partitions to parameters are not what `_fragments` takes them for"
        )


def test_no_operator_is_built(ranks: list[dict[Any, dict[str, Any]]]) -> None:
    assert ranks[0]["comm"]["shm_comm_op"] is None, "DeepSpeed compiled its shared-memory collective at start-up"
