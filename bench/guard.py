"""Exits with 1 where something has become slower than its recorded baseline.

    python -m bench.guard                     # all that this machine can tell
    python -m bench.guard cpu instructions    # some of it
    python -m bench.guard cpu --record        # writes the baseline anew, from what is measured now

cpu            Each pair of `bench.pairs`: the peer's processor time over ours, one thread, the median of pairs taken in
               turn. Below its baseline by more than the margin it is measured again, up to twice, and fails only if
               it stays there. Other processes' time does not count, and what they do to caches is what margins are for.
sm90           What `bench.sm90` finds in every kernel compiled for an H100 or H200: fails if one spills more, has fewer
               wgmma, TMA or cp.async instructions, or has more instructions in all or needs more registers or shared
               memory than the baseline allows.
instructions   How many instructions valgrind counts in the C++ extension and the loader (`bench.instructions`): the
               same in every run, so 2 % more fails.
gpu            TFLOP/s and GB/s of `make bench-gpu` in bench/results, as shares of that machine's own matmul and copy:
               fails below the baseline of that GPU, `bench/baselines/h200.json` for an H200.

A baseline belongs to what it was recorded with: where triton, the compiler or the GPU is another, a line says so, and
nothing is compared. Exit codes: 0 as fast as before, 1 not, 2 nothing could be compared at all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine

BASELINES = Path(__file__).parent / "baselines"
TURNS, WARM_UP = 15, 2
ATTEMPTS = 3
LEAST_MARGIN = 0.3  # of a CPU ratio: one machine was seen 15 % off itself, and two differ by more
INSTRUCTIONS_MARGIN = 0.02
GPU_MARGIN = 0.07
REGISTERS_ALLOWED = 8  # more than recorded: what a compiler shifts about without a spill
INSTRUCTIONS_ALLOWED = 1.05  # times those recorded, likewise


class Outcome(NamedTuple):
    """What a part found. `notes` are lines for the reader, `faults` those that make it fail."""

    compared: int
    notes: list[str]
    faults: list[str]


class Incomparable(Exception):
    """There is no baseline, or it is of another compiler or device; says so in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--record", action="store_true", help="write the baselines of these parts instead")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="of bench-gpu; default: bench/results")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{min(unknown)} is no part of the guard; there are {', '.join(PARTS)}")
    if options.record and not options.parts:
        parser.error("--record needs the parts to record, such as cpu")
    compared, faults = 0, []
    for name in options.parts or PARTS:
        started_at = time.monotonic()
        try:
            if options.record:
                print(record(name, options.results))
                continue
            outcome = PARTS[name](options.results)
        except Incomparable as reason:
            print(f"{name}: not compared: {reason}", flush=True)
            if options.record:
                return 2
            continue
        for line in outcome.notes:
            print(f"  {line}")
        for line in outcome.faults:
            print(f"  FAILED {line}")
        seconds = time.monotonic() - started_at
        print(f"{name}: {outcome.compared} compared, {len(outcome.faults)} failed, {seconds:.0f} s", flush=True)
        compared, faults = compared + outcome.compared, faults + outcome.faults
    if options.record:
        return 0
    return 1 if faults else 0 if compared else 2


def read_baseline(name: str, **same: str | None) -> dict[str, Any]:
    """Raises Incomparable where there is none, or one that was not recorded with the `same`."""
    path = BASELINES / f"{name}.json"
    try:
        baseline = json.loads(path.read_text())
    except FileNotFoundError:
        raise Incomparable(f"there is no {_short(path)}; --record writes one") from None
    for what, here in same.items():
        if baseline[what] != here:
            raise Incomparable(f"{_short(path)} was recorded with {what} {baseline[what]}, here is {here}")
    return baseline


def _short(path: Path) -> str:
    return str(path.relative_to(machine.ROOT) if path.is_relative_to(machine.ROOT) else path)


# --- Ratios on a CPU ---


def ratio_of(name: str) -> tuple[float, float, float]:
    """The quartiles, median second, of a pair's ratios: the peer's processor time over ours."""
    from bench.pairs import prepared

    def seconds(action: Callable[[], object]) -> float:
        started_at = time.process_time()
        action()
        return time.process_time() - started_at

    ratios = []
    with prepared(name) as (ours, peer):
        for turn in machine.turns(WARM_UP + TURNS, name):
            own, other = seconds(ours), seconds(peer)
            if turn >= WARM_UP:
                ratios.append(other / own)
    first, median, third = statistics.quantiles(ratios, n=4)
    return first, median, third


def cpu(results: Path) -> Outcome:
    from bench.pairs import PAIRS

    baseline = read_baseline("cpu")["ratios"]
    notes, faults = [], []
    if missing := set(PAIRS) ^ set(baseline):
        faults.append(f"{min(missing)}: is in only one of bench/pairs.py and bench/baselines/cpu.json")
    for name in [name for name in PAIRS if name in baseline]:
        note, fault = judge(name, baseline[name]["ratio"], baseline[name]["margin"], lambda name=name: ratio_of(name))
        notes.append(note)
        faults += [fault] if fault else []
    return Outcome(len(baseline), notes, faults)


def judge(
    name: str, before: float, margin: float, measure: Callable[[], tuple[float, float, float]]
) -> tuple[str, str | None]:
    """A line, and another if the ratio stays below what is allowed as often as it is measured."""
    least, medians = before * (1 - margin), []
    for _ in range(ATTEMPTS):
        first, median, third = measure()
        medians.append(median)
        if median >= least:
            break
    note = f"{name:42} {median:5.2f}× ({first:.2f} – {third:.2f}), {before:.2f} before, at least {least:.2f}"
    if len(medians) > 1:
        note += f"; measured {len(medians)} times"
    if medians[-1] >= least:
        return note, None
    found = ", ".join(f"{median:.2f}" for median in medians)
    return note, f"{name}: {found}× in {len(medians)} measurements, where {before:.2f} − {margin:.0%} is allowed"


def record_cpu(results: Path) -> dict[str, Any]:
    from bench.pairs import PAIRS

    ratios = {}
    for name in PAIRS:
        medians = [ratio_of(name)[1] for _ in range(5)]
        middle = statistics.median(medians)
        spread = 2 * max(abs(median / middle - 1) for median in medians)
        ratios[name] = {"ratio": round(middle, 3), "margin": max(LEAST_MARGIN, -(-spread // 0.05) * 0.05)}
    return {"ratios": ratios}


# --- What the compiler makes of the kernels ---

FIELDS = ("registers", "spills", "shared", "warps", "instructions", "wgmma", "tma", "cp_async")


def by_launch(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """The rows of `bench.sm90` by case and launch: the kernel's name, numbered if a case launches it again."""
    found: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for row in rows:
        launches = found[row["case"]]
        again = sum(name.split(" ")[0] == row["kernel"] for name in launches)
        launches[row["kernel"] + (f" {again + 1}" if again else "")] = [row[field] for field in FIELDS]
    return dict(found)


def sm90_faults(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> list[str]:
    """What has become worse in the rows of `bench.sm90`."""
    faults, found = [], by_launch(rows)
    before = baseline["kernels"]
    for case in sorted(set(found) | set(before)):
        for launch in sorted(set(found.get(case, {})) | set(before.get(case, {}))):
            if launch not in found.get(case, {}) or launch not in before.get(case, {}):
                where = "the baseline" if launch in before.get(case, {}) else "this code"
                faults.append(f"{case}, {launch}: is in {where} alone; record the baseline anew if that is meant")
                continue
            now, then = (dict(zip(FIELDS, table[case][launch], strict=True)) for table in (found, before))
            allowed = {**then, "registers": then["registers"] + REGISTERS_ALLOWED}
            allowed["instructions"] = int(then["instructions"] * INSTRUCTIONS_ALLOWED)
            for field in ("spills", "registers", "shared", "instructions"):
                if now[field] > allowed[field]:
                    faults.append(f"{case}, {launch}: {field} {now[field]}, allowed are {allowed[field]}")
            for field in ("wgmma", "tma", "cp_async"):
                if now[field] < then[field]:
                    faults.append(f"{case}, {launch}: {now[field]} {field} instructions, {then[field]} before")
    return faults


def compiled(architecture: int = 90, cases: str = "", cache: Path | None = None) -> list[dict[str, Any]]:
    """The rows of `bench.sm90`, with the tiles that ship, or those of a folder of the user's own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        variables = {**os.environ, "AVA_KERNELS_CACHE": str(cache or folder)}
        variables.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "bench.sm90", "--architecture", str(architecture), "--cases", cases]
        subprocess.run(
            [*command, "--json", path],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=machine.ROOT,
            env=variables,
        )
        return json.loads(path.read_text())


def sm90(results: Path) -> Outcome:
    if machine.installed("triton") is None:
        raise Incomparable("triton is not installed")
    baseline = read_baseline("sm90", triton=machine.installed("triton"))
    rows = compiled()
    return Outcome(len(rows), [], sm90_faults(rows, baseline))


def record_sm90(results: Path) -> dict[str, Any]:
    return {"triton": machine.installed("triton"), "fields": FIELDS, "kernels": by_launch(compiled())}


# --- Instructions ---


def instructions(results: Path) -> Outcome:
    counting = _counting()
    baseline, compared, notes, faults = read_baseline("instructions"), 0, [], []
    for name, group in counting.GROUPS.items():
        before, here = baseline["groups"][name], group.tools()
        different = [f"{what} {before[what]}, here {here[what]}" for what in here if before[what] != here[what]]
        if different:
            notes.append(f"{name}: not compared: the baseline is of {different[0]}")
            continue
        found = group.count()
        told, failed = instruction_faults(found, before["counts"])
        compared, notes, faults = compared + len(found), notes + told, faults + failed
    return Outcome(compared, notes, faults)


def _counting() -> Any:
    """Raises Incomparable where nothing can be counted."""
    if missing := [tool for tool in ("valgrind", "g++") if shutil.which(tool) is None]:
        raise Incomparable(f"{' and '.join(missing)} not found; instructions are counted where both are")
    from bench import instructions

    return instructions


def instruction_faults(found: dict[str, int], before: dict[str, int]) -> tuple[list[str], list[str]]:
    notes, faults = [], []
    for name in sorted(set(found) | set(before)):
        if name not in found or name not in before:
            faults.append(f"{name}: is counted here or in the baseline alone; record it anew if that is meant")
            continue
        change = found[name] / before[name] - 1
        notes.append(f"{name:42} {found[name]:12,} instructions, {change:+.2%}")
        if found[name] > before[name] * (1 + INSTRUCTIONS_MARGIN):
            faults.append(f"{name}: {change:+.1%} instructions, {INSTRUCTIONS_MARGIN:+.0%} is allowed")
    return notes, faults


def record_instructions(results: Path) -> dict[str, Any]:
    groups = _counting().GROUPS.items()
    return {"groups": {name: {**group.tools(), "counts": group.count()} for name, group in groups}}


# --- Shares of a GPU's ceilings ---


def shares(results: Path) -> tuple[str, dict[str, float]]:
    """The GPU, and by operation, size, contender of ours and direction what it reaches of that machine's ceilings."""
    ceilings = _result(results, "ceilings")
    tflops, gb = ceilings["matmul"]["tflops"], ceilings["copy"]["gb_per_second"]
    found = {}
    for name in ("experts", "attention", "routing", "gradients", "rotary", "norm", "loss"):
        try:
            result = _result(results, name)
        except Incomparable:
            continue
        if result["gpu"] != ceilings["gpu"]:
            raise Incomparable(f"{name}_cuda.json is of {result['gpu']}, ceilings_cuda.json of {ceilings['gpu']}")
        for row in result.get("sizes", [result]):
            for contender, figures in row["contenders"].items():
                if not contender.startswith("ours"):
                    continue
                for direction in ("forward", "backward") if "forward" in figures else ("",):
                    part = figures[direction] if direction else figures
                    key = ", ".join(part for part in (name, size_of(row), contender, direction) if part)
                    if "tflops" in part:
                        found[key] = part["tflops"] / tflops
                    elif "clip" not in contender and "bytes" in row:
                        found[key] = row["bytes"] / part["median_ms"] / 1e6 / gb
    return ceilings["gpu"], found


def _result(results: Path, name: str) -> dict[str, Any]:
    path = results / f"{name}_cuda.json"
    if not path.is_file():
        raise Incomparable(f"{_short(path)} is not there; `make bench-gpu` on a GPU writes it")
    return json.loads(path.read_text())


def size_of(row: dict[str, Any]) -> str:
    """`32768,2048,1024,64,8 zipf`, `4,4096,16,16,128,causal`, `64 experts, 8`: what a row's numbers are of."""
    size = row.get("size")
    if size is not None:
        numbers = ",".join(map(str, size.values() if isinstance(size, dict) else size))
        return f"{numbers} {row['routing']}" if "routing" in row else numbers
    return f"{row['experts']} experts of which {row['top_k']}" if "experts" in row else ""


def baseline_of(gpu: str) -> str:
    """ "NVIDIA H200" → "h200" """
    return gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")


def gpu(results: Path) -> Outcome:
    device, now = shares(results)
    baseline = read_baseline(baseline_of(device), gpu=device)
    return Outcome(len(now), *share_faults(now, baseline["shares"]))


def share_faults(now: dict[str, float], before: dict[str, float]) -> tuple[list[str], list[str]]:
    notes, faults = [], []
    if unmeasured := sorted(set(before) - set(now)):
        notes.append(f"{len(unmeasured)} of the baseline were not measured, such as {unmeasured[0]}")
    for key in [key for key in now if key in before]:
        if now[key] < before[key] * (1 - GPU_MARGIN):
            faults.append(f"{key}: {now[key]:.1%} of the ceiling, {before[key]:.1%} − {GPU_MARGIN:.0%} is allowed")
    return notes, faults


def record_gpu(results: Path) -> dict[str, Any]:
    device, now = shares(results)
    return {"gpu": device, "shares": {key: round(share, 4) for key, share in now.items()}}


# --- Baselines ---

PARTS = {"cpu": cpu, "sm90": sm90, "instructions": instructions, "gpu": gpu}
RECORDERS = {"cpu": record_cpu, "sm90": record_sm90, "instructions": record_instructions, "gpu": record_gpu}


def record(part: str, results: Path) -> Path:
    contents = RECORDERS[part](results)
    name = baseline_of(contents["gpu"]) if part == "gpu" else part
    BASELINES.mkdir(exist_ok=True)
    path = BASELINES / f"{name}.json"
    provenance = {key: value for key, value in machine.describe().items() if key != "gpu"}
    text = json.dumps({"provenance": provenance, **contents}, indent=1, ensure_ascii=False)
    written = path.with_suffix(".tmp")
    written.write_text(machine.lists_on_a_line(text) + "\n")
    written.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
