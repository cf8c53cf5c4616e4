"""The gradient noise scale: how large a batch still pays (McCandlish et al., "An Empirical Model of Large-Batch
Training", 2018, appendix A).

A gradient over b sequences has E|g|² = |G|² + tr(Σ) / b, with G the true gradient and Σ the covariance of one
sequence's. Two batch sizes give both unknowns. Their ratio, tr(Σ) / |G|², is the batch at which noise and signal are
equal: far smaller batches waste steps, far larger ones waste sequences. Either estimate is noisy, so both are averaged
before the ratio is taken.
"""

from __future__ import annotations

from typing import Any

WEIGHT = 0.9  # of the past, per measurement


class NoiseScale:
    """From the mean |g|² over gradients of `small` sequences each and the |g|² of their mean over `big` sequences."""

    def __init__(self, small: float, big: float):
        if not 0 < small < big:
            raise ValueError(f"the small batch has {small} sequences and the big one {big}: it must be smaller")
        self._small, self._big = small, big
        self._signal = self._noise = self._weight = 0.0

    def update(self, small_square: float, big_square: float, *, big: float | None = None, parts: int = 1) -> None:
        """One measurement: mean of the small batches' squared norms, squared norm of the big one's, of `big` sequences
        this time if that is given.

        Where the small ones were taken in `parts`, even or not, pass the mean of the parts' squared norms, weighted by
        their share of the small batch: it is that of batches of small / parts.
        """
        small, big = self._small / parts, big or self._big
        signal = (big * big_square - small * small_square) / (big - small)
        noise = (small_square - big_square) / (1 / small - 1 / big)
        self._signal = WEIGHT * self._signal + (1 - WEIGHT) * signal
        self._noise = WEIGHT * self._noise + (1 - WEIGHT) * noise
        self._weight = WEIGHT * self._weight + 1 - WEIGHT

    @property
    def sequences(self) -> float | None:
        """tr(Σ) / |G|², in sequences; None before a measurement, and while noise hides the signal."""
        if self._weight == 0.0 or self._signal <= 0.0 or self._noise < 0.0:
            return None
        return self._noise / self._signal

    def state_dict(self) -> dict[str, Any]:
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._signal, self._noise, self._weight = state["signal"], state["noise"], state["weight"]
