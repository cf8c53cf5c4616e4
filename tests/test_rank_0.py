"""What rank 0 does alone, what all ranks must see of it, and how a process group is entered and left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks

from ava_fast import engine, train
from ava_fast.config import load_config
from ava_fast.distributed.rank_0 import on_rank_0, see_the_same, wait_for_all
from ava_fast.engine import close_distributed, init_distributed
from ava_fast.errors import LostRank, UserError


def refused(folder: Path) -> str:
    try:
        see_the_same(folder)
    except UserError as error:
        return str(error)
    return ""


def alone(root: Path) -> tuple[str, str, str, str]:
    """Runs on every rank: rank 0 takes longer than a collective may."""
    init_distributed(load_config(None, ["distributed.timeout_seconds=1"]))

    def prepare() -> str:
        time.sleep(2.5)
        return "prepared"

    def refuse() -> str:
        raise UserError("rank 0 says no")

    done = on_rank_0(prepare)
    with pytest.raises(UserError) as error:
        on_rank_0(refuse)
    if dist.get_rank() == 0:
        time.sleep(2.5)
    wait_for_all()
    own = root / f"disk_{dist.get_rank()}"
    own.mkdir()
    found = done, str(error.value), refused(root), refused(own)
    close_distributed()
    return found


def test_the_others_wait_as_long_as_it_takes_and_must_see_what_rank_0_wrote(tmp_path: Path) -> None:
    for done, error, shared, apart in run_on_ranks(alone, 2, tmp_path):
        assert (done, error, shared) == ("prepared", "rank 0 says no", "")
        assert "is not the same folder on every node" in apart
        assert "set logging.output_dir to a disk that the nodes share" in apart
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("rank_0_has_spoken", [False, True])
def test_another_rank_says_why_it_leaves_only_where_rank_0_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank_0_has_spoken: bool
) -> None:
    meeting = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    if rank_0_has_spoken:
        assert train._leave(UserError("no shards"), meeting) == 2
        assert capsys.readouterr().err == "no shards\n"
    monkeypatch.setenv("RANK", "3")
    assert train._leave(UserError("no shards here"), meeting) == 2
    said = capsys.readouterr().err
    assert said.startswith("rank 3 on ") is not rank_0_has_spoken
    assert said.endswith(": no shards here\n") is not rank_0_has_spoken
    assert train._leave(LostRank("rank 1 failed", resumable=True), meeting) == 75
    assert not capsys.readouterr().err  # rank 0 has that to say, once it is free


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="LOCAL_RANK is 1, but this process sees 1 GPU"):
        init_distributed(load_config(None))


def test_a_group_of_nccl_is_not_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving it waits for the other ranks. (There is no nccl here: gloo under its name.)"""
    init_distributed(load_config(None))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine.dist, "get_backend", lambda: "nccl")
            close_distributed(alone=True)
        assert dist.is_initialized()
    finally:
        close_distributed(alone=True)
    assert not dist.is_initialized()
    close_distributed()  # as the watcher may have done
