"""What a rank's machine can do, measured before the run and compared between ranks: a slow one slows all of them.

    rows = examine(config)        # on every rank, together
    rows = examine_alone(config)  # `ava-fast preflight`, in one process

Each row is a name, whether it is well, and what was found. `quick` takes about a tenth of a second; `full` takes some
seconds and asks for sustained speed. A speed that is an outlier is measured again before it counts.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ava_fast.config import Config

_TRIES = 3
_CLOCKS_APART = 60.0  # seconds
_XIDS = "Xid errors are not among what NVML tells after the fact: see dcgmi or the kernel's log"


class Row(NamedTuple):
    """One line of preflight's table."""

    name: str
    ok: bool
    detail: str


class Sizes(NamedTuple):
    """Of what is timed."""

    matmul: int
    copied: int  # bytes
    reduced: int  # bytes
    written: int  # bytes
    seconds: float  # for each speed


def _sizes(level: str, cuda: bool) -> Sizes:
    if level == "quick":
        return Sizes(4096, 2**28, 2**25, 2**22, 0.02) if cuda else Sizes(256, 2**24, 2**20, 2**22, 0.01)
    return Sizes(8192, 2**30, 2**28, 2**28, 1.0) if cuda else Sizes(1024, 2**27, 2**26, 2**28, 1.0)


def examine(config: Config) -> list[Row]:
    """Every check, the same rows on every rank. Collective."""
    level = config.distributed.health_checks
    if level == "off":
        return []
    cuda, world_size = torch.cuda.is_available(), dist.get_world_size()
    sizes = _sizes(level, cuda)
    rows = [
        _compared("matmul", "GFLOP/s", config, lambda: matmul_speed(sizes, cuda)),
        _compared("copy", "GB/s", config, lambda: copy_speed(sizes, cuda)),
    ]
    reduced = _reduce_speed(sizes, cuda)
    if cuda:
        torch.cuda.empty_cache()  # what the checks took is free again for preflight, which looks next
    own = _own_rows(config, sizes) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    own += _gpu_rows() if cuda else []
    dist.barrier()
    everyone: list[dict[str, Any]] = [{}] * world_size
    dist.all_gather_object(everyone, {"clock": time.time(), "reduced": reduced, "rows": own})
    if world_size > 1:
        reduced = min(each["reduced"] for each in everyone)
        rows.append(Row("all-reduce", True, f"{reduced:.2f} GB/s over {world_size} ranks"))
        apart = max(each["clock"] for each in everyone) - min(each["clock"] for each in everyone)
        rows.append(Row("clocks", apart < _CLOCKS_APART, f"{1000 * apart:.0f} ms apart, set them by NTP beyond 60 s"))
    return rows + _gathered([each["rows"] for each in everyone])


def examine_alone(config: Config) -> list[Row]:
    """What needs no other rank."""
    level = config.distributed.health_checks
    if level == "off":
        return []
    cuda = torch.cuda.is_available()
    sizes = _sizes(level, cuda)
    speeds = [
        Row("matmul", True, f"{matmul_speed(sizes, cuda):.3g} GFLOP/s"),
        Row("copy", True, f"{copy_speed(sizes, cuda):.3g} GB/s"),
    ]
    return [*speeds, *_own_rows(config, sizes), *(_gpu_rows() if cuda else [])]


def matmul_speed(sizes: Sizes, cuda: bool) -> float:
    """GFLOP/s of the best repetition."""
    device = "cuda" if cuda else "cpu"
    a = torch.ones(sizes.matmul, sizes.matmul, dtype=torch.bfloat16 if cuda else torch.float32, device=device)
    return 2 * sizes.matmul**3 / _best(lambda: a @ a, sizes.seconds, cuda) / 1e9


def copy_speed(sizes: Sizes, cuda: bool) -> float:
    """GB/s read and written, of the best repetition, within this rank's device."""
    source = torch.ones(sizes.copied, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    return 2 * sizes.copied / _best(lambda: target.copy_(source), sizes.seconds, cuda) / 1e9


def _reduce_speed(sizes: Sizes, cuda: bool) -> float:
    """GB/s that each rank sends and receives, of the best of a few all-reduces. Collective."""
    values = torch.zeros(sizes.reduced // 4, device="cuda" if cuda else "cpu")
    moved = 2 * sizes.reduced * (dist.get_world_size() - 1) / dist.get_world_size()
    return moved / _best(lambda: dist.all_reduce(values), 0.0, cuda) / 1e9


def _best(action: Callable[[], object], seconds: float, cuda: bool) -> float:
    """Seconds of the fastest of at least three repetitions; others on the machine only ever slow them."""
    best, ends_at, done = float("inf"), time.perf_counter() + seconds, 0
    while done < 4 or time.perf_counter() < ends_at:
        started_at = time.perf_counter()
        action()
        if cuda:
            torch.cuda.synchronize()
        if done:  # the first one warms up
            best = min(best, time.perf_counter() - started_at)
        done += 1
    return best


def _compared(name: str, unit: str, config: Config, measure: Callable[[], float]) -> Row:
    """Every rank's speed beside the others'. Not well if one is still an outlier at its best of several tries."""
    world_size, ratio = dist.get_world_size(), config.distributed.health_ratio
    best = [0.0] * world_size
    for _ in range(_TRIES):
        speeds = [0.0] * world_size
        dist.all_gather_object(speeds, measure())
        best = list(map(max, best, speeds))
        usual = statistics.median_high(best)
        slow = [rank for rank, speed in enumerate(best) if speed * ratio < usual]
        if not slow:
            return Row(
                name, True, f"{min(best):.3g} to {usual:.3g} {unit}" if world_size > 1 else f"{usual:.3g} {unit}"
            )
    hosts = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    found = ", ".join(f"rank {rank} on {hosts[rank]} reaches {best[rank]:.3g}" for rank in slow)
    return Row(name, False, f"{found} {unit}, the others {usual:.3g}; exclude it, or raise distributed.health_ratio")


def _own_rows(config: Config, sizes: Sizes) -> list[Row]:
    """Of this host as a whole."""
    return [_disk(Path(config.logging.output_dir), sizes.written), *_dcgm()]


def _disk(folder: Path, size: int) -> Row:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started_at = time.perf_counter()
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started_at
        free = shutil.disk_usage(folder).free
    except OSError as error:
        # Whether a run can be written there is for preflight to say, and how to mend it.
        return Row("write", True, f"no speed is known of {folder} ({error.strerror or error})")
    return Row("write", True, f"{size / seconds / 1e6:.0f} MB/s to {folder}, {free / 2**30:.1f} GiB free")


def _gpu_rows() -> list[Row]:
    """This rank's GPU, as NVML knows it, if its Python package is there."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except ImportError:
        return [Row("gpu", True, "its state is not known, as nvidia-ml-py is not installed")]
    except Exception as error:  # of a driver that is not there or not this version's, or a part of a GPU (MIG)
        return [Row("gpu", True, f"its state is not known: {error}")]
    return [gpu_row(nvml, handle)]


def gpu_row(nvml: Any, handle: Any) -> Row:
    """What `nvml`, pynvml's module, says of a GPU: memory errors that were not corrected, and rows that could not be
    replaced, are not well; heat and throttling are only told."""

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:  # not every GPU answers everything
            return None

    errors = ask(
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    )
    rows = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    celsius = ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    limit = ask(lambda: nvml.nvmlDeviceGetTemperatureThreshold(handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN))
    reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    slowed = [
        name
        for name, bit in (
            ("heat", nvml.nvmlClocksThrottleReasonHwThermalSlowdown | nvml.nvmlClocksThrottleReasonSwThermalSlowdown),
            ("power supply", nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown),
        )
        if reasons & bit
    ]
    faults = [f"{errors} memory errors that were not corrected"] if errors else []
    faults += ["memory rows that could not be replaced"] if rows is not None and rows[3] else []
    told = [f"{celsius} °C" + (f" of {limit}" if limit else "")] if celsius is not None else []
    told += [f"slowed by {', '.join(slowed)}"] if slowed else []
    told += ["a reset is pending to replace memory rows"] if rows is not None and rows[2] else []
    if faults:
        return Row("gpu", False, f"{', '.join(faults)}; reset or exclude it ({_XIDS})")
    return Row("gpu", True, ", ".join(told) or "no fault is known")


def _dcgm() -> list[Row]:
    """NVIDIA's own judgement, where its command is installed."""
    if not shutil.which("dcgmi"):
        return []
    try:
        done = subprocess.run(["dcgmi", "health", "-c"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return [Row("dcgm", True, f"gave no answer ({error})")]
    lines = [line.strip(" |") for line in done.stdout.splitlines() if "Failure" in line]
    return [Row("dcgm", not lines, "; ".join(lines) or "no failure")]


def _gathered(rows_of_ranks: list[list[Row]]) -> list[Row]:
    """Rank by rank, rows that say the same only once."""
    found: dict[Row, list[int]] = {}
    for number, rows in enumerate(rows_of_ranks):
        for row in rows:
            found.setdefault(row, []).append(number)
    alone = len(rows_of_ranks) == 1
    return [
        row if alone or len(ranks) > 1 else row._replace(detail=f"rank {ranks[0]}: {row.detail}")
        for row, ranks in found.items()
    ]
