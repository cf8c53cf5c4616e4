"""Runs that are killed, checkpoints that are damaged, disks that fail: what is lost, and what it costs.

    python -m bench.chaos [--only kills corruptions disks] [--kills 50] [--corruptions 1000]

Each scenario is a function that gives figures for bench/results/chaos_cpu.json, and fails if anything was lost. The
tests run the same functions with smaller numbers.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from ava_fast.checkpoint import store
from ava_fast.checkpoint.prove import compare, kill_tree
from ava_fast.errors import UserError
from ava_fast.observe.run import read_metrics
from bench import machine

ROOT = Path(__file__).resolve().parent.parent
# Small enough that a step takes some ten milliseconds, on the project's own source.
SETTINGS = {
    "model.vocab_size": 512,
    "model.hidden_size": 48,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "moe.num_experts": 4,
    "moe.intermediate_size": 32,
    "data.data_dir": ROOT / "ava_fast",
    "data.max_length": 64,
    "training.batch_size": 8,
    "training.learning_rate": 0.003,
    "checkpoint.save_steps": 2,
    "checkpoint.save_total_limit": 3,
    "evaluation.eval_steps": 0,
    "evaluation.max_sequences": 8,
    "evaluation.prompt": "null",
    "evaluation.ngram_baselines": "false",
    "logging.progress": "false",
}


class Runs:
    """Runs of one configuration in a folder of its own, on `ranks` processes."""

    def __init__(self, folder: Path, ranks: int = 2, **settings: Any):
        self.folder, self.ranks, self._launches = folder, ranks, 0
        own = {"logging.output_dir": folder / "outputs", "data.cache_dir": folder.parent / "data"}
        self.settings = {**SETTINGS, **own, **{key.replace("__", "."): value for key, value in settings.items()}}

    def start(self, *, resume: bool = False, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Both streams go to `log`, a new one for each launch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", "-m"]
        overrides = [part for key, value in self.settings.items() for part in ("--override", f"{key}={value}")]
        command = [sys.executable, "-m", *(launcher if self.ranks > 1 else []), "ava_fast.train"]
        command += [
            "--config",
            str(ROOT / "configs/demo.yaml"),
            *overrides,
            *(["--resume", "latest"] if resume else []),
        ]
        self._launches += 1
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self, *, resume: bool = False, env: dict[str, str] | None = None, timeout: float = 300.0) -> int:
        """A whole run → its exit code."""
        process = self.start(resume=resume, env=env)
        try:
            return process.wait(timeout)
        finally:
            kill_tree(process)

    @property
    def log(self) -> Path:
        return self.folder / f"log_{self._launches}.txt"

    def said(self) -> str:
        """By the newest launch."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def run(self) -> Path | None:
        """The newest."""
        return max(self.folder.glob("outputs/runs/run_*"), default=None)

    @property
    def checkpoints(self) -> Path:
        return (self.run or self.folder) / "checkpoints"

    def steps(self) -> list[dict[str, Any]]:
        with suppress(OSError):  # while it is replaced, or before it is there
            return [r for r in read_metrics((self.run or self.folder) / "metrics.jsonl") if r["kind"] == "step"]
        return []

    def last_step(self) -> int:
        return max((record["step"] for record in self.steps()), default=0)

    def whole(self) -> int:
        """How many checkpoints are listed; all are read. Raises UserError if one is damaged."""
        return len([store.read_manifest(path) for path in store.list_checkpoints(self.checkpoints)])


def undisturbed(root: Path, steps: int, ranks: int = 2) -> Runs:
    """A run of which nothing is killed or broken, to compare with."""
    runs = Runs(root / "undisturbed", ranks, training__max_steps=steps)
    assert runs.finish() == 0, runs.said()
    return runs


MOMENTS = ("start", "save", "step", "save")


def kills(root: Path, count: int = 50, steps: int = 120, seed: int = 0, plain: Runs | None = None) -> dict[str, Any]:
    """SIGKILL at random moments, of every process or of one rank in turn: while starting, in a step, and, every other
    time, while a checkpoint is written. The end is to the bit that of a run that nothing disturbed."""
    draw, started_at = random.Random(seed), time.perf_counter()
    plain = plain or undisturbed(root, steps)
    seconds = time.perf_counter() - started_at
    stepping = sum(record["seconds"] for record in plain.steps())
    reference = store.find_checkpoint(plain.checkpoints)
    what: Counter[str] = Counter()
    recovery, again, ends, listed = list[float](), 0, 0, 0
    bar = tqdm(total=count, unit="kill", disable=None, leave=False)
    while what.total() < count or ends == 0:
        runs, finished = Runs(root / f"run_{ends}", training__max_steps=steps), False
        while not finished:
            reached = runs.last_step()
            process = runs.start(resume=True)
            try:
                if what.total() < count:
                    kind, whom = MOMENTS[(what.total() + 1) % 4], ("all ranks", "one rank")[what.total() // 2 % 2]
                    moment = _moment(draw, kind, runs, process, reached)
                    if process.poll() is None:
                        what[f"{moment}, {whom}"] += 1
                        bar.update()
                        _kill(draw, process, whom)
                else:
                    process.wait(300)
                finished = process.poll() == 0
            finally:
                kill_tree(process)
            resumed = re.search(r"resuming after step (\d+) .*?ready after ([\d.]+) s", runs.said(), re.DOTALL)
            if resumed:
                again += reached - int(resumed[1])
                recovery.append(float(resumed[2]))
            listed += runs.whole()
        found = compare(reference, store.find_checkpoint(runs.checkpoints))
        assert not found["different"], found
        assert found["state"], found
        ends += 1
    bar.close()
    lost = statistics.median(recovery) + again / what.total() * stepping / steps  # seconds, by each
    return {
        "kills": dict(what),
        "runs_whose_end_was_the_undisturbed_one_s_to_the_bit": ends,
        "listed_checkpoints_read_whole": listed,
        "seconds_from_launch_to_training_on": _spread(recovery),
        "steps_computed_again_per_kill": round(again / what.total(), 2),
        "undisturbed_seconds": {"launch_to_end": round(seconds, 2), "in_steps": round(stepping, 2)},
        "goodput_with_a_failure_an_hour": round(1 - lost / 3600, 4),
    }


def _moment(draw: random.Random, kind: str, runs: Runs, process: subprocess.Popen[bytes], reached: int) -> str:
    """Waits for the moment to kill at."""
    if kind == "start":
        _wait(process, lambda: False, draw.uniform(0.2, 6.0))
        return "while starting or soon after"
    fresh = reached + draw.randint(1, 8)
    _wait(process, lambda: runs.last_step() >= fresh, 120.0)
    if kind == "step":
        _wait(process, lambda: False, draw.uniform(0.0, 0.2))
        return "in a step"
    _wait(process, lambda: any(runs.checkpoints.glob("step_*.tmp")), 60.0, pause=0.0005)
    _wait(process, lambda: False, draw.uniform(0.0, 0.03))
    return "while a checkpoint was written" if any(runs.checkpoints.glob("step_*.tmp")) else "just after a save"


def _wait(process: subprocess.Popen[bytes], until: Callable[[], bool], seconds: float, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not until():
        time.sleep(pause)


def _kill(draw: random.Random, process: subprocess.Popen[bytes], whom: str) -> None:
    if whom == "one rank":
        with suppress(psutil.NoSuchProcess):
            ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "ava_fast.train" in p.cmdline()]
            if ranks:
                draw.choice(ranks).kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(120)  # the others, and torchrun, leave by themselves
    kill_tree(process)


def corruptions(root: Path, count: int = 1000, seed: int = 0, plain: Runs | None = None) -> dict[str, Any]:
    """One random damage at a time to the newest checkpoint that a run of two ranks left: a bit flipped, a
    stretch overwritten, cut short, made longer, deleted, exchanged with another file. Each is found by what loads, the
    file is named, and the older checkpoint is taken."""
    runs = plain or undisturbed(root, steps=4)
    older, newest = store.list_checkpoints(runs.checkpoints)[-2:]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    draw, what = random.Random(seed), Counter[str]()
    for _ in tqdm(range(count), unit="damage", disable=None, leave=False):
        with _damaged(draw, files, older, newest) as (kind, path):
            said = "nothing"
            try:
                store.read_manifest(newest)
            except UserError as error:
                said = str(error)
            # Of an exchange within the checkpoint, either file may be the one that is named.
            assert path.name in said or (kind == "exchanged" and said != "nothing"), (kind, path, said)
            assert store.find_checkpoint(runs.checkpoints) == older
            what[kind] += 1
    store.read_manifest(newest)  # what was damaged has been mended: the damage was all that was found
    return {"damages": dict(what), "found": what.total(), "files": len(files)}


@contextmanager
def _damaged(draw: random.Random, files: list[Path], older: Path, newest: Path) -> Iterator[tuple[str, Path]]:
    """Does one damage, says which to which file, and mends it."""
    path = draw.choice(files)
    content = path.read_bytes()
    place = draw.randrange(len(content))
    kind = draw.choice(("flipped", "overwritten", "cut", "longer", "deleted", "exchanged", "exchanged with older"))
    other = draw.choice([file for file in files if file != path])
    if kind == "exchanged with older":
        other = older / path.relative_to(newest)
    others = other.read_bytes()
    if kind.startswith("exchanged") and others == content:
        kind = "flipped"
    match kind:
        case "flipped":
            path.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
            )
        case "overwritten":
            stretch = bytes(255 - byte for byte in content[place : place + draw.randint(1, 4096)])
            path.write_bytes(content[:place] + stretch + content[place + len(stretch) :])
        case "cut":
            path.write_bytes(content[:place])
        case "longer":
            path.write_bytes(content + draw.randbytes(draw.randint(1, 100)))
        case "deleted":
            path.unlink()
        case "exchanged":
            path.write_bytes(others)
            other.write_bytes(content)
        case _:
            path.write_bytes(others)
    try:
        yield kind, path
    finally:
        path.write_bytes(content)
        if kind == "exchanged":
            other.write_bytes(others)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "largest": round(max(values), 2)} if values else {}


# Which call fails, with what, from which on and how often, how slow each is; and whether the run survives.
FAULTS = {
    "full": ({"CALL": "write", "ERROR": errno.ENOSPC, "AFTER": 100}, False),
    "full for a moment": ({"CALL": "write", "ERROR": errno.ENOSPC, "AFTER": 100, "TIMES": 1}, False),
    "an I/O error, once": ({"CALL": "write", "ERROR": errno.EIO, "AFTER": 100, "TIMES": 1}, True),
    "an I/O error when it is synced, once": ({"CALL": "fsync", "ERROR": errno.EIO, "AFTER": 14, "TIMES": 1}, True),
    "I/O errors for ever": ({"CALL": "fsync", "ERROR": errno.EIO, "AFTER": 14}, False),
    "read only": ({"CALL": "open", "ERROR": errno.EROFS, "AFTER": 12}, False),
    "permission denied": ({"CALL": "open", "ERROR": errno.EACCES, "AFTER": 12}, False),
    "no renaming": ({"CALL": "rename", "ERROR": errno.EACCES, "AFTER": 2}, False),
    "slow": ({"CALL": "write", "SLOW": 20_000}, True),
    "slow, and what comes too soon is left out": ({"CALL": "write", "SLOW": 20_000}, True),
}


def disks(root: Path, faults: Iterable[str] = tuple(FAULTS), ranks: int = 2) -> dict[str, Any]:
    """Disks that fail under `checkpoints/`: the run goes on, or stops with one line that says why and what is safe;
    every checkpoint that is listed can be read, and with a sound disk the run goes on from there."""
    shim = build_shim(root)
    results: dict[str, Any] = {}
    for name in tqdm(list(faults), unit="fault", disable=None, leave=False):
        fault, survives = FAULTS[name]
        policy = "skip" if "left out" in name else "wait"
        runs = Runs(root / name.replace(" ", "_"), ranks, training__max_steps=12, checkpoint__when_busy=policy)
        env = {f"FAULT_{key}": str(value) for key, value in fault.items()}
        code = runs.finish(env={**env, "FAULT_PATH": "/checkpoints/", "LD_PRELOAD": str(shim)})
        said = runs.said()
        assert (code == 0) == survives, (name, code, said)
        assert not re.search(r'File ".*/ava_fast/', said), (name, said)  # no traceback but torchrun's own
        line = next((line for line in said.splitlines() if "could not be written" in line), "")
        assert survives or (os.strerror(fault["ERROR"]) in line and "checkpoint" in line), (name, said)
        listed, stopped_at = runs.whole(), runs.last_step()
        assert not list(runs.checkpoints.glob("step_*.tmp")), name
        if not survives:
            assert runs.finish(resume=True) == 0, (name, runs.said())
        records = [r for r in read_metrics(runs.checkpoints.parent / "metrics.jsonl") if r["kind"] == "checkpoint"]
        written = statistics.median(r["write_seconds"] for r in records)
        results[name] = {
            "survives": survives,
            "steps_before_it_stopped": stopped_at,
            "listed_checkpoints_read_whole": listed,
            "says": re.sub(r"^.*?: the checkpoint", "the checkpoint", line).replace(str(runs.checkpoints), "…"),
            "median_write_seconds": round(written, 3),
            "median_stall_seconds": round(statistics.median(r["stall_seconds"] for r in records), 4),
        }
    return results


def build_shim(folder: Path) -> Path:
    """Raises FileNotFoundError where there is no C compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / "faulty_disk.so"
    source = ROOT / "bench" / "faulty_disk.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(shim), "-ldl"], check=True)
    return shim


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {"kills": kills, "corruptions": corruptions, "disks": disks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=1000)
    options = parser.parse_args()
    path = machine.RESULTS / "chaos_cpu.json"
    results = json.loads(path.read_text())["scenarios"] if path.exists() else {}
    for name in options.only:
        count = {"count": getattr(options, name)} if hasattr(options, name) else {}
        started_at = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="ava_chaos_") as root:
            figures = SCENARIOS[name](Path(root), **count)
        results[name] = {**figures, "seconds": round(time.perf_counter() - started_at, 1)}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        machine.write("chaos_cpu", {"scenarios": results})


if __name__ == "__main__":
    main()
