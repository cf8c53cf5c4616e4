"""One run over several starts of its workers.

torchrun with --max-restarts or --nnodes=MIN:MAX starts the workers anew when one is lost or a node joins, with the same
command. A start that follows another finds the run's folder by the agents, torchrun's processes: at least one of them
has seen both. It goes on there from the newest checkpoint that verifies, at whatever world size it has now.

    <run folder>/elastic.json     the agents of the last start; how the run ended, if it has for good
    <run folder>/lost.json        why the last start ended, by the first rank that knew
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from ava_fast.checkpoint import store
from ava_fast.config import Config
from ava_fast.distributed.rendezvous import is_shared
from ava_fast.files import write_whole
from ava_fast.observe.run import read_metrics, runs_folder

logger = logging.getLogger(__name__)

NOTE, LOST = "elastic.json", "lost.json"


@dataclass(frozen=True)
class Past:
    """What earlier starts of these workers left."""

    run_folder: Path
    ended: tuple[int, str] | None
    """The exit code, and the line that said why, of a run that is not to go on."""
    restarts: int
    """How often the workers have been started anew, this time included."""
    checkpoints: list[Path]
    """To go on from, the newest first; the first that verifies. None: from the beginning."""
    reason: str
    """Why the last start ended."""
    step: int
    """Steps it had taken."""
    lost_at: float
    """When it ended, in Unix seconds."""
    world_size: int
    """It had."""

    def record(self, step: int) -> dict[str, Any]:
        """For metrics.jsonl: the run goes on after `step` steps."""
        return {
            "kind": "restart",
            "step": step,
            "restarts": self.restarts,
            "reason": self.reason,
            "lost_step": self.step,
            "world_size": dist.get_world_size(),
            "world_size_before": self.world_size,
            "seconds": time.time() - self.lost_at,
        }


def attempts_left() -> int:
    """How often torchrun would still start the workers anew if one fails."""
    environment = os.environ
    return int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def agent() -> str | None:
    """The torchrun process that started this one, as no other on any machine is called; None without torchrun."""
    if not started_by_torchrun():
        return None
    try:
        parent = psutil.Process(os.getppid())
        return f"{socket.gethostname()} {parent.pid} {parent.create_time() - psutil.boot_time():.1f}"
    except psutil.Error:  # it is gone, and this process is about to be
        return None


def advice() -> str | None:
    """What is wrong with how torchrun was started, if nodes are to come and go."""
    try:
        command = psutil.Process(os.getppid()).cmdline() if started_by_torchrun() else []
    except psutil.Error:
        return None
    nodes = re.search(r"--nnodes[= ](\d+):(\d+)", " ".join(command))
    if nodes is None or nodes[1] == nodes[2] or not is_shared():
        return None
    return (
        f"torchrun {nodes[0]}: a node that joins later would wait for an address that nobody tells it, and end this "
        "run after a minute; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every torchrun"
    )


def agents() -> list[str]:
    """Those of all ranks, without torchrun none. Collective."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, agent())
    return sorted({each for each in everyone if each is not None})


def look_back(config: Config, agents: list[str]) -> Past | None:
    """What an earlier start by any of these agents left; None at the first. For rank 0."""
    if not agents:
        return None
    for path in sorted(runs_folder(config).glob(f"run_*/{NOTE}"), reverse=True):
        note = _read(path)
        if note and not set(agents).isdisjoint(note["agents"]):
            return _past(path.parent, note)
    return None


def begin(run_folder: Path, agents: list[str], past: Past | None, checkpoints: list[Path]) -> None:
    """Notes that the run starts from the first of `checkpoints`, or starts anew. For rank 0."""
    if not agents:
        return
    if past is None:
        # Newer than the one that was asked for: they belong to another future, until they are written again.
        found = store.list_checkpoints(run_folder / "checkpoints")
        later = found[found.index(checkpoints[0]) + 1 :] if checkpoints and checkpoints[0] in found else []
        passed_over = {path.name: _written_at(path) for path in later}
    else:
        passed_over = (_read(run_folder / NOTE) or {}).get("passed_over", {})
    (run_folder / LOST).unlink(missing_ok=True)
    note = {
        "agents": agents,
        "world_size": dist.get_world_size(),
        "restarts": past.restarts if past else 0,
        "passed_over": passed_over,
        "ended": None,
    }
    write_whole(run_folder / NOTE, json.dumps(note, indent=1).encode())


def end(run_folder: Path, code: int, line: str) -> None:
    """Notes that the run is not to go on, if torchrun should start it again. For rank 0."""
    if note := _read(run_folder / NOTE):
        write_whole(run_folder / NOTE, json.dumps({**note, "ended": [code, line]}, indent=1).encode())


def lost(run_folder: Path, reason: str) -> None:
    """Notes why this start ends, unless another rank has. A disk that refuses is no reason to end otherwise."""
    if not started_by_torchrun():
        return
    try:
        with (run_folder / LOST).open("x") as file:
            file.write(json.dumps({"reason": reason, "at": time.time()}))
    except OSError:
        logger.debug("why this start ends could not be noted", exc_info=True)


def _past(run_folder: Path, note: dict[str, Any]) -> Past:
    metrics = run_folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    told = _read(run_folder / LOST) or {}
    lasted_until = metrics.stat().st_mtime if metrics.exists() else time.time()
    saved = store.list_checkpoints(run_folder / "checkpoints")[::-1]
    return Past(
        run_folder=run_folder,
        ended=tuple(note["ended"]) if note["ended"] else None,
        restarts=note["restarts"] + 1,
        checkpoints=[path for path in saved if note["passed_over"].get(path.name) != _written_at(path)],
        reason=told.get("reason", "the workers were ended without a word"),
        step=max((record["step"] for record in records if record["kind"] == "step"), default=0),
        lost_at=told.get("at", lasted_until),
        world_size=note["world_size"],
    )


def _written_at(checkpoint: Path) -> int:
    return (checkpoint / store.MANIFEST).stat().st_mtime_ns


def _read(path: Path) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or cut short by what ended that start
        return None
    return note
