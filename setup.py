"""Builds the C++ extension of `ava_kernels.gradients` where it can be built; pyproject.toml holds everything else.

With a C++ compiler and an installed torch (hence `pip install --no-build-isolation`) the CPU half is built, with nvcc
and a CUDA torch the CUDA half too. Where that fails, the installation goes on without: PyTorch does the same, slower.
The library uses torch's stable ABI and nothing of Python, so one wheel serves every version of both.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_SOURCE = "csrc/grad_stats_cuda.cu"
ARCHITECTURES = ("80", "90", "100")  # 86, 89 and later ones run the code or the PTX of these


def find_torch() -> Path | None:
    """The installed torch, not imported: that would take longer than the build."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))


def extension(torch: Path) -> Extension:
    return Extension(
        "ava_kernels.gradients._extension",
        sources=["csrc/bindings.cpp", "csrc/grad_stats_cpu.cpp"],
        depends=["csrc/grad_stats.h", "csrc/grad_stats_lanes.h", CUDA_SOURCE],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        # 2.10's interface is the first with lists of tensors. Fused multiply-add would make bits depend on the CPU.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"],
        extra_link_args=["-s"],
        py_limited_api=True,
        optional=True,
    )


class BuildExtension(build_ext):
    """Adds the CUDA half where there are nvcc and a torch to load it."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc and (Path(ext.library_dirs[0]) / "libtorch_cuda.so").exists():
            try:
                self.add_cuda(ext, nvcc)
                self.force = True  # to link it in, though the C++ sources may be older than what was built of them
            except (OSError, subprocess.CalledProcessError) as error:
                self.warn(f"the CUDA half of the extension is not built: {error}")
        super().build_extension(ext)

    def add_cuda(self, ext: Extension, nvcc: str) -> None:
        """Compiles the CUDA source for the architectures that this nvcc knows. CUDA's runtime is linked in, so that
        the library does not depend on which one torch brings."""
        known = _output(nvcc, "--list-gpu-arch").split()
        code = [
            f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in ARCHITECTURES if f"compute_{a}" in known
        ]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        compiled = str(folder / "grad_stats_cuda.o")
        subprocess.run(
            [
                nvcc,
                *code,
                "-O3",
                "-std=c++17",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-c",
                CUDA_SOURCE,
                "-o",
                compiled,
            ],
            check=True,
        )
        # nvcc may be a script anywhere, so it is asked where its libraries are.
        libraries = next(line for line in _output(nvcc, "--dryrun", CUDA_SOURCE).splitlines() if "LIBRARIES=" in line)
        folders = [word[2:] for word in shlex.split(libraries.split("=", 1)[1]) if word.startswith("-L")]
        ext.extra_objects.append(compiled)
        ext.library_dirs.extend(folders)
        ext.libraries.extend(["torch_cuda", "cudart_static", "dl", "rt", "pthread"])
        ext.extra_link_args.append("-Wl,--exclude-libs,ALL")
        ext.define_macros.append(("USE_CUDA", None))


def _output(*command: str) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return run.stdout


installed = find_torch()
setup(
    ext_modules=[extension(installed)] if installed else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
