"""Faults injected into training on two gloo ranks, every ZeRO stage: what they leave is what a run has that never saw
those batches, to the bit."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from corpus import write_config, write_corpus
from distributed import run_on_ranks
from torch import Tensor

from ava_fast.checkpoint import store
from ava_fast.config import Config, load_config
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import read_index
from ava_fast.data.tokenizer import load_tokenizer
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import TrainingError, UserError
from ava_fast.model.transformer import Output, Transformer
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer, seed_generators

CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
STOPPED = [(0, "fp32"), (3, "fp32")]
POISONED, SEED = 11, 52  # which batch holds the poisoned document's one sequence, with this seed
BROKEN = "blocks.1.mlp.down"
TROUBLE = {
    "nan loss": "loss not finite",
    "inf gradient": "gradient not finite",
    "explosion": "gradient explosion",
    "spike": "loss spike",
    "damaged file": "batch not readable",
    "exception at once": "exception in the model",
    "exception in forward": "exception in the model",
    "exception in backward": "exception in the model",
}
# Batch → what goes wrong in it, and on which rank. A batch is all that one optimizer step sees.
FAULTS = {9: ("nan loss", 1), 13: ("inf gradient", 0), 15: ("explosion", 1)} | dict.fromkeys(
    (17, 18, 19), ("nan loss", 0)
)
FAULTS |= {14: ("spike", 1), 21: ("damaged file", 1), 22: ("exception in forward", 1), 23: ("exception in backward", 0)}
FAULTS[24] = ("exception at once", 0)
STEPS = 16  # of 28 batches
WAITED_FOR = {
    "exception at once": 3,
    "exception in forward": 3,
    "exception in backward": 2,
}  # from this stage on, it ends the run
FIXED = ["stability.window=8", "stability.max_skips=7", f"training.max_steps={STEPS}"]
LADDER = ["stability.window=4", "stability.max_skips=1", "stability.recovery_steps=4", "checkpoint.save_steps=4"]
CLOCK = {"seconds", "tokens_per_second"}


def settings(file: str, *overrides: str) -> Config:
    fixed = [f"training.seed={SEED}", "moe.expert_bias_rate=0.01", "evaluation.eval_steps=0", "checkpoint.save_steps=0"]
    return load_config(file, [*fixed, *overrides])


def faults(stage: int) -> dict[int, tuple[str, int]]:
    """Those that leave a run of this stage going."""
    return {batch: fault for batch, fault in FAULTS.items() if stage < WAITED_FOR.get(fault[0], 4)}


class Run:
    """A trainer whose batches can be dropped before it sees them, or spoilt."""

    def __init__(self, config: Config, shards: str, folder: Path, weights: dict[str, Tensor]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.trainer = folder, Trainer(config, folder, Path(shards), weights)
        self.size = config.training.batch_size * config.training.gradient_accumulation_steps
        self.drop: set[int] = set()
        self.faults: dict[int, tuple[str, int]] = {}
        self.batch = -1
        self._next_batch, self.trainer.loader.next_batch = self.trainer.loader.next_batch, self._next
        model = self.trainer.engine.model
        model.register_forward_hook(self._spoil)
        model.get_parameter(BROKEN).register_hook(self._break)

    def train(self) -> dict[str, Any]:
        """To the end → on rank 0 its weights, on every rank its records and how it ended."""
        error = None
        try:
            self.trainer.run()
        except TrainingError as stopped:
            error = str(stopped)
        weights = self.trainer.engine.gather_weights()
        dist.barrier()
        records = read_metrics(self.folder / "metrics.jsonl")
        return {
            "error": error,
            "weights": weights,
            "step": [{k: v for k, v in r.items() if k not in CLOCK} for r in records if r["kind"] == "step"],
            "verdict": [r for r in records if r["kind"] == "verdict"],
        }

    def _next(self) -> tuple[Tensor, Tensor]:
        loader = self.trainer.loader
        while loader.position // self.size in self.drop:
            loader.position += self.size
        found = self._next_batch()
        self.batch = (loader.position - 1) // self.size
        if self._fault() == "damaged file":
            raise UserError("data.data_dir: 00000.bin holds token 999")
        return found

    def _fault(self) -> str:
        what, rank = self.faults.get(self.batch, ("", 0))
        return what if rank == dist.get_rank() and self.trainer.engine.model.training else ""

    def _second(self) -> bool:
        """Whether it is the last of the batch's micro-batches."""
        return self.trainer.loader.position % self.size == 0

    def _spoil(self, module: Any, inputs: Any, output: Output) -> Output:
        match self._fault():
            case "nan loss":
                return output._replace(objective=output.objective * math.nan, loss=output.loss * math.nan)
            case "explosion":
                return output._replace(objective=output.objective * 1e6)
            case "spike":
                return output._replace(loss=output.loss * 100)
            case "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "exception at once":
                raise ValueError("no such block")
            case "exception in forward" if self._second():
                raise ValueError("no such expert")
        return output

    def _break(self, gradient: Tensor) -> Tensor:
        if self._fault() == "exception in backward" and self._second():
            raise ValueError("no such gradient")
        if self._fault() == "inf gradient":
            gradient = gradient.clone()
            gradient.view(-1)[7] = math.inf
        return gradient


def poisoned_weights(config: Config, shards: str) -> dict[str, Tensor]:
    """Weights in which the token that only the poisoned document has is NaN."""
    seed_generators(0)
    weights = {name: tensor.clone() for name, tensor in Transformer(config).state_dict().items()}
    (token,) = load_tokenizer(shards).encode("\x07", add_special_tokens=False).ids
    weights["embed.weight"][token] = math.nan
    return weights


def exercise(file: str, shards: str, root: Path) -> dict[Any, dict[str, Any]]:
    """Runs on every rank of two."""
    init_distributed(settings(file))
    seen: dict[Any, dict[str, Any]] = {}
    for stage, precision in CASES:
        options = [f"deepspeed.zero_stage={stage}", f"training.precision={precision}"]
        config = settings(file, *FIXED, *options)
        weights, folder = poisoned_weights(config, shards), root / f"{stage}{precision}"
        faulty = Run(config, shards, folder / "faulty", weights)
        faulty.faults = faults(stage)
        seen[stage, precision] = {"stage": stage, "faulty": faulty.train()}
        clean = Run(config, shards, folder / "clean", weights)
        clean.drop = {*faults(stage), POISONED}
        seen[stage, precision]["clean"] = clean.train()
        (file_of_tokens,) = Path(shards).glob("train/[0-9]*.bin")
        tokens, (poison,) = np.fromfile(file_of_tokens, "<u2"), weights["embed.weight"][:, 0].isnan().nonzero()
        (place,) = (tokens == int(poison)).nonzero()[0]
        ends = (tokens == read_index(shards).eos_id).nonzero()[0]
        seen[stage, precision]["poisoned document"] = int((ends < place).sum())

        # Steps 1 to 6 on batches 0 to 5, then batches 6 to 9 go wrong: SKIP, CUT, SKIP, ROLL_BACK to step 4, and on
        # with batches 4, 5, 10, 11 (which is poisoned: SKIP), 12, … at a reduced rate.
        config = settings(file, *LADDER, "training.max_steps=10", "stability.max_rollbacks=1", *options)
        rolled = Run(config, shards, folder / "rolled", weights)
        rolled.faults = dict.fromkeys((6, 7, 8, 9), ("nan loss", 1))
        seen[stage, precision]["rolled"] = rolled.train()
        half = Run(config, shards, folder / "half", weights)
        for _ in range(4):
            half.trainer._step()
        half.trainer.save(wait=True)
        by_hand = Run(config, shards, folder / "by hand", weights)
        by_hand.trainer.load(folder / "half" / "checkpoints" / "step_4")
        by_hand.trainer.judge._cut = 0.5
        by_hand.drop = {6, 7, 8, 9, POISONED}
        seen[stage, precision]["by hand"] = by_hand.train()

        # Everything after batch 5 goes wrong.
        if (stage, precision) not in STOPPED:
            continue
        stopped = Run(config, shards, folder / "stopped", weights)
        stopped.faults = dict.fromkeys(range(6, 99), ("nan loss", 1))
        seen[stage, precision]["stopped"] = stopped.train()
        resumed = Run(config, shards, folder / "stopped", weights)
        resumed.trainer.load(store.find_checkpoint(folder / "stopped"))
        seen[stage, precision]["resumed at"] = resumed.trainer.loader.position
        seen[stage, precision]["resumed"] = resumed.train()
        if stage == 3:
            continue
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"on_out_of_memory": "stop"})})
        no_room = Run(config, shards, folder / "no room", weights)
        no_room.faults = {3: ("out of memory", 1)}
        seen[stage, precision]["no room"] = no_room.train()
        resumed = Run(config, shards, folder / "no room", weights)
        resumed.trainer.load(store.find_checkpoint(folder / "no room"))
        seen[stage, precision]["no room, resumed at"] = resumed.trainer.step, resumed.trainer.loader.position
    close_distributed()
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("injection")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, dict[str, Any]]]:
    text = write_corpus(folder / "text", documents=8, words=300)
    (text / "000.txt").write_text("ba ko \x07\n")
    file = str(write_config(folder / "c.yaml", text))
    data = load_config(file).data
    shards = str(prepare(data.data_dir, data.cache_dir, vocab_size=load_config(file).model.vocab_size))
    return run_on_ranks(exercise, 2, file, shards, folder, timeout=300.0)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, ranks: list[dict[Any, dict[str, Any]]]) -> dict[str, Any]:
    return ranks[0][request.param]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)) for name in first
    )


def test_skipped_batches_leave_no_trace(case: dict[str, Any]) -> None:
    assert case["faulty"]["error"] is None
    assert [record["step"] for record in case["faulty"]["step"]] == list(range(1, STEPS + 1))
    assert case["faulty"]["step"] == case["clean"]["step"]
    assert same(case["faulty"]["weights"], case["clean"]["weights"])
    assert not case["clean"]["verdict"]


def test_every_fault_is_told_with_its_rank_its_parameter_and_its_documents(case: dict[str, Any]) -> None:
    verdicts = {v["position"] // 8 - 1: v for v in case["faulty"]["verdict"]}  # by batch
    expected = faults(case["stage"]) | {POISONED: ("nan loss", 0)}
    assert verdicts.keys() == expected.keys()
    assert {v["verdict"] for v in verdicts.values()} == {"SKIP"}
    for batch, (what, rank) in expected.items():
        assert verdicts[batch]["trouble"] == TROUBLE[what]
        assert verdicts[batch]["step"] == batch - sum(earlier < batch for earlier in expected)
        blamed = [culprit["rank"] for culprit in verdicts[batch]["culprits"]]
        assert blamed == ([0, 1] if what in ("explosion", "spike") else [rank])
    assert [c["parameters"] for v in verdicts.values() for c in v["culprits"] if c["parameters"]] == [[BROKEN]]
    assert verdicts[13]["nonfinite_gradients"] == 1
    (poisoned,) = verdicts[POISONED]["culprits"]
    assert case["poisoned document"] in poisoned["documents"]
    assert verdicts[21]["culprits"][0]["errors"] == ["data.data_dir: 00000.bin holds token 999"] * 2
    if 22 in expected:
        (error,) = verdicts[22]["culprits"][0]["errors"]
        assert error.startswith("ValueError: no such expert (test_injection.py:")
    assert verdicts[15]["grad_norm"] > 1e4
    assert verdicts[14]["loss"] > 5 * case["faulty"]["step"][8]["loss"]
    counts = Counter(TROUBLE[what] for what, _ in expected.values())
    assert max(verdicts.values(), key=lambda v: v["position"])["counts"] == {**counts, "SKIP": len(expected)}


@pytest.mark.parametrize("case", STOPPED[:1])
def test_out_of_memory_on_one_rank_is_every_ranks_clean_stop(
    case: tuple[int, str], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    seen = [rank[case]["no room"] for rank in ranks]
    assert seen[0]["error"] == seen[1]["error"]
    for words in ("out of memory on 1 rank", "emergency checkpoint", "training.batch_size (now 4)", "zero_stage=1"):
        assert words in seen[0]["error"]
    (verdict,) = seen[0]["verdict"]
    assert (verdict["verdict"], verdict["step"], verdict["culprits"][0]["rank"]) == ("STOP", 3, 1)
    assert ranks[0][case]["no room, resumed at"] == (3, 8 * 4)


def test_a_roll_back_goes_on_from_the_checkpoint_past_the_bad_data(case: dict[str, Any]) -> None:
    rolled, by_hand = case["rolled"], case["by hand"]
    assert rolled["error"] is None
    assert [v["verdict"] for v in rolled["verdict"]] == ["SKIP", "CUT", "SKIP", "ROLL_BACK", "SKIP"]
    assert [record["step"] for record in rolled["step"]] == list(range(1, 11))
    assert rolled["step"][4:] == by_hand["step"]
    assert same(rolled["weights"], by_hand["weights"])


@pytest.mark.parametrize("case", STOPPED)
def test_what_cannot_be_mended_stops_with_an_emergency_checkpoint_and_advice(
    case: tuple[int, str], ranks: list[dict[Any, dict[str, Any]]]
) -> None:
    seen = ranks[0][case]
    stopped = seen["stopped"]
    assert stopped["error"] == ranks[1][case]["stopped"]["error"]
    assert [v["verdict"] for v in stopped["verdict"]] == ["SKIP", "CUT", "SKIP", "ROLL_BACK", "SKIP", "STOP"]
    for word in ("the loss is nan", "6 × loss not finite", "emergency checkpoint", "training.learning_rate (now 0.01)"):
        assert word in stopped["error"]
    assert len(stopped["step"]) == 6
    # Resumed without the fault, it goes on behind the batches that it could not use: 12 are handed out by then.
    assert seen["resumed at"] == 8 * 12
    assert seen["resumed"]["error"] is None
    assert len(seen["resumed"]["step"]) == 10
    assert seen["resumed"]["verdict"] == stopped["verdict"]
