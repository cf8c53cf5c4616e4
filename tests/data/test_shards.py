"""Shards come back as written, are there whole or not at all, and are refused when they are not what the index says."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ava_fast.data.corpus import Skipped
from ava_fast.data.shards import Piece, TokenStream, check_vocabulary, is_prepared, read_index, write_shards
from ava_fast.errors import UserError

EOS = 7


def write(folder: Path, train: list[Piece], vocab_size: int = 100, shard_tokens: int = 4, **changes: object) -> None:
    arguments = {
        "validation": [Piece([5, 6], 2, True)],
        "tokenizer_json": b"{}",
        "eos_id": EOS,
        "source": "a test",
        "skipped": [Skipped("x.gz", "is .gz")],
    }
    write_shards(folder, train, vocab_size=vocab_size, shard_tokens=shard_tokens, **arguments | changes)  # type: ignore[arg-type]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_documents_are_stored_one_after_the_other_with_an_end_each(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "shards"
    write(folder, [Piece([1, 2], 10, False), Piece([3], 5, True), Piece([], 0, True), Piece([4] * 8, 8, True)])
    assert files(folder) == [
        "index.json",
        "rejected.jsonl",
        "skipped.jsonl",
        "tokenizer.json",
        *(f"train/0000{number}.bin" for number in range(4)),
        "train/checks.bin",
        "train/documents.bin",
        "validation/00000.bin",
        "validation/checks.bin",
        "validation/documents.bin",
    ]
    index = read_index(folder)
    assert (index.dtype, index.vocab_size, index.eos_id, index.source, index.skipped) == (
        "uint16",
        100,
        EOS,
        "a test",
        1,
    )
    assert (index.train.documents, index.train.bytes, index.train.tokens) == (3, 23, 14)
    assert [shard.tokens for shard in index.train.shards] == [4, 4, 4, 2]
    expected = [1, 2, 3, EOS, EOS, *[4] * 8, EOS]
    stream = TokenStream(folder, index, "train")
    assert len(stream) == 14
    for start in range(15):
        for stop in range(start, 15):
            assert stream.read(start, stop).tolist() == expected[start:stop]
    assert (folder / "train/00000.bin").read_bytes() == np.array(expected[:4], "<u2").tobytes()
    assert json.loads((folder / "skipped.jsonl").read_text()) == {"path": "x.gz", "reason": "is .gz"}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_vocabulary_decides_the_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write(tmp_path / "s", [Piece([vocab_size - 1, 0], 1, True)], vocab_size)
    index = read_index(tmp_path / "s")
    assert index.dtype == dtype
    assert TokenStream(tmp_path / "s", index, "train").read(0, 3).tolist() == [vocab_size - 1, 0, EOS]
    assert (tmp_path / "s/train/00000.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_the_fingerprint_is_of_the_tokens_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", [Piece([1, 2], 1, True)])
    write(tmp_path / "b", [Piece([1, 2], 9, True)], source="elsewhere")
    write(tmp_path / "c", [Piece([1, 3], 1, True)])
    a, b, c = (read_index(tmp_path / name) for name in "abc")
    assert a.fingerprint("train") == b.fingerprint("train") != c.fingerprint("train")
    assert a.fingerprint("validation") == c.fingerprint("validation") != a.fingerprint("train")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece([1] * 10, 1, True)
        assert files(tmp_path), "written by now, under another name"
        assert not (tmp_path / "s").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", pieces())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_reported_and_cleaned(tmp_path: Path) -> None:
    # A file size limit makes write() fail as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"data\.cache_dir: cannot write .*/s: File too large; free some space"
        ) as e:
            write(tmp_path / "s", [Piece([1] * 1000, 1, True)], shard_tokens=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert e.value.__cause__.errno == errno.EFBIG  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*/file/s: "):
        write(tmp_path / "file" / "s", [])


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece([1], 1, True)
        write(tmp_path / "s", [Piece([2], 1, True)])  # another process, quicker

    write(tmp_path / "s", pieces())  # type: ignore[arg-type]
    assert TokenStream(tmp_path / "s", read_index(tmp_path / "s"), "train").read(0, 2).tolist() == [2, EOS]
    assert os.listdir(tmp_path) == ["s"]


def test_another_folder_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*/s: Directory not empty"):
        write(tmp_path / "s", [Piece([1], 1, True)])
    assert files(tmp_path) == ["s/precious"]


def test_damage_is_refused_with_the_file_named(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write(folder, [Piece([1, 2, 3, 4, 5], 1, True)])
    assert is_prepared(folder)
    shard, content = folder / "train/00001.bin", (folder / "train/00001.bin").read_bytes()
    for damaged in (content[:-1], content + b"\0"):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"00001\.bin holds {len(damaged)} bytes where the index says 4; delete"):
            read_index(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train/00001\.bin is missing"):
        read_index(folder)
    shard.write_bytes(np.array([1, 100], "<u2").tobytes())
    with pytest.raises(UserError, match=r"00001\.bin or the checks\.bin beside it is damaged: bytes 0 to 4 are not"):
        TokenStream(folder, read_index(folder), "train").read(3, 6)
    tree = json.loads((folder / "index.json").read_text())
    del tree["train"]["checks_sha256"]
    (folder / "index.json").write_text(json.dumps(tree))  # as before there were checks
    with pytest.raises(UserError, match=r"00001\.bin holds token 100 but the vocabulary has 100 \(at byte 2\)"):
        TokenStream(folder, read_index(folder), "train").read(3, 6)


@pytest.mark.parametrize("vocab_size", [100, 2**17])
def test_no_flipped_byte_is_ever_read(tmp_path: Path, vocab_size: int) -> None:
    folder, tokens = tmp_path / "s", np.arange(3000) % 90
    write(folder, [Piece(tokens[:1700], 1, True), Piece(tokens[1700:], 1, True)], vocab_size, shard_tokens=1300)
    index = read_index(folder)
    stream, size = TokenStream(folder, index, "train"), np.dtype(index.dtype).itemsize
    whole = stream.read(0, 3002)
    random = np.random.default_rng(0)
    for place in [0, 1299 * size, *random.integers(0, 3002 * size, 60).tolist()]:
        shard, offset = divmod(place, 1300 * size)
        file = folder / index.train.shards[shard].file
        original = file.read_bytes()
        content = bytearray(original)
        content[offset] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        start = place // size
        first = int(random.integers(max(0, start - 700), start + 1))
        last = int(random.integers(start + 1, min(start + 700, 3002) + 1))
        with pytest.raises(UserError, match=rf"{file.name} or the checks\.bin beside it is damaged: bytes "):
            stream.read(first, last)
        piece = offset // 1024 * 1024  # within the shard; what lies in others is read
        before, behind = shard * 1300 + piece // size, shard * 1300 + min(piece + 1024, len(content)) // size
        assert np.array_equal(stream.read(0, before), whole[:before])
        assert np.array_equal(stream.read(behind, 3002), whole[behind:])
        file.write_bytes(original)
    assert np.array_equal(stream.read(0, 3002), whole)
    (folder / "train" / "checks.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"checks\.bin holds 0 bytes where the index says"):
        read_index(folder)
    with pytest.raises(UserError, match=r"damaged: bytes 0 to 1,024 are not what was written"):
        stream.read(0, 5)


def test_a_disk_that_fails_is_an_error_and_no_signal(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write(folder, [Piece([1, 2, 3, 4, 5], 1, True)])
    index = read_index(folder)
    (folder / "train/00001.bin").unlink()
    (folder / "train/00001.bin").symlink_to("/proc/self/mem")  # whose first page gives EIO
    stream = TokenStream(folder, index, "train")
    assert stream.read(0, 4).tolist() == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"00001\.bin cannot be read at byte 0: Input/output error"):
        stream.read(0, 5)


def test_more_shards_than_a_process_may_open_by_default(tmp_path: Path) -> None:
    write(tmp_path / "s", [Piece(list(range(8)) * 50, 1, True)])
    index = read_index(tmp_path / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
        stream = TokenStream(tmp_path / "s", index, "train")
        assert stream.read(0, 401).tolist() == [*list(range(8)) * 50, EOS]
    finally:
        stream.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"index\.json is not JSON; delete"),
        ("[]", r"has format_version None, this version reads 1"),
        ('{"format_version": 2}', r"has format_version 2, this version reads 1"),
        ('{"format_version": 1, "dtype": "int8"}', r"index\.json is damaged at dtype; delete"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(tmp_path)


def test_a_missing_index_is_refused(tmp_path: Path) -> None:
    assert not is_prepared(tmp_path)
    with pytest.raises(UserError, match=r"index\.json cannot be read: No such file or directory"):
        read_index(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    check_vocabulary(1024, 1024)
    with pytest.raises(UserError, match=r"^model\.vocab_size: 1023 is too small .* at least 1024$"):
        check_vocabulary(1024, 1023)
