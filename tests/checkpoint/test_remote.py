"""Checkpoints on an S3 that moto serves on localhost, through a connection that is cut."""

import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from corpus import write_config, write_corpus
from launch import only_run

from ava_fast import train
from ava_fast.checkpoint import remote, store
from ava_fast.errors import UserError
from ava_fast.files import write_hashed

moto = pytest.importorskip("moto.server")


class Cable:
    """A connection to a port, on a port of its own, that is cut whenever `left` bytes have gone towards the server, and
    mended after the first cut if it `heals`."""

    def __init__(self, port: int):
        self.left: float = float("inf")
        self.cuts, self.heals = 0, False
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for one, other, counted in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._carry, args=(one, other, counted), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket, counted: bool) -> None:
        try:
            while data := one.recv(65536):
                if counted:
                    self.left -= len(data)
                    if self.left < 0:
                        self.cuts += 1
                        self.left = float("inf") if self.heals else self.left
                        break
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            end.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 6 steps, with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("remote")
    training = {"max_steps": 6, "lr_scheduler_type": "constant", "warmup_steps": 1}
    changes = {"training": training, "checkpoint": {"save_steps": 2}, "evaluation": {"eval_steps": 0}}
    config = write_config(folder / "c.yaml", write_corpus(folder / "text"), **changes)
    assert train.main(["--config", str(config)]) == 0
    return only_run(config)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def cable(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    """An empty bucket at its end."""
    cable = Cable(server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{cable.port}")
    monkeypatch.setattr(remote, "PAUSES", (0.05, 0.1))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's and s3fs's own patience would only take time here
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket().mkdir("bucket")
    yield cable
    cable.left = float("inf")
    bucket().rm("bucket", recursive=True)


def bucket() -> Any:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    return fs


def objects() -> list[str]:
    return sorted(bucket().find("bucket"))


def test_a_checkpoint_is_copied_and_comes_back(cable: Cable, run: Path, tmp_path: Path) -> None:
    names = [remote.upload(path, "s3://bucket/runs/r") for path in store.list_checkpoints(run / "checkpoints")]
    assert [name.partition(".")[0] for name in names] == ["step_2", "step_4", "step_6"]
    assert bucket().cat_file("bucket/runs/r/latest") == names[-1].encode()
    (found,) = remote.download("s3://bucket/runs/r", tmp_path)
    assert found == tmp_path / "r" / "checkpoints" / "step_6"
    assert store.read_manifest(found) == store.read_manifest(run / "checkpoints" / "step_6")
    (named,) = remote.download(f"s3://bucket/runs/r/{names[0]}", tmp_path)
    assert named.name == "step_2"
    # Damaged there, the newest is passed over; a folder here that is damaged is fetched again.
    damaged = f"bucket/runs/r/{names[2]}/engine/rank_0.safetensors"
    content = bucket().cat_file(damaged)
    bucket().pipe_file(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    (older,) = remote.download("s3://bucket/runs/r", tmp_path / "elsewhere")
    assert older.name == "step_4"
    (named / "tokenizer.json").unlink()
    assert remote.download(f"s3://bucket/runs/r/{names[0]}", tmp_path) == [named]
    store.read_manifest(named)


def test_a_cut_in_the_midst_is_tried_again(cable: Cable, run: Path, tmp_path: Path) -> None:
    cable.left, cable.heals = 300_000, True  # of 500,000 bytes
    remote.upload(store.candidates(run)[0], "s3://bucket/runs/r")
    assert cable.cuts
    (found,) = remote.download("s3://bucket/runs/r", tmp_path)
    store.read_manifest(found)


def test_an_upload_that_stays_cut_off_leaves_the_older_one_the_latest(
    cable: Cable, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = store.list_checkpoints(run / "checkpoints")
    older = remote.upload(first, "s3://bucket/runs/r")
    cable.left = 300_000
    uploader = remote.Uploader("s3://bucket/runs/r", run / "checkpoints")
    uploader.offer(second)
    uploader.finish()
    assert cable.cuts
    assert "step_4 is on this disk alone, it could not be uploaded" in caplog.text
    cable.left = float("inf")
    assert bucket().cat_file("bucket/runs/r/latest") == older.encode()
    assert any("step_4" in name for name in objects())
    assert remote._order(bucket(), "bucket/runs/r") == [older]
    assert remote.download("s3://bucket/runs/r", tmp_path)[0].name == "step_2"
    # The next one works, and clears what was cut off and what is not on the disk any more.
    copy = Path(shutil.copytree(run / "checkpoints", tmp_path / "copy"))
    shutil.rmtree(copy / "step_2")
    uploader = remote.Uploader("s3://bucket/runs/r", copy)
    uploader.offer(copy / "step_6")
    uploader.finish()
    left = {name.split("/")[3].partition(".")[0] for name in objects()}
    assert left == {"latest", "step_6"}
    assert third.name == remote.download("s3://bucket/runs/r", tmp_path)[0].name


def test_large_files_go_in_parts(cable: Cable, tmp_path: Path) -> None:
    folder = store.open_folder(tmp_path / "checkpoints", 1)
    files = {"large": write_hashed(folder / "large", [bytes(101 * 2**20)])}  # s3fs parts what is above 100 MiB
    name = remote.upload(store.commit(folder, {"step": 1}, files), "s3://bucket/r")
    assert bucket().info(f"bucket/r/{name}/large")["ETag"].strip('"').endswith("-3")  # of as many parts


def test_a_run_copies_its_checkpoints_and_another_machine_goes_on_from_there(
    cable: Cable, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    shutil.copy(run / "config.yaml", config)
    here, there = (f"logging.output_dir={tmp_path / name}" for name in ("here", "there"))
    steps = ["--override", "training.max_steps=4"]
    copied = ["--override", "checkpoint.remote=s3://bucket/runs", "--override", "checkpoint.save_total_limit=1"]
    assert train.main(["--config", str(config), "--override", here, *steps, *copied]) == 0
    ((_, name),) = {tuple(name.split("/")[1:3]) for name in objects()}
    assert {path.split("/")[3].partition(".")[0] for path in objects()} == {"latest", "step_4"}
    assert train.main(["--config", str(config), "--override", there, "--resume", f"s3://bucket/runs/{name}"]) == 0
    again, straight = (
        store.read_manifest(path / "checkpoints" / "step_6") for path in (tmp_path / "there/runs" / name, run)
    )
    assert (again["step"], again["data"], again["probe"]) == (6, straight["data"], straight["probe"])
    capsys.readouterr()
    assert train.main(["--config", str(config), "--override", there, "--resume", "s3://bucket/nothing"]) == 2
    assert "s3://bucket/nothing: holds no checkpoint that can be used" in capsys.readouterr().err
    assert train.main(["--config", str(config), "--override", "checkpoint.remote=s3://none/x"]) == 2
    assert "checkpoint.remote: s3://none/x: cannot be written to: " in capsys.readouterr().err


def test_what_no_package_can_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nonsense://x: cannot be opened"):
        remote.check("nonsense://x")
    remote.check(f"file://{tmp_path}/folder")
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_arrives_altered_is_sent_again_and_never_the_latest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    put, left = memory.put_file, [1]

    def alter(source: str, target: str) -> None:
        put(source, target)
        if left[0] and target.endswith(".safetensors"):
            left[0] -= 1
            content = memory.cat_file(target)
            memory.pipe_file(target, content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(type(memory), "put_file", lambda _, source, target: alter(source, target))
    name = remote.upload(run / "checkpoints" / "step_2", "memory://altered")
    assert left == [0]
    left[0] = 99
    with pytest.raises(OSError, match=r"rank_0\.safetensors: is not what was written: its SHA-256 differs"):
        remote.upload(run / "checkpoints" / "step_4", "memory://altered")
    assert memory.cat_file("/altered/latest") == name.encode()
