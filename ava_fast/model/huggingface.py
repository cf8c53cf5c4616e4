"""Weights and settings to and from Hugging Face folders: Mixtral, Qwen2-MoE and Qwen3-MoE. Needs no transformers.

    export(model.state_dict(), config, Path("exported"), tokenizer=Path("tokenizer.json"))
    weights, sections = import_folder(Path("Mixtral-8x7B-v0.1"))
    write_model(weights, sections, Path("imported"))        # what `training.init_from` names
    weights, sections = read_model(Path("imported"))

`weights` are a Transformer's state_dict. A folder that is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ava_fast.config import Config, ConfigError, load_config
from ava_fast.data.tokenizer import end_of_text_id, load_tokenizer, tokenizer_file
from ava_fast.errors import UserError
from ava_fast.files import sync
from ava_fast.model import architectures
from ava_fast.model.architectures import ARCHITECTURES
from ava_fast.model.transformer import Transformer


def export(
    weights: Mapping[str, Tensor],
    config: Config,
    folder: Path,
    *,
    architecture: str | None = None,
    tokenizer: Path | None = None,
) -> str:
    """Writes config.json, generation_config.json and one model.safetensors, in the weights' own dtype.

    `architecture` is a key of ARCHITECTURES; None takes the first that can express the model. With a tokenizer.json
    (or a folder that holds one), tokenizer.json and tokenizer_config.json as well. → the architecture. Raises UserError
    for what the architecture cannot express, weights that do not fit the config, and a target that is not empty.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"--architecture: '{architecture}' is not known; allowed: {', '.join(ARCHITECTURES)}")
    candidates = [architecture] if architecture else list(ARCHITECTURES)
    obstacles = {name: architectures.obstacles(config, name) for name in candidates}
    chosen = next((name for name, found in obstacles.items() if not found), None)
    if chosen is None:
        reasons = "; ".join(f"{name} needs {', '.join(found)}" for name, found in obstacles.items())
        raise UserError(f"this model cannot be exported: {reasons}")
    shapes, weights = _shapes(config), _without_head(weights, config.model.tie_embeddings)
    _check("the weights", weights, {name: tensor.shape for name, tensor in shapes.items()})

    exported = {}
    for name, tensor in weights.items():
        for theirs, index in architectures.parts(name, shapes[name], config, chosen, fused=False):
            exported[theirs] = tensor[index].contiguous()
    dtype = str(weights["embed.weight"].dtype).removeprefix("torch.")
    eos, eos_id = (None, None) if tokenizer is None else _end_of_text(tokenizer)
    with _appearing_whole(folder) as temporary:
        save_file(exported, temporary / "model.safetensors", {"format": "pt"})
        _write_json(temporary / "config.json", architectures.options(config, chosen, eos_id) | {"dtype": dtype})
        _write_json(temporary / "generation_config.json", {"do_sample": False, "eos_token_id": eos_id})
        if tokenizer is not None:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
            _copy_tokenizer(tokenizer, temporary, settings | {"model_max_length": config.data.max_length})
    return chosen


def import_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """→ a Transformer's state_dict in float32 on the CPU, and the `model` and `moe` sections that describe it.

    Reads one model.safetensors or a sharded one, experts one by one or fused. Where embeddings are tied, head.weight is
    embed.weight. Raises UserError naming all options that cannot be expressed here, or all tensors that do not fit.
    """
    file = folder / "config.json"
    options = _read_json(file)
    architecture = options.get("model_type")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file}: model_type {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    sections, faults = architectures.sections(options, architecture)
    if faults:
        raise UserError(f"{file}: cannot be imported: {'; '.join(faults)}")
    overrides = [f"{name}.{key}={json.dumps(value)}" for name, body in sections.items() for key, value in body.items()]
    try:
        config = load_config(None, overrides)
    except ConfigError as error:
        raise UserError(f"{file}: cannot be imported: {'; '.join(map(str, error.faults))}") from None

    theirs = _load_shards(folder)
    fused = any(name.endswith(".experts.gate_up_proj") for name in theirs)
    shapes = _shapes(config)
    parts = {name: architectures.parts(name, tensor, config, architecture, fused) for name, tensor in shapes.items()}
    expected = {key: shapes[name][index].shape for name, found in parts.items() for key, index in found}
    if config.model.tie_embeddings and not _drop_copy(theirs, "lm_head.weight", "model.embed_tokens.weight"):
        raise UserError(
            f"{file}: tie_word_embeddings is true, but lm_head.weight is not the embedding; set it to false"
        )
    _check(str(folder), theirs, expected)

    weights = {}
    for name, found in parts.items():
        weights[name] = torch.empty_like(shapes[name], dtype=torch.float32, device="cpu")
        for key, index in found:
            weights[name][index] = theirs.pop(key)
    return _with_head(weights, config), sections


def write_model(
    weights: Mapping[str, Tensor], sections: Mapping[str, Any], folder: Path, tokenizer: Path | None = None
) -> None:
    """Writes ava-fast's own format: config.yaml (`sections`: model and moe), model.safetensors under the Transformer's
    names and, if given, the tokenizer. Raises UserError for a target that is not empty."""
    kept = _without_head(weights, sections["model"].get("tie_embeddings", False))
    kept = {name: tensor.contiguous() for name, tensor in kept.items()}
    with _appearing_whole(folder) as temporary:
        save_file(kept, temporary / "model.safetensors")
        (temporary / "config.yaml").write_text(yaml.safe_dump(dict(sections), sort_keys=False))
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, temporary)


def read_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_model` wrote: a Transformer's state_dict and the full `model` and `moe` sections.

    Raises UserError (ConfigError for config.yaml) for what is missing, damaged or does not fit together.
    """
    config = load_config(folder / "config.yaml")
    weights = _load(folder / "model.safetensors")
    _check(str(folder), weights, {name: tensor.shape for name, tensor in _shapes(config).items()})
    sections = config.model_dump(include={"model", "moe"})
    return _with_head(weights, config), sections


def _shapes(config: Config) -> dict[str, Tensor]:
    """The parameters as tensors without storage, tied ones once."""
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    if config.model.tie_embeddings:
        del shapes["head.weight"]
    return shapes


def _without_head(weights: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not (tied and name == "head.weight")}


def _drop_copy(tensors: dict[str, Tensor], name: str, original: str) -> bool:
    """Removes `name` if it equals `original`; false if it differs."""
    if name not in tensors or original not in tensors:
        return True
    return torch.equal(tensors.pop(name), tensors[original])


def _with_head(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return weights | {"head.weight": weights["embed.weight"]} if config.model.tie_embeddings else weights


def _check(source: str, given: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuses tensors that are missing, unexpected, of another shape or not floating-point, all at once."""
    wrong = [
        f"{name} is {tuple(tensor.shape)} where {tuple(expected[name])} is needed"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name]
    ]
    quantised = [name for name, tensor in given.items() if tensor.dtype.itemsize < 2 or not tensor.is_floating_point()]
    kinds = {
        "missing": expected.keys() - given.keys(),
        "unexpected": given.keys() - expected.keys(),
        "of another shape than the config says": wrong,
        "not in fp64, fp32, bf16 or fp16": quantised,
    }
    faults = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"{source}: tensors do not fit the config: {'; '.join(faults)}")


def _some(names: Iterable[str], shown: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:shown]) + (f" and {len(ordered) - shown} more" if len(ordered) > shown else "")


def _load_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        tensors = _load(folder / "model.safetensors")
    else:
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise UserError(f"{index}: has no weight_map of tensor names to file names; fetch it again")
        tensors = {}
        for name in sorted(set(files.values())):
            tensors |= _load(folder / name)
    # Old checkpoints hold the rotation's frequencies, which follow from rope_theta.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: not found; weights must be in safetensors files") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: is not a readable safetensors file: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _end_of_text(tokenizer: Path) -> tuple[str | None, int]:
    loaded = load_tokenizer(tokenizer)
    eos_id = end_of_text_id(loaded, tokenizer)
    return loaded.id_to_token(eos_id), eos_id


def _copy_tokenizer(source: Path, folder: Path, settings: dict[str, Any] | None = None) -> None:
    """tokenizer.json, and the tokenizer_config.json beside it; where there is none, `settings`."""
    file = tokenizer_file(source)
    shutil.copyfile(file, folder / "tokenizer.json")
    settings_file = file.with_name("tokenizer_config.json")
    if settings_file.is_file():
        shutil.copyfile(settings_file, folder / "tokenizer_config.json")
    elif settings is not None:
        _write_json(folder / "tokenizer_config.json", settings)


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, and is removed if the body raises."""
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; name another or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after the rename
