"""What a rank was doing when a collective did not end: its last collectives and every thread's Python stack.

The rank whose last collective has the lowest number is the one that the others wait for. A process that had been
stopped leaves no record."""

from __future__ import annotations

import faulthandler
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

logger = logging.getLogger(__name__)

_SHOWN = 20  # collectives


def record(run_folder: Path, rank: int, why: str, doing: str) -> None:
    """Writes `logs/stuck_rank_R.txt` in the run's folder, after what is there. A disk that refuses is let be."""
    path = run_folder / "logs" / f"stuck_rank_{rank}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} on {socket.gethostname()}, {doing}\n")
            file.write(f"because of {why}\n\n" + "".join(f"{line}\n" for line in collectives()) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
    except OSError:
        logger.debug("what this rank was doing could not be written", exc_info=True)


def collectives() -> list[str]:
    """The last ones of torch's flight recorder, newest last: `#17 gloo:all_reduce [[38048]], 2.1 s ago, not done`."""
    entries: list[dict[str, Any]] = []
    for recorder in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # of nccl, and of what runs on the host
        if dump := getattr(_distributed_c10d, recorder, None):
            entries += json.loads(dump()).get("entries", [])
    now = time.time_ns()
    return [
        f"#{each['collective_seq_id'] or each['p2p_seq_id']} {each['profiling_name']} {each['input_sizes']} in "
        f"{each['process_group'][1]}, {(now - each['time_created_ns']) / 1e9:.1f} s ago, "
        f"{'done' if each['retired'] else 'not done'}"
        for each in sorted(entries, key=lambda each: int(each["time_created_ns"]))[-_SHOWN:]
    ]
