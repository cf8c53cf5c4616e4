"""A model to use, wherever it is: a run, a checkpoint or an imported folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ava_fast.checkpoint import store
from ava_fast.config import Config, load_config, saved_config
from ava_fast.files import sha256

IMPORTED = "model.safetensors"


def read_source(source: Path) -> tuple[dict[str, Tensor], Config, Path | None]:
    """Weights, settings and tokenizer. Raises UserError where there is no model, or a damaged one."""
    from ava_fast.checkpoint.shards import read_weights
    from ava_fast.model.huggingface import read_model

    if (source / IMPORTED).is_file():
        weights, _ = read_model(source)
        tokenizer = source / "tokenizer.json"
        return weights, load_config(source / "config.yaml"), tokenizer if tokenizer.is_file() else None
    checkpoint = store.find_checkpoint(source)
    manifest = store.read_manifest(checkpoint)
    config = saved_config(manifest["config"])
    return read_weights(checkpoint / "engine"), config, checkpoint / "tokenizer.json"


def fingerprint(source: Path) -> str:
    """Changes with the weights: a hash of them, or of the manifest that has theirs. Raises UserError as
    `read_source` does where there is none."""
    if (source / IMPORTED).is_file():
        return sha256(source / IMPORTED)
    return sha256(store.find_checkpoint(source) / store.MANIFEST)
