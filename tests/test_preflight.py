"""Preflight: each check on a real machine, and each fault it is there for."""

from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from corpus import write_config, write_corpus

from ava_fast import cli, preflight
from ava_fast.config import Config, load_config
from ava_fast.engine import Engine, close_distributed, init_distributed
from ava_fast.errors import UserError
from ava_fast.model.transformer import Transformer


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text"))


def failing(config: Config, world_size: int = 1) -> dict[str, str]:
    return {check.name: check.detail for check in preflight.run_checks(config, world_size) if not check.ok}


def test_a_table_of_every_check_and_nothing_left_behind(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(config.parent.rglob("*"))
    assert cli.main(["preflight", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["configuration", "versions", "device", "memory", "output", "disk", "data", "tokenizer"]
    names += ["matmul", "copy", "write"]
    assert [line.split()[1] for line in lines] == names
    assert all(line.startswith("ok ") for line in lines)
    assert set(config.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "check", "says"),
    [
        ("data.data_dir=/nowhere", "data", "/nowhere"),
        ("data.tokenizer_name=/nowhere.json", "tokenizer", "/nowhere.json"),
        ("logging.output_dir=/dev/null/x", "output", "logging.output_dir: /dev/null/x/runs cannot be written"),
        ("moe.intermediate_size=16777216", "memory", "raise deepspeed.zero_stage"),
        ("model.vocab_size=99999999999", "disk", "lower checkpoint.save_total_limit"),
    ],
)
def test_each_fault_is_found(
    override: str, check: str, says: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in failing(load_config(config, [override]))[check]
    assert cli.main(["preflight", "--config", str(config), "--override", override]) == 2
    assert f"FAILED  {check}" in capsys.readouterr().out


def test_a_world_size_that_does_not_divide_the_batch(config: Path) -> None:
    assert "training.batch_size" in failing(load_config(config), world_size=3)["configuration"]


def test_what_needs_a_gpu_or_a_compiler_is_refused_without(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(preflight.shutil, "which", lambda _: None)
    for_hopper = load_config(config, ["training.attention_backend=hopper", "training.precision=bf16"])
    asked = load_config(config, ["training.attention_backend=triton"])
    assert "training.attention_backend: triton needs a GPU" in failing(asked)["device"]
    assert "training.attention_backend: hopper needs a GPU" in failing(for_hopper)["device"]
    assert "no-such-compiler" in failing(load_config(config, ["training.compile=true"]))["device"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not failing(asked)
    assert "device" in failing(for_hopper)


def test_an_old_package_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight.NEEDED, "torch", "99.0")
    assert failing(load_config(config)) == {"versions": f"torch is {version('torch')}; it must be 99.0 or newer"}


def test_several_faults_are_shown_together(config: Path) -> None:
    overrides = ["data.data_dir=/nowhere", "logging.output_dir=/dev/null/x"]
    assert set(failing(load_config(config, overrides))) == {"data", "output"}


def test_memory_is_compared_with_what_a_rank_can_have(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", ["available"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1_000_000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "memory" in failing(load_config(config))


def test_the_host_must_have_room_for_what_its_ranks_build(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(There is no GPU here: one with 80 GiB is imagined.)"""
    memory = namedtuple("memory", ["available"])
    settings = load_config(config)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(settings).parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(3 * 4 * parameters))
    for ranks, init_from, fits in ((3, None, True), (4, None, False), (1, "weights", True), (2, "weights", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        training = settings.training.model_copy(update={"init_from": init_from})
        asked = settings.model_copy(update={"training": training})
        if fits:
            preflight._memory(asked, ranks)
            continue
        with pytest.raises(UserError, match=f"of the host's memory while {ranks} ranks make the model"):
            preflight._memory(asked, ranks)


@pytest.mark.parametrize(
    ("precision", "stage", "offload"),
    [
        ("fp32", 0, False),
        ("fp32", 1, False),
        ("bf16", 2, False),
        ("bf16", 0, False),
        ("fp32", 2, True),
        ("bf16", 2, True),
    ],
)
def test_state_bytes_are_those_of_a_stepped_engine(precision: str, stage: int, offload: bool, config: Path) -> None:
    overrides = [f"training.precision={precision}", f"deepspeed.zero_stage={stage}"]
    settings = load_config(config, [*overrides, f"memory.offload_optimizer={str(offload).lower()}"])
    tensors = _bytes_of_live_tensors()
    init_distributed(settings)
    try:
        engine = Engine(Transformer(settings), settings)
        tokens = torch.zeros(1, 32, dtype=torch.int64)
        engine.backward(engine(tokens, tokens).objective)
        engine.step(lambda _: 1e-3)
        used = _bytes_of_live_tensors() - tensors
        parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        estimate = preflight.state_bytes(parameters, settings, 1, gpu=False)
        # Gradients may be gone by now, buckets and padding may be there.
        assert used == pytest.approx(estimate, rel=0.35)
        engine.close()
    except BaseException:
        close_distributed()
        raise


def _bytes_of_live_tensors() -> int:
    import gc

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
