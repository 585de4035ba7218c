"""Do the scores that are served still look like those the operating point was calibrated on?

A guarantee holds for prompts drawn like the calibration set, so a change of the traffic has to be noticed. The
test is sequential and exact: each new score is ranked among the calibration scores and everything served since
(ties broken at random), which gives independent uniform numbers as long as all of them are exchangeable. Bets
against uniformity are multiplied up from every possible moment of change (Shiryaev-Roberts). The mean of the
bets, R, satisfies E[R after n requests] = n and R is a submartingale, so by Doob's inequality

    P(R reaches c within the first n requests) <= n / c      for every n, without a shift.

With c = 1,000,000: at most 1 % per 10,000 requests. Nothing is assumed about the distribution. What it cannot see:
a change that leaves the distribution of p_refuse as it is. A change so slow that each request looks like the ones
before it is found late, since the ranks are taken among them too.

References: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, chapter 8; Shin, Ramdas and
Rinaldo 2022, arXiv 2203.03532 (e-detectors).
"""

from __future__ import annotations

import math
import threading
from collections import deque

import numpy as np
import numpy.typing as npt
from scipy import stats

from demur.errors import InputError

FloatArray = npt.NDArray[np.float64]
BINS = 512
"""Cells of the logit scale in which scores are counted: memory stays flat for any number of requests."""
_REACH = 14.0
_CELLS = 200
_BETAS = (
    (1.0, 1.3), (1.3, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 5.0), (5.0, 1.0), (1.0, 20.0), (20.0, 1.0),
    (0.7, 0.7), (1.5, 1.5), (4.0, 4.0), (3.0, 8.0), (8.0, 3.0),
)  # fmt: skip
"""Densities that are bet on: scores higher, lower, further apart, closer together, in one region."""
_COARSE, _PRIOR, _KEEP = 10, 5.0, 0.995
"""One more bet, for shapes that no Beta has: a histogram of about the last 200 ranks, drawn towards flat."""
LEAST = 20
"""Reference scores that a test of drift needs."""


class Drift:
    """Sequential test of p_refuse against calibration scores.

    Args:
        reference: p_refuse of the calibration prompts, (n,) in [0, 1], at least 20.
        window: recent scores that `distance` looks at; the test itself forgets nothing.
        per_request: bound of the false-alarm probability for each request; 1e-6 is 1 % per 10,000 requests.
        seed: of the random order of ties.

    Measured on simulated two-humped scores with 400 reference scores: a shift after which a new score beats an old
    one with probability 0.62 alarmed within 1,000 requests in 80 of 80 streams (median 199 requests when the
    shift is there from the start, 116 after 2,000 unshifted ones); at 0.58 in 68 of 80.

    >>> drift = Drift(np.linspace(0.0, 1.0, 200))
    >>> for _ in range(100):
    ...     drift.add(0.999)
    >>> drift.alarm
    True
    """

    def __init__(
        self, reference: npt.ArrayLike, window: int = 1000, *, per_request: float = 1e-6, seed: int = 0
    ) -> None:
        scores = np.asarray(reference, float).ravel()
        if scores.size < LEAST or not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
            raise InputError(
                f"drift: {scores.size} reference scores between {scores.min(initial=0)} and "
                f"{scores.max(initial=0)}; at least {LEAST} probabilities are needed"
            )
        if not 0 < per_request < 1:
            raise InputError(f"drift: per_request={per_request} is no probability")
        self.reference = np.sort(scores)
        self.limit = 1 / per_request
        self._recent: deque[float] = deque(maxlen=window)
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Start anew from the reference, after the alarm has been looked into."""
        with self._lock:
            self._counts = np.bincount([_cell(p) for p in self.reference], minlength=BINS)
            self._bets = np.zeros(len(_BETAS) + 1)
            self._shape = np.full(_COARSE, _PRIOR)
            self._top = 0.0
            self._recent.clear()
            self.n = 0
            self.alarm = False
            self.alarmed_at: int | None = None

    def add(self, p_refuse: float) -> None:
        """Take in one served score. Numbers that are no probabilities are passed over."""
        if not 0 <= p_refuse <= 1:
            return
        cell = _cell(p_refuse)
        with self._lock:
            self._counts[cell] += 1
            above = int(self._counts[cell + 1 :].sum())
            rank = above + self._random.random() * int(self._counts[cell])
            u = rank / (len(self.reference) + self.n + 1)
            self.n += 1
            self._recent.append(p_refuse)
            self._bets = np.minimum((1 + self._bets) * self._pay(u), 1e300)
            self._top = max(self._top, float(self._bets.mean()))
            if self._top >= self.limit and not self.alarm:
                self.alarm, self.alarmed_at = True, self.n

    def _pay(self, u: float) -> FloatArray:
        """What each bet pays for `u`; the last one bets on the recent shape, known before `u` is."""
        k = min(int(u * _COARSE), _COARSE - 1)
        recent = self._shape[k] * _COARSE / self._shape.sum()
        self._shape = _PRIOR + (self._shape - _PRIOR) * _KEEP
        self._shape[k] += 1
        return np.append(_TABLE[min(int(u * _CELLS), _CELLS - 1)], recent)

    @property
    def value(self) -> float:
        """log10 of the evidence R, at least 0; the alarm is raised once it reaches `log10(limit)` (6)."""
        return math.log10(max(1.0, float(self._bets.mean())))

    @property
    def p_value(self) -> float:
        """Bound of the probability of as much evidence in this many requests when nothing has changed."""
        return min(1.0, self.n / self._top) if self._top > 0 else 1.0

    @property
    def distance(self) -> float | None:
        """Largest gap between the distribution functions of the reference and the recent scores, 0 to 1.

        A description without an error rate (the Kolmogorov-Smirnov statistic); None before any request.
        """
        with self._lock:
            recent = np.sort(np.array(self._recent))
        if not recent.size:
            return None
        at = np.concatenate([self.reference, recent])
        ours = np.searchsorted(recent, at, side="right") / recent.size
        theirs = np.searchsorted(self.reference, at, side="right") / self.reference.size
        return float(np.abs(ours - theirs).max())


def _cell(p: float) -> int:
    """The cell of a probability; the cells are fixed, so ranks by them are as exchangeable as the scores."""
    if p <= 0 or p >= 1:
        return 0 if p <= 0 else BINS - 1
    z = math.log(p) - math.log1p(-p)
    return int((min(max(z, -_REACH), _REACH) + _REACH) / (2 * _REACH) * (BINS - 1))


def _table() -> FloatArray:
    """(cells, bets): average density of each Beta over each cell of [0, 1], so each bet has mean exactly 1."""
    edges = np.linspace(0.0, 1.0, _CELLS + 1)
    return np.stack([np.diff(stats.beta.cdf(edges, a, b)) * _CELLS for a, b in _BETAS], axis=1)


_TABLE = _table()
