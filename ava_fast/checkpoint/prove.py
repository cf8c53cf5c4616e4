"""Is a run that was killed and resumed the run that was not? Asked of a machine, its software and a configuration.

    result = prove("configs/demo.yaml", [], steps=20, ranks=2)
    result["same"], result["verdict"]

One run takes all the steps; another is ended by SIGKILL in the midst of a step after its checkpoint at half of them,
and resumed. Their last checkpoints are compared: weights, moments, buffers, random generators, position in the data.
On a CPU they are the same to the bit. On a GPU, kernels that add in no fixed order (atomics) may round otherwise: then
weights may differ by TOLERANCE of their norm.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ava_fast.checkpoint import store
from ava_fast.checkpoint.shards import MASTER, MOMENTS, Shards
from ava_fast.config import load_config
from ava_fast.errors import TrainingError

TOLERANCE = 1e-3
"""On a GPU: of a tensor's norm. Of the order of one optimizer step's own rounding, summed over some tens."""


def prove(
    config: str, overrides: list[str], steps: int, ranks: int = 1, keep_runs: str | None = None
) -> dict[str, Any]:
    """Makes both runs and compares them. Raises UserError where the configuration is refused, TrainingError if a run
    fails; shows progress on a terminal."""
    half = max(1, steps // 2)
    load_config(config, overrides)
    with ExitStack() as stack:
        root = Path(keep_runs or stack.enter_context(tempfile.TemporaryDirectory(prefix="ava_prove_")))
        fixed = [*overrides, f"training.max_steps={steps}", f"checkpoint.save_steps={half}"]
        fixed += ["evaluation.eval_steps=0", "evaluation.prompt=null", "evaluation.ngram_baselines=false"]
        bar = stack.enter_context(tqdm(total=2 * steps, unit="step", disable=None, leave=False))
        straight, killed = ([*fixed, f"logging.output_dir={root / name}"] for name in ("straight", "killed"))
        _run(config, straight, ranks, bar, "straight")
        killed_at = _run(config, killed, ranks, bar, "to be killed", kill_after=half)
        _run(config, killed, ranks, bar, "resumed", resume=True)
        ends = [_last(root / name) for name in ("straight", "killed")]
        found = compare(*ends)
    exact, on_gpu = not found["different"] and found["state"], torch.cuda.is_available()
    same = exact or (on_gpu and found["state"] and found["relative"] <= TOLERANCE)
    what = f"{steps} steps, and {half} + SIGKILL + the rest, on {ranks} rank(s)"
    if exact:
        verdict = f"{what}: the same to the bit: {found['tensors']} tensors, random generators and data position"
    elif same:
        verdict = f"{what}: the same but for rounding: weights differ by {found['relative']:.1e} of their norm"
    else:
        names = ", ".join(found["different"][:5]) or "random generators or the position in the data"
        verdict = f"{what}: NOT THE SAME: {names}; weights differ by {found['relative']:.1e} of their norm"
    run = {"steps": steps, "ranks": ranks, "killed_at": killed_at}
    return {"same": same, "exact": exact, **run, **found, "verdict": verdict}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Two checkpoints: which tensors differ, the largest difference of weights relative to their norm, and whether
    the rest of the state is the same."""
    manifests = [store.read_manifest(path) for path in (first, second)]
    shards = [Shards(path / "engine") for path in (first, second)]
    different, largest = [], 0.0
    for name, shape in shards[0].shapes.items():
        for kind in (MASTER, *MOMENTS):
            one, other = (each.read(kind, name, 0, math.prod(shape)) for each in shards)
            if not torch.equal(one, other):
                different.append(f"{kind}/{name}")
                if kind == MASTER:
                    largest = max(largest, float((one - other).norm() / one.norm().clamp_min(1e-30)))
    others = shards[0].description["others"]
    different += [name for name in others if not torch.equal(*(each.other(name) for each in shards))]
    generators = sorted(path.name for path in first.glob("rank_*.json"))
    state = all((first / name).read_bytes() == (second / name).read_bytes() for name in generators)
    state &= all(manifests[0][key] == manifests[1][key] for key in ("step", "data", "stability"))
    tensors = len(shards[0].shapes) * (1 + len(MOMENTS)) + len(others)
    return {"different": different, "relative": largest, "state": state, "tensors": tensors}


def _run(
    config: str,
    overrides: list[str],
    ranks: int,
    bar: Any,
    name: str,
    *,
    kill_after: int | None = None,
    resume: bool = False,
) -> int:
    """One run, or one until it is killed a little after its checkpoint → the last step that it has logged."""
    bar.set_description(name)
    output = Path(overrides[-1].removeprefix("logging.output_dir="))
    output.mkdir(parents=True, exist_ok=True)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    arguments = [argument for override in overrides for argument in ("--override", override)]
    arguments += ["--resume", "latest"] if resume else []
    command = [sys.executable, "-m", *launcher, "ava_fast.train", "--config", config, *arguments]
    seen = steps = _steps(output)
    log = output / f"{name.replace(' ', '_')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.02)
                steps = _steps(output)
                bar.update(max(0, steps - seen))
                seen = max(seen, steps)
                if kill_after is not None and steps > kill_after and _saved(output) >= kill_after:
                    break
            else:
                if kill_after is not None and process.returncode == 0:
                    raise TrainingError("the run had finished before it could be killed; give more --steps")
        finally:
            killed = process.poll() is None
            kill_tree(process)
    if process.returncode != 0 and not killed:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise TrainingError(f"the {name} run failed with exit code {process.returncode}: {lines[-1] if lines else ''}")
    return steps


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all that it has started, ranks in sessions of their own included."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for each in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _steps(output: Path) -> int:
    """How many steps the only run under `output` has logged."""
    for path in output.glob("runs/*/metrics.jsonl"):
        with suppress(OSError):  # while it is replaced
            return path.read_text(errors="replace").count('{"kind": "step"')
    return 0


def _saved(output: Path) -> int:
    saved = [path.name for folder in output.glob("runs/*/checkpoints") for path in store.list_checkpoints(folder)]
    return max((int(name.removeprefix("step_")) for name in saved), default=-1)


def _last(output: Path) -> Path:
    (run,) = output.glob("runs/*")
    return store.find_checkpoint(run)
