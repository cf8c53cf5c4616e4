"""Documents: one per UTF-8 text file below a folder, or below the running Python's standard library.

    corpus = scan("my/texts")          # None: the standard library's source, without its tests
    train, validation = split(corpus.documents, 0.05)
    train[0].read()

Every file is read once to learn whether it is text and what its content hashes to, so that the same files give the same
result wherever they lie and whenever they were written. What is not text is listed with the reason, never just dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ava_fast.errors import UserError

# UTF-8 or not, the bytes of these are records around the text rather than text.
NOT_PLAIN_TEXT = frozenset({".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".gz", ".zst"})
# What an installed Python keeps beside its own library's source. pydoc_data is the language reference as one generated
# document, 6 % of the text; encodings is 12 %, mostly character tables that are near-copies of each other, so that a
# model would have seen what is held out.
NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
)


@dataclass(frozen=True)
class Document:
    """A text file, or the characters [start, stop) of one."""

    name: str
    """Path relative to the corpus, with forward slashes."""
    path: Path
    sha256: str
    """Of the whole file."""
    size: int
    """Bytes of UTF-8."""
    start: int = 0
    stop: int | None = None

    def read(self) -> str:
        """Its text. Raises UserError if the file is no longer what `scan` saw."""
        try:
            text, sha256 = _read_text(self.path)
        except _Unreadable as error:
            raise UserError(f"data.data_dir: {self.path} {error}, though it was read before; prepare again") from None
        if sha256 != self.sha256:
            raise UserError(f"data.data_dir: {self.path} changed while the folder was being prepared; prepare again")
        return text[self.start : self.stop]


@dataclass(frozen=True)
class Skipped:
    """Something below the folder that is not a document, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """What `scan` found, ordered by name."""

    source: str
    documents: list[Document]
    skipped: list[Skipped]


def scan(data_dir: str | Path | None) -> Corpus:
    """Every document below `data_dir`; None: the standard library's source. Hidden files and folders are left out.

    Raises UserError when the folder is missing or holds no text.
    """
    if data_dir is None:
        root = Path(sysconfig.get_path("stdlib"))
        names, skipped = _walk(root, NOT_LIBRARY)
        names = [name for name in names if name.endswith(".py") and (root / name).stat().st_size]
        source = f"source of the Python {platform.python_version()} standard library"
    else:
        root = Path(data_dir)
        # An unset shell variable gives "", which Path would take for the working directory.
        if not str(data_dir) or not root.is_dir():
            problem = "is a file; give the folder that holds it" if root.is_file() else "is not a folder"
            raise UserError(f"data.data_dir: '{data_dir}' {problem}")
        names, skipped = _walk(root)
        source = str(root.resolve())
    documents = []
    for name in names:
        path = root / name
        try:
            _, sha256 = _read_text(path)
        except _Unreadable as error:
            skipped.append(Skipped(name, str(error)))
        else:
            documents.append(Document(name, path, sha256, path.stat().st_size))
    skipped.sort(key=lambda item: item.path)
    if not documents:
        seen = f"skipped {len(skipped)}, such as {skipped[0].path}: {skipped[0].reason}" if skipped else "it is empty"
        raise UserError(f"data.data_dir: '{root}' holds no readable UTF-8 text ({seen}); give a folder of text files")
    return Corpus(source, documents, skipped)


def split(documents: list[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), both non-empty. A document's side depends on its name alone, so new files move no old ones.

    A document is held out when the hash of its name, as a number in [0, 1), is below `validation_fraction`. If that
    leaves a side empty, the document whose hash is nearest to the threshold changes sides. A single document is cut:
    its last `validation_fraction` of characters is held out.
    """
    if len(documents) == 1:
        (document,) = documents
        text = document.read()
        cut = max(1, int(len(text) * (1 - validation_fraction)))
        size = len(text[:cut].encode())
        head = dataclasses.replace(document, size=size, stop=cut)
        tail = dataclasses.replace(document, size=document.size - size, start=cut)
        return [head], [tail]
    by_hash = sorted(documents, key=lambda document: (_unit_hash(document.name), document.name))
    held_out = sum(_unit_hash(document.name) < validation_fraction for document in documents)
    held_out = min(max(held_out, 1), len(documents) - 1)
    validation = {document.name for document in by_hash[:held_out]}
    return (
        [document for document in documents if document.name not in validation],
        [document for document in documents if document.name in validation],
    )


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


class _Unreadable(Exception):
    """Why a file is not a document."""


def _read_text(path: Path) -> tuple[str, str]:
    """A file's text, without a byte order mark, and the SHA-256 of its bytes."""
    if path.suffix.lower() in NOT_PLAIN_TEXT:
        raise _Unreadable(f"is {path.suffix.lower()}, and only plain text is read")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise _Unreadable("is not a regular file")
        data = path.read_bytes()
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise _Unreadable("is binary: it holds a NUL byte")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"is not UTF-8 text: byte {error.start}") from None
    if not text.strip():
        raise _Unreadable("is empty")
    return text, hashlib.sha256(data).hexdigest()


def _walk(root: Path, exclude: frozenset[str] = frozenset()) -> tuple[list[str], list[Skipped]]:
    """Names of all files below `root`, sorted, and the folders that could not be entered."""
    names, skipped = [], []

    def refuse(folder: str, reason: str) -> None:
        skipped.append(Skipped(Path(folder).relative_to(root).as_posix(), reason))

    def refuse_unreadable(error: OSError) -> None:
        refuse(error.filename, f"cannot be listed: {error.strerror}")

    for folder, subfolders, files in os.walk(root, onerror=refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in exclude]
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                refuse(os.path.join(folder, name), "is a link to a folder, which is not followed")
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names), skipped
