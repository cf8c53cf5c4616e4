"""Checkpoints on disk: whole or absent, and damage is found before anything is read."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ava_fast.checkpoint import store
from ava_fast.errors import UserError
from ava_fast.files import write_hashed


def save(checkpoints: Path, step: int, keep: int | None = None, loss: float | None = None, **rules: int) -> Path:
    folder = store.open_folder(checkpoints, step)
    (folder / "engine").mkdir()
    contents = {"engine/weights.bin": bytes(range(100)) * step, "rank_0.json": b"state"}
    files = {name: write_hashed(folder / name, [content]) for name, content in contents.items()}
    final = store.commit(folder, {"step": step, "heldout_loss": loss, "heldout_step": step}, files)
    store.rotate(checkpoints, newest=keep, **rules)
    return final


def test_a_commit_is_listed_verified_and_latest(tmp_path: Path) -> None:
    save(tmp_path, 9)
    final = save(tmp_path, 10)
    assert final == tmp_path / "step_10"
    assert store.list_checkpoints(tmp_path) == [tmp_path / "step_9", tmp_path / "step_10"]
    manifest = store.read_manifest(final)
    assert manifest["step"] == 10
    assert set(manifest["files"]) == {"engine/weights.bin", "rank_0.json"}
    assert store.find_checkpoint(tmp_path) == final
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=2)
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_10", "step_12"]


def test_a_checkpoint_just_written_is_not_the_one_deleted(tmp_path: Path) -> None:
    save(tmp_path, 10, keep=1)
    save(tmp_path, 5, keep=1)  # a run resumed from before step 10
    assert store.find_checkpoint(tmp_path).name == "step_5"
    assert (tmp_path / "step_5" / "manifest.json").exists()


def test_an_unfinished_save_is_no_checkpoint_and_the_next_one_clears_it(tmp_path: Path) -> None:
    folder = store.open_folder(tmp_path, 3)
    (folder / "half").write_bytes(b"x")
    assert store.list_checkpoints(tmp_path) == []
    with pytest.raises(UserError, match="holds no checkpoint"):
        store.find_checkpoint(tmp_path)
    assert list(store.open_folder(tmp_path, 3).iterdir()) == []


def test_found_by_run_by_folder_and_by_step(tmp_path: Path) -> None:
    final = save(tmp_path / "checkpoints", 7)
    for path in (tmp_path, tmp_path / "checkpoints", final):
        assert store.find_checkpoint(path) == final


@pytest.mark.parametrize("name", ["engine/weights.bin", "rank_0.json", "manifest.json", "manifest.sha256"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "delete"])
def test_every_damage_is_found_and_names_the_file(name: str, damage: str, tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    path = final / name
    content = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 0x80]) + content[-1:])
        case "truncate":
            path.write_bytes(content[:-1])
        case "grow":
            path.write_bytes(content + b"x")
        case "delete":
            path.unlink()
    with pytest.raises(UserError, match=path.name):
        store.read_manifest(final)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    manifest = json.loads((final / "manifest.json").read_text())
    newer = json.dumps({**manifest, "format_version": 99}).encode()
    (final / "manifest.json").write_bytes(newer)
    (final / "manifest.sha256").write_text(f"{hashlib.sha256(newer).hexdigest()}  manifest.json\n")
    with pytest.raises(UserError, match="format version 99"):
        store.read_manifest(final)
    (final / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    (final / "manifest.sha256").unlink()  # which format 2 did not have
    with pytest.raises(UserError, match="format version 2; this release reads 3"):
        store.read_manifest(final)


def test_the_manifest_s_hash_is_what_sha256sum_checks(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    check = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=final, capture_output=True, text=True)
    assert check.stdout == "manifest.json: OK\n"


def test_those_that_are_kept(tmp_path: Path) -> None:
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: None, 10: 9.0, 12: 8.0, 14: 7.0}
    for step, loss in losses.items():
        save(tmp_path, step, keep=2, loss=loss, every=5, best=2)
    assert [path.name for path in store.list_checkpoints(tmp_path)] == [f"step_{n}" for n in (4, 6, 10, 12, 14)]
    assert store.pointed(tmp_path, "best") == tmp_path / "step_4"
    assert store.pointed(tmp_path, "latest") == tmp_path / "step_14"


def test_what_is_read_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    with store.reading(tmp_path / "step_1"):
        save(tmp_path, 2, keep=1)
        assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_1", "step_2"]
    save(tmp_path, 3, keep=1)
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_3"]


def test_a_deletion_that_is_cut_off_leaves_nothing_half_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "engine" / "weights.bin").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store._delete(tmp_path / "step_1")
    assert store.list_checkpoints(tmp_path) == []
    save(tmp_path, 2)
    assert not list(tmp_path.glob("*.gone"))


def test_what_is_damaged_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_3" / "manifest.json").unlink()
    (tmp_path / "step_2" / "rank_0.json").write_bytes(b"stat_")
    assert store.candidates(tmp_path) == [tmp_path / f"step_{step}" for step in (3, 2, 1)]
    assert store.find_checkpoint(tmp_path).name == "step_1"
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert store.candidates(tmp_path)[0].name == "step_3"
    (tmp_path / "latest").write_text("step_2")  # killed before the pointer was moved
    assert [path.name for path in store.candidates(tmp_path)] == ["step_2", "step_3", "step_1"]


def test_a_rewind_makes_an_older_checkpoint_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save(tmp_path, step)
    store.rewind(tmp_path / "step_4")
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_2", "step_4"]
    assert store.find_checkpoint(tmp_path).name == "step_4"
    store.read_manifest(tmp_path / "step_4")
