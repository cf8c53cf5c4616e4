"""Parts of `bench/wheelhouse.sh`: what a folder of wheels lacks, and how they fit under a limit.

    python -m bench.wheels needs --python 3.12 FOLDER [FOLDER …]
    python -m bench.wheels fit --limit 50 FOLDER

The first prints what the wheels of the first folder ask for and no wheel of any of them is, one requirement a line. The
second compresses anew what is larger, or splits it where that does not do. A wheel is a zip; with LZMA instead of
deflate those of compiled code lose up to a third, and pip installs them all the same. The parts of one that stays too
large are named `….whl.part00` and so on; `install.sh` joins them. SHA256SUMS, if there, is kept right.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

MEGABYTE = 10**6
BROUGHT = {"torch", "triton", "numpy", "cuda-bindings", "cuda-python"}  # a GPU machine's torch comes with these


def needs(folders: list[Path], python: str) -> list[str]:
    """What the wheels of the first folder ask for on 64 bit Linux, extras aside, and no wheel of any folder is:
    `einops`, `quack-kernels>=0.5.3`. A wheel that is there counts in whatever version."""
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    there = BROUGHT | {
        canonicalize_name(wheel.name.split("-")[0]) for folder in folders for wheel in folder.glob("*.whl")
    }
    lacking: dict[str, SpecifierSet] = defaultdict(SpecifierSet)
    for wheel in folders[0].glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            (name,) = (
                name for name in file.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1
            )
            metadata = HeaderParser().parsestr(file.read(name).decode())
        for text in metadata.get_all("Requires-Dist", []):
            asked = Requirement(text)
            own = canonicalize_name(asked.name)
            if own not in there and (asked.marker is None or asked.marker.evaluate(target)):
                lacking[own] &= asked.specifier
    return [f"{name}{lacking[name]}" for name in sorted(lacking)]


def fit(folder: Path, limit: int) -> None:
    """Under `folder`, at any depth, no wheel or part of one has more than `limit` bytes afterwards."""
    large = sorted((wheel for wheel in folder.rglob("*.whl") if wheel.stat().st_size > limit), key=_size, reverse=True)
    if large:
        megabytes = sum(map(_size, large)) / MEGABYTE
        minutes = megabytes / 30 / min(len(large), os.cpu_count() or 1)
        print(f"compressing {len(large)} wheels anew, {megabytes:.0f} MB: about {minutes:.0f} minutes", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # LZMA lets other threads run
        done = {pool.submit(compress, wheel): wheel for wheel in large}
        for future in as_completed(done):
            future.result()
            print(f"{done[future].name}: {_size(done[future]) / MEGABYTE:.1f} MB", flush=True)
    for wheel in large:
        _note(folder, wheel)
        if _size(wheel) > limit:
            parts = split(wheel, limit)
            print(f"{wheel.name}: split into {len(parts)} parts", flush=True)


def _size(wheel: Path) -> int:
    return wheel.stat().st_size


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
    commands = parser.add_subparsers(dest="command", required=True)
    lacking = commands.add_parser("needs", help="prints what the wheels of the first folder lack")
    lacking.add_argument("folder", type=Path, nargs="+")
    lacking.add_argument("--python", default="3.12", help="the version that they are for; default: 3.12")
    fitting = commands.add_parser("fit", help="compresses and splits")
    fitting.add_argument("folder", type=Path)
    fitting.add_argument("--limit", type=float, required=True, help="MB that no file may exceed")
    options = parser.parse_args()
    if options.command == "needs":
        print("\n".join(needs(options.folder, options.python)))
        return 0
    if options.limit <= 0:
        parser.error(f"--limit is {options.limit}; it must be above 0")
    fit(options.folder, int(options.limit * MEGABYTE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
