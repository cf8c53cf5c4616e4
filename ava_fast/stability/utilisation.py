"""How much of the memory that a run may have it takes, and what follows before it runs out.

On a GPU: what the allocator has given out, of the device's memory or the share set by set_per_process_memory_fraction.
On a CPU: what the process holds, of whichever limit is nearest: a cgroup's or the machine's memory, in equal parts for
the machine's ranks, RLIMIT_AS or RLIMIT_DATA. What others take does not count, nor do file pages, which can be dropped.

    utilisation.look()                    # where a step holds most, between forward and backward
    shares = utilisation.share()          # joins an all-reduce that the step has anyway
    change = utilisation.heard(sums)      # on all ranks the same; None while the level stays
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

NOTED, ADVISED, EMPTIED, SAVED = 1, 2, 3, 4
"""The levels, one for each of `memory.thresholds`, by what is done when they are reached."""
CALM = 0.03  # a level is left at so much less than reached, so that a step more or less is no news
_CGROUPS = Path("/sys/fs/cgroup")


class Change(NamedTuple):
    """Of the level, and where it comes from."""

    before: int
    level: int
    share: float
    rank: int

    def reached(self, level: int) -> bool:
        return self.before < level <= self.level

    def record(self, step: int) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"kind": "utilisation", "step": step, "level": self.level, "share": self.share, "rank": self.rank}


class Utilisation:
    """One on each rank. `thresholds`: four shares that rise; None: nothing is measured."""

    def __init__(self, rank: int, world_size: int, device: torch.device, thresholds: list[float] | None):
        self._rank, self._device, self._thresholds = rank, device, thresholds
        self._seen = 0.0  # since the last `share`
        self._last = [0.0] * world_size
        self.level = 0
        self._peak = (0.0, 0)  # the largest share so far, and its rank
        if device.type == "cpu" and thresholds is not None:
            # Open as long as the run, as it is read at every pass.
            self._statm = Path("/proc/self/statm").open("rb", buffering=0)  # noqa: SIM115
            self._whole = memory_limit() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def look(self) -> None:
        if self._thresholds is not None:
            self._seen = max(self._seen, self._of_gpu() if self._device.type == "cuda" else self._of_process())

    def share(self) -> list[float]:
        """This rank's in its place, 0 in the others'; where it could not look, what it last saw."""
        shares = [0.0] * len(self._last)
        shares[self._rank], self._seen = self._seen or self._last[self._rank], 0.0
        return shares

    def heard(self, shares: list[float]) -> Change | None:
        """Every rank's."""
        self._last = shares
        worst = max(shares)
        rank = shares.index(worst)
        self._peak = max(self._peak, (worst, rank))
        thresholds, before = self._thresholds or [], self.level
        left = sum(worst >= threshold - CALM for threshold in thresholds)
        self.level = max(sum(worst >= threshold for threshold in thresholds), min(before, left))
        return Change(before, self.level, round(worst, 4), rank) if self.level != before else None

    def most(self) -> Change:
        """The largest share so far."""
        share, rank = self._peak
        return Change(self.level, self.level, round(share, 4), rank)

    def _of_gpu(self) -> float:
        cap = torch.cuda.get_per_process_memory_fraction(self._device)
        whole = torch.cuda.get_device_properties(self._device).total_memory
        return torch.cuda.memory_allocated(self._device) / (cap * whole)

    def _of_process(self) -> float:
        # Limits on the process may change at any time, as its own code or `prlimit` sets them.
        pages = [int(count) for count in os.pread(self._statm.fileno(), 200, 0).split()]
        size, resident, shared, data = (pages[at] * resource.getpagesize() for at in (0, 1, 2, 5))
        most = (resident - shared) / self._whole
        for taken, kind in ((size, resource.RLIMIT_AS), (data, resource.RLIMIT_DATA)):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                most = max(most, taken / limit)
        return most


def memory_limit(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process and those beside it may take together: the machine's, or a cgroup's, v2 or v1."""
    limits = [psutil.virtual_memory().total]
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif controllers == "memory":
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and only the root is there.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            file = folder / name
            if file.is_file() and (text := file.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def empty_cache(device: torch.device) -> None:
    """Gives back to the device, or to the system, what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
