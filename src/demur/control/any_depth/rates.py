"""Two ways to count stops over depths, which are never mixed: at exactly this depth, and at any depth so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.stats import rate
from demur.types import Rate

FEW = 10
"""Answers below which a depth has no rate of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRate:
    """Stops at one depth.

    Attributes:
        per_depth: share stopped by the check at exactly this depth, of the answers that are that long; None where
            these are fewer than `FEW`.
        per_answer: share stopped by this check or any before it, of all answers. One that ended before was not
            stopped.
    """

    depth: int
    per_depth: Rate | None
    per_answer: Rate


def depth_rates(scores: npt.ArrayLike, depths: Sequence[int], threshold: float) -> list[DepthRate]:
    """Both rates at each depth, from scores (answers, depths) with NaN where an answer is shorter.

    >>> rows = [[0.9, 0.1], [0.2, 0.8], [0.1, float("nan")]]
    >>> [(r.depth, r.per_answer.k, r.per_answer.n) for r in depth_rates(rows, [32, 64], 0.5)]
    [(32, 1, 3), (64, 2, 3)]
    """
    s = np.asarray(scores, float)
    if s.ndim != 2 or s.shape[1] != len(depths) or list(depths) != sorted(depths):
        raise InputError(
            f"scores of shape {s.shape} for depths {list(depths)}: one column for each, ascending"
        )
    there, hit = np.isfinite(s), np.nan_to_num(s, nan=-np.inf) >= threshold
    so_far = np.logical_or.accumulate(hit, axis=1)
    out = []
    for k, depth in enumerate(depths):
        n = int(there[:, k].sum())
        own = rate(int(hit[:, k].sum()), n) if n >= FEW else None
        out.append(DepthRate(depth=depth, per_depth=own, per_answer=rate(int(so_far[:, k].sum()), len(s))))
    return out
