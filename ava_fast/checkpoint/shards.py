"""Weights and AdamW's moments on disk, every rank its share, readable by any number of ranks in any ZeRO stage.

engine/engine.json             stage, precision, ranks, AdamW's step count, every parameter's shape, tied names
engine/rank_0.safetensors …    flat stretches of parameters: `master/<name>` (fp32), `exp_avg/<name>`,
                               `exp_avg_sq/<name>`; whole on rank 0: `other/<name>`, buffers and frozen parameters

A file's metadata says where in the flattened parameter each stretch starts. The ranks' stretches of a parameter cover
it without overlap, so which rank holds what is of no concern to a reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ava_fast.errors import UserError
from ava_fast.files import write_hashed

MASTER, MOMENTS, OTHER = "master", ("exp_avg", "exp_avg_sq"), "other"
_DESCRIPTION = "engine.json"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PIECE = 16 * 2**20  # bytes at a time: hashing and writing take turns, and neither holds the interpreter


def write_shard(
    folder: Path, rank: int, tensors: dict[str, Tensor], starts: dict[str, int], description: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes one rank's share, hashed on its way and synced → its files' sizes and SHA-256, by name.

    `tensors`: on the CPU, keyed as above. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank_{rank}.safetensors"
    written = {name: write_hashed(folder / name, _pieces(tensors, {"starts": json.dumps(starts)}))}
    if rank == 0:
        written[_DESCRIPTION] = write_hashed(folder / _DESCRIPTION, [json.dumps(description, indent=1).encode()])
    return written


def _pieces(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors format: the header's length, the header, the values. The library's own writer wants a name to
    write to or makes a copy of it all."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


class Shards:
    """What `write_shard` wrote under a folder. Nothing is read before it is asked for.

    Raises UserError if there is no such thing, or parts of it are missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.description: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder}: holds no weights ({_DESCRIPTION} is missing); name a checkpoint's folder"
            ) from None
        self.shapes: dict[str, list[int]] = self.description["parameters"]
        self._files, self._stretches = [], dict[tuple[str, str], list[tuple[int, Any]]]()
        try:
            for rank in range(self.description["world_size"]):
                file = safe_open(folder / f"rank_{rank}.safetensors", "pt")
                starts = json.loads(file.metadata()["starts"])
                self._files.append(file)
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    kind, _, name = key.partition("/")
                    self._stretches.setdefault((kind, name), []).append((starts.get(name, 0), file.get_slice(key)))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}/rank_{rank}.safetensors: cannot be read: {error}") from None

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """`length` values of the flattened parameter, from `start`; only they are read."""
        result, missing = torch.empty(length), length
        for first, stretch in self._stretches.get((kind, name), []):
            low, high = max(start, first), min(start + length, first + stretch.get_shape()[0])
            if low < high:
                result[low - start : high - start] = stretch[low - first : high - first]
                missing -= high - low
        if missing:
            raise UserError(f"{self.folder}: {missing} values of {kind} {name} are in none of its files")
        return result

    def whole(self, name: str) -> Tensor:
        """A parameter's fp32 master, in its shape."""
        return self.read(MASTER, name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def other(self, name: str) -> Tensor:
        """A buffer or a frozen parameter."""
        ((_, stretch),) = self._stretches[OTHER, name]
        return stretch[...].view(self.description["others"][name])

    def weights(self) -> dict[str, Tensor]:
        """The whole fp32 state dict; tied parameters appear under each name and share memory."""
        weights = {name: self.whole(name) for name in self.shapes}
        for name in self.description["others"]:
            tensor = self.other(name)
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        return weights | {name: weights[first] for name, first in self.description["tied"].items()}

    def names(self) -> set[str]:
        """Of the state dict."""
        return self.shapes.keys() | self.description["others"].keys() | self.description["tied"].keys()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole fp32 state dict, on the CPU, of what `Engine.save` wrote under `folder`; needs no process group.

    Raises UserError if there is no checkpoint.
    """
    return Shards(folder).weights()
