"""What becomes a document, what is skipped and why, and which side of the split a document is on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ava_fast.data.corpus import scan, split
from ava_fast.errors import UserError


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_text_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.txt": "größe\r\n".encode(),
            "a/z.md": b"z",
            "a.txt": b"\xef\xbb\xbfmarked",
            "a/y/no_suffix": "日本".encode(),
            ".hidden": b"no",
            ".git/config": b"no",
        },
    )
    corpus = scan(tmp_path)
    assert {document.name: document.read() for document in corpus.files} == {
        "a.txt": "marked",
        "a/y/no_suffix": "日本",
        "a/z.md": "z",
        "b.txt": "größe\r\n",
    }
    assert [document.name for document in corpus.files] == ["a.txt", "a/y/no_suffix", "a/z.md", "b.txt"]
    assert corpus.skipped == []
    assert corpus.source == str(tmp_path)


def test_what_is_not_text_is_listed_with_its_reason(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "good.txt": b"text",
            "binary": b"a\0b",
            "blank.txt": b" \n",
            "latin1.txt": "caf\xe9".encode("latin-1"),
            "rows.JSONL": b'{"body": "x"}',
            "elsewhere/x.txt": b"x",
        },
    )
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder_link").symlink_to(tmp_path / "elsewhere")
    corpus = scan(tmp_path)
    assert [document.name for document in corpus.files] == ["elsewhere/x.txt", "good.txt"]
    assert [(item.path, item.reason) for item in corpus.skipped] == [
        ("binary", "is binary: it holds a NUL byte"),
        ("blank.txt", "is empty"),
        ("dangling", "cannot be read: No such file or directory"),
        ("folder_link", "is a link to a folder, which is not followed"),
        ("latin1.txt", "is not UTF-8 text: byte 3"),
        ("pipe", "is not a regular file"),
        (
            "rows.JSONL",
            "is JSON lines without a text column ('text' or 'content'); its keys are body; "
            "name one as data.text_column",
        ),
    ]


def test_binary_data_are_no_loss_and_damaged_text_is(tmp_path: Path) -> None:
    lines = b"\xe9\xe8 noise\n" * 30
    write(
        tmp_path,
        {
            "good.txt": b"text",
            "seldom_nul": lines + b"\0" + lines,
            "latin1": lines,
            "nul.txt": b"a line\n" * 99 + b"\0",
        },
    )
    lost = {item.path: bool(item.lost) for item in scan(tmp_path).skipped}
    assert lost == {"seldom_nul": False, "latin1": True, "nul.txt": True}


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "missing", r"data\.data_dir: '.*missing' is not a folder"),
        ({"file.txt": b"x"}, "file.txt", r"data\.data_dir: '.*file\.txt' is a file; give the folder that holds it"),
        ({}, ".", r"data\.data_dir: .* holds no readable text \(it is empty\); see docs/data\.md"),
        ({"a.txt": b"\0"}, ".", r"holds no readable text \(skipped 1, such as a\.txt: is binary: it holds a NUL byte"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, bytes], given: str, message: str) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=message):
        scan(tmp_path / given)


def test_an_empty_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, {"a.txt": b"x"}))
    with pytest.raises(UserError, match=r"data\.data_dir: '' is not a folder"):
        scan("")


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"before", "b.txt": b"before"})
    first, second = scan(tmp_path).files
    first.path.write_bytes(b"after!")
    second.path.unlink()
    with pytest.raises(UserError, match=r"a\.txt changed while the folder was being prepared"):
        first.read()
    with pytest.raises(UserError, match=r"b\.txt cannot be read: No such file"):
        second.read()


def test_the_default_corpus_is_the_standard_library_without_its_tests() -> None:
    corpus = scan(None)
    names = {document.name for document in corpus.files}
    assert {"json/decoder.py", "typing.py"} <= names
    assert len(names) > 400
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert "standard library" in corpus.source


def test_the_split_depends_on_names_only_and_holds_out_about_the_fraction(tmp_path: Path) -> None:
    write(tmp_path, {f"{number}.txt": b"x" for number in range(400)})
    documents = scan(tmp_path).files
    train, validation = split(documents, 0.2)
    assert sorted(document.name for document in train + validation) == [document.name for document in documents]
    assert 50 <= len(validation) <= 110
    fewer, _ = split(documents[:200], 0.2)
    assert {document.name for document in fewer} <= {document.name for document in train}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_the_split_is_empty(tmp_path: Path, fraction: float) -> None:
    write(tmp_path, {f"{number}.txt": b"x" for number in range(5)})
    train, validation = split(scan(tmp_path).files, fraction)
    assert (len(train), len(validation)) == ((4, 1) if fraction < 0.5 else (1, 4))


def test_a_single_document_is_cut(tmp_path: Path) -> None:
    text = "".join(f"zeile {number} größe\n" for number in range(100))
    write(tmp_path, {"only.txt": text.encode()})
    (head,), (tail,) = split(scan(tmp_path).files, 0.1)
    assert head.read() + tail.read() == text
    assert len(tail.read()) == pytest.approx(len(text) * 0.1, abs=1)
    assert (head.size, tail.size) == (len(head.read().encode()), len(tail.read().encode()))
