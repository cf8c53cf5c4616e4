"""Reads result files into one form: a `Row` for each contender, size and direction."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

NEEDED = ("date", "command", "commit", "python")


class Row(NamedTuple):
    size: str
    contender: str
    direction: str  # forward, backward or ""
    milliseconds: tuple[float, float, float] | None  # median, quartiles
    rate: tuple[float, str] | None  # 3.2, "TFLOP/s"
    ratio: tuple[float, float, float] | None  # this one's time over ours, pair by pair
    flops: float | None
    bytes: float | None


class Result(NamedTuple):
    suite: str
    device: str  # cpu, cuda
    path: Path
    contents: dict[str, Any]
    rows: list[Row]

    def machine(self) -> str:
        """`AMD EPYC, 2 threads`, or the GPU."""
        gpu = self.contents.get("gpu") if self.device == "cuda" else None
        return gpu or f"{self.contents['cpu']}, {self.contents['threads']} threads".replace(" 1 threads", " 1 thread")


class NoProvenance(Exception):
    """A file of results does not say where its numbers come from."""


def read_all(folder: Path) -> list[Result]:
    """Raises NoProvenance, naming the file and what it lacks."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def read(path: Path) -> Result:
    try:
        contents = json.loads(path.read_text())
    except ValueError as error:
        raise NoProvenance(f"{path}: is no JSON ({error}); measure it again, or delete it") from None
    lacking = [key for key in NEEDED if not contents.get(key)]
    lacking += ["cpu or gpu"] if not (contents.get("cpu") or contents.get("gpu")) else []
    lacking += ["versions.torch"] if not contents.get("versions", {}).get("torch") else []
    if lacking:
        raise NoProvenance(
            f"{path}: does not say {', '.join(lacking)}; measure it again by its own command (where there is no git, "
            "BENCH_COMMIT names the commit), or delete it"
        )
    found = re.fullmatch(r"(.+?)_(cpu|cuda)(_.+)?", path.stem)
    if not found:
        raise NoProvenance(f"{path}: is named neither after _cpu nor _cuda, so what it is of is not known")
    suite, device = found[1], found[2]
    return Result(suite, device, path, contents, list(_rows(suite, contents)))


def nearest_peers(result: Result) -> list[Row]:
    """For every size and direction the fastest peer, the one that counts."""
    best: dict[tuple[str, str], Row] = {}
    for row in result.rows:
        if row.ratio is None or is_ours(row.contender) or row.contender in ("copy", "clip"):
            continue
        key = (row.size, row.direction)
        if key not in best or row.ratio[0] < best[key].ratio[0]:  # type: ignore[index]
            best[key] = row
    return list(best.values())


def is_ours(contender: str) -> bool:
    return contender.startswith(("ours", "ava-fast", "separate, triton", "prepare"))


def _rows(suite: str, contents: dict[str, Any]) -> Iterator[Row]:
    if suite == "training_step":
        yield from _training_step(contents)
    elif suite == "gradients":
        size = f"{contents['elements'] / 1e6:,.0f} M elements in {contents['tensors']:,} tensors"
        yield from _contenders(contents, size, contents["ratios"])
    elif suite == "checkpoint":
        size = f"training waits for {contents['parameters'] / 1e6:,.0f} M parameters with their moments"
        rows = _contenders(contents, size, contents["ratios"])
        yield from sorted(rows, key=lambda row: row.contender != "ours, while training")  # the one that counts, first
    elif suite == "data":
        for name, rate in contents["mb_per_second"].items():
            seconds = contents["seconds"]
            ratios = [a / b for a, b in zip(seconds[name], seconds["prepare"], strict=True)]
            size = f"{contents['text_mb']:,.0f} MB of text"
            yield Row(size, name, "", None, (rate, "MB/s"), _three(ratios), None, None)
    elif suite == "loader":
        for length, figures in contents["lengths"].items():
            for name, rate in figures["million_tokens_per_second"].items():
                words = {"plain": "batches", "offsets": "batches with documents' offsets"}[name]
                yield Row(f"sequences of {length}", words, "", None, (rate["median"], "M tokens/s"), None, None, None)
    elif "sizes" in contents and suite != "gpu":
        for row in contents["sizes"]:
            ratios = row.get("ratios", {})
            if "pair_ratios" in row:  # of routing, for its one peer
                ratios = {"composition": row["pair_ratios"]}
            yield from _contenders(row, size_of(contents, row), ratios)
    elif suite not in ("gpu", "rerouting"):
        yield from _leaves(contents, "")


def size_of(contents: dict[str, Any], row: dict[str, Any]) -> str:
    """In words, what a row's numbers are of."""
    if "name" in row:  # experts
        T, M, I, E, K = row["size"]
        return f"{T:,} tokens, width {M:,}, {E} experts of {I:,}, K {K}; {row['routing']}"
    size = row.get("size", {})
    if "V" in size:
        return "{T:,} tokens, width {M:,}, {V:,} words".format(**size)
    if "kind" in size:
        return "{R:,} rows of {N:,}, {kind}".format(**size)
    if "H_q" in size:
        return "batch {B}, length {S:,}, heads {H_q}/{H_kv} of {D}, {mask}".format(**size)
    return f"{contents['tokens']:,} tokens, {row['experts']} experts, K {row['top_k']}"


def _contenders(row: dict[str, Any], size: str, ratios: dict[str, Any]) -> Iterator[Row]:
    for name, figures in row["contenders"].items():
        for direction in ("forward", "backward") if "forward" in figures else ("",):
            part = figures[direction] if direction else figures
            ratio = part.get("ratio") or ratios.get(name)
            if ratio and direction in ratio:
                ratio = ratio[direction]
            flops, moved = (of[direction] if isinstance(of := row.get(key), dict) else of for key in ("flops", "bytes"))
            rate = None
            if "tflops" in part:
                rate = (part["tflops"], "TFLOP/s")
            elif moved and "copy" not in name:
                rate = (moved / part["median_ms"] / 1e6, "GB/s")
            yield Row(size, name, direction, _times(part), rate, _quartiles(ratio), flops, moved)


def _training_step(contents: dict[str, Any]) -> Iterator[Row]:
    experts = "{experts} experts of {width}, K {top_k}".format(**contents)
    tokens = contents["batch"] * contents["length"]
    size = f"{contents['parameters'] / 1e6:,.1f} M parameters, {experts}, {tokens:,} tokens a step"
    ours = contents["contenders"]["ava-fast"]
    for name, figures in contents["contenders"].items():
        ratio = None
        if name == contents["fastest_peer"]:
            ratio = _quartiles(contents.get("pair_ratios")) or (contents["ratio"],) * 3
        elif name != "ava-fast":
            ratio = (figures["median_ms"] / ours["median_ms"],) * 3
        yield Row(
            size,
            name,
            "",
            _times(figures),
            (figures["tokens_per_second"], "tokens/s"),
            ratio,
            contents.get("flops"),
            None,
        )


def _leaves(value: Any, name: str) -> Iterator[Row]:
    """Of any other suite: whatever has a median."""
    if not isinstance(value, dict):
        return
    if "median_ms" in value:
        rate = (value["tflops"], "TFLOP/s") if "tflops" in value else None
        rate = (value["gb_per_second"], "GB/s") if "gb_per_second" in value else rate
        yield Row(name, "ours", "", _times(value), rate, _quartiles(value.get("ratio")), None, None)
        return
    for key, inner in value.items():
        words = key.replace("_", " ")
        yield from _leaves(inner, f"{name}, {words}" if name else words)


def _times(figures: dict[str, Any]) -> tuple[float, float, float]:
    return figures["median_ms"], figures.get("q1_ms", figures["median_ms"]), figures.get("q3_ms", figures["median_ms"])


def _quartiles(ratio: dict[str, float] | None) -> tuple[float, float, float] | None:
    return (ratio["median"], ratio["q1"], ratio["q3"]) if ratio and "median" in ratio else None


def _three(ratios: list[float]) -> tuple[float, float, float]:
    ordered = sorted(ratios)
    return ordered[len(ordered) // 2], ordered[0], ordered[-1]
