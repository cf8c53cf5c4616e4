"""The trainer over two ranks: routing figures against a plain computation, and the expert bias in every ZeRO stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from torch import Tensor

from ava_fast.checkpoint.shards import read_weights
from ava_fast.config import Config, load_config
from ava_fast.data.loader import TokenLoader
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.evaluate.heldout import heldout_loss
from ava_fast.model import moe
from ava_fast.model.transformer import Transformer
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer, seed_generators

CASES = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
RECOMPUTED = [(0, "fp32"), (3, "bf16")]
STEPS, BATCH, MICRO_BATCHES, E, K, RATE = 4, 4, 2, 6, 2, 0.01
# Everything that the router can do at once; and what does not depend on how tokens are shared out over ranks.
EVERYTHING = ["moe.score=sigmoid", "moe.num_groups=3", "moe.group_top_k=2", "moe.capacity_factor=0.9", "moe.scale=1.5"]
WHOLE_BATCH = ["moe.jitter=0", "moe.aux_loss_weight=0"]
FIGURES = ["moe.jitter=0", "moe.capacity_factor=0.9", "training.max_steps=1"]
HALF = f"step_{STEPS // 2}"


def settings(file: str, *overrides: str) -> Config:
    fixed = [f"moe.num_experts={E}", f"moe.top_k={K}", f"moe.expert_bias_rate={RATE}", f"training.max_steps={STEPS}"]
    fixed += [f"checkpoint.save_steps={STEPS // 2}", "evaluation.eval_steps=0"]
    fixed += ["model.initializer_range=0.3", "data.max_length=16"]  # tokens differ in their choices, and so do ranks
    return load_config(file, [*fixed, *overrides])


def biases(weights: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in weights.items() if name.endswith("expert_bias")]


def train(config: Config, shards: str, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """A whole run, or the rest of one: its records, its biases on this rank, gathered, and read from the file."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder, Path(shards))
    if resume is not None:
        trainer.load(resume)
    loaded = [bias.clone() for bias in biases(dict(trainer.engine.model.named_buffers()))]
    trainer.run()
    gathered = trainer.engine.gather_weights()
    seen: dict[str, Any] = {
        "loaded": loaded,
        "bias": biases(dict(trainer.engine.model.named_buffers())),
        "parameter": trainer.engine.model.norm.weight.dtype,
    }
    dist.barrier()
    if gathered is not None:
        clock = {"seconds", "tokens_per_second"}
        records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] not in ("checkpoint", "utilisation")]
        seen["records"] = [{key: value for key, value in r.items() if key not in clock} for r in records]
        seen["gathered"] = biases(gathered)
    return seen


def exercise(file: str, shards: str, root: Path) -> dict[Any, dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(settings(file))
    seen = {}
    for stage, precision in CASES:
        options = [*EVERYTHING, f"deepspeed.zero_stage={stage}", f"training.precision={precision}"]
        config, folder = settings(file, *options), root / f"{stage}{precision}"
        case = train(config, shards, folder)
        case["resumed"] = train(config, shards, root / f"{stage}{precision}resumed", folder / "checkpoints" / HALF)
        if (stage, precision) in RECOMPUTED:
            config = settings(file, *options, "memory.activation_checkpointing=true", "checkpoint.save_steps=0")
            case["recomputed"] = train(config, shards, root / f"{stage}{precision}recomputed")
        seen[stage, precision] = case
    seen["whole batch"] = train(settings(file, *WHOLE_BATCH), shards, root / "whole2")
    seen["figures"] = train(settings(file, *FIGURES), shards, root / "figures")
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def file(folder: Path) -> str:
    return str(write_config(folder / "c.yaml", write_corpus(folder / "text")))


@pytest.fixture(scope="module")
def shards(file: str) -> str:
    data = load_config(file).data
    return str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))


@pytest.fixture(scope="module")
def ranks(file: str, shards: str, folder: Path) -> list[dict[Any, dict[str, Any]]]:
    return run_on_ranks(exercise, 2, file, shards, folder)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[int, str]:
    return request.param


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) == 2 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_bias_is_float32_moves_every_step_and_is_the_same_on_every_rank_and_in_the_file(
    case: tuple[int, str], ranks: list[dict[Any, dict[str, Any]]], folder: Path
) -> None:
    first, second = (rank[case] for rank in ranks)
    assert first["parameter"] == (torch.bfloat16 if case[1] == "bf16" else torch.float32)
    assert {bias.dtype for bias in first["bias"]} == {torch.float32}
    steps = torch.stack(first["bias"]) / RATE
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)  # whole steps of the rate, in fp32
    assert 1 <= steps.abs().max() <= STEPS + 0.1
    assert same(first["bias"], second["bias"])
    assert same(first["bias"], first["gathered"])
    saved = read_weights(folder / f"{case[0]}{case[1]}" / "checkpoints" / f"step_{STEPS}" / "engine")
    assert same(first["bias"], biases(saved))


def test_a_resumed_run_has_the_bias_and_every_figure_to_the_bit(
    case: tuple[int, str], ranks: list[dict[Any, dict[str, Any]]], folder: Path
) -> None:
    half = read_weights(folder / f"{case[0]}{case[1]}" / "checkpoints" / HALF / "engine")
    for rank in ranks:
        straight, resumed = rank[case], rank[case]["resumed"]
        assert same(resumed["loaded"], biases(half))
        assert same(resumed["bias"], straight["bias"])
    assert not same(ranks[0][case]["bias"], biases(half))
    later = [record for record in ranks[0][case]["records"] if record["step"] > STEPS // 2]
    assert ranks[0][case]["resumed"]["records"] == later


@pytest.mark.parametrize("case", RECOMPUTED)
def test_recomputed_activations_count_requests_once(
    case: tuple[int, str], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    plain, recomputed = ranks[0][case], ranks[0][case]["recomputed"]
    assert same(plain["bias"], recomputed["bias"])
    for one, other in zip(plain["records"], recomputed["records"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one.get("routing") == other.get("routing")


def test_the_number_of_ranks_changes_neither_bias_nor_figures(
    ranks: list[dict[Any, dict[str, Any]]], file: str, shards: str, folder: Path
) -> None:
    config = settings(file, *WHOLE_BATCH)
    init_distributed(config)
    try:
        one, two = train(config, shards, folder / "whole1"), ranks[0]["whole batch"]
        # What two ranks saved, gone on with by one and in another stage.
        other = settings(file, *WHOLE_BATCH, "deepspeed.zero_stage=3")
        moved = train(other, shards, folder / "moved", folder / "whole2" / "checkpoints" / HALF)
    finally:
        close_distributed()
    assert same(one["bias"], two["bias"])
    assert same(moved["bias"], two["bias"])
    later = [record for record in two["records"] if record["step"] > STEPS // 2]
    assert len(later) == len(moved["records"]) == STEPS // 2 + 1
    for mine, theirs in (
        *zip(one["records"], two["records"], strict=True),
        *zip(moved["records"], later, strict=True),
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if mine["kind"] == "step":
            assert mine["routing"]["utilisation"] == theirs["routing"]["utilisation"]
            assert mine["routing"]["entropy"] == pytest.approx(theirs["routing"]["entropy"], abs=2e-6)
            assert mine["routing"]["dropped"] == mine["routing"]["rerouted"] == [0.0, 0.0]


def test_figures_and_first_bias_equal_a_plain_computation(
    ranks: list[dict[Any, dict[str, Any]]], file: str, shards: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(file, *FIGURES)
    record = ranks[0]["figures"]["records"][0]
    seen, route = [], moe.route

    def seen_route(logits: Tensor, *arguments: Any, **options: Any) -> Any:
        routing = route(logits, *arguments, **options)
        seen.append((logits.detach(), routing.expert))
        return routing

    monkeypatch.setattr(moe, "route", seen_route)
    seed_generators(config.training.seed)
    model = Transformer(config)
    loader = TokenLoader(Path(shards), max_length=config.data.max_length, batch_size=BATCH, seed=0)
    losses = []
    for _ in range(MICRO_BATCHES):
        tokens, labels = loader.next_batch()
        for rank in range(2):  # each its own rows, and its own capacity
            rows = slice(2 * rank, 2 * rank + 2)
            losses.append(model(tokens[rows], labels[rows]).loss.item())
    assert record["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)

    bias = biases(read_weights(folder / "figures" / "checkpoints" / "step_1" / "engine"))
    for block in range(2):
        passes = seen[block::2]
        probs, held = [logits.softmax(-1) for logits, _ in passes], [expert for _, expert in passes]
        asked = [logits.topk(K, dim=-1).indices for logits, _ in passes]
        count = torch.bincount(torch.cat(asked).flatten(), minlength=E).double()
        shares = [torch.bincount(a.flatten(), minlength=E) / a.numel() for a in asked]
        entropies = [-(p * p.log()).sum(-1).mean() / math.log(E) for p in probs]
        expected = {
            "utilisation": count.mean() / count.max(),
            "entropy": sum(entropies) / 4,
            "rerouted": sum(((h >= 0) & (h != a)).double().mean() for h, a in zip(held, asked, strict=True)) / 4,
            "dropped": sum((h < 0).double().mean() for h in held) / 4,
            "balance_loss": sum(E * (s * p.mean(0)).sum() for s, p in zip(shares, probs, strict=True)) / 4,
        }
        assert record["routing"].keys() == expected.keys()
        for name, value in expected.items():
            assert record["routing"][name][block] == pytest.approx(float(value), abs=2e-6), name
        assert expected["rerouted"] > 0
        assert expected["dropped"] > 0
        torch.testing.assert_close(bias[block], RATE * (count.mean() - count).sign().float())


@pytest.fixture
def trainer(file: str, shards: str, tmp_path: Path) -> Any:
    """One rank, in this process, after two steps."""
    config = settings(file, "moe.capacity_factor=0.5", "training.max_steps=2")
    init_distributed(config)
    try:
        trainer = Trainer(config, tmp_path, Path(shards))
        trainer.run()
        yield trainer
    finally:
        close_distributed()


def test_a_step_that_was_not_taken_leaves_the_bias_and_evaluation_is_dropless_whatever_the_batch(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [bias.clone() for bias in biases(dict(trainer.engine.model.named_buffers()))]
    assert any(bias.any() for bias in before)
    losses = [heldout_loss(trainer.engine, trainer.heldout_NS1, rows) for rows in (1, 3, 7)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)

    backward = trainer.engine.backward
    monkeypatch.setattr(trainer.engine, "backward", lambda loss: backward(loss * math.inf))
    ruling, _ = trainer._step()
    assert (ruling.verdict, ruling.apply, trainer.step) == ("SKIP", False, 2)
    assert same(before, biases(dict(trainer.engine.model.named_buffers())))


def test_the_bias_comes_along_with_a_fresh_optimizer(trainer: Trainer, shards: str, tmp_path: Path) -> None:
    fresh = Trainer(trainer.config, tmp_path / "fresh", Path(shards))
    fresh.load(tmp_path / "checkpoints" / "step_2", optimizer=False)
    assert same(*(biases(dict(t.engine.model.named_buffers())) for t in (trainer, fresh)))


def test_a_dense_model_has_no_routing_figures(file: str, shards: str, tmp_path: Path) -> None:
    config = settings(file, "model.num_dense_layers=2", "training.max_steps=1")
    init_distributed(config)
    try:
        Trainer(config, tmp_path, Path(shards)).run()
    finally:
        close_distributed()
    (step,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert "routing" not in step
    assert step["balance_loss"] == 0.0
