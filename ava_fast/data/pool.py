"""Tasks shared out over worker processes (`work`), one thread of this process watching each.

A worker that dies, of a file that crashes a library or of too little memory, is replaced and its task tried once more;
then the task is given up and said to be lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ava_fast.errors import UserError

ATTEMPTS = 2


def run_tasks(
    plan_file: Path,
    tasks: list[int],
    processes: int,
    report: Callable[[dict[str, Any]], None],
    give_up: Callable[[int, str], None],
) -> None:
    """Computes `tasks` of the plan in the file. `report` gets a worker's lines, one at a time; it may raise to stop.

    `give_up(task, reason)` is called for a task that no worker survives. Raises what a worker refuses as UserError.
    """
    queue: SimpleQueue[int] = SimpleQueue()
    for task in tasks:
        queue.put(task)
    lock, stop = threading.Lock(), threading.Event()
    path = os.pathsep.join(filter(None, sys.path))
    workers: set[subprocess.Popen[str]] = set()

    def start() -> subprocess.Popen[str]:
        with lock:
            if stop.is_set():
                raise _Stopped
            worker = subprocess.Popen(
                [sys.executable, "-m", "ava_fast.data.work", str(plan_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
            )  # fmt: skip
            workers.add(worker)
            return worker

    def end(worker: subprocess.Popen[str]) -> int:
        worker.kill()
        code = worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        with lock:
            workers.discard(worker)
        return code

    def watch() -> None:
        worker = start()
        try:
            while not stop.is_set():
                task = queue.get_nowait()
                for attempt in range(1, ATTEMPTS + 1):
                    if _compute(worker, task, stop, lock, report):
                        break
                    code = worker.wait()
                    end(worker)
                    worker = start()
                    if attempt == ATTEMPTS:
                        with lock:
                            give_up(task, f"its reader died, {attempt} times (exit code {code})")
        except (Empty, _Stopped):
            pass
        except BaseException:
            stop.set()
            raise
        finally:
            end(worker)

    with ThreadPoolExecutor(processes) as threads:
        futures = [threads.submit(watch) for _ in range(min(processes, len(tasks)))]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            with lock:
                for worker in workers:
                    worker.kill()
            raise


class _Stopped(Exception):
    """Another thread failed."""


def _compute(
    worker: subprocess.Popen[str],
    task: int,
    stop: threading.Event,
    lock: threading.Lock,
    report: Callable[[dict[str, Any]], None],
) -> bool:
    """Whether the worker did the task, as opposed to died."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(f"{task}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return False
    for line in worker.stdout:
        if not line.endswith("\n"):
            return False
        message = json.loads(line)
        if "error" in message:
            raise UserError(message["error"])
        with lock:
            if stop.is_set():
                raise _Stopped
            report(message)
        if message["last"]:
            return True
    return False
