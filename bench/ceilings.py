"""How fast this machine multiplies matrices of random numbers and copies: the most that anything can reach on it.

    OMP_NUM_THREADS=2 python -m bench.ceilings           # on the GPU where there is one

bfloat16 products of 8192³ and copies of 1 GiB on a GPU, float32 products of 2048³ and copies of 256 MiB on a CPU, in
turn. What a benchmark reaches is read as a share of these.
"""

from __future__ import annotations

import argparse

import torch

from bench import machine

SIZES = {"cuda": (8192, 1 << 28), "cpu": (2048, 1 << 26)}  # rows of a matrix, floats copied


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--size", type=int, help="rows of the matrices")
    parser.add_argument("--floats", type=int, help="how many are copied")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, floats = SIZES[device]
    size, floats = options.size or size, options.floats or floats
    a, b = (torch.randn(size, size, device=device, dtype=_dtype(device)) for _ in range(2))
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    contenders = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = machine.alternate(contenders, device, options.runs, warm_up=5, label="ceilings")
    matmul, copy = (machine.spread(times) for times in seconds.values())
    flops, moved = 2 * size**3, 2 * floats * source.element_size()
    result = {
        "runs": options.runs,
        "matmul": {
            **matmul,
            "size": size,
            "dtype": str(a.dtype),
            "flops": flops,
            "tflops": flops / matmul["median_ms"] / 1e9,
        },
        "copy": {**copy, "bytes_read_and_written": moved, "gb_per_second": moved / copy["median_ms"] / 1e6},
    }
    tflops, gb = result["matmul"]["tflops"], result["copy"]["gb_per_second"]
    print(f"products {tflops:.3g} TFLOP/s, copies {gb:.3g} GB/s, read and written")
    print(machine.write(f"ceilings_{device}", result))


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


if __name__ == "__main__":
    main()
