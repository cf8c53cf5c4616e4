"""Makes docs/benchmarks.md with its pictures, and README's table, from the files in bench/results.

    python -m bench.report             # writes them
    python -m bench.report --check     # exit code 1 if they are not what it would write (pictures aside)

Only what says where it comes from is used: a file without its command, date, commit, machine and versions is refused,
by name, with exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import machine
from bench.figures import NoProvenance, Result, Row, nearest_peers, read_all

BEGIN, END = "<!-- bench.report -->", "<!-- /bench.report -->"
# In this order; a suite that is not here comes last, under its own name.
TITLES = {
    "training_step": "A training step",
    "experts": "The experts' MLP",
    "attention": "Attention with its rotation",
    "rotary": "The rotation alone",
    "routing": "Routing",
    "gradients": "Gradient statistics and clipping",
    "norm": "RMSNorm",
    "loss": "The loss over the vocabulary",
    "loader": "Reading batches from shards",
    "data": "Preparing text",
    "checkpoint": "Checkpoints",
    "startup": "Start-up",
    "ceilings": "What the machine can do",
}
ON_A_GPU = ("ceilings", "experts", "attention", "rotary", "routing", "gradients", "norm", "loss", "training_step")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
HEAD = """# Benchmarks

Made by `python -m bench.report` from [bench/results](../bench/results); do not edit. `make bench` measures on a CPU,
`make bench-gpu` on an NVIDIA GPU. How they measure, and what keeps these numbers from falling, stands in
[measuring](measuring.md).

Times are medians, with quartiles in brackets. A ratio is a contender's time over ours, taken in the same turn: above 1
ours is faster. A result holds for the commit that it names; `+` behind it: with changes that were not committed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    parser.add_argument("--root", type=Path, default=machine.ROOT, help="where docs/ and README.md are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is out of date")
    options = parser.parse_args()
    try:
        results = read_all(options.results)
        texts = pages(results, (options.root / "README.md").read_text(encoding="utf-8"))
    except (NoProvenance, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    changed = [name for name, text in texts.items() if not _is(options.root / name, text)]
    if options.check:
        for name in changed:
            print(f"{name} is not what `python -m bench.report` makes of {options.results}", file=sys.stderr)
        return int(bool(changed))
    from bench import plots

    for device in DEVICES:
        of_device = ordered(result for result in results if result.device == device)
        for kind, draw in (("ratios", plots.ratios), ("roofline", plots.roofline)):
            path = options.root / "docs" / picture(kind, device)
            if not draw(of_device, path):
                path.unlink(missing_ok=True)
    for name, text in texts.items():
        (options.root / name).write_text(text, encoding="utf-8")
        print(options.root / name)
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def picture(kind: str, device: str) -> str:
    return f"images/bench-{kind}-{DEVICES[device].lower()}.png"


def ordered(results: Iterable[Result]) -> list[Result]:
    names = list(TITLES)
    return sorted(
        (result for result in results if result.rows),
        key=lambda result: (names.index(result.suite) if result.suite in names else len(names), result.path.name),
    )


def pages(results: list[Result], readme: str) -> dict[str, str]:
    """The text of every file that is made from results."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md: has no {BEGIN} … {END} for the table to stand between")
    before, rest = readme.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return {
        "docs/benchmarks.md": page(results),
        "README.md": f"{before}{BEGIN}\n{readme_table(results)}{END}{after}",
    }


# --- docs/benchmarks.md ---


def page(results: list[Result]) -> str:
    lines = [HEAD, "| | on a CPU | on a GPU |", "|---|---|---|", *coverage(results), ""]
    for device, name in DEVICES.items():
        of_device = ordered(result for result in results if result.device == device)
        if not of_device:
            continue
        lines += [f"## On a {name}", ""]
        if any(row.ratio for result in of_device for row in result.rows):
            lines += [f"![The fastest peer's time over ours]({picture('ratios', device)})", ""]
        if any(result.suite == "ceilings" for result in of_device):
            lines += [
                f"![What ours reaches of this machine's own matmul and copy]({picture('roofline', device)})",
                "",
            ]
        for suite in dict.fromkeys(result.suite for result in of_device):
            lines += [f"### {TITLES.get(suite, suite.replace('_', ' '))}", ""]
            from_one: dict[str, list[Row]] = {}
            for result in (result for result in of_device if result.suite == suite):
                from_one.setdefault(provenance(result), []).extend(result.rows)
            for said, rows in from_one.items():
                lines += [said, "", *table(rows), ""]
    return "\n".join(lines)


def coverage(results: list[Result]) -> list[str]:
    """Which suites have been measured where."""
    lines = []
    for suite in [*TITLES, *sorted({result.suite for result in results if result.rows} - set(TITLES))]:
        cells = []
        for device in DEVICES:
            dates = [result.contents["date"] for result in results if (result.suite, result.device) == (suite, device)]
            on_a_gpu = "**never run**" if suite in ON_A_GPU else "not of a GPU"
            cells.append(max(dates) if dates else on_a_gpu if device == "cuda" else "not measured yet")
        lines.append(f"| {TITLES.get(suite, suite)} | {cells[0]} | {cells[1]} |")
    return lines


def provenance(result: Result) -> str:
    found = result.contents
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    load = f", load before {found['load_before']}" if found.get("load_before") is not None else ""
    runs = f", {found['runs']} runs" if "runs" in found else ""
    return (
        f"`{found['command']}` on {found['date']}, commit {found['commit']}: {result.machine()}{load}{runs}; "
        f"Python {found['python']}, {versions}"
    )


def table(rows: list[Row]) -> list[str]:
    columns = ["", "contender"]
    has_direction, has_times = any(row.direction for row in rows), any(row.milliseconds for row in rows)
    has_rate, has_ratio = any(row.rate for row in rows), any(row.ratio for row in rows)
    columns += ["pass"] * has_direction + ["ms"] * has_times + ["rate"] * has_rate + ["ratio"] * has_ratio
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    last = None
    for row in rows:
        cells = [row.size if row.size != last else "", row.contender]
        cells += [row.direction] * has_direction
        cells += [_spread(row.milliseconds, "")] * has_times
        cells += [f"{significant(row.rate[0])} {row.rate[1]}" if row.rate else ""] * has_rate
        cells += [_spread(row.ratio, "×") if row.ratio else ""] * has_ratio
        lines.append("| " + " | ".join(cells) + " |")
        last = row.size
    return lines


def _spread(values: tuple[float, float, float] | None, unit: str) -> str:
    if values is None:
        return ""
    median, first, third = values
    shown = f"{significant(median)}{unit}"
    return shown if first == third else f"{shown} ({significant(first)} – {significant(third)})"


def significant(value: float) -> str:
    """Three digits: 1,234; 12.3; 0.123."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


# --- README's table ---


def readme_table(results: list[Result]) -> str:
    """A line a suite, from its worst size to its best: none is chosen."""
    on_a_gpu = [result for result in results if result.device == "cuda"]
    chosen = ordered(on_a_gpu or [result for result in results if result.device == "cpu"])
    lines = [
        "| | worst to best (×: the fastest peer's time over ours) | of | peers | commit, machine |",
        "|---|---|---|---|---|",
    ]
    for suite, title in TITLES.items():
        of_suite = [result for result in chosen if result.suite == suite]
        peers = [row for result in of_suite for row in nearest_peers(result)]
        ratios = sorted(row.ratio[0] for row in peers if row.ratio)
        own = [row for result in of_suite for row in result.rows if row.contender in ("ours", "batches")]
        if ratios:
            found = _range([f"{ratio:.2f}×" for ratio in ratios])
            at = f"{len(ratios)} sizes and passes" if len(ratios) > 1 else peers[0].size
            names = ", ".join(dict.fromkeys(row.contender for row in peers))
        elif own and suite in ("startup", "loader"):
            found, names = _range([_figure(row) for row in own]), "none"
            at = _range([row.size for row in own])
        else:
            continue
        where = dict.fromkeys(f"{result.contents['commit']}, {result.machine()}" for result in of_suite)
        lines.append(f"| {title} | {found} | {at} | {names} | {'; '.join(where)} |")
    never = [] if on_a_gpu else ["", "Nothing here has run on a GPU yet."]
    return "\n".join([*lines, *never]) + "\n"


def _range(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _figure(row: Row) -> str:
    if row.rate and row.milliseconds is None:
        return f"{significant(row.rate[0])} {row.rate[1]}"
    assert row.milliseconds
    ms = row.milliseconds[0]
    return f"{significant(ms / 1e3)} s" if ms >= 1000 else f"{significant(ms)} ms"


if __name__ == "__main__":
    sys.exit(main())
