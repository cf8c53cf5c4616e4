"""report.md, loss.png and routing.png: what a run did, for someone who was not watching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ava_fast.config import Config
from ava_fast.distributed.pace import NAMED_AFTER
from ava_fast.observe.console import duration
from ava_fast.observe.run import read_metrics


def write_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Writes `report.md`, `loss.png` and, where there are mixture-of-experts blocks, `routing.png` into the run's
    folder from its metrics.jsonl; returns the report's path."""
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if steps:
        _plot(folder / "loss.png", steps, evaluations, _rate_events(records), summary)
    routed = [step for step in steps if "routing" in step]
    if routed:
        _plot_routing(folder / "routing.png", routed, config.model.num_dense_layers)
    report = folder / "report.md"
    report.write_text(_markdown(folder, config, records, summary), encoding="utf-8")
    return report


def _markdown(
    folder: Path,
    config: Config,
    records: list[dict[str, Any]],
    summary: dict[str, Any],
) -> str:
    verdicts = [record for record in records if record["kind"] == "verdict"]
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    lines = [f"# {folder.name}", ""]
    if steps:
        lines += ["![Loss, learning rate and gradient norm by step](loss.png)", ""]
    lines += ["| | |", "|---|---|"]
    rows = _rows(steps, evaluations, summary)
    if verdicts:
        rows.append(("bad steps", ", ".join(f"{count} × {name}" for name, count in verdicts[-1]["counts"].items())))
    if retries := sum(record["retries"] for record in records if record["kind"] == "retry"):
        rows.append(("network errors, tried again", f"{retries:,}"))
    if taken := [record for record in records if record["kind"] == "utilisation"]:
        most = max(taken, key=lambda record: record["share"])
        rows.append(("memory, at most", f"{most['share']:.0%} of what a rank may have (rank {most['rank']})"))
    restarts = [record for record in records if record["kind"] == "restart"]
    if restarts:
        redone = sum(record["lost_step"] - record["step"] for record in restarts)
        rows.append(("restarts", f"{restarts[-1]['restarts']}, which cost {redone:,} steps done again"))
    rows += [("slow rank", text) for text in _slow_ranks([r for r in records if r["kind"] == "pace"])]
    for name, value in rows:
        lines.append(f"| {name} | {value} |")
    if steps and "routing" in steps[-1]:
        lines += ["", "## Routing", "", "![Utilisation, entropy and overflow of each block by step](routing.png)"]
    if summary.get("sources"):
        lines += ["", "## Data", "", "| folder | sequences | epochs | documents from |", "|---|---|---|---|"]
        lines += [
            f"| {s['folder']} | {s['sequences']:,} | {s['epochs']:.2f} | {s['first_document']:,} |"
            for s in summary["sources"]
        ]
    if restarts:
        lines += ["", "## Restarts", "", "| after step | on from | ranks | seconds without a step | why |"]
        lines += ["|---|---|---|---|---|"]
        for r in restarts:
            why = r["reason"].replace("|", " ")
            lines.append(f"| {r['lost_step']} | {r['step']} | {r['world_size']} | {r['seconds']:.0f} | {why} |")
    if verdicts:
        lines += ["", "## Bad steps", "", "| after step | verdict | why | where |", "|---|---|---|---|"]
        lines += [f"| {v['step']} | {v['verdict']} | {v['reason']} | {_where(v['culprits'])} |" for v in verdicts[:50]]
        if len(verdicts) > 50:
            lines.append(f"| | | {len(verdicts) - 50} more are in metrics.jsonl | |")
    if evaluations:
        lines += ["", "## Held-out loss", "", "| step | nats per token | perplexity |", "|---|---|---|"]
        lines += [f"| {e['step']} | {e['loss']:.4f} | {_perplexity(e['loss'])} |" for e in evaluations]
    if summary.get("continuation") is not None:
        fence = "````"
        text = f"{config.evaluation.prompt}{summary['continuation']}"
        lines += ["", "## A continuation", "", fence, text, fence]
    lines += ["", "The settings are in [config.yaml](config.yaml), every step in [metrics.jsonl](metrics.jsonl)."]
    return "\n".join(lines) + "\n"


def _rows(
    steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], summary: dict[str, Any]
) -> list[tuple[str, str]]:
    rows = [("status", str(summary["status"])), ("parameters", f"{summary['parameters']:,}")]
    if steps:
        # The first steps warm caches up; the median is what the run settles at.
        seconds = sorted(step["seconds"] for step in steps)
        rates = sorted(step["tokens_per_second"] for step in steps)
        rows += [
            ("steps", f"{steps[-1]['step']:,}"),
            ("tokens", f"{steps[-1]['tokens']:,}"),
            ("training loss, last step", f"{steps[-1]['loss']:.4f} nats per token"),
            ("median step", f"{1000 * seconds[len(seconds) // 2]:.0f} ms"),
            ("tokens per second, median step", f"{rates[len(rates) // 2]:,.0f}"),
            ("time in steps", duration(sum(step["seconds"] * step.get("steps", 1) for step in steps))),
        ]
        if noise := [step["noise_scale"] for step in steps if step.get("noise_scale")]:
            rows.append(("gradient noise scale", f"{noise[-1]:,.0f} sequences a step; batches up to about that pay"))
    if evaluations:
        rows.append(("held-out loss", f"{evaluations[-1]['loss']:.4f} nats per token"))
    for name in ("unigram", "bigram"):
        if name in summary:
            rows.append((f"{name} baseline", f"{summary[name]:.4f} nats per token on the same tokens"))
    return rows


def _slow_ranks(paces: list[dict[str, Any]]) -> list[str]:
    """`rank 3 on node7: up to 1.8 × the others' median, in 4 of 20 stretches`, for those that stayed slow."""
    stayed = {each["rank"] for record in paces for each in record["outliers"] if each["in_a_row"] >= NAMED_AFTER}
    named: dict[tuple[int, str], list[float]] = {}
    for record in paces:
        for each in record["outliers"]:
            named.setdefault((each["rank"], each["host"]), []).append(each["times"])
    return [
        f"rank {rank} on {host}: up to {max(times):.3g} × the others' median, in {len(times)} of {len(paces)} stretches"
        for (rank, host), times in sorted(named.items())
        if rank in stayed
    ]


def _where(culprits: list[dict[str, Any]]) -> str:
    """`rank 1: documents 3, 4; embedding.weight`"""
    return "; ".join(
        f"rank {each['rank']}: documents " + "; ".join(", ".join(map(str, each[key][:5])) for key in keys)
        for each in culprits
        if (keys := [key for key in ("documents", "parameters") if each[key]])
    )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "over e⁵⁰"


def _rate_events(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The steps after which the learning rate left its schedule, and how."""
    events = [
        (record["step"], "CUT") for record in records if record["kind"] == "verdict" and record["verdict"] == "CUT"
    ]
    changes = [record for record in records if record["kind"] == "rate"]
    factors = [1.0, *(record["factor"] for record in changes)]
    for before, change in zip(factors, changes, strict=False):
        events.append((change["step"], "raised" if change["factor"] > before else "lowered"))
    return events


def _plot(
    path: Path,
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    rate_events: list[tuple[int, str]],
    summary: dict[str, Any],
) -> None:
    import matplotlib  # takes a second to import: not before the first step

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, rate, norm) = pyplot.subplots(
        3, 1, figsize=(9, 8), sharex=True, height_ratios=[3, 1, 1], layout="constrained"
    )
    x = [step["step"] for step in steps]
    losses = [step["loss"] for step in steps]
    loss.plot(x, losses, color="#9ec5e8", linewidth=0.8, label="training, each step")
    loss.plot(x, smooth(losses), color="#1f5f99", linewidth=1.6, label="training, smoothed")
    if evaluations:
        loss.plot(
            [e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", color="#c8553d", label="held out"
        )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if name in summary:
            loss.axhline(summary[name], color="#666666", linestyle=style, linewidth=1.0, label=f"{name} baseline")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    if any("scheduled_rate" in step for step in steps):
        scheduled = [step.get("scheduled_rate", step["learning_rate"]) for step in steps]
        rate.plot(x, scheduled, color="#999999", linewidth=1.2, label="schedule")
    rate.plot(x, [step["learning_rate"] for step in steps], color="#1f5f99", label="used" if rate.lines else None)
    taken = {step["step"]: step["learning_rate"] for step in steps}
    for kind, marker in (("raised", "^"), ("lowered", "v"), ("CUT", "x")):
        at = [step for step, event in rate_events if event == kind and step in taken]
        if at:
            rate.plot(at, [taken[step] for step in at], marker, color="#c8553d", label=kind)
    if len(rate.lines) > 1:
        rate.legend()
    rate.set_ylabel("learning rate")
    norm.plot(x, [step["grad_norm"] for step in steps], color="#1f5f99", linewidth=0.8)
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    norm.set_xlabel("step")
    for axis in (loss, rate, norm):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_routing(path: Path, steps: list[dict[str, Any]], first_block: int) -> None:
    from matplotlib import pyplot

    panels = {
        "utilisation": "utilisation: mean load\n÷ busiest expert's",
        "entropy": "entropy of the scores\n÷ that of even ones",
    }
    for name in ("rerouted", "dropped"):  # all 0 without a capacity
        if any(any(step["routing"][name]) for step in steps):
            panels[name] = f"{name} share\nof requests"
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2.2 * len(panels) + 0.4), sharex=True, layout="constrained"
    )
    x = [step["step"] for step in steps]
    blocks = len(steps[0]["routing"]["utilisation"])
    colours = pyplot.get_cmap("viridis")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for block in range(blocks):
            values = smooth([step["routing"][name][block] for step in steps])
            named = blocks <= 6 or block in (0, blocks - 1)
            axis.plot(
                x,
                values,
                color=colours(0.9 * block / max(1, blocks - 1)),
                linewidth=1.2,
                label=f"block {first_block + block}" if named else None,
            )
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step (smoothed)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential average, corrected for its empty start."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
