"""The examples of docs/drop-in.md run as they stand."""

from __future__ import annotations

import os
import pkgutil
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import ava_kernels.compat
import pytest

pytestmark = pytest.mark.usefixtures("small_and_seeded")
PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")


def test_every_example_runs_and_gives_gradients():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["out"].shape == names["x"].shape
    assert names["product"].shape == (12, 96)
    assert names["attended"].shape == (40, 4, 64)
    assert names["mixed"].shape == (32, 64)
    for parameter in (*names["layer"].parameters(), *names["model"].parameters()):
        assert parameter.grad is not None
    for leaf in ("rows", "weight", "qkv", "score"):
        assert names[leaf].grad.any()


def test_every_module_is_on_the_page():
    for module in pkgutil.iter_modules(ava_kernels.compat.__path__):
        assert f"ava_kernels.compat.{module.name}" in PAGE
