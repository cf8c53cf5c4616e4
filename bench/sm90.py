"""Compiles our Triton kernels for an H200 on a machine without one, and shows what the compiler made of them.

    python -m bench.sm90 [--json FILE]

The public operations run on meta tensors at the shapes that the benchmarks time; each kernel launch is caught and
compiled for sm_90 instead, specialised as Triton would for these arguments. Reported per launch: registers and bytes
of spills a thread, bytes of shared memory a program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from ava_kernels.experts import kernels as experts
from ava_kernels.routing import kernels as routing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
LINE = "{case:40} {kernel:14} {warps:2} warps {registers:4} registers {spills:5} B spilled {shared:6} B shared"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


def route(T: int, E: int, K: int, **options: Any) -> Callable[[], None]:
    """A forward and backward pass of routing; `options` are those of the kernels' `forward`."""
    defaults = {
        "expert_bias": None,
        "capacity": None,
        "max_reroutes": 0,
        "by_probability": False,
        "sigmoid": False,
        "normalize": True,
        "num_groups": 1,
        "group_top_k": 1,
        "scale": 1.0,
    }

    def run() -> None:
        logits = torch.empty(T, E, device="meta")
        found = routing.forward(logits, top_k=K, **{**defaults, **options})
        dweight, dlse, dmean_prob = (torch.empty_like(t) for t in (found.weight, found.lse, found.mean_prob))
        sigmoid = options.get("sigmoid", False)
        routing.backward(
            logits, found.probs, found.lse, found.expert, dweight, None, dlse, dmean_prob, sigmoid, True, 1.0
        )

    return run


def counting_sort(N: int, bins: int) -> Callable[[], None]:
    def run() -> None:
        routing.counting_sort(torch.empty(N, dtype=torch.int32, device="meta"), bins, counts_only=False)

    return run


def rows(T: int, K: int, H: int, dtype: torch.dtype, weighted: bool) -> Callable[[], None]:
    """Tokens to rows and back; with weights, their gradient too."""

    def run() -> None:
        x, y = torch.empty(T, H, dtype=dtype, device="meta"), torch.empty(T * K, H, dtype=dtype, device="meta")
        pair, weight = torch.empty(T * K, dtype=torch.int64, device="meta"), torch.empty(T * K, device="meta")
        experts.take_rows(x, pair, K, weight if weighted else None)
        experts.sum_rows(y, pair.view(T, K), weight.view(T, K) if weighted else None)
        if weighted:
            experts.dot_rows(y, pair.view(T, K), x)

    return run


CASES = {
    **{f"route {E}/8": route(32768, E, 8) for E in (64, 128, 256)},
    **{f"route {E}/8, capacity": route(32768, E, 8, capacity=32768 * 8 // E, max_reroutes=E) for E in (64, 128, 256)},
    "route 256/8, capacity by probability": route(32768, 256, 8, capacity=1280, max_reroutes=256, by_probability=True),
    "route 256/8, sigmoid, bias, groups": route(
        32768, 256, 8, sigmoid=True, expert_bias=torch.empty(256, device="meta"), num_groups=8, group_top_k=4,
        capacity=1280, max_reroutes=256,
    ),
    "route 1024/32, capacity": route(4096, 1024, 32, capacity=128, max_reroutes=1024),
    "counting sort, 128 bins": counting_sort(262144, 128),
    "rows 2048, bf16": rows(32768, 8, 2048, torch.bfloat16, weighted=False),
    "rows 2048, bf16, weighted": rows(32768, 8, 2048, torch.bfloat16, weighted=True),
}  # fmt: skip


@contextmanager
def _launches() -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Within it, launches are noted instead of run."""
    noted: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    original = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append((self, args, kwargs))

    JITFunction.run = note
    try:
        yield noted
    finally:
        JITFunction.run = original


def compile_launch(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Compiles one launch for sm_90 → its name and resources."""
    names = [parameter.name for parameter in fn.params]
    values = dict(zip(names, args, strict=False))
    options = {key: value for key, value in kwargs.items() if key not in names}
    values.update((key, value) for key, value in kwargs.items() if key in names)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(fn.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        usage = subprocess.run(
            [ASSEMBLER, "-v", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")],
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr
    return {
        "kernel": fn.__name__,
        "registers": _number(r"Used (\d+) registers", usage),
        "spills": _number(r"(\d+) bytes spill stores", usage),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found.group(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for case, run in CASES.items():
        with _launches() as launches:
            run()
        for fn, args, kwargs in launches:
            row = {"case": case, **compile_launch(fn, args, kwargs)}
            rows.append(row)
            print(LINE.format(**row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
