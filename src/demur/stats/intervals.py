"""Intervals for shares: Wilson, Clopper-Pearson, and the bootstrap over prompts or clusters of prompts.

Shares without observations are undefined (None or NaN), never zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.types import Rate

FloatArray = npt.NDArray[np.float64]


def rate(
    k: int,
    n: int,
    *,
    judge: str | None = None,
    unread: int = 0,
    method: Literal["wilson", "exact"] = "wilson",
    level: float = 0.95,
) -> Rate:
    """k of n as a `Rate` with its two-sided interval.

    Args:
        k, n: counts, 0 <= k <= n. judge: id of what made the labels. unread: items left out of n.
        method: "wilson" (default) or "exact" (Clopper-Pearson). level: coverage, in (0, 1).

    Raises:
        InputError: counts that are no share.

    >>> r = rate(3, 10)
    >>> round(r.low, 3), round(r.high, 3)
    (0.108, 0.603)
    >>> rate(0, 0).value is None
    True
    """
    if not 0 <= k <= n or unread < 0:
        raise InputError(f"rate(k={k}, n={n}, unread={unread}): needs 0 <= k <= n and unread >= 0")
    if n == 0:
        return Rate(k=0, n=0, low=None, high=None, judge=judge, unread=unread)
    low, high = proportion_interval(k, n, method=method, level=level)
    return Rate(k=int(k), n=int(n), low=float(low), high=float(high), judge=judge, unread=unread)


def proportion_interval(
    k: npt.ArrayLike, n: npt.ArrayLike, *, method: Literal["wilson", "exact"] = "wilson", level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Two-sided interval of k / n, elementwise over arrays; NaN where n is 0.

    Wilson: the p with |k/n - p| <= z sqrt(p (1 - p) / n). Exact: Clopper-Pearson.
    """
    _check_level(level)
    kk, nn = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    tail = (1 - level) / 2
    if method == "exact":
        low = np.where(kk > 0, special.betaincinv(np.maximum(kk, 1), nn - kk + 1, tail), 0.0)
        high = upper_bound(kk, nn, tail)
        return np.where(nn > 0, low, np.nan), np.where(nn > 0, high, np.nan)
    if method != "wilson":
        raise InputError(f"method={method!r}: use 'wilson' or 'exact'")
    z2 = special.ndtri(1 - tail) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        p = kk / nn
        centre = (p + z2 / (2 * nn)) / (1 + z2 / nn)
        half = np.sqrt(z2 * p * (1 - p) / nn + z2**2 / (4 * nn**2)) / (1 + z2 / nn)
        # the ends are exact at k = 0 and k = n; float error would leave them a hair inside
        low = np.where(kk == 0, 0.0, centre - half)
        high = np.where(kk == nn, 1.0, centre + half)
    return np.where(nn > 0, low, np.nan), np.where(nn > 0, high, np.nan)


def upper_bound(k: npt.ArrayLike, n: npt.ArrayLike, delta: float) -> FloatArray:
    """One-sided Clopper-Pearson upper bound of k / n: the true share exceeds it with probability <= delta.

    >>> round(float(upper_bound(0, 45, 0.1)), 4)  # 1 - 0.1 ** (1 / 45)
    0.0499
    """
    kk, nn = np.broadcast_arrays(np.asarray(k, float), np.asarray(n, float))
    inner = special.betaincinv(kk + 1, np.maximum(nn - kk, 1), 1 - delta)
    return np.where(kk < nn, inner, 1.0)


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(*arrays)`, resampling rows (or whole clusters) together.

    Args:
        statistic: takes arrays of the same kinds and returns a float; NaN or None marks it undefined.
        arrays: each of shape (n, ...), row i belonging together.
        clusters: (n,) labels; rows of one label are drawn together.

    Returns:
        (low, high); (nan, nan) when more than 5 % of the resamples are undefined.

    >>> low, high = bootstrap_interval(np.mean, [0, 1, 1, 0, 1, 1, 1, 0], n_boot=500)
    >>> low < 5 / 8 < high
    True
    """
    _check_level(level)
    data = [np.asarray(a) for a in arrays]
    if not data or any(len(a) != len(data[0]) for a in data):
        raise InputError(
            f"bootstrap_interval: arrays of lengths {[len(a) for a in data]}; needs equal lengths"
        )
    n = len(data[0])
    if n == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    members = None if clusters is None else _members(clusters, n)
    out = np.empty(n_boot)
    for b in range(n_boot):
        if members is None:
            rows: npt.NDArray[np.intp] = rng.integers(0, n, n)
        else:
            rows = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        value = statistic(*(a[rows] for a in data))
        out[b] = np.nan if value is None else value
    return _quantiles(out, level)


def share_interval(
    hits: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Bootstrap interval of a share of yes/no outcomes over rows or clusters; None for no rows.

    Rows (clusters) of one size and number of hits are interchangeable, so a resample is one multinomial draw
    over the few kinds there are: exact, and independent of n in cost. Where every row (or cluster) has the
    same share the bootstrap would claim certainty; then the Wilson interval over clusters is returned.

    Args:
        hits: (n,) booleans. clusters: (n,) labels or None.
    """
    _check_level(level)
    hit = np.asarray(hits, bool)
    if hit.size == 0:
        return None
    _, of = np.unique(np.arange(hit.size) if clusters is None else np.asarray(clusters), return_inverse=True)
    size, total = np.bincount(of), np.bincount(of, weights=hit)
    kinds, count = np.unique(np.stack([size, total], axis=1), axis=0, return_counts=True)
    if np.ptp(kinds[:, 1] / kinds[:, 0]) == 0:
        low, high = proportion_interval(hit.mean() * len(size), len(size), level=level)
        return float(low), float(high)
    draws = np.random.default_rng(seed).multinomial(len(size), count / count.sum(), size=n_boot)
    sums = draws @ kinds
    return _quantiles(sums[:, 1] / sums[:, 0], level)


def _members(clusters: npt.ArrayLike, n: int) -> list[npt.NDArray[np.intp]]:
    labels = np.asarray(clusters)
    if len(labels) != n:
        raise InputError(
            f"clusters has length {len(labels)} and the data {n}; give one cluster label per row"
        )
    _, of = np.unique(labels, return_inverse=True)
    order = np.argsort(of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(of))[:-1])


def _quantiles(values: npt.NDArray[Any], level: float) -> tuple[float, float]:
    if np.isnan(values).mean() > 0.05:
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level={level}: a coverage lies strictly between 0 and 1, e.g. 0.95")
