"""Downloads against a hub on localhost: whole, resumed, retried, verified, and refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from samples import MAKERS, jsonl, parquet, text

from ava_fast.data.download import CURATED, read_manifest
from ava_fast.errors import UserError

REPOSITORY = "owner/corpus"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as a download uses, with faults on demand."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.claims: dict[str, bytes] = {}
        """Content whose checksum is announced in place of the right one."""
        self.gets: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.break_after: dict[str, list[int]] = {}
        """Per file: bytes after which each next download breaks off."""
        self.refuse: list[int] = []
        """Status codes of the next answers to what is not a download."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.refuse:
            return self._answer(self.server.refuse.pop(0), b"no")
        if path.startswith(f"/api/datasets/{REPOSITORY}"):
            return self._answer(200, json.dumps(self._info()).encode())
        prefix = f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.server.files:
            code = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            return self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "none"})
        data = self.server.files[name]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"',
                   "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}  # fmt: skip
        if self.command == "HEAD":
            return self._answer(200, data, headers)
        self.server.gets[name] += 1
        asked = self.headers.get("Range")
        if asked and asked != "bytes=0-":
            self.server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._answer(206, data[start:], headers, self._break(name))
        return self._answer(200, data, headers, self._break(name))

    def _break(self, name: str) -> int | None:
        planned = self.server.break_after.get(name)
        return planned.pop(0) if planned else None

    def _answer(
        self, code: int, data: bytes, headers: dict[str, str] | None = None, break_after: int | None = None
    ) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:break_after])
        if break_after is not None:
            self.close_connection = True

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.server.files.items():
            data = self.server.claims.get(name, data)
            if name.endswith(".parquet"):
                lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                siblings.append({"rfilename": name, "size": len(data), "blobId": "f" * 40, "lfs": lfs})
            else:
                blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                siblings.append({"rfilename": name, "size": len(data), "blobId": blob})
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "cc0-1.0"}}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        server.files = {
            "README.md": b"# corpus",
            "data/a.parquet": parquet(range(3000)),
            "data/b.jsonl": jsonl(range(3000, 3100)),
            "other/c.parquet": parquet(range(4000, 4100)),
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(
    endpoint: str, folder: Path, *arguments: str, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`ava-fast download` in a process of its own: the hub's library reads its endpoint when it is imported."""
    script = f"{before}\n" + (
        "import sys; from ava_fast.data import download; download.BACK_OFF_SECONDS = 0.01\n"
        "import argparse, logging; from ava_fast.data.commands import add_data_commands\n"
        "from ava_fast.errors import UserError\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "parser = argparse.ArgumentParser(); add_data_commands(parser.add_subparsers())\n"
        "options = parser.parse_args(sys.argv[1:])\n"
        "try:\n    sys.exit(options.command(options))\n"
        "except UserError as error:\n    print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", script, "download", "--output", str(folder / "data"), *arguments]
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    settings |= environment
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


def test_a_dataset_arrives_verified_and_is_not_fetched_again(tmp_path: Path, hub: Hub) -> None:
    result = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "owner--corpus"
    assert result.stdout.splitlines() == [
        f"{folder}: 3 files at {COMMIT[:12]}",
        "1 of them became Parquet, 100 texts without other columns; --as-is keeps these",
        "license cc0-1.0, as it says of itself: read https://huggingface.co/datasets/owner/corpus before you train "
        "on it",
        f"prepare it with: ava-fast prepare --data-dir {folder} --output shards",
    ]
    for name in ("data/a.parquet", "other/c.parquet"):
        assert (folder / name).read_bytes() == hub.files[name]
    made = folder / "data" / "b.jsonl.parquet"
    assert pq.read_table(made).to_pydict() == {"text": [text(number) for number in range(3000, 3100)]}
    assert files(folder) == [".download.json", "data/a.parquet", "data/b.jsonl.parquet", "other/c.parquet"]
    record = json.loads((folder / ".download.json").read_text())
    assert record["revision"] == COMMIT
    known = record["files"]["data/b.jsonl"]
    assert known["sha256"] == hashlib.sha256(hub.files["data/b.jsonl"]).hexdigest()
    assert known["parquet"]["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    before, at = hub.gets.total(), made.stat().st_mtime_ns
    (folder / "data" / "b.jsonl").write_bytes(b"a run ended just before it removed this")
    assert run(hub.endpoint, tmp_path, "--dataset", REPOSITORY).returncode == 0
    assert hub.gets.total() == before == 3
    assert made.stat().st_mtime_ns == at
    assert not (folder / "data" / "b.jsonl").exists()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_format_becomes_parquet_unless_something_of_it_would_be_lost(tmp_path: Path, hub: Hub) -> None:
    hub.files = {f"{place}.{'arrow' if 'arrow' in name else 'json'}": make(range(place * 100, place * 100 + 60))
                 for place, (name, make) in enumerate(MAKERS.items())}  # fmt: skip
    hub.files["broken.jsonl"] = jsonl(range(50)) + b"{\n" + jsonl(range(50))
    hub.files["body.jsonl"] = jsonl(range(50), "body")
    folder = tmp_path / "data" / "owner--corpus"
    result = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert "broken.jsonl stays as it is: line 51 is not JSON" in result.stderr
    assert "body.jsonl stays as it is: is JSON lines without a text column" in result.stderr
    record = json.loads((folder / ".download.json").read_text())["files"]
    for place, (name, make) in enumerate(MAKERS.items()):
        (stored,) = folder.glob(f"{place}.*")
        if name == "parquet":
            assert stored.read_bytes() == make(range(place * 100, place * 100 + 60))
            continue
        assert stored.name.endswith(".parquet"), name
        assert pq.read_table(stored).to_pydict() == {"text": [text(n) for n in range(place * 100, place * 100 + 60)]}
        assert record[stored.name.removesuffix(".parquet")]["parquet"]["rows"] == 60
    for name in ("broken.jsonl", "body.jsonl"):
        assert (folder / name).read_bytes() == hub.files[name]
    before = hub.gets.total()
    again = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY)
    assert (again.returncode, hub.gets.total()) == (0, before)
    assert "stays" not in again.stderr, "it is known, and not tried again"
    asked = run(hub.endpoint, tmp_path / "b", "--dataset", REPOSITORY, "--text-column", "body", "--max-files", "9")
    assert asked.returncode == 0, asked.stderr
    assert (tmp_path / "b/data/owner--corpus/body.jsonl.parquet").exists()
    assert run(hub.endpoint, tmp_path / "c", "--dataset", REPOSITORY, "--as-is").returncode == 0
    assert files(tmp_path / "c/data/owner--corpus") == [".download.json", *sorted(hub.files)]


def test_a_run_that_ends_while_it_converts_goes_on_without_a_download(tmp_path: Path, hub: Hub) -> None:
    hub.files = {"b.jsonl": jsonl(range(100))}
    dies = "import os, ava_fast.data.convert as convert; convert.sync = lambda path: os.kill(os.getpid(), 9)"
    assert run(hub.endpoint, tmp_path, "--dataset", REPOSITORY, before=dies).returncode == -9
    folder = tmp_path / "data" / "owner--corpus"
    assert files(folder) == [".b.jsonl.parquet.part", ".download.json", "b.jsonl"]
    assert run(hub.endpoint, tmp_path, "--dataset", REPOSITORY).returncode == 0
    assert files(folder) == [".download.json", "b.jsonl.parquet"]
    assert hub.gets["b.jsonl"] == 1


def test_what_becomes_parquet_is_never_in_memory_whole(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    with (tmp_path / "x.jsonl").open("wb") as file:
        for _ in range(30):
            file.write(line * 1000)  # 300 MB
    script = (
        "import resource, sys; from pathlib import Path; from ava_fast.data.convert import to_parquet\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(to_parquet(Path(sys.argv[1]), 'x.jsonl').rows)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    rows, grown = map(int, result.stdout.split())
    assert rows == 30_000
    assert grown < 150, "MiB; the text is 286"


def test_a_broken_download_goes_on_where_it_broke(tmp_path: Path, hub: Hub) -> None:
    hub.break_after["data/a.parquet"] = [100_000]
    hub.refuse = [503]
    result = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY, "--max-files", "1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data/owner--corpus/data/a.parquet").read_bytes() == hub.files["data/a.parquet"]
    assert hub.ranges == ["bytes=100000-"]


def test_a_run_that_was_given_up_is_resumed_by_the_next(tmp_path: Path, hub: Hub) -> None:
    hub.break_after["data/a.parquet"] = [100_000] + [0] * 20
    result = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY)
    assert result.returncode == 2
    assert "run the same command again to go on" in result.stderr
    assert not (tmp_path / "data/owner--corpus/data/a.parquet").exists()
    hub.break_after.clear()
    hub.ranges.clear()
    assert run(hub.endpoint, tmp_path, "--dataset", REPOSITORY).returncode == 0
    assert hub.ranges == ["bytes=100000-"]
    assert (tmp_path / "data/owner--corpus/data/a.parquet").read_bytes() == hub.files["data/a.parquet"]


@pytest.mark.parametrize("name", ["data/a.parquet", "data/b.jsonl"])
def test_a_file_with_another_checksum_is_not_kept(tmp_path: Path, hub: Hub, name: str) -> None:
    content = hub.files[name]
    hub.claims[name] = content[:-1] + b"?"
    result = run(hub.endpoint, tmp_path, "--dataset", REPOSITORY)
    assert result.returncode == 2
    assert f"{name} arrived with another checksum than the hub's, 5 times" in result.stderr
    assert not (tmp_path / "data/owner--corpus" / name).exists()
    assert hub.gets[name] == 5


def test_a_manifest_names_files(tmp_path: Path, hub: Hub) -> None:
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"mine:\n  repository: {REPOSITORY}\n  files: ['other/*']\n  license: mine\n")
    assert run(hub.endpoint, tmp_path, "--manifest", str(manifest)).returncode == 0
    found = [path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*.parquet")]
    assert found == [Path("mine/other/c.parquet")]


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = run("http://127.0.0.1:9", tmp_path, "--dataset", "wikipedia", **environment)
        assert result.returncode == 2
        last = result.stderr.splitlines()[-1]
        assert last.startswith("--dataset: http://127.0.0.1:9 cannot be reached")
        command = "hf download wikimedia/wikipedia --repo-type dataset --include '20231101.en/*.parquet' --local-dir D"
        assert f"where there is a network, run `{command}`, copy D here" in last
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "owner/nothing"], "--dataset: owner/nothing does not exist, or is private"),
        (["--dataset", "nothing"], "--dataset: 'nothing' is neither owner/name nor one of wikipedia, "),
        (["--manifest", "nowhere.yaml"], "--manifest: nowhere.yaml cannot be read: No such file or directory"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path: Path, hub: Hub, arguments: list[str], says: str) -> None:
    result = run(hub.endpoint, tmp_path, *arguments)
    assert result.returncode == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is not YAML"),
        ("[]", "must hold names"),
        ("a: 5", r"a: is no mapping"),
        ("a: {license: x}", r"a\.repository: Field required"),
        ("'../a': {repository: o/n}", r"\.\./a\.name"),
        ("a: {repository: o/n, fils: []}", r"a\.fils: Extra inputs"),
    ],
)
def test_a_manifest_with_a_fault_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_manifest(tmp_path / "m.yaml")


def test_the_curated_list_is_well_formed() -> None:
    entries = read_manifest(CURATED)
    assert len(entries) >= 8
    assert all(entry.license != "not given" for entry in entries)
    assert all(str(entry.license_source).startswith("https://") for entry in entries)
    assert len({entry.repository for entry in entries}) == len(entries)


def test_the_list_says_where_each_license_is_found(tmp_path: Path) -> None:
    lines = run("http://127.0.0.1:9", tmp_path, "--list").stdout.splitlines()
    assert lines[0].split() == ["name", "repository", "license"]
    assert lines[1].split() == ["wikipedia", "wikimedia/wikipedia", "CC-BY-SA-3.0,", "GFDL"]
    assert "read https://huggingface.co/datasets/<repository> before you train on it" in lines[-1]
