"""Checkpoints of every format that was released are read as they were written (make_format.py makes the fixture)."""

import json
from pathlib import Path

import pytest
import torch

from ava_fast import cli
from ava_fast.checkpoint import store
from ava_fast.checkpoint.generators import packed, unpacked
from ava_fast.config import saved_config
from ava_fast.engine import Engine, close_distributed, init_distributed
from ava_fast.model.transformer import Transformer

HERE = Path(__file__).parent
FORMATS = sorted(HERE.glob("format_*"))


def test_the_current_format_has_a_fixture() -> None:
    assert HERE / f"format_{store.FORMAT_VERSION}" in FORMATS, "run make_format.py"


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
def test_its_weights_have_the_loss_that_was_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "smoke", str(folder)]) == 0, capsys.readouterr()


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
def test_its_moments_and_generators_are_taken_up(folder: Path) -> None:
    manifest = store.read_manifest(folder)
    config = saved_config(manifest["config"])
    init_distributed(config)
    try:
        engine = Engine(Transformer(config), config)
        engine.load(folder / "engine")
        state = engine.state()
    finally:
        close_distributed()
    assert state.description["adam_step"] == manifest["step"] == 3
    moments = [tensor for key, tensor in state.tensors.items() if key.startswith("exp_avg_sq/")]
    assert all((moment >= 0).all() for moment in moments)
    assert sum(moment.count_nonzero().item() for moment in moments) > 1000
    biases = [tensor for key, tensor in state.tensors.items() if key.endswith("expert_bias")]
    assert torch.cat(biases).abs().max() > 0.005
    noise = (folder / "rank_0.json").read_bytes()
    assert json.loads(packed(unpacked(noise))) == json.loads(noise)
