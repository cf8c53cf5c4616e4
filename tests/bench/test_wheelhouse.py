"""The folder of wheels for a machine without a network: built, cut to size, and installed from."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import wheels

ROOT = Path(__file__).parents[2]


def wheelhouse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "wheelhouse.sh"), *arguments]
    variables = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_our_own_wheel_goes_there_in_parts_and_comes_out_whole(tmp_path):
    folder = tmp_path / "wheels"
    done = wheelhouse(str(folder), "--only", "ours", "--limit", "0.06")
    assert done.returncode == 0, done.stdout + done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert all(path.stat().st_size <= 60_000 for path in folder.iterdir())
    assert sum(".whl.part" in name for name in names) >= 3
    installed = tmp_path / "installed"
    install = [str(folder / "install.sh"), sys.executable]
    variables = {**os.environ, "PIP_TARGET": str(installed), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(install, env=variables, check=True, capture_output=True, timeout=120)
    assert (installed / "ava_kernels" / "experts" / "tiles.json").is_file()
    assert (installed / "ava_fast" / "train.py").is_file()

    part = next(folder.glob("*.part01"))
    part.write_bytes(bytes(len(part.read_bytes())))
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    spoilt = subprocess.run(install, env=variables, capture_output=True, text=True, timeout=120)
    assert spoilt.returncode != 0
    assert "FAILED" in spoilt.stdout + spoilt.stderr


def test_what_is_asked_wrongly_is_said(tmp_path):
    done = wheelhouse()
    assert done.returncode == 2
    assert "wheelhouse.sh FOLDER" in done.stderr
    done = wheelhouse(str(tmp_path), "--only", "everything")
    assert done.returncode == 2
    assert done.stderr.startswith("wheelhouse.sh: there is no group everything; there are ours deepspeed needed ")


def test_a_wheel_is_compressed_before_it_is_split(tmp_path):
    generator = random.Random(0)
    contents = {"plain.txt": b"abc" * 40_000, "noise.bin": generator.randbytes(5_000)}
    for name in ("one.whl", "two.whl"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_STORED) as file:
            for entry, content in contents.items():
                file.writestr(entry, content)
    (tmp_path / "two.whl").rename(tmp_path / "sub.whl")
    wheels.fit(tmp_path, 10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.whl", "sub.whl"]
    with zipfile.ZipFile(tmp_path / "one.whl") as file:
        assert {entry: file.read(entry) for entry in contents} == contents
    whole = (tmp_path / "one.whl").read_bytes()
    wheels.fit(tmp_path, 2_000)
    parts = sorted(tmp_path.glob("one.whl.part*"))
    assert len(parts) == -(-len(whole) // 2_000)
    assert b"".join(part.read_bytes() for part in parts) == whole


def test_what_wheels_ask_for_is_found_until_it_is_there(tmp_path):
    def wheel(folder, name, *asked):
        lines = "\n".join(f"Requires-Dist: {text}" for text in asked)
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
            file.writestr(
                f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}\n"
            )

    beside = tmp_path / "beside"
    beside.mkdir()
    wheel(tmp_path, "one", "torch>=2", "Two_Words>=1.5", "old; python_version < '3.11'", "more; extra == 'dev'")
    wheel(tmp_path, "other", "two-words<3", "third", "cuda-bindings")
    assert wheels.needs([tmp_path], "3.12") == ["third", "two-words<3,>=1.5"]
    assert wheels.needs([tmp_path], "3.10") == ["old", "third", "two-words<3,>=1.5"]
    wheel(beside, "third", "nothing_of_ours")
    assert wheels.needs([tmp_path, beside], "3.12") == ["two-words<3,>=1.5"]
    wheel(tmp_path, "two_words")
    assert wheels.needs([tmp_path, beside], "3.12") == []


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_no_limit_of_nothing(limit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["wheels", "fit", "--limit", limit, str(tmp_path)])
    with pytest.raises(SystemExit):
        wheels.main()
    assert "it must be above 0" in capsys.readouterr().err
