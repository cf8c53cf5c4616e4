"""What a rank takes of the memory that it may have, and what the levels do: real limits on real processes."""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from hypothesis import given
from hypothesis import strategies as st

from ava_fast.checkpoint import store
from ava_fast.config import load_config
from ava_fast.data.prepare import prepare
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.observe.report import write_report
from ava_fast.observe.run import read_metrics
from ava_fast.stability.utilisation import CALM, Utilisation, memory_limit
from ava_fast.trainer import Trainer

THRESHOLDS = [0.75, 0.8, 0.85, 0.9]
CPU = torch.device("cpu")


@given(st.lists(st.floats(0, 1), max_size=40))
def test_a_level_is_reached_at_its_threshold_and_left_below_it(shares: list[float]) -> None:
    utilisation, told = Utilisation(0, 1, CPU, THRESHOLDS), 0
    for share in shares:
        change = utilisation.heard([share])
        if change is not None:
            assert (change.before, change.level) == (told, utilisation.level)
            told = change.level
        assert told == utilisation.level
        assert sum(share >= t for t in THRESHOLDS) <= told <= sum(share >= t - CALM for t in THRESHOLDS)
    if shares:
        assert utilisation.most().share == round(max(shares), 4)


def test_all_ranks_hear_the_same_and_one_that_could_not_look_keeps_its_share() -> None:
    ranks = [Utilisation(rank, 2, CPU, THRESHOLDS) for rank in range(2)]
    for seen in ((0.1, 0.83), (0.1, 0.0), (0.1, 0.7)):
        for each, share in zip(ranks, seen, strict=True):
            each._seen = share
        sums = [sum(shares) for shares in zip(*(each.share() for each in ranks), strict=True)]
        assert ranks[0].heard(list(sums)) == ranks[1].heard(list(sums))
        assert [each.level for each in ranks] == ([2, 2] if seen[1] != 0.7 else [0, 0])


def test_the_nearest_limit_is_the_one_that_counts(tmp_path: Path) -> None:
    machine = memory_limit(tmp_path, tmp_path / "none")
    own = tmp_path / "cgroup"
    inner = tmp_path / "v2" / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (inner / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path / "v2", own) == machine
    (inner.parent / "memory.max").write_text("5000\n")
    assert memory_limit(tmp_path / "v2", own) == 5000
    v1 = tmp_path / "v1" / "memory"
    v1.mkdir(parents=True)
    own.write_text("4:memory:/of/the/host\n3:cpuset:/\n0::/\n")
    (v1 / "memory.limit_in_bytes").write_text("7000\n")
    assert memory_limit(tmp_path / "v1", own) == 7000


def test_what_a_process_takes_is_measured() -> None:
    utilisation = Utilisation(0, 1, CPU, [1e-9, 2e-9, 3e-9, 4e-9])
    utilisation.look()
    (before,) = utilisation.share()
    ballast = torch.ones(2**24)  # 64 MiB
    utilisation.look()
    (after,) = utilisation.share()
    assert 0 < before < 1
    assert (after - before) * memory_limit() == pytest.approx(ballast.nbytes, rel=0.25)


LIMITED = 3_000_000_000  # bytes by which a limit exceeds what the process has mapped


class Ballast:
    """On rank 1, address space under a real RLIMIT_AS: in each step as much as makes the wanted share of it."""

    def __init__(self, trainer: Trainer, shares: dict[int, float]):
        self.held: Any = None
        self.trainer, self.shares = trainer, shares
        self.limit = self.size() + LIMITED
        resource.setrlimit(resource.RLIMIT_AS, (self.limit, resource.RLIM_INFINITY))
        trainer.engine.model.register_forward_pre_hook(self.load)

    @staticmethod
    def size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def load(self, *_: Any) -> None:
        self.held = None
        more = int(self.shares.get(self.trainer.step, 0.0) * self.limit) - self.size()
        if more > 0:
            self.held = torch.empty(more, dtype=torch.int8)


def train(file: str, shards: str, folder: Path, shares: dict[int, float] | None, *overrides: str) -> dict[str, Any]:
    config = load_config(file, ["training.max_steps=10", "evaluation.eval_steps=0", *overrides])
    folder.mkdir(parents=True, exist_ok=True)
    trainer, lines = Trainer(config, folder, Path(shards)), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ava_fast").addHandler(handler)
    if shares is not None and dist.get_rank() == 1:
        Ballast(trainer, shares)
    try:
        trainer.run()
    finally:
        logging.getLogger("ava_fast").removeHandler(handler)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    if dist.get_rank() == 0:
        write_report(folder, config, {"status": "finished", "parameters": 1})
    return {
        "lines": [line for line in lines if "of the memory" in line],
        "records": read_metrics(folder / "metrics.jsonl"),
        "saved": [path.name for path in store.list_checkpoints(folder / "checkpoints")],
    }


def exercise(file: str, shards: str, root: Path) -> list[dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(load_config(file))
    try:
        tight = {2: 0.77, 3: 0.74, 4: 0.93, 6: 0.5, 7: 0.93}
        never = ["checkpoint.save_steps=0"]
        return [
            train(file, shards, root / "tight", tight, *never),
            train(file, shards, root / "free", tight, *never, "memory.thresholds=null"),
        ]
    finally:
        close_distributed()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("utilisation")


@pytest.fixture(scope="module")
def seen(root: Path) -> list[list[dict[str, Any]]]:
    file = str(write_config(root / "c.yaml", write_corpus(root / "text")))
    data = load_config(file).data
    shards = str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))
    return run_on_ranks(exercise, 2, file, shards, root)


def test_one_rank_that_is_short_moves_both_and_both_save(seen: list[list[dict[str, Any]]], root: Path) -> None:
    for tight, _ in seen:
        kept = [record for record in tight["records"] if record["kind"] == "utilisation"]
        levels = [(record["step"], record["level"]) for record in kept]
        assert levels == [(2, 1), (4, 4), (5, 0), (7, 4), (8, 0), (10, 0)]  # not at step 3, which is hardly below
        assert kept[0]["share"] == pytest.approx(0.77, abs=0.02)
        assert {record["rank"] for record in kept[:2]} == {1}
        assert tight["saved"] == ["step_5", "step_10"]  # after the step that was short, and once
        first, critical, again = tight["lines"]
        assert first == f"after step 2: rank 1 takes {kept[0]['share']:.0%} of the memory that it may have"
        for words in ("is given back", "a checkpoint follows", "Try half of training.batch_size (now 4)"):
            assert words in critical
        assert "a checkpoint follows" not in again
    assert "of what a rank may have (rank 1) |" in (root / "tight" / "report.md").read_text()


def test_what_a_level_does_changes_no_number_and_without_thresholds_nothing_is_done(
    seen: list[list[dict[str, Any]]],
) -> None:
    for tight, free in seen:
        assert free["saved"] == ["step_10"]
        assert not free["lines"]
        assert {record["kind"] for record in free["records"]}.isdisjoint({"utilisation"})
        losses = [[(r["loss"], r["grad_norm"]) for r in run["records"] if r["kind"] == "step"] for run in (tight, free)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 10
