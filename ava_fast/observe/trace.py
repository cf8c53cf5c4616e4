"""Reads a torch profiler's trace: the time of a step by part, kernels by their roofline, memory over time.

Events of a thread lie inside each other. An event's part is that of the innermost range of `ava_fast.parts` around it;
what runs backward has that of the operator that made its node of autograd's graph, found by their sequence number, and
collectives are communication wherever they stand. Where no operator runs on a step's thread, a collective on another
thread is waited for, or the host is busy with Python: host gaps, unless it reads data. On a GPU the kernels' own time
counts, for the part that launched them, and a gap is where the device has nothing to do.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ava_fast.config import Config
from ava_fast.parts import PREFIX

PARTS = ("attention", "routing", "experts", "mlp", "loss", "optimizer", "communication", "data", "other", "host gaps")
WHOLE = ("data", "communication")  # waiting and Python count too
COLLECTIVES = ("c10d::", "gloo:", "nccl:", "record_param_comms", "ncclDevKernel", "ncclKernel")
ON_HOST = ("cpu_op", "user_annotation")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1}

Event = dict[str, Any]
Interval = tuple[float, float]


class Frame(NamedTuple):
    """An event under way, and what follows from those around it."""

    end: float
    part: str
    in_operator: bool
    operator: Event | None  # the innermost with shapes


def read(path: Path) -> list[Event]:
    events: list[Event] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events


def times_by_part(events: list[Event]) -> dict[str, Any]:
    """→ "steps": the milliseconds of each, "host" and "device": milliseconds a step by part; no device, none."""
    steps = _steps(events)
    thread, windows = steps[0]["tid"], [_interval(step) for step in steps]
    made_by = _parts_by_sequence(events)
    host: dict[str, float] = defaultdict(float)
    elsewhere = _union(_interval(e) for e in events if _is_collective(e) and "dur" in e and e["tid"] != thread)
    own = [event for event in events if event.get("cat") in ON_HOST and event["tid"] == thread]
    for start, end, frame in _segments(own, made_by):
        for window in windows:
            inside = (max(start, window[0]), min(end, window[1]))
            if inside[1] <= inside[0]:
                continue
            if frame is not None and frame.in_operator:
                host[frame.part] += inside[1] - inside[0]
                continue
            waiting = _overlap(inside, elsewhere)
            host["communication"] += waiting
            host["host gaps"] += inside[1] - inside[0] - waiting
    found = {"steps": [step["dur"] / 1e3 for step in steps], "host": _a_step(host, len(steps)), "device": {}}
    kernels = _on_device(events, ON_DEVICE)
    if kernels:
        device: dict[str, float] = defaultdict(float)
        launched = launches(events)
        for kernel in kernels:
            device[_part_of_kernel(kernel, launched)] += kernel["dur"]
        busy = _union(_interval(kernel) for kernel in kernels)
        device["host gaps"] = sum(end - start - _overlap((start, end), busy) for start, end in windows)
        found["device"] = _a_step(device, len(steps))
    return found


def _steps(events: list[Event]) -> list[Event]:
    return [event for event in events if event["name"] == PREFIX + "step" and event.get("cat") == "user_annotation"]


def _on_device(events: list[Event], categories: tuple[str, ...]) -> list[Event]:
    """What runs on the device in the steps."""
    windows = [_interval(step) for step in _steps(events)]
    return [e for e in events if e.get("cat") in categories and _overlap(_interval(e), windows)]


def _a_step(microseconds: dict[str, float], steps: int) -> dict[str, float]:
    return {part: round(microseconds[part] / 1e3 / steps, 4) for part in PARTS if microseconds.get(part)}


def _parts_by_sequence(events: list[Event]) -> dict[int, str]:
    """Of every node of the graph, the part of the operator that made it: the last forward one that saw its number."""
    found: dict[int, tuple[float, str]] = {}
    for thread in {event["tid"] for event in events if event.get("cat") == "cpu_op"}:
        own = [event for event in events if event.get("cat") in ON_HOST and event["tid"] == thread]
        for event, frame in _frames(own, {}):
            arguments = event.get("args", {})
            number = arguments.get("Sequence number", -1)
            if number >= 0 and not arguments.get("Fwd thread id") and event["ts"] >= found.get(number, (-math.inf,))[0]:
                found[number] = event["ts"], frame.part
    return {number: part for number, (_, part) in found.items()}


def _frame(event: Event, around: Frame | None, made_by: dict[int, str]) -> Frame:
    name, arguments = event["name"], event.get("args", {})
    part = around.part if around else "other"
    if name.startswith(PREFIX) and name != PREFIX + "step":
        part = name[len(PREFIX) :]
    elif _is_collective(event):
        part = "communication"
    elif arguments.get("Fwd thread id"):
        part = made_by.get(arguments.get("Sequence number", -1), part)
    operator = event if arguments.get("Input Dims") else around.operator if around else None
    in_operator = event.get("cat") == "cpu_op" or part in WHOLE or (around is not None and around.in_operator)
    return Frame(event["ts"] + event["dur"], part, in_operator, operator)


def _frames(events: list[Event], made_by: dict[int, str]) -> Iterator[tuple[Event, Frame]]:
    """Every event of one thread, and what it is in."""
    stack: list[Frame] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1].end <= event["ts"]:
            stack.pop()
        stack.append(_frame(event, stack[-1] if stack else None, made_by))
        yield event, stack[-1]


def _segments(events: list[Event], made_by: dict[int, str]) -> Iterator[tuple[float, float, Frame | None]]:
    """The time of one thread, cut wherever an event begins or ends, each piece with the innermost event."""
    stack: list[Frame] = []
    now = -math.inf
    for event in [*sorted(events, key=lambda event: (event["ts"], -event["dur"])), None]:
        until = event["ts"] if event else math.inf
        while stack and stack[-1].end <= until:
            frame = stack.pop()
            if frame.end > now:
                yield now, frame.end, frame
                now = frame.end
        if event:
            if until > now and now > -math.inf:
                yield now, until, stack[-1] if stack else None
            now = max(now, until)
            stack.append(_frame(event, stack[-1] if stack else None, made_by))


def _is_collective(event: Event) -> bool:
    return event["name"].startswith(COLLECTIVES)


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _overlap(interval: Interval, others: list[Interval]) -> float:
    return sum(max(0.0, min(interval[1], end) - max(interval[0], start)) for start, end in others)


def table(ranks: list[dict[str, Any]], cuda: bool) -> str:
    """A line for every part, a column for every rank."""
    kind = "device" if cuda else "host"
    totals = [sum(rank["steps"]) / len(rank["steps"]) for rank in ranks]
    lines = [f"{'ms a step':16}" + "".join(f"{f'rank {number}':>18}" for number in range(len(ranks)))]
    for part in PARTS:
        if any(rank[kind].get(part) for rank in ranks):
            cells = zip((rank[kind].get(part, 0.0) for rank in ranks), totals, strict=True)
            lines.append(f"{part:16}" + "".join(f"{ms:11.2f} {ms / total:6.1%}" for ms, total in cells))
    lines.append(f"{'a step':16}" + "".join(f"{total:11.2f} 100.0%" for total in totals))
    return "\n".join(lines)


# --- Kernels ---


class Launch(NamedTuple):
    part: str
    operator: Event | None


def launches(events: list[Event]) -> dict[int, Launch]:
    """By correlation number, the part that launched a kernel and the operator around it."""
    made_by, found = _parts_by_sequence(events), {}
    for thread in {event["tid"] for event in events if event.get("cat") in LAUNCHES}:
        own = [event for event in events if event.get("cat") in (*ON_HOST, *LAUNCHES) and event["tid"] == thread]
        for event, frame in _frames(own, made_by):
            if event.get("cat") in LAUNCHES:
                found[event["args"]["correlation"]] = Launch(frame.part, frame.operator)
    return found


def _part_of_kernel(kernel: Event, launched: dict[int, Launch]) -> str:
    if _is_collective(kernel):
        return "communication"
    launch = launched.get(kernel.get("args", {}).get("correlation"))
    return launch.part if launch else "other"


def kernels(
    events: list[Event], config: Config, world_size: int, steps: int, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Every kernel by its time: milliseconds and launches a step, and where its arithmetic or its operator's inputs
    are known, which share it reaches of what the device multiplies ("flops" a second) or copies ("bytes"). Bytes are
    those of the inputs, so that share is a lower bound."""
    launched = launches(events)
    own = _own_flops(config, world_size)
    alone: dict[int, int] = defaultdict(int)  # kernels of an operator
    device = _on_device(events, ("kernel",))
    for kernel in device:
        if launch := launched.get(kernel["args"]["correlation"]):
            alone[id(launch.operator)] += 1
    found: dict[str, dict[str, Any]] = {}
    for kernel in device:
        launch = launched.get(kernel["args"]["correlation"], Launch("other", None))
        name = kernel["name"]
        row = found.setdefault(
            name, {"kernel": name, "part": launch.part, "us": 0.0, "launches": 0, "flops": 0.0, "bytes": 0}
        )
        row["us"] += kernel["dur"]
        row["launches"] += 1
        if (flops := own.get(name.replace("_hopper_", "_"))) is not None:
            row["flops"] += flops
        elif launch.operator is not None and alone[id(launch.operator)] == 1:
            row["flops"] += _flops_of(launch.operator)
            row["bytes"] += _bytes_of(launch.operator)
    rows = []
    for row in sorted(found.values(), key=lambda row: -row["us"]):
        seconds = row["us"] / 1e6
        shares = [row[what] / seconds / ceilings[what] for what in ("flops", "bytes") if row[what]]
        rows.append(
            {
                "kernel": row["kernel"],
                "part": row["part"],
                "ms": round(row["us"] / 1e3 / steps, 4),
                "launches": row["launches"] / steps,
                "roofline_share": round(max(shares), 4) if shares else None,
            }
        )
    return rows


def _own_flops(config: Config, world_size: int) -> dict[str, float]:
    """Of one launch of our Triton kernels, on one rank and micro-batch (docs/experts.md says what each computes); those
    for Hopper are named alike, behind `_hopper`."""
    S, M = config.data.max_length, config.model.hidden_size
    T = config.training.batch_size // world_size * S
    product = 2.0 * T * config.moe.top_k * M * config.moe.intermediate_size  # rows by one of M and I
    grouped_mm_launches = (1, 1, 2) if config.memory.activation_checkpointing else (1, 2)
    scores = float(T) * S * config.model.num_heads * config.head_dim  # causal, one product of queries and keys
    return {
        "_up": 2 * product,
        "_grouped_mm": product * sum(grouped_mm_launches) / len(grouped_mm_launches),
        "_down_backward": product,
        "_weight_grad": 1.5 * product,
        "_forward": 2 * scores,
        "_dkdv": 4 * scores,
        "_dq": 3 * scores,
    }


def _flops_of(operator: Event) -> float:
    dims = operator["args"]["Input Dims"]
    if operator["name"] == "aten::mm":
        return 2.0 * math.prod(dims[0]) * dims[1][1]
    if operator["name"] == "aten::addmm":
        return 2.0 * math.prod(dims[1]) * dims[2][1]
    if operator["name"] == "aten::bmm":
        return 2.0 * math.prod(dims[0]) * dims[1][2]
    return 0.0


def _bytes_of(operator: Event) -> int:
    arguments = operator["args"]
    return sum(
        math.prod(dims) * SIZES.get(kind, 0)
        for dims, kind in zip(arguments["Input Dims"], arguments.get("Input type", []), strict=False)
        if dims and all(isinstance(size, int) for size in dims)
    )


def kernel_table(rows: list[dict[str, Any]], most: int = 20) -> str:
    lines = [f"{'kernel':48} {'part':14} {'ms a step':>9} {'launches':>8}  roofline"]
    for row in rows[:most]:
        share = "" if row["roofline_share"] is None else f"{row['roofline_share']:8.1%}"
        lines.append(f"{row['kernel'][:48]:48} {row['part']:14} {row['ms']:9.3f} {row['launches']:8.0f}  {share}")
    if len(rows) > most:
        lines.append(f"{len(rows) - most} more are in kernels.json")
    return "\n".join(lines)


# --- Memory ---


def memory_timeline(events: list[Event], device: str) -> dict[str, list[float]]:
    """→ "ms" from the first step on and "bytes" allocated then, and "steps": where each began."""
    kind = {"cpu": 0, "cuda": 1}[device]
    steps = [step["ts"] for step in _steps(events)]
    found = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == kind and event["ts"] >= steps[0]
    )
    return {
        "ms": [round((at - steps[0]) / 1e3, 4) for at, _ in found],
        "bytes": [allocated for _, allocated in found],
        "steps": [round((at - steps[0]) / 1e3, 4) for at in steps],
    }


def plot_memory(memory: dict[str, list[float]], path: Path) -> None:
    import matplotlib  # takes a second to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 4), layout="constrained")
    axis.fill_between(memory["ms"], [b / 2**20 for b in memory["bytes"]], step="post", color="#9ec5e8")
    axis.plot(
        memory["ms"], [b / 2**20 for b in memory["bytes"]], drawstyle="steps-post", color="#1f5f99", linewidth=0.8
    )
    for number, start in enumerate(memory["steps"]):
        axis.axvline(start, color="#666666", linestyle=":", linewidth=1.0, label=None if number else "a step begins")
    axis.set_xlabel("milliseconds from the first profiled step on")
    axis.set_ylabel("MiB allocated" if memory["bytes"][0] else "MiB allocated since then")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
