"""A process that reads for another gives it what it finds, or says that it died."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_fast.data.apart import Apart, Died

FUNCTIONS = """
import os
def numbers(count):
    print("in between")
    for number in range(count):
        yield number
    if count == 7:
        os.kill(os.getpid(), 9)
def broken(path):
    yield 1
    open(path)
"""


def test_items_errors_and_death_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions_apart.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    import functions_apart as functions  # type: ignore[import-not-found]

    with Apart() as apart:
        assert list(apart.each(functions.numbers, 5)) == [0, 1, 2, 3, 4]
        first = apart._process
        found = apart.each(functions.broken, tmp_path / "missing")
        assert next(found) == 1
        with pytest.raises(FileNotFoundError, match="missing"):
            next(found)
        assert list(apart.each(functions.numbers, 2)) == [0, 1]
        assert apart._process is first, "one process for all"
        with pytest.raises(Died, match=r"its reader died \(exit code -9\)"):
            list(apart.each(functions.numbers, 7))
        assert next(apart.each(functions.numbers, 1000)) == 0
        assert list(apart.each(functions.numbers, 3)) == [0, 1, 2], "not the rest of what was not read"
        last = apart._process
    assert first is not None
    assert last is not None
    assert first.returncode == last.returncode == -9, "nothing stays behind"
