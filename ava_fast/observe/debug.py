"""`training.mode: debug`: looks at what every module gives, and asks torch for deterministic algorithms.

    look = CloseLook(config.training)
    with look.at(model):
        ...
        look.first      # the first module whose output was not finite since `look.begin()`, or None

Every look waits for the device: for finding a fault, not for training.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ava_fast.settings import TrainingConfig

logger = logging.getLogger(__name__)


class CloseLook:
    """Does nothing in the other modes."""

    first: str | None
    """`blocks.1.mlp: 3 of 4,096 values are not finite`; the innermost module, in the order of the forward pass."""

    def __init__(self, training: TrainingConfig):
        self._training, self._looking, self._shapes, self.first = training, False, True, None
        self._hooks = ExitStack()

    @contextmanager
    def at(self, model: nn.Module) -> Iterator[None]:
        """Looks at this model, or at what `turn_to` names, until the block ends."""
        if self._training.mode != "debug":
            yield
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._looking = True
        try:
            with torch.autograd.set_detect_anomaly(self._training.detect_anomaly):
                self.turn_to(model)
                yield
        finally:
            self.turn_to(None)
            self._looking = False
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def turn_to(self, model: nn.Module | None) -> None:
        """Leaves the model that it looks at for this one, if it looks at any."""
        self._hooks.close()
        for name, module in model.named_modules() if model is not None and self._looking else ():
            handle = module.register_forward_hook(functools.partial(self._look, name or "the model"))
            self._hooks.callback(handle.remove)

    def begin(self) -> None:
        """A step begins. The first one's shapes go into debug.log, module by module."""
        self.first = None

    def end(self) -> None:
        self._shapes = False

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = list(_tensors(output))
        if self._shapes:
            shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
            logger.debug(f"{name} ({type(module).__name__}) gives {shapes}")
        if self.first is not None:
            return
        for tensor in tensors:
            if tensor.is_floating_point() and (bad := int((~tensor.detach().isfinite()).sum())):
                self.first = f"{name}: {bad:,} of {tensor.numel():,} values are not finite"
                logger.debug(self.first)
                return


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
