"""Compiles our Triton kernels for a GPU on a machine without one, and shows what the compiler made of them.

    python -m bench.sm90 [--architecture 80] [--cases PATTERN] [--json FILE]

The public operations run on meta tensors at the shapes that the benchmarks time; each kernel launch is caught and
compiled instead, for sm_90 (H100, H200) unless told otherwise, specialised as Triton would for these arguments.
Reported per launch: registers and bytes of spills a thread, bytes of shared memory a program, how many instructions the
code has, how many of them are the tensor cores' (wgmma) and asynchronous fetches (TMA and cp.async), and whether the
assembler had to make its wgmma wait for each other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from ava_kernels import tiles
from ava_kernels.attention import hopper as hopper_kernels
from ava_kernels.attention import kernels as attention_kernels
from ava_kernels.experts import kernels as experts
from ava_kernels.experts import row_kernels
from ava_kernels.routing import kernels as routing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

triton.knobs.nvidia.dump_ptxas_log = True
ASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = (
    "{case:44} {kernel:15} {warps:2} warps {registers:4} registers {spills:4} B spilled {shared:6} B shared "
    "{instructions:5} instructions"
)
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "tma": r"cp\.async\.bulk\.tensor", "cp_async": r"cp\.async\.c[ag]\."}
# T, M, I, E, K of the published benchmarks, and of two models.
EXPERTS = [
    (40960, 768, 256, 128, 8), (40960, 768, 512, 64, 4), (40960, 768, 1024, 32, 2),
    (24576, 1536, 256, 128, 8), (24576, 1536, 512, 64, 4), (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16), (32768, 4096, 512, 128, 8), (32768, 4096, 1024, 64, 4),
    (32768, 4096, 512, 256, 16), (32768, 4096, 1024, 128, 8), (32768, 4096, 2048, 64, 4),
    (8192, 2048, 768, 128, 8), (32768, 2048, 1024, 64, 8),
]  # fmt: skip
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
        sigmoid, kept = options.get("sigmoid", False), (found.probs, found.lse, found.expert, found.weight)
        routing.backward(logits, *kept, dweight, None, dlse, dmean_prob, sigmoid, True, 1.0)

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
        row_kernels.take_rows(x, pair, K, weight if weighted else None)
        row_kernels.sum_rows(y, pair.view(T, K), weight.view(T, K) if weighted else None)
        if weighted:
            row_kernels.dot_rows(y, pair.view(T, K), x)

    return run


def moe_mlp(
    T: int,
    M: int,
    I: int,
    E: int,
    K: int,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "swiglu",
    transposed: bool = False,
    sums: bool = False,
    hopper: bool = False,
) -> Callable[[], None]:
    """A forward and backward pass of the experts' MLP; `transposed` weights have their rows and columns swapped in
    memory, `sums` adds their gradients to float32 tensors; `hopper`: by those kernels."""

    def run() -> None:
        H = 2 * I if activation in experts.GATED else I

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def weights(rows: int, columns: int) -> torch.Tensor:
            return empty(E, columns, rows, dtype=dtype).mT if transposed else empty(E, rows, columns, dtype=dtype)

        x, gate_up, down = empty(T, M, dtype=dtype), weights(H, M), weights(M, I)
        pairs = empty(T, K, dtype=torch.float32), empty(T * K), empty(T * K), empty(E + 1)[1:]
        out, h = experts.forward(x, gate_up, down, *pairs, activation, hopper)
        added = [empty(*w.shape, dtype=torch.float32) if sums else None for w in (gate_up, down)]
        experts.backward(out, x, gate_up, down, *pairs, h, activation, [True] * 4, *added, hopper)

    return run


def attention(
    B: int,
    S: int,
    H_q: int,
    H_kv: int,
    D: int,
    dtype: torch.dtype = torch.bfloat16,
    rotary_dim: int | None = None,
    packed: bool = False,
    hopper: bool = False,
    **options: Any,
) -> Callable[[], None]:
    """A forward and backward pass of attention that rotates `rotary_dim` elements of each head (default: all).
    `options` are those of the kernels' `Shape`; `packed`: B documents of S tokens; `hopper`: by those kernels."""

    def run() -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        rows = (1, B * S) if packed else (B, S)
        q, k, v = empty(*rows, H_q, D), empty(*rows, H_kv, D), empty(*rows, H_kv, D)
        pairs = (D if rotary_dim is None else rotary_dim) // 2
        cos, sin = (empty(S, pairs, dtype=torch.float32) if pairs else None for _ in range(2))
        cu = empty(B + 1, dtype=torch.int32) if packed else None
        position = empty(*rows, dtype=torch.int32) if packed else None
        shape = attention_kernels.Shape(
            **{"scale": D**-0.5, "left": -1, "right": 0, "softcap": 0.0, "interleaved": False, "max_q": S, "max_k": S}
            | options
        )
        kernels = hopper_kernels if hopper else attention_kernels
        table = cos, sin, position, cu, cu
        out, lse, rotated_q, rotated_k = kernels.forward(q, k, v, *table, shape, True)
        kept = (rotated_q, rotated_k) if pairs else (q, k)
        kernels.backward(out, None, *kept, v, out, lse, *table, shape)

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
    **{f"moe_mlp {T}×{M}, {E}/{K} of {I}": moe_mlp(T, M, I, E, K) for T, M, I, E, K in EXPERTS},
    "moe_mlp, fp16, transposed, sums": moe_mlp(32768, 2048, 1024, 64, 8, torch.float16, "geglu", True, True),
    "moe_mlp, gelu": moe_mlp(32768, 2048, 1024, 64, 8, activation="gelu"),
    "moe_mlp, relu2": moe_mlp(32768, 2048, 1024, 64, 8, activation="relu2"),
    "moe_mlp, odd sizes": moe_mlp(1000, 1000, 504, 8, 2),
    "moe_mlp, unaligned sizes": moe_mlp(1000, 1001, 505, 8, 2),
    **{
        f"attention {D}, {mask}, {H_q}/{H_kv}": attention(4, 4096, H_q, H_kv, D, right=right)
        for D in (64, 128)
        for mask, right in (("causal", 0), ("full", -1))
        for H_q, H_kv in ((16, 16), (64, 8))
    },
    "attention 128, packed": attention(4, 4096, 16, 16, 128, packed=True),
    "attention 128, window, softcap": attention(4, 4096, 16, 16, 128, left=1024, softcap=50.0),
    "attention 128, interleaved": attention(4, 4096, 16, 16, 128, interleaved=True),
    "attention 96, partial rotary": attention(4, 4096, 16, 16, 96, rotary_dim=32),
    **{f"attention {D}, causal, 64/8, hopper": attention(4, 4096, 64, 8, D, hopper=True) for D in (64, 128)},
    "attention 128, window, softcap, hopper": attention(
        4, 4096, 16, 16, 128, torch.float16, hopper=True, left=1024, softcap=50.0, interleaved=True
    ),
    "attention 64, partial rotary, softcap, hopper": attention(
        4, 4096, 16, 16, 64, rotary_dim=32, hopper=True, left=1024, softcap=50.0
    ),
    **{f"attention {D}, packed, hopper": attention(4, 4096, 16, 16, D, packed=True, hopper=True) for D in (64, 128)},
    "attention 128, packed, window, softcap, hopper": attention(
        4, 4096, 16, 16, 128, packed=True, hopper=True, left=1024, softcap=50.0, interleaved=True
    ),
    "attention 96, packed, hopper": attention(4, 4096, 16, 16, 96, packed=True, hopper=True),
    "attention 32, hopper": attention(4, 4096, 16, 16, 32, hopper=True),
    "moe_mlp 32768×2048, 64/8 of 1024, hopper": moe_mlp(32768, 2048, 1024, 64, 8, hopper=True),
    "moe_mlp, geglu, fp16, transposed, hopper": moe_mlp(
        32768, 2048, 1024, 64, 8, torch.float16, "geglu", transposed=True, hopper=True
    ),
    "moe_mlp, odd sizes, hopper": moe_mlp(1000, 1000, 504, 8, 2, hopper=True),
    "attention 32": attention(4, 4096, 16, 16, 32),
    "attention 256, fp16": attention(4, 4096, 16, 16, 256, torch.float16),
    "attention 64, fp32": attention(4, 1024, 16, 16, 64, torch.float32),
    "moe_mlp, fp32": moe_mlp(4096, 1024, 512, 8, 2, torch.float32),
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


def compile_launch(
    fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: int = 90
) -> dict[str, Any]:
    """Compiles one launch → its name and resources."""
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
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, GluonTensorDescriptor):
            kind = f"{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}"
            signature[parameter.name] = f"tensordesc<{kind}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    key = str((fn.__name__, signature, constants, attributes, options, architecture))
    if key not in _compiled:
        source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, attributes)
        said = io.StringIO()
        with redirect_stdout(said):  # where Triton writes what its assembler says, if it runs it
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        _compiled[key] = {"kernel": fn.__name__, **_resources(compiled, architecture, said.getvalue())}
    return _compiled[key]


_compiled: dict[str, dict[str, Any]] = {}  # what differs in no way that the compiler sees is compiled once


def _resources(compiled: Any, architecture: int, usage: str) -> dict[str, Any]:
    if "registers" not in usage:  # it was in Triton's cache
        usage = _assembled(compiled.asm["ptx"], architecture)
    return {
        "registers": _number(r"Used (\d+) registers", usage),
        "spills": _number(r"(\d+) bytes spill stores", usage),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": _instructions(compiled.asm["cubin"]),
        **{name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()},
        "serialized": "wgmma.mma_async instructions are serialized" in usage,
    }


def _instructions(cubin: bytes) -> int:
    """→ how many an ELF file has, padding included: since compute capability 7 each has 16 bytes."""
    (table,), (size, number, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(number)]  # name … offset, bytes
    named = [(cubin[sections[names][4] + section[0] :], section[5]) for section in sections]
    return sum(length for name, length in named if name.startswith(b".text.")) // 16


def _assembled(ptx: str, architecture: int) -> str:
    """→ what the assembler says of the registers, called as Triton calls it."""
    target = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    assembler = ASSEMBLERS / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={target}"]
        command += [source, "-o", source.with_suffix(".cubin")]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found.group(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--architecture", type=int, default=90, choices=(80, 86, 89, 90, 120), help="default: 90")
    parser.add_argument("--cases", default="", help="a regular expression that a case's name must hold")
    arguments = parser.parse_args()
    tiles.NEWEST = divmod(arguments.architecture, 10)
    rows = []
    for case, run in CASES.items():
        if not re.search(arguments.cases, case) or ("hopper" in case and arguments.architecture != 90):
            continue
        with _launches() as launches:
            run()
        for fn, args, kwargs in launches:
            row = {"case": case, **compile_launch(fn, args, kwargs, arguments.architecture)}
            rows.append(row)
            print(LINE.format(**row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
