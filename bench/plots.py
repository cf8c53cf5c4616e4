"""The pictures of docs/benchmarks.md: ratios, and the roofline of a machine."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.figures import Result, nearest_peers

COLOURS = {
    "training_step": "#1f5f99",
    "experts": "#c8553d",
    "attention": "#3d8b5f",
    "rotary": "#7fb069",
    "routing": "#8a63a8",
    "gradients": "#d99a2b",
    "loss": "#3aa6a6",
    "norm": "#b58db6",
    "data": "#6b6b6b",
}


def ratios(results: list[Result], path: Path) -> bool:
    """One line a size: the fastest peer's time over ours, with quartiles. False, and no file, if there is nothing."""
    rows = [(result, row) for result in results for row in nearest_peers(result)]
    if not rows:
        return False
    figure, axis = pyplot.subplots(figsize=(11, 0.9 + 0.27 * len(rows)), layout="constrained")
    for at, (result, row) in enumerate(rows):
        assert row.ratio
        median, first, third = row.ratio
        colour = COLOURS.get(result.suite, "#444444")
        axis.plot([first, third], [at, at], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axis.plot(median, at, "o", color=colour, markersize=6)
    labels = [
        " ".join(filter(None, (result.suite.replace("_", " ") + ":", row.size, row.direction))) for result, row in rows
    ]
    axis.set_yticks(range(len(rows)), [label.replace(" of which ", "/") for label in labels], fontsize=8)
    for at, (_, row) in enumerate(rows):
        axis.annotate(
            f"{row.ratio[0]:.2f}× {row.contender}",  # type: ignore[index]
            (1.01, at),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
        )
    axis.axvline(1, color="#333333", linewidth=1)
    axis.set_xscale("log")
    most = max(row.ratio[2] for _, row in rows if row.ratio)
    least = min(row.ratio[1] for _, row in rows if row.ratio)
    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 8, 16) if least / 1.1 <= tick <= most * 1.1]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("time of the fastest peer ÷ ours: right of 1 ours is faster (median and quartiles of pairs)")
    _save(figure, path)
    return True


def roofline(results: list[Result], path: Path) -> bool:
    """Arithmetic intensity and speed of every operation of ours, under what the machine's own matmul and copy allow.
    False, and no file, without these ceilings."""
    ceilings = next((result.contents for result in results if result.suite == "ceilings"), None)
    points = [
        (result.suite, row)
        for result in results
        for row in result.rows
        if row.contender == "ours" or row.contender in ("ours, triton", "ours, captured")
        if row.flops and row.bytes and row.milliseconds
    ]
    if ceilings is None or not points:
        return False
    most, copy = 1e12 * ceilings["matmul"]["tflops"], 1e9 * ceilings["copy"]["gb_per_second"]
    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [row.flops / row.bytes for _, row in points]  # type: ignore[operator]
    low, high = min(*intensities, most / copy) / 3, max(*intensities, most / copy) * 3
    axis.plot([low, most / copy, high], [low * copy, most, most], color="#333333", linewidth=1.5)
    axis.annotate(f"matmul {most / 1e12:.3g} TFLOP/s", (high, most), ha="right", va="bottom", fontsize=9)
    axis.annotate(f"copy {copy / 1e9:.3g} GB/s", (low, low * copy), ha="left", va="bottom", fontsize=9)
    named = set()
    for suite, row in points:
        assert row.flops
        assert row.bytes
        assert row.milliseconds
        label = f"{suite} {row.direction}".strip()
        axis.plot(
            row.flops / row.bytes,
            row.flops / (row.milliseconds[0] / 1e3),
            {"forward": "o", "backward": "s", "": "D"}[row.direction],
            color=COLOURS.get(suite, "#444444"),
            markerfacecolor="none" if row.direction == "backward" else None,
            label=None if label in named else label,
        )
        named.add(label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP a byte that must move")
    axis.set_ylabel("FLOP/s")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=9)
    _save(figure, path)
    return True


def _save(figure: pyplot.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
