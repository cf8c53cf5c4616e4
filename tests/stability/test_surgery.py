"""Gradient surgery against the papers' algorithms in plain float64, alone and in training on two ranks."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from test_injection import Run
from torch import Tensor

from ava_fast.config import Config, ConfigError, load_config
from ava_fast.data.loader import TokenLoader
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.model.transformer import Output, Transformer
from ava_fast.stability.surgery import DECAY, adaptive, combine, gram, pcgrad
from ava_fast.trainer import seed_generators

CASES = [("pcgrad", "fp32"), ("adaptive", "fp32"), ("adaptive", "bf16")]
LOSSES, STEPS = 3, 4
FAULTS = {1: ("nan loss", 1), 2: ("inf gradient", 0), 3: ("explosion", 1)}  # the last is finite, and above max_norm
NONE: dict[int, tuple[str, int]] = {}


def oracle(gradients_NP: Tensor, order: random.Random, target_NN: Tensor | None = None) -> Tensor:
    """Algorithm 1 of PCGrad or, with targets (moved in place), of Gradient Vaccine, on whole vectors."""
    N, total_P = len(gradients_NP), torch.zeros_like(gradients_NP[0])
    for i in range(N):
        own_P = gradients_NP[i].clone()
        others = [j for j in range(N) if j != i]
        order.shuffle(others)
        for j in others:
            other_P = gradients_NP[j]
            if target_NN is None:
                if own_P @ other_P < 0:
                    own_P = own_P - (own_P @ other_P) / other_P.norm() ** 2 * other_P
                continue
            cosine, target = own_P @ other_P / (own_P.norm() * other_P.norm()), target_NN[i, j].clone()
            if cosine < target:
                rest = (1 - target**2).sqrt()
                lift = own_P.norm() * (target * (1 - cosine**2).sqrt() - cosine * rest) / (other_P.norm() * rest)
                own_P = own_P + lift * other_P
            target_NN[i, j] = (1 - DECAY) * target + DECAY * cosine
        total_P += own_P
    return total_P


def conflicting(losses: int, seed: int) -> list[list[Tensor]]:
    """Gradients of a few tensors, of which many pairs conflict."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(11, generator=generator, dtype=torch.float64)
    vectors = [
        torch.randn(11, generator=generator, dtype=torch.float64) + (2 * (n % 2) - 1) * shared for n in range(losses)
    ]
    return [[vector[:6].view(2, 3), vector[6:]] for vector in vectors]


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("losses", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_the_papers(losses: int, seed: int) -> None:
    gradients = conflicting(losses, seed)
    stacked_NP = torch.stack([flat(each) for each in gradients])
    found = flat(combine(gradients, pcgrad(gram(gradients), random.Random(seed))))
    torch.testing.assert_close(found, oracle(stacked_NP, random.Random(seed)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, stacked_NP.sum(0), atol=0.1), "nothing was in conflict"


@pytest.mark.parametrize("losses", [2, 3, 5])
def test_the_adaptive_variant_is_the_papers_over_many_steps(losses: int) -> None:
    targets, target_NN = [[0.0] * losses for _ in range(losses)], torch.zeros(losses, losses, dtype=torch.float64)
    for step in range(30):
        gradients = conflicting(losses, step)
        stacked_NP = torch.stack([flat(each) for each in gradients])
        found = flat(combine(gradients, adaptive(gram(gradients), targets, random.Random(step))))
        expected = oracle(stacked_NP, random.Random(step), target_NN)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.tensor(targets, dtype=torch.float64), target_NN, rtol=1e-9, atol=1e-9)
        if step == 0:
            first = flat(combine(gradients, pcgrad(gram(gradients), random.Random(step))))
    assert not torch.allclose(first, found)
    assert target_NN.abs().max() > 0.01


def test_what_agrees_is_only_added_up_and_what_is_opposed_vanishes() -> None:
    a, b = [torch.tensor([1.0, 0.0])], [torch.tensor([0.5, 1.0])]
    assert pcgrad(gram([a, b]), random.Random(0)) == [1.0, 1.0]
    opposed = [a, [-2 * a[0]]]
    assert torch.equal(combine(opposed, pcgrad(gram(opposed), random.Random(0)))[0], torch.zeros(2))


def test_a_gradient_of_zero_or_one_that_is_not_finite_is_left_alone() -> None:
    zero, a, b = [torch.zeros(2)], [torch.tensor([1.0, 1.0])], [torch.tensor([-1.0, 0.0])]
    targets = [[0.0] * 3 for _ in range(3)]
    for weights in (
        pcgrad(gram([zero, a, b]), random.Random(0)),
        adaptive(gram([zero, a, b]), [list(row) for row in targets], random.Random(0)),
    ):
        torch.testing.assert_close(combine([zero, a, b], weights)[0], torch.tensor([-0.5, 1.5]))
    bad = [zero, a, [torch.tensor([math.nan, 0.0])]]
    assert adaptive(gram(bad), targets, random.Random(0)) == [1.0] * 3
    assert targets == [[0.0] * 3 for _ in range(3)]
    assert combine(bad, pcgrad(gram(bad), random.Random(0)))[0].isnan().any()


def settings(file: str, kind: str, precision: str, *overrides: str) -> Config:
    fixed = [f"stability.gradient_surgery={kind}", f"training.precision={precision}", "deepspeed.zero_stage=0"]
    fixed += [f"training.gradient_accumulation_steps={LOSSES}", f"training.max_steps={STEPS}", "moe.jitter=0"]
    # So that a micro-batch's gradient does not depend on how ranks share it, and conflicts are many.
    fixed += [
        "moe.aux_loss_weight=0",
        "model.initializer_range=0.3",
        "training.max_grad_norm=0",
        "stability.max_norm=1e4",
    ]
    return load_config(file, [*fixed, "evaluation.eval_steps=0", "checkpoint.save_steps=2", *overrides])


def fresh(config: Config) -> dict[str, Tensor]:
    seed_generators(config.training.seed)
    return Transformer(config).state_dict()


def turn(loader: TokenLoader, module: Any, inputs: Any, output: Output) -> Output:
    """Turns every step's second loss against the others, as nothing is in conflict at the start of training."""
    second = loader.position // 4 % LOSSES == 2
    return output._replace(objective=-output.objective) if second and module.training else output


def exercise(file: str, shards: str, root: Path) -> dict[Any, dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(settings(file, "none", "fp32"))
    seen: dict[Any, dict[str, Any]] = {}
    for kind, precision in CASES:
        config, folder = settings(file, kind, precision), root / f"{kind}{precision}"
        weights, case = fresh(config), {}
        for name, faults in (("clean", NONE), ("faulty", FAULTS)):
            run = Run(config, shards, folder / name, weights)
            run.faults, run.drop = faults, FAULTS.keys() - faults.keys()
            run.trainer.engine.model.register_forward_hook(partial(turn, run.trainer.loader))
            given: list[list[Tensor]] = []
            set_gradient = run.trainer.engine.set_gradient

            def capture(gradients: list[Tensor], given: Any = given, set_gradient: Any = set_gradient) -> None:
                given.append([gradient.clone() for gradient in gradients])
                set_gradient(gradients)

            run.trainer.engine.set_gradient = capture  # type: ignore[method-assign]
            case[name] = {**run.train(), "targets": run.trainer._surgery.state(), "given": given[0]}
            case["order"] = [
                parameter_name
                for group in run.trainer.engine._groups
                for parameter in group
                for parameter_name, candidate in run.trainer.engine.model.named_parameters()
                if candidate is parameter
            ]
        resumed = Run(config, shards, folder / "resumed", weights)
        resumed.trainer.engine.model.register_forward_hook(partial(turn, resumed.trainer.loader))
        resumed.trainer.load(folder / "clean" / "checkpoints" / "step_2")
        case["resumed"] = {**resumed.train(), "targets": resumed.trainer._surgery.state()}
        seen[kind, precision] = case
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("surgery")
    return str(write_config(root / "c.yaml", write_corpus(root / "text")))


@pytest.fixture(scope="module")
def shards(file: str) -> str:
    data = load_config(file).data
    return str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))


@pytest.fixture(scope="module")
def ranks(file: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(exercise, 2, file, shards, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["pcgrad", "adaptive"])
def test_a_step_on_two_ranks_takes_the_papers_gradient(
    kind: str, ranks: list[dict[Any, dict[str, Any]]], file: str, shards: str
) -> None:
    config, case = settings(file, kind, "fp32"), ranks[0][kind, "fp32"]
    model = Transformer(config)
    model.load_state_dict(fresh(config))
    loader = TokenLoader(Path(shards), max_length=config.data.max_length, batch_size=4, seed=config.training.seed)
    parameters = [model.get_parameter(name) for name in case["order"]]
    gradients = []
    for _ in range(LOSSES):
        objective = turn(loader, model, None, model(*loader.next_batch())).objective / LOSSES
        gradients.append(flat(list(torch.autograd.grad(objective, parameters))).double())
    targets = torch.zeros(LOSSES, LOSSES, dtype=torch.float64) if kind == "adaptive" else None
    expected = oracle(torch.stack(gradients), random.Random(f"{config.training.seed} 0"), targets)
    for rank in ranks:
        found = flat(rank[kind, "fp32"]["clean"]["given"]).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert not torch.allclose(expected, torch.stack(gradients).sum(0), rtol=1e-2), "nothing was in conflict"
    first = case["clean"]["step"][0]
    assert first["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_skips_and_resumption_leave_no_trace_in_it(
    case: tuple[str, str], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    for rank in ranks:
        seen = rank[case]
        assert seen["clean"]["targets"] == seen["faulty"]["targets"] == seen["resumed"]["targets"]
        assert any(map(any, seen["clean"]["targets"])) == (case[0] == "adaptive")
    seen = ranks[0][case]
    assert seen["clean"]["targets"] == ranks[1][case]["clean"]["targets"]
    assert len(seen["faulty"]["verdict"]) == 3
    for other in ("faulty", "resumed"):
        for name, weight in seen["clean"]["weights"].items():
            assert torch.equal(weight, seen[other]["weights"][name]), (other, name)
    assert [record["step"] for record in seen["clean"]["step"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("override", ["deepspeed.zero_stage=1", "training.gradient_accumulation_steps=1"])
def test_it_is_refused_where_there_is_nothing_to_operate_on(file: str, override: str) -> None:
    with pytest.raises(ConfigError, match=r"stability\.gradient_surgery: does not go .* given: pcgrad; allowed: none"):
        settings(file, "pcgrad", "fp32", override)
