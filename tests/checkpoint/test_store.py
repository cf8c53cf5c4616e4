"""Checkpoints on disk: whole or absent, and damage is found before anything is read."""

import json
from pathlib import Path

import pytest

from ava_fast.checkpoint import store
from ava_fast.errors import UserError


def save(checkpoints: Path, step: int, keep: int | None = None) -> Path:
    folder = store.open_folder(checkpoints, step)
    (folder / "engine").mkdir()
    (folder / "engine" / "weights.bin").write_bytes(bytes(range(100)) * step)
    (folder / "rank_0.pt").write_bytes(b"state")
    return store.commit(folder, {"step": step}, keep)


def test_a_commit_is_listed_verified_and_latest(tmp_path: Path) -> None:
    save(tmp_path, 9)
    final = save(tmp_path, 10)
    assert final == tmp_path / "step_10"
    assert store.list_checkpoints(tmp_path) == [tmp_path / "step_9", tmp_path / "step_10"]
    manifest = store.read_manifest(final)
    assert manifest["step"] == 10
    assert set(manifest["files"]) == {"engine/weights.bin", "rank_0.pt"}
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


@pytest.mark.parametrize("name", ["engine/weights.bin", "rank_0.pt", "manifest.json"])
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
    (final / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        store.read_manifest(final)


def test_a_rewind_makes_an_older_checkpoint_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save(tmp_path, step)
    store.rewind(tmp_path / "step_4")
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_2", "step_4"]
    assert store.find_checkpoint(tmp_path).name == "step_4"
    store.read_manifest(tmp_path / "step_4")
