"""Gradients of several losses that pull against each other, made to agree before they are added up.

PCGrad (Yu et al., 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1): in random order, what a loss's
gradient has against another's is projected away, g_i ← g_i − (g_i·g_j / |g_j|²) g_j where g_i·g_j < 0.

Its adaptive variant, GradVac (Wang et al., 2021, "Gradient Vaccine", algorithm 1, with the whole model as the one
component): the cosine φ of g_i and g_j is raised to a target φ̂ wherever it lies below,

    g_i ← g_i + |g_i| (φ̂ √(1 − φ²) − φ √(1 − φ̂²)) / (|g_j| √(1 − φ̂²)) · g_j,      then      φ̂ ← (1 − β) φ̂ + β φ,

so that losses which have agreed so far are not let drift apart. A target of 0 is PCGrad.

Both only ever add multiples of the given gradients, so all they need of them is the matrix of their products: read once
for that, once more for the weighted sum. N losses.

    gram_NN = gram([gradients_of_loss_0, gradients_of_loss_1])
    weights = pcgrad(gram_NN, random.Random(seed))
    gradient = combine([gradients_of_loss_0, gradients_of_loss_1], weights)

`Surgery` is the place that this takes in training, where each micro-batch is a loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ava_fast.config import Config
from ava_fast.engine import Engine

Matrix = list[list[float]]
DECAY = 0.01  # β, as in the paper


class Surgery:
    """On one rank: takes the micro-batches' gradients, and operates once a step. ZeRO 0 only.

    The order of the losses depends on the seed and the step alone, so every rank does the same.
    """

    def __init__(self, config: Config):
        N = config.training.gradient_accumulation_steps
        self._kind, self._seed = config.stability.gradient_surgery, config.training.seed
        self._targets = [[0.0] * N for _ in range(N)]
        self._next_targets = self._targets  # if the step is taken
        self._gradients: list[list[Tensor]] = []

    def begin(self) -> None:
        """A step; what was taken for one that has been given up is dropped."""
        self._gradients, self._next_targets = [], self._targets

    def take(self, engine: Engine) -> None:
        """A micro-batch's gradient, which is then no longer the engine's."""
        if self._kind != "none":
            self._gradients.append(engine.take_gradient())

    def operate(self, engine: Engine, step: int) -> None:
        """Gives the engine the combined gradient, averaged over ranks. Collective."""
        if self._kind == "none":
            return
        losses = [engine.average(gradients) for gradients in self._gradients]
        products, order = gram(losses), random.Random(f"{self._seed} {step}")
        self._next_targets = [list(row) for row in self._targets]
        if self._kind == "adaptive":
            weights = adaptive(products, self._next_targets, order)
        else:
            weights = pcgrad(products, order)
        engine.set_gradient(combine(losses, weights))

    def applied(self) -> None:
        """The step has been taken: what it taught stays."""
        self._targets = self._next_targets

    def state(self) -> Matrix:
        return self._targets

    def load(self, targets: Matrix) -> None:
        """Nothing where the number of micro-batches has been changed since."""
        if len(targets) == len(self._targets):
            self._targets = self._next_targets = targets


def gram(losses: Sequence[Sequence[Tensor]]) -> Matrix:
    """The products g_i·g_j, summed in float64. `losses`: of each, its gradient as a list of tensors, the same shapes
    for all. One wait for the device."""
    rows = []
    for i, first in enumerate(losses):
        for second in losses[: i + 1]:
            products = [(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]
            rows.append(torch.stack(products).sum())
    values = iter(torch.stack(rows).tolist())
    lower = [[next(values) for _ in range(i + 1)] for i in range(len(losses))]
    return [[lower[max(i, j)][min(i, j)] for j in range(len(losses))] for i in range(len(losses))]


def pcgrad(gram_NN: Matrix, order: random.Random) -> list[float]:
    """Weights of the losses' gradients in the sum of the projected ones. `order` gives each its order of the others.

    Where a gradient is not finite all weights are 1: the sum then says so.
    """

    def share(i: int, j: int, product: float, norm: float) -> float:
        return -product / gram_NN[j][j] if product < 0 else 0.0

    return _weights(gram_NN, order, share)


def adaptive(gram_NN: Matrix, target_NN: Matrix, order: random.Random, decay: float = DECAY) -> list[float]:
    """The same by GradVac. `target_NN`: φ̂, zeros at the start of training; moved in place, unless a gradient is not
    finite."""

    def share(i: int, j: int, product: float, norm: float) -> float:
        other, target = math.sqrt(gram_NN[j][j]), target_NN[i][j]
        cosine = max(-1.0, min(1.0, product / (norm * other)))
        target_NN[i][j] = (1 - decay) * target + decay * cosine
        if cosine >= target:
            return 0.0
        rest = math.sqrt(1 - target**2)
        return norm * (target * math.sqrt(1 - cosine**2) - cosine * rest) / (other * rest)

    return _weights(gram_NN, order, share)


def combine(losses: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """Σ_i weight_i · g_i, tensor by tensor, in the tensors' dtype."""
    combined = []
    for tensors in zip(*losses, strict=True):
        total = tensors[0] * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor, alpha=weight)
        combined.append(total)
    return combined


def _weights(gram_NN: Matrix, order: random.Random, share: Callable[[int, int, float, float], float]) -> list[float]:
    """Walks over all pairs. `share(i, j, g_i·g_j, |g_i|)` says how much of g_j to add to g_i as it is then."""
    N = len(gram_NN)
    weights = [1.0] * N
    if not all(math.isfinite(value) for row in gram_NN for value in row):
        return weights
    weights = [0.0] * N
    for i in range(N):
        own = [float(k == i) for k in range(N)]  # g_i as it is now, in the given gradients
        others = [j for j in range(N) if j != i]
        order.shuffle(others)
        for j in others:
            product = sum(own[k] * gram_NN[k][j] for k in range(N))
            square = sum(own[k] * own[m] * gram_NN[k][m] for k in range(N) for m in range(N))
            if gram_NN[j][j] > 0 and square > 0:  # a gradient of 0 is in nobody's way
                own[j] += share(i, j, product, math.sqrt(square))
        weights = [total + part for total, part in zip(weights, own, strict=True)]
    return weights
