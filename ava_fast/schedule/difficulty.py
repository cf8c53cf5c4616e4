"""Easy rows first: an order of a source's rows that follows a ranking, as a function of the place like any other.

    order = EasyFirst(ranking, mode="threshold", horizon=100_000, seed=0)
    order.at(np.arange(1000, 1008))

Places are cut into stages. Each stage draws from one stretch of the ranking, by a Shuffle of its own, so that any place
is found in constant time and nothing has to be remembered but the place.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from ava_fast.data.order import Places, Shuffle

STAGES = 32


class EasyFirst:
    """Of rows 0 … n − 1. Behind the last stage comes the ordinary shuffle, endlessly, from its first epoch on."""

    identity: str
    """What must be the same for a place to mean the same, in words."""

    def __init__(
        self,
        ranking_N: npt.NDArray[np.uint32],
        *,
        mode: Literal["threshold", "order"],
        pacing: Literal["linear", "root", "step"] = "linear",
        start: float = 0.2,
        horizon: int = 0,
        seed: int,
        stream: int = 0,
        identity: str = "",
    ):
        """`ranking_N`: the rows, easiest first.

        `threshold`: `horizon` places are cut into 32 stages, and stage k draws from the easiest start + (1 − start) ·
        pacing(k / 32) of the rows, rounded up, each of them once before any comes again. `order`: n places, of which
        stage k holds every row of the k-th 32nd of the ranking once.
        """
        n, self._ranking, self.identity = len(ranking_N), ranking_N, identity
        edges = [-(-n * k // STAGES) for k in range(STAGES + 1)]
        if mode == "order":
            places, self._firsts, counts = edges, edges[:-1], [b - a for a, b in itertools.pairwise(edges)]
        else:
            places, self._firsts = [-(-horizon * k // STAGES) for k in range(STAGES + 1)], [0] * STAGES
            shares = (start + (1.0 - start) * _pace(k / STAGES, pacing) for k in range(STAGES))
            counts = [min(n, math.ceil(share * n - 1e-9)) for share in shares]
        self._places = np.array(places, np.int64)
        # A stream beside those of the ordinary shuffles, which are numbers of sources.
        self._shuffles = [
            Shuffle(max(1, count), seed=seed, stream=stream + (k + 1 << 32)) for k, count in enumerate(counts)
        ]
        self._shuffle = Shuffle(n, seed=seed, stream=stream)

    def at(self, places: Places) -> Places:
        """Which row comes at each of these places ≥ 0."""
        stages, rows = np.searchsorted(self._places, places, side="right") - 1, np.empty_like(places)
        for stage in np.unique(stages).tolist():
            own = stages == stage
            within = places[own] - self._places[stage]
            if stage == STAGES:
                rows[own] = self._shuffle.at(within)
            else:
                rows[own] = self._ranking[self._firsts[stage] + self._shuffles[stage].at(within)]
        return rows


def _pace(progress: float, pacing: Literal["linear", "root", "step"]) -> float:
    match pacing:
        case "linear":
            return progress
        case "root":  # Platanios et al., 2019, "Competence-based curriculum learning"
            return math.sqrt(progress)
        case "step":
            return math.floor(4 * progress) / 4
