"""Do probabilities mean what they say: reliability bins and the expected calibration error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.stats.curves import split_scores
from demur.stats.intervals import FloatArray, proportion_interval


class Reliability(NamedTuple):
    """One entry per bin, shape (bins,). Empty bins have 0 in `counts` and NaN elsewhere.

    `edges` (bins + 1,); `confidence` the mean probability; `frequency` the share of positives with its Wilson
    interval `low`, `high`.
    """

    edges: FloatArray
    counts: npt.NDArray[np.int64]
    confidence: FloatArray
    frequency: FloatArray
    low: FloatArray
    high: FloatArray


def reliability(p: npt.ArrayLike, y: npt.ArrayLike, bins: int = 10, *, level: float = 0.95) -> Reliability:
    """Bin probabilities into equal widths and compare each bin's mean with its share of positives.

    Args:
        p: (n,) probabilities in [0, 1]; 1.0 falls into the last bin. y: (n,) booleans.

    >>> reliability([0.1, 0.2, 0.9], [0, 1, 1], bins=2).counts.tolist()
    [2, 1]
    """
    if bins < 1:
        raise InputError(f"bins={bins}: needs at least one bin")
    split_scores(p, y)
    prob, label = np.asarray(p, float), np.asarray(y, float)
    if prob.size and (prob.min() < 0 or prob.max() > 1):
        raise InputError(f"probabilities lie in [{prob.min():g}, {prob.max():g}]; calibration needs [0, 1]")
    at = np.minimum((prob * bins).astype(np.int64), bins - 1)
    count = np.bincount(at, minlength=bins).astype(np.int64)
    hits = np.bincount(at, weights=label, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(at, weights=prob, minlength=bins) / count
        frequency = hits / count
    low, high = proportion_interval(hits, count, level=level)
    return Reliability(np.linspace(0, 1, bins + 1), count, confidence, frequency, low, high)


def ece(p: npt.ArrayLike, y: npt.ArrayLike, bins: int = 10) -> float | None:
    """Expected calibration error: sum over bins of (n_b / n) |confidence_b - frequency_b|; None for no rows.

    >>> round(ece([0.1, 0.2, 0.9], [0, 1, 1], bins=2), 4)  # 2/3 * |0.15 - 0.5| + 1/3 * |0.9 - 1|
    0.2667
    """
    r = reliability(p, y, bins)
    n = r.counts.sum()
    return float(np.nansum(r.counts * np.abs(r.confidence - r.frequency)) / n) if n else None
