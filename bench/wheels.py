"""Makes wheels fit under a limit: compressed anew, or split where that does not do. Part of `bench/wheelhouse.sh`.

    python -m bench.wheels --limit 50 FOLDER

A wheel is a zip; with LZMA instead of deflate those of compiled code lose a third, and pip installs them all the same.
The parts of one that stays too large are named `….whl.part00` and so on; `install.sh` joins them. SHA256SUMS, if there,
is kept right.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path

MEGABYTE = 10**6


def fit(folder: Path, limit: int) -> None:
    """Under `folder`, at any depth, no wheel or part of one has more than `limit` bytes afterwards."""
    for wheel in sorted(folder.rglob("*.whl")):
        if wheel.stat().st_size <= limit:
            continue
        compress(wheel)
        size = wheel.stat().st_size
        print(f"{wheel.name}: compressed anew, {size / MEGABYTE:.1f} MB", flush=True)
        _note(folder, wheel)
        if size > limit:
            parts = split(wheel, limit)
            print(f"{wheel.name}: split into {len(parts)} parts", flush=True)


def compress(wheel: Path) -> None:
    smaller = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as after:
        for entry in before.infolist():
            contents = before.read(entry)
            entry.compress_type = zipfile.ZIP_LZMA
            after.writestr(entry, contents)
    if smaller.stat().st_size < wheel.stat().st_size:
        smaller.replace(wheel)
    else:
        smaller.unlink()


def split(wheel: Path, limit: int) -> list[Path]:
    contents = wheel.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(contents), limit)):
        parts.append(wheel.with_name(f"{wheel.name}.part{number:02}"))
        parts[-1].write_bytes(contents[start : start + limit])
    wheel.unlink()
    return parts


def _note(folder: Path, wheel: Path) -> None:
    """Its new sum."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return
    name, digest = f"./{wheel.relative_to(folder)}", hashlib.sha256(wheel.read_bytes()).hexdigest()
    lines = [f"{digest}  {name}" if line.endswith(f"  {name}") else line for line in sums.read_text().splitlines()]
    sums.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=float, required=True, help="MB that no file may exceed")
    options = parser.parse_args()
    if options.limit <= 0:
        parser.error(f"--limit is {options.limit}; it must be above 0")
    fit(options.folder, int(options.limit * MEGABYTE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
