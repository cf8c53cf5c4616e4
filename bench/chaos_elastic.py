"""Workers that are lost, hang, leave and join while a run trains: what it costs, and that no data is lost or repeated.

    python -m bench.chaos_elastic            # on this machine, a few minutes

Each scenario is a function: a configuration in, a run disturbed and finished, its figures out. Each raises
AssertionError where the run's end is not what that of an undisturbed run would be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch._C._distributed_c10d import TCPStore
from tqdm import tqdm

from ava_fast.config import Config, load_config
from ava_fast.data.batches import Batches
from ava_fast.data.prepare import prepare
from ava_fast.files import write_whole
from ava_fast.observe.run import read_metrics
from bench import machine
from bench.chaos_worker import hashes

ROOT = Path(__file__).parents[1]
PATIENCE = 240.0  # seconds for anything to happen


class Job:
    """torchrun agents that train one configuration together; what their workers do is read from the disk."""

    def __init__(self, config: Path, nodes: str, restarts: int, ranks: int = 1, overrides: tuple[str, ...] = ()):
        self.config, self.seen, self._pause = config, config.parent / "seen", config.parent / "pause"
        self.pause(0.1)
        # Here and not in an agent, so that any agent may be lost.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._arguments = [f"--nnodes={nodes}", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
        self._overrides = overrides
        self.agents: list[subprocess.Popen[bytes]] = []

    def pause(self, seconds: float) -> None:
        """How much longer each batch takes from now on."""
        write_whole(self._pause, str(seconds).encode())

    def start_agent(self) -> subprocess.Popen[bytes]:
        """One more node."""
        quick = "is_host=false,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
        command = [sys.executable, "-m", "torch.distributed.run", *self._arguments, "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=localhost:{self._store.port}", "--rdzv-id=chaos", f"--rdzv-conf={quick}"]
        command += ["--local-addr=localhost", "-m", "bench.chaos_worker", "--config", str(self.config)]
        command += [f"--override={each}" for each in self._overrides]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CHAOS_PAUSE": str(self._pause)}
        # Else a node that joins waits for an address that torchrun (torch 2.13) has told in the first round only.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        log = (self.config.parent / f"agent_{len(self.agents)}.log").open("wb")
        agent = subprocess.Popen(
            command, env={**environment, "CHAOS_SEEN": str(self.seen)}, stdout=log, stderr=subprocess.STDOUT
        )
        self.agents.append(agent)
        return agent

    def run_folder(self) -> Path | None:
        return next((self.config.parent / "outputs" / "runs").glob("run_*"), None)

    def records(self, kind: str) -> list[dict[str, Any]]:
        run = self.run_folder()
        path = run / "metrics.jsonl" if run else None
        return [r for r in read_metrics(path) if r["kind"] == kind] if path and path.exists() else []

    def steps(self) -> int:
        return max((record["step"] for record in self.records("step")), default=0)

    def workers(self) -> list[dict[str, Any]]:
        """The last line of each process that has taken a batch, oldest process first."""
        last = [path.read_text().splitlines()[-1:] for path in sorted(self.seen.glob("*.jsonl"))]
        return [json.loads(lines[0]) for lines in last if lines]

    def pid(self, rank: int) -> int:
        """Of the newest process that is this rank."""
        return int([each["pid"] for each in self.workers() if each["rank"] == rank][-1])

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Waits for it → the seconds it took. Raises TimeoutError with the agents' last words."""
        started_at = time.monotonic()
        while not condition():
            if time.monotonic() - started_at > PATIENCE:
                raise TimeoutError(f"not within {PATIENCE:.0f} s: {what}\n{self.last_words()}")
            time.sleep(0.02)
        return time.monotonic() - started_at

    def last_words(self) -> str:
        logs = sorted(self.config.parent.glob("agent_*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)

    def finished(self) -> bool:
        return all(agent.poll() is not None for agent in self.agents)


@contextmanager
def job(*arguments: Any, **named: Any) -> Iterator[Job]:
    """A job whose agents and workers are gone afterwards, whatever happened."""
    made = Job(*arguments, **named)
    try:
        yield made
    finally:
        for agent in made.agents:
            agent.terminate()
        for agent in made.agents:
            try:
                agent.wait(40)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


def check_data(job: Job, config: Config) -> dict[str, Any]:
    """That the kept steps saw each sequence of their stretch of the data once, whichever ranks read it. Of a batch that
    was read more than once, the last time counts: earlier steps with it were lost with their start's weights."""
    shards = prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size)
    batch_size, training = config.training.batch_size, config.training
    alone = Batches(
        shards, max_length=config.data.max_length, batch_size=batch_size, seed=training.seed, rank=0, world_size=1
    )
    last: dict[int, dict[float, list[str]]] = {}  # position → start of the world → rows of all of its ranks
    read = 0
    for path in sorted(job.seen.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            read += len(line["rows"])
            last.setdefault(line["position"], {}).setdefault(line["start"], []).extend(line["rows"])
    steps = [record["step"] for record in job.records("step")]
    assert steps == list(range(1, training.max_steps + 1)), f"metrics.jsonl has steps {steps}"
    kept: list[str] = []
    for position in range(0, training.max_steps * training.gradient_accumulation_steps * batch_size, batch_size):
        rows = last[position][max(last[position])]
        assert sorted(rows) == sorted(hashes(alone.at(position))), f"the batch at {position} was not seen whole"
        kept += rows
    assert len(kept) > len(alone.sources[0]) or len(set(kept)) == len(kept), "a sequence was seen twice in an epoch"
    return {"sequences": len(kept), "read_again": read - len(kept)}


def scale(config: Path) -> dict[str, Any]:
    """Two nodes of one worker; one is lost; a new one joins. Each time the run goes on with those that are there."""
    settings = load_config(config)
    third = settings.training.max_steps // 3
    with job(config, "1:2", restarts=3) as run:
        run.start_agent()
        lost = run.start_agent()
        run.until(lambda: run.steps() >= third and len({each["rank"] for each in run.workers()}) == 2, "two take steps")
        lost.kill()  # its worker finds itself alone, and ends
        before = run.steps()
        one = run.until(lambda: _world(run) == 1 and run.steps() > before, "one node goes on")
        run.pause(PATIENCE)  # so that the run does not end before the third node is there
        run.start_agent()
        run.until(lambda: "signal SIGTERM" in run.last_words(), "torchrun asks the worker to make room for two")
        run.pause(0.1)
        run.until(lambda: _world(run) == 2, "a new node is taken in")
        run.until(run.finished, "the run ends")
        codes = [run.agents[0].returncode, run.agents[2].returncode]
        assert codes == [0, 0], run.last_words()
        # The two need not have met in time for the first start.
        worlds = [(record["world_size_before"], record["world_size"]) for record in run.records("restart")]
        assert worlds[-2:] == [(2, 1), (1, 2)], worlds
        joined = run.records("restart")[-1]["seconds"]
        figures = {"seconds_until_one_goes_on": one, "seconds_until_two_go_on": joined}
        return {**figures, "steps_redone": _redone(run), **check_data(run, settings)}


def stopped(config: Path, heartbeat: int = 5) -> dict[str, Any]:
    """A rank is stopped with SIGSTOP in the midst of a step: found, ended and replaced."""
    settings = load_config(config)
    overrides = (f"distributed.heartbeat_seconds={heartbeat}",)
    with job(config, "1", restarts=1, ranks=2, overrides=overrides) as run:
        run.start_agent()
        run.until(lambda: run.steps() >= settings.training.max_steps // 2, "steps are taken")
        pid = run.pid(rank=1)
        os.kill(pid, signal.SIGSTOP)
        found = run.until(lambda: not _alive(pid), "the stopped rank is ended")
        replaced = found + run.until(lambda: bool(run.records("restart")), "the run goes on")
        run.until(run.finished, "the run ends")
        assert run.agents[0].returncode == 0, run.last_words()
        assert "no sign of life" in run.records("restart")[0]["reason"]
        figures = {"heartbeat_seconds": heartbeat, "seconds_until_ended": found, "seconds_until_going_on": replaced}
        return {**figures, "steps_redone": _redone(run), **check_data(run, settings)}


def killed(config: Path, times: int = 5, seed: int = 0) -> dict[str, Any]:
    """Ranks are killed with SIGKILL at random moments, again and again: goodput is the share of the time in steps that
    count."""
    settings, moments = load_config(config), random.Random(seed)
    started_at = time.monotonic()
    with job(config, "1", restarts=times, ranks=2) as run:
        run.start_agent()
        for number in range(times):
            run.until(lambda number=number: len(run.records("restart")) == number, "the run goes on")
            processes = 2 * (number + 1)
            run.until(lambda processes=processes: len(run.workers()) >= processes, "a batch is taken")
            time.sleep(moments.uniform(0, 3))
            if run.finished():
                break
            os.kill(run.pid(moments.randrange(2)), signal.SIGKILL)
        run.until(run.finished, "the run ends")
        assert run.agents[0].returncode == 0, run.last_words()
        recoveries = [record["seconds"] for record in run.records("restart")]
        useful = sum(record["seconds"] for record in run.records("step"))
        seconds = time.monotonic() - started_at
        figures = {"times": len(recoveries), "recovery_seconds": recoveries, "goodput": useful / seconds}
        return {**figures, "steps_redone": _redone(run), **check_data(run, settings)}


SCENARIOS = {"scale": scale, "stopped": stopped, "killed": killed}


def _redone(run: Job) -> int:
    return sum(record["lost_step"] - record["step"] for record in run.records("restart"))


def _world(run: Job) -> int | None:
    restarts = run.records("restart")
    return restarts[-1]["world_size"] if restarts else None


def _alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def write_config(folder: Path) -> Path:
    """A model so small that a step takes some ten milliseconds, on this project's own source."""
    sections = {
        "model": {"vocab_size": 512, "hidden_size": 48, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        "moe": {"num_experts": 4, "intermediate_size": 32, "jitter": 0.0},
        "data": {"data_dir": str(ROOT / "ava_fast"), "cache_dir": str(folder / "data"), "max_length": 64},
        "training": {"max_steps": 60, "batch_size": 8},
        "checkpoint": {"save_steps": 5},
        "evaluation": {"eval_steps": 0, "max_sequences": 8, "prompt": None, "ngram_baselines": False},
        "logging": {"output_dir": str(folder / "outputs"), "progress": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(options.only, desc="scenarios"):
            figures[name] = SCENARIOS[name](write_config(Path(folder) / name))
            tqdm.write(f"{name}: {json.dumps(figures[name])}")
    machine.write("chaos_elastic_cpu", {"scenarios": figures})


if __name__ == "__main__":
    main()
