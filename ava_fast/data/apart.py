"""Generators in a process of their own, for what may crash it: pyarrow, at a file that is damaged in some new way.

    with Apart() as apart:
        for item in apart.each(read, path, part):      # what read(path, part) gives; raises Died where its process ends
            ...

The process starts with the first call. A generator that is not read to its end costs the next call a new process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")


class Died(Exception):
    """The process ended before the generator did; the message is a reason for the ledger."""


class Apart:
    """A context manager: the process ends with the block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def each(self, function: Callable[..., Iterator[Item]], *arguments: Any) -> Iterator[Item]:
        """The items of `function(*arguments)`, all of which can be pickled. Raises what that raises, and Died."""
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        kind, value = "item", None
        try:
            with suppress(BrokenPipeError):
                pickle.dump((function, arguments), process.stdin)
                process.stdin.flush()
            while True:
                try:
                    kind, value = pickle.load(process.stdout)
                except (EOFError, pickle.UnpicklingError):
                    raise Died(f"its reader died (exit code {process.wait()})") from None
                if kind != "item":
                    break
                yield value
        finally:
            if kind == "item":
                self._end()
        if kind == "error":
            raise value

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes the pipes and waits
                pass


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ava_fast.data.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for the process that waits, whose end is the end of this one
    )


def main() -> None:
    """The process: what to run on stdin, its items on stdout, pickled."""
    with os.fdopen(os.dup(1), "wb", 1 << 16) as results:
        os.dup2(2, 1)  # what a library prints must not get between them
        while True:
            try:
                function, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            last: tuple[str, Any] = ("end", None)
            try:
                for item in function(*arguments):
                    pickle.dump(("item", item), results)
            except Exception as error:
                last = ("error", error)
            pickle.dump(last, results)
            results.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # nobody waits any more
        main()
