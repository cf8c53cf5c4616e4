"""Random number generators: python's, numpy's and torch's, seeded, kept and put back together."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """Of all of them, the CUDA one of this rank's device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Puts back what `generator_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def packed(states: dict[str, Any]) -> bytes:
    """As JSON, which needs no trust to be read."""
    name, keys, *rest = states["numpy"]
    tensors = {device: None if states[device] is None else states[device].tolist() for device in ("torch", "cuda")}
    return json.dumps({"python": states["python"], "numpy": [name, keys.tolist(), *rest], **tensors}).encode()


def unpacked(content: bytes) -> dict[str, Any]:
    """What was packed."""
    states = json.loads(content)
    version, internal, gauss = states["python"]
    name, keys, *rest = states["numpy"]
    tensors = {
        device: None if states[device] is None else torch.tensor(states[device], dtype=torch.uint8)
        for device in ("torch", "cuda")
    }
    python = (version, tuple(internal), gauss)
    return {"python": python, "numpy": (name, np.array(keys, np.uint32), *rest), **tensors}
