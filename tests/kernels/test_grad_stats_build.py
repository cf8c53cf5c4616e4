"""The extension installs with a compiler and without one, and its CUDA half compiles for each architecture."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("always")
import torch
from ava_kernels import clip_, clip_coefficient, grad_stats
from ava_kernels.gradients import op
assert op.__file__.startswith(sys.argv[1]), op.__file__
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        tensors = [torch.tensor([3.0, 4.0]), torch.ones(2).bfloat16()]
        stats = grad_stats(tensors)
        clip_(tensors, clip_coefficient(stats, 1.0))
assert abs(stats.norm.item() - 27 ** 0.5) < 1e-6
assert abs(grad_stats(tensors).norm.item() - 1) < 1e-2
print([str(w.message) for w in caught if w.category is RuntimeWarning])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="paths and tools are those of Linux")


def make_wheel(folder: Path, **environment: str) -> Path:
    """Builds a wheel from a copy of the sources → where it is unpacked."""
    source = folder / "source"
    for name in ("csrc", "kernels", "ava_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder]
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    variables = {"PATH": path, "HOME": str(folder), "CUDA_HOME": str(folder), **environment}
    subprocess.run(command, cwd=source, env=variables, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def run_installed(folder: Path) -> list[str]:
    """What a process with this copy of the package warns of."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    return eval(output)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_wheel_holds_the_extension_and_needs_only_the_stable_abi(tmp_path):
    folder = make_wheel(tmp_path)
    (library,) = folder.rglob("*.so")
    assert library.relative_to(folder).as_posix() == "ava_kernels/gradients/_extension.abi3.so"
    assert run_installed(folder) == []
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, stdout=subprocess.PIPE, text=True)
    foreign = [name for name in symbols.stdout.split() if re.search(r"c10|at::|N2at|5torch|^_?Py", name)]
    assert foreign == []


def test_without_a_compiler_it_installs_and_says_once_what_is_missing(tmp_path):
    folder = make_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert list(folder.rglob("*.so")) == []
    (warning,) = run_installed(folder)
    assert "extension is not built" in warning
    assert "pip install" in warning


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_the_cuda_half_compiles_without_spills(tmp_path, architecture):
    source, compiled = ROOT / "csrc" / "grad_stats_cuda.cu", tmp_path / "grad_stats.cubin"
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", source.read_text())
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-cubin", source, "-o", compiled]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert "warning" not in run.stdout
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout)
    assert spills == [("0", "0")] * 4  # fill, stats, tensor_stats, scale
    assert max(int(count) for count in re.findall(r"Used (\d+) registers", run.stdout)) <= 64  # four blocks of 256
    assert _loads_of_16_bytes(compiled) >= 4 * 4 * 2  # per batch and type, of stats and of scale


def _loads_of_16_bytes(cubin: Path) -> int:
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else Path("cuobjdump")
    tool = shutil.which("cuobjdump") or shutil.which(bundled)
    if tool is None:
        pytest.skip("no cuobjdump to read the machine code with")
    listing = subprocess.run([tool, "-sass", cubin], check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
    return len(re.findall(r"LDG\.E\.\S*128", listing))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_bindings_of_the_cuda_half_compile():
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(
        [*command, "-DUSE_CUDA", "-isystem", include, ROOT / "csrc" / "bindings.cpp"], check=True, timeout=300
    )
