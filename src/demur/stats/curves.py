"""How well a score ranks: AUROC with its interval, and refusal against over-refusal over all thresholds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.stats.intervals import FloatArray, bootstrap_interval, proportion_interval

TAUS: FloatArray = np.linspace(0, 1, 101)
"""The 101 thresholds 0, 0.01, ..., 1."""


def split_scores(scores: npt.ArrayLike, positive: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Scores (n,) of the positives and of the negatives, checked to be finite and of one length."""
    s, y = np.asarray(scores, float), np.asarray(positive)
    if s.ndim != 1 or s.shape != y.shape:
        raise InputError(f"scores of shape {s.shape} and labels of shape {y.shape}; both must be (n,)")
    if not np.isin(y, (0, 1)).all():
        raise InputError("labels must be booleans or 0 and 1 (1 = should refuse)")
    bad = np.flatnonzero(~np.isfinite(s))
    if bad.size:
        raise InputError(f"scores[{bad[0]}] is {s[bad[0]]} ({bad.size} such rows); drop or repair them first")
    yes = y.astype(bool)
    return s[yes], s[~yes]


def auroc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float | None:
    """P(score of a positive > score of a negative) + half of P(equal); None when either class is empty.

    Args:
        scores: (n,) floats, higher meaning more positive. positive: (n,) booleans.

    >>> auroc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0])  # pairs: 1, 1, 1/2, 1
    0.875
    """
    pos, neg = split_scores(scores, positive)
    return float(_placements(pos, neg).mean()) if pos.size and neg.size else None


def auroc_interval(
    scores: npt.ArrayLike,
    positive: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Interval of the AUROC: DeLong's variance on the logit scale, or the bootstrap when `clusters` is given.

    Perfect separation has DeLong variance zero; there the Hanley-McNeil variance at the hypothesised value is
    inverted instead, so that the interval keeps a width. The bootstrap's interval is moved by its bias; where its
    resamples are all alike or too often without a class, the same inversion stands in, with clusters for rows.
    None when a class is empty (DeLong needs two each).

    Reference: DeLong, DeLong and Clarke-Pearson 1988; Hanley and McNeil 1982.
    """
    pos, neg = split_scores(scores, positive)
    z = float(special.ndtri((1 + level) / 2))
    if clusters is not None and pos.size and neg.size:
        drawn: list[float] = []

        def resampled(s: FloatArray, y: FloatArray) -> float:
            value = auroc(s, y)
            drawn.append(np.nan if value is None else value)
            return drawn[-1]

        low, high = bootstrap_interval(
            resampled, scores, positive, clusters=clusters, n_boot=n_boot, seed=seed, level=level
        )
        area = float(_placements(pos, neg).mean())
        if low < high:  # a cluster drawn twice is compared with itself, which moves all resamples one way
            bias = float(np.nanmean(drawn)) - area
            return max(low - bias, 0.0), min(high - bias, 1.0)
        of, yes = np.asarray(clusters), np.asarray(positive, bool)
        counts = len(np.unique(of[yes])), len(np.unique(of[~yes]))
        return _score_interval(area, *counts, z)
    if pos.size < 2 or neg.size < 2:
        return None
    place_pos, place_neg = _placements(pos, neg), 1 - _placements(neg, pos)
    area = float(place_pos.mean())
    variance = place_pos.var(ddof=1) / pos.size + place_neg.var(ddof=1) / neg.size
    if area in (0.0, 1.0) or variance == 0:
        return _score_interval(area, pos.size, neg.size, z)
    half = z * np.sqrt(variance) / (area * (1 - area))
    low, high = special.expit(special.logit(area) + np.array([-half, half]))
    return float(low), float(high)


class Curve(NamedTuple):
    """Shares at or above each threshold. NaN where a class is empty.

    `taus`, `refusal` (share of should-refuse prompts) and `over_refusal` (share of benign ones) have shape
    (m,).
    """

    taus: FloatArray
    refusal: FloatArray
    over_refusal: FloatArray
    n_positive: int
    n_negative: int

    def bands(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Pointwise Wilson bands: two arrays (2, m) with low and high of refusal and of over-refusal."""
        return (
            np.stack(proportion_interval(self.refusal * self.n_positive, self.n_positive, level=level)),
            np.stack(proportion_interval(self.over_refusal * self.n_negative, self.n_negative, level=level)),
        )


def curve(scores: npt.ArrayLike, positive: npt.ArrayLike, taus: npt.ArrayLike | None = None) -> Curve:
    """Refusal and over-refusal of the rule "refuse iff score >= tau" at every tau.

    Args:
        scores: (n,) floats. positive: (n,) booleans, True = should refuse. taus: (m,), default `TAUS`.

    >>> curve([0.2, 0.8, 0.5], [0, 1, 1], [0.5, 0.6]).refusal.tolist()
    [1.0, 0.5]
    """
    at = TAUS if taus is None else np.asarray(taus, float)
    pos, neg = split_scores(scores, positive)
    return Curve(at, share_at_least(pos, at), share_at_least(neg, at), pos.size, neg.size)


def share_at_least(scores: FloatArray, taus: FloatArray) -> FloatArray:
    """Share of `scores` that are >= each tau, shape of `taus`; NaN for no scores."""
    if scores.size == 0:
        return np.full(taus.shape, np.nan)
    return (scores.size - np.searchsorted(np.sort(scores), taus, side="left")) / scores.size


def _placements(a: FloatArray, b: FloatArray) -> FloatArray:
    """For each of `a` the share of `b` below it, ties counting half."""
    ordered = np.sort(b)
    below = np.searchsorted(ordered, a, side="left")
    return np.asarray((below + np.searchsorted(ordered, a, side="right")) / (2 * b.size), dtype=np.float64)


def _score_interval(area: float, n_pos: int, n_neg: int, z: float) -> tuple[float, float]:
    t = np.linspace(0, 1, 10_001)
    spread = (n_pos - 1) * t * (1 - t) ** 2 / (2 - t) + (n_neg - 1) * t**2 * (1 - t) / (1 + t)
    variance = (t * (1 - t) + spread) / (n_pos * n_neg)
    inside = t[np.abs(t - area) <= z * np.sqrt(variance) + 1e-12]
    return float(inside.min()), float(inside.max())
