"""How a run ends: n-gram baselines, a continuation of the prompt, the report, and the closing lines."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ava_fast.config import Config, for_host, load_config
from ava_fast.data.shards import TokenStream, read_index
from ava_fast.data.tokenizer import load_tokenizer
from ava_fast.errors import UserError
from ava_fast.evaluate.baselines import Baselines, ngram_baselines
from ava_fast.model.generation import generate
from ava_fast.model.transformer import Transformer
from ava_fast.observe.console import duration
from ava_fast.observe.report import write_report
from ava_fast.observe.run import read_metrics
from ava_fast.trainer import Trainer

logger = logging.getLogger(__name__)


def finish(trainer: Trainer, status: str, started_at: float) -> None:
    """Writes the report; after a finished run also scores the baselines and continues the prompt. Collective.

    `started_at` is the process's start in Unix seconds."""
    config, shards = trainer.config, trainer.shards
    summary: dict[str, Any] = {"status": status, "step": trainer.step, "parameters": trainer.parameters}
    summary["sources"] = _sources(trainer)
    weights = trainer.engine.gather_weights() if status == "finished" and config.evaluation.prompt else None
    if dist.get_rank() != 0:
        return
    if status == "finished":
        summary["heldout_loss"] = trainer.heldout
        summary["tokens_per_second"] = _tokens_per_second(trainer.run_folder)
        if config.evaluation.ngram_baselines:
            try:
                baselines = _baselines(trainer)
            except UserError as error:  # the shards have changed since; what was trained is no worse for it
                logger.warning(f"no n-gram baselines: {error}")
            else:
                summary.update(unigram=baselines.unigram, bigram=baselines.bigram)
        if weights is not None:
            summary["continuation"] = _continuation(config, weights, shards)
    summary["wall_seconds"] = time.time() - started_at
    write_report(trainer.run_folder, config, summary)
    (trainer.run_folder / "summary.json").write_text(json.dumps(summary, indent=1))
    if status == "finished":
        logger.info(_closing_lines(trainer.run_folder, config, summary))
    else:
        logger.info(f"report: {trainer.run_folder / 'report.md'}")


def _sources(trainer: Trainer) -> list[dict[str, Any]]:
    """What each folder of shards has given; its documents have the numbers from `first_document` on."""
    sources, first, found = trainer.loader.batches.sources, 0, []
    for source, (sequences, epochs) in zip(sources, trainer.loader.progress(), strict=True):
        name = str(source.folder)
        found.append({"folder": name, "first_document": first, "sequences": sequences, "epochs": epochs})
        first += source.total_documents
    return found


def _baselines(trainer: Trainer) -> Baselines:
    folders = [source.folder for source in trainer.loader.batches.sources]
    indices = [read_index(folder) for folder in folders]
    streams = [TokenStream(folder, index, "train") for folder, index in zip(folders, indices, strict=True)]
    arrays = [array for stream in streams for array in stream.arrays()]
    return ngram_baselines(arrays, trainer.heldout_NS1, indices[0].vocab_size)


def finished_lines(run: Path, config: Config) -> str | None:
    """The closing lines of a run that has finished with these very settings; None of any other."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        if summary["status"] != "finished" or load_config(run / "config.yaml") != config:
            return None
    except (OSError, ValueError):
        return None
    return f"{run} has finished; start anew without --resume\n{_closing_lines(run, config, summary)}"


def _closing_lines(run: Path, config: Config, summary: dict[str, Any]) -> str:
    lines = []
    if "continuation" in summary:
        lines += ["a continuation of the prompt:", f"{config.evaluation.prompt}{summary['continuation']}", ""]
    lines.append(f"report: {run / 'report.md'}")
    parts = [f"held-out loss {summary['heldout_loss']:.3f} nats per token"]
    if "bigram" in summary:
        parts.append(f"unigram {summary['unigram']:.3f}, bigram {summary['bigram']:.3f} on the same tokens")
    parts += [f"{summary['tokens_per_second']:,.0f} tokens/s", f"wall time {duration(summary['wall_seconds'])}"]
    return "\n".join([*lines, " | ".join(parts)])


def _tokens_per_second(run: Path) -> float:
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]
    return float(steps[-1]["tokens"] / sum(step["seconds"] * step.get("steps", 1) for step in steps))


def _continuation(config: Config, weights: dict[str, torch.Tensor], shards: Path) -> str:
    tokenizer = load_tokenizer(shards)
    model = Transformer(for_host(config))
    model.load_state_dict(weights)
    prompt = tokenizer.encode(config.evaluation.prompt or "", add_special_tokens=False).ids
    tokens = generate(
        model,
        prompt,
        config.evaluation.max_new_tokens,
        temperature=config.evaluation.temperature,
        stop_token=read_index(shards).eos_id,
        generator=torch.Generator().manual_seed(config.training.seed),
    )
    return str(tokenizer.decode(tokens))
