"""Writes into the tables that `ava_kernels/tiles.py` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ava_kernels import tiles

from bench import machine


def keep(path: Path, generation: str, kernel: str, problem: str, entry: Sequence[int | str]) -> None:
    """Puts one entry into the table at `path`, whole or not at all."""
    table: tiles.Table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(generation, {}).setdefault(kernel, {})[problem] = list(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    text = json.dumps(table, indent=1, ensure_ascii=False)
    written.write_text(machine.lists_on_a_line(text) + "\n")
    os.replace(written, path)
    tiles.forget()
