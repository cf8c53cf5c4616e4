"""What is checked before the first step, so that a run does not fail after an hour for a reason known at its start."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from ava_fast.checkpoint import remote
from ava_fast.compatibility import world_size_conflicts
from ava_fast.config import Config
from ava_fast.data.corpus import scan
from ava_fast.data.shards import check_vocabulary, is_prepared, read_index
from ava_fast.data.tokenizer import load_tokenizer, vocabulary_size
from ava_fast.errors import UserError
from ava_fast.model.transformer import Transformer
from ava_fast.observe.run import runs_folder
from ava_fast.stability.plan import GIB, state_bytes

NEEDED = {"torch": "2.11", "deepspeed": "0.19.8", "tokenizers": "0.22", "pydantic": "2.10"}


@dataclass(frozen=True)
class Check:
    """One row of the table. A failed check refuses the run."""

    name: str
    ok: bool
    detail: str


def run_checks(config: Config, world_size: int) -> list[Check]:
    """Every check, in the order of the table, whether or not an earlier one failed. Writes nothing that stays."""
    checks: dict[str, Callable[[], str]] = {
        "configuration": lambda: _configuration(config, world_size),
        "versions": _versions,
        "device": lambda: _device(config),
        "memory": lambda: _memory(config, world_size),
        "output": lambda: _output(config),
        "disk": lambda: _disk(config),
        "data": lambda: _data(config),
        "tokenizer": lambda: _tokenizer(config),
    }
    return [_check(name, check) for name, check in checks.items()]


def table(checks: list[Check]) -> str:
    """The checks as lines: `ok  memory  0.1 GiB of 20.1 GiB`."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{'ok    ' if check.ok else 'FAILED'}  {check.name:<{width}}  {check.detail}" for check in checks)


def _check(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except UserError as error:
        return Check(name, False, str(error))


def _configuration(config: Config, world_size: int) -> str:
    faults = world_size_conflicts(config, world_size)
    if faults:
        raise UserError("; ".join(map(str, faults)))
    return f"consistent, for {world_size} rank{'s' if world_size > 1 else ''}"


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package, needed in NEEDED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; it must be {needed} or newer") from None
        if _numbers(installed) < _numbers(needed):
            raise UserError(f"{package} is {installed}; it must be {needed} or newer")
        found.append(f"{package} {installed}")
    return ", ".join(found)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split("+")[0].split(".") if part.isdigit()]


def _device(config: Config) -> str:
    attention = config.training.attention_backend
    if not torch.cuda.is_available():
        interpreted = attention == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if attention in ("triton", "hopper") and not interpreted:
            raise UserError(f"training.attention_backend: {attention} needs a GPU, and there is none; set auto")
        compiler = os.environ.get("CXX", "g++")
        if config.training.compile and not (shutil.which(compiler) or shutil.which("clang++")):
            raise UserError(f"training.compile: needs a C++ compiler on a CPU, and there is no {compiler}; set false")
        return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads per rank"
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    if config.training.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"training.precision: {', '.join(names)} has no bf16; set fp32")
    generations = {torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())}
    if attention == "hopper" and generations != {9}:
        raise UserError(f"training.attention_backend: hopper needs an H100 or H200, not {', '.join(names)}; set auto")
    return f"{torch.cuda.device_count()} × {', '.join(sorted(names))}"


def _memory(config: Config, world_size: int) -> str:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    gpu = torch.cuda.is_available()
    needed = state_bytes(parameters, config, world_size, gpu=gpu)
    if gpu:
        free, where = torch.cuda.mem_get_info()[0], "free on the GPU"
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        where = "available to a rank"
    if needed > free:
        less = "set memory.offload_optimizer or " if gpu else ""  # to a host that is the device it gives nothing
        raise UserError(
            f"{parameters:,} parameters need {needed / GIB:.1f} GiB a rank before any activation, {free / GIB:.1f} GiB "
            f"are {where}; raise deepspeed.zero_stage, add ranks, {less}choose a smaller model"
        )
    if gpu:
        _host_memory(parameters, config)
    return f"{parameters:,} parameters, {needed / GIB:.2f} GiB a rank without activations, {free / GIB:.1f} GiB {where}"


def _host_memory(parameters: int, config: Config) -> None:
    """Every rank makes the model on its host, in fp32, before it goes to the GPU; with given weights beside these."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = (8 if config.training.init_from else 4) * parameters * ranks
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{parameters:,} parameters need {needed / GIB:.1f} GiB of the host's memory while {ranks} ranks make the "
            f"model; {available / GIB:.1f} GiB are available: start fewer ranks here, or choose a smaller model"
        )


def _output(config: Config) -> str:
    folder = runs_folder(config)
    if config.checkpoint.remote is not None:
        try:
            remote.check(config.checkpoint.remote)
        except UserError as error:
            raise UserError(f"checkpoint.remote: {error}; choose another, or null") from None
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"logging.output_dir: {folder} cannot be written ({error.strerror}); choose a writable folder"
        ) from None
    return f"{folder} can be written"


def _disk(config: Config) -> str:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    kept = (config.checkpoint.save_total_limit or 1) + config.checkpoint.keep_best + 1  # one while it is written
    needed = kept * 12 * parameters  # fp32 weights and two moments
    folder = Path(config.logging.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{kept} checkpoints need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free under "
            f"{config.logging.output_dir}; lower checkpoint.save_total_limit or free some"
        )
    return f"{kept} checkpoints need {needed / GIB:.2f} GiB, {free / GIB:.1f} GiB are free"


def _data(config: Config) -> str:
    return "; ".join(_source(folder, config.data.text_column) for folder, _ in config.sources)


def _source(data_dir: str | None, text_column: str | None) -> str:
    if data_dir is not None and is_prepared(data_dir):
        index = read_index(data_dir)
        return f"{data_dir}: {index.train.tokens:,} training and {index.validation.tokens:,} held-out tokens"
    corpus = scan(data_dir, text_column)
    skipped = f", {len(corpus.skipped)} files cannot be used" if corpus.skipped else ""
    return f"{data_dir or 'the standard library’s source'}: {len(corpus.files):,} files{skipped}"


def _tokenizer(config: Config) -> str:
    (data_dir, _), name = config.sources[0], config.data.tokenizer_name
    if data_dir is not None and is_prepared(data_dir):
        index = read_index(data_dir)
        check_vocabulary(index.vocab_size, config.model.vocab_size)
        return f"of the prepared data, {index.vocab_size:,} tokens"
    if name is None:
        return f"will be trained, {config.model.vocab_size:,} tokens"
    size = vocabulary_size(load_tokenizer(name))
    check_vocabulary(size, config.model.vocab_size)
    return f"{name}, {size:,} tokens"
