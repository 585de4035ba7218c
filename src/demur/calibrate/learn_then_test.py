"""The most true refusals whose false refusal rate provably stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.calibrate.base import Calibrator, Choice, Slice, candidates, count_at_least
from demur.calibrate.decide import FloatArray
from demur.errors import InputError, UnsupportedClaim
from demur.stats import upper_bound


@dataclass(frozen=True)
class LearnThenTest(Calibrator):
    """The most true refusals with false refusals of look-alike benign prompts provably at most alpha.

    For each category the null hypotheses "the false refusal rate at tau exceeds alpha" are tested from the
    safest threshold (never refuse) downwards, each at level delta / K, until the first is not rejected;
    the rejected threshold with the most true refusals is taken (the highest on a tie). Fixed-sequence
    testing keeps each category's error at delta / K, Bonferroni the joint one over K categories at delta.
    The p-value is the exact binomial tail; where prompts come in groups, Hoeffding-Bentkus on the mean
    over groups. As the false refusal rate falls with tau, thresholds between the calibration scores are
    valid too.

    With `ordinary_alpha`, ordinary benign prompts (those that resemble no category) get a budget as well: the
    share of them that opens with the refuse token of a steered category. All thresholds are raised together, so
    that each category gives up the same share of the true refusals it had, tested from the largest share
    downwards at level delta / (K + 1), as are then the categories. The path is fixed by look-alikes and
    should-refuse prompts, so the ordinary prompts test it independently, and raising a threshold cannot break a
    look-alike budget.

    Args:
        alpha: budget for the false refusal rate of each category.
        delta: chance at most, over calibration sets, that any budget is exceeded.
        taus: grid to search; None tries every distinct outcome. Others: see `Calibrator`.
        ordinary_alpha: budget for ordinary benign prompts, over all categories together; None sets none.

    Example:
        >>> import numpy as np
        >>> p = np.r_[np.full(30, 0.9), np.full(60, 0.2)]
        >>> point = LearnThenTest(alpha=0.05, delta=0.1).fit(
        ...     np.c_[p, 1 - p], np.arange(90) < 30, None, names=["refuse", "respond"])
        >>> t = point.thresholds["refuse"]
        >>> round(t.tau, 6), t.refusal_rate, t.benign_errors, round(t.bound, 4)
        (0.55, 1.0, 0, 0.0376)

    Reference: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", arXiv 2110.01052, sections 2-3;
    for monotone risks also Bates et al., arXiv 2101.02703, theorem A.1.
    """

    alpha: float = 0.05
    delta: float = 0.1
    taus: tuple[float, ...] | None = None
    ordinary_alpha: float | None = None

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)
        _check_share("delta", self.delta)
        if self.ordinary_alpha is not None:
            _check_share("ordinary_alpha", self.ordinary_alpha)

    @property
    def goal(self) -> str:
        """For example "max_tpr_fpr<=0.05@delta=0.1"; "ordinary<=0.02" where these have a budget too."""
        ordinary = "" if self.ordinary_alpha is None else f",ordinary<={self.ordinary_alpha:g}"
        return f"max_tpr_fpr<={self.alpha:g}{ordinary}@delta={self.delta:g}"

    def choose(self, slices: Sequence[Slice]) -> list[Choice]:
        """One tested threshold per slice.

        Raises:
            UnsupportedClaim: not even zero errors on so few benign prompts would do; says how many would.
        """
        claims = len(slices) + (self.ordinary_alpha is not None)
        needed = sample_size(self.alpha, self.delta, claims)
        short = [(s.name, n) for s in slices if (n := _draws(s)) < needed]
        if short:
            raise UnsupportedClaim(
                f"false refusals <= {self.alpha:g} with probability {1 - self.delta:g}"
                + (f" jointly over {len(slices)} categories" if len(slices) > 1 else "")
                + f" needs at least {needed} independent benign prompts per category, all answered; found "
                + ", ".join(f"{n} for {name}" for name, n in short)
                + ". Add prompts, steer fewer categories, or allow a larger alpha or delta"
            )
        level = self.delta / claims
        choices = [self._choose(s, level, self.alpha, candidates(s, self.taus)) for s in slices]
        if self.ordinary_alpha is None:
            return choices
        ways = [_Raising.of(s, c.tau) for s, c in zip(slices, choices, strict=True)]
        given_up = self._given_up(slices, ways, level, self.ordinary_alpha)
        if given_up == 0:
            return choices
        return [self._at(s, way.tau(given_up), level) for s, way in zip(slices, ways, strict=True)]

    def _given_up(
        self, slices: Sequence[Slice], ways: Sequence[_Raising], level: float, budget: float
    ) -> float:
        """The share of its true refusals that each category gives up for the ordinary prompts' budget."""
        if any(s.general for s in slices):
            raise UnsupportedClaim(
                "a budget for ordinary prompts needs look-alike prompts of every steered category: "
                f"{', '.join(s.name for s in slices if s.general)} would use the ordinary ones twice"
            )
        # each prompt is emitted as one category at most, so one column of each row is above -inf
        hit = np.max([way.share(s.ordinary) for s, way in zip(slices, ways, strict=True)], axis=0)
        everyone = Slice("ordinary", hit, hit, None, slices[0].ordinary_groups)
        n, needed = _draws(everyone), math.ceil(math.log(level) / math.log1p(-budget))
        if n < needed:
            raise UnsupportedClaim(
                f"false refusals of ordinary prompts <= {budget:g} need at least {needed} independent ordinary "
                f"benign prompts (of no category, or of 'general'), all answered; found {n}. Add prompts, or "
                "allow a larger ordinary_alpha or delta"
            )
        share = self._choose(everyone, level, budget, candidates(everyone)).tau
        return 0.0 if (hit >= share).sum() == (hit >= 0).sum() else share

    def _at(self, s: Slice, tau: float, level: float) -> Choice:
        """This threshold, with the bound that holds for the look-alikes there."""
        n = _draws(s)
        if n == s.benign.size:
            return Choice(tau, float(upper_bound(int((s.benign >= tau).sum()), n, level)))
        risk = _group_risk(s.benign, np.asarray(s.benign_groups), np.array([tau]))
        return Choice(tau, _risk_bound(float(risk[0]), n, level))

    def guarantee(self, slices: Sequence[Slice], where: str, claim: str) -> str:
        """The claim in words, with the set it is about."""
        joint = f", jointly over {', '.join(s.name for s in slices)}" if len(slices) > 1 else ""
        text = (
            f"On {where}, {claim.format(kind='look-alike')} is at most {self.alpha:g} "
            f"with probability at least {1 - self.delta:g}{joint}."
        )
        general = [s.name for s in slices if s.general]
        if general:
            text += (
                f" For {', '.join(general)} there were no look-alike benign prompts: "
                "there it holds for general benign prompts only."
            )
        if self.ordinary_alpha is not None:
            text += (
                f" Of ordinary benign prompts drawn like its {slices[0].ordinary.size}, at most "
                f"{self.ordinary_alpha:g} open with the refuse token of a steered category, with the same joint "
                "probability."
            )
        if any(_draws(s) < s.benign.size for s in slices):
            text += " Prompts of one group count as one draw, and rates are means over groups."
        return text

    def _choose(self, s: Slice, level: float, alpha: float, taus: FloatArray) -> Choice:
        n = _draws(s)
        if n == s.benign.size:
            errors = count_at_least(s.benign, taus)
            p_values = special.bdtr(errors.astype(float), n, alpha)
        else:
            risk = _group_risk(s.benign, np.asarray(s.benign_groups), taus)
            p_values = hoeffding_bentkus(risk, n, alpha)
        failed = np.flatnonzero(p_values > level)
        tested = taus[: failed[0]] if failed.size else taus
        best = int(count_at_least(s.refuse, tested).argmax())
        if n == s.benign.size:
            return Choice(float(tested[best]), float(upper_bound(errors[best], n, level)))
        return Choice(float(tested[best]), _risk_bound(float(risk[best]), n, level))


@dataclass(frozen=True, slots=True)
class _Raising:
    """How one category's threshold rises with the share of its true refusals that is given up.

    It starts at `start`; between the scores of true refusals it rises evenly in log-odds: `logits` (m,) at
    `shares` (m,), both rising.
    """

    start: float
    logits: FloatArray
    shares: FloatArray

    @classmethod
    def of(cls, s: Slice, tau: float) -> _Raising:
        kept = np.sort(_logit(s.refuse[s.refuse >= tau]))
        # a threshold at the i-th score (from 0) is on the way to giving up i + 1 of them; equal scores go together
        logits, last = np.unique(np.append(_logit(tau), kept), return_index=True)
        ends = np.append(last[1:], kept.size + 1) - 1
        return cls(tau, logits, ends / max(kept.size, 1))

    def share(self, scores: FloatArray) -> FloatArray:
        """The largest share at which each score still refuses, -inf where it never does."""
        shares = np.interp(_logit(scores), self.logits, self.shares)
        return np.where(scores >= self.start, shares, -np.inf)

    def tau(self, share: float) -> float:
        """The threshold at a share; once all true refusals are given up nothing is refused."""
        if share > self.shares[-1]:
            return 1.01
        return float(special.expit(np.interp(share, self.shares, self.logits)))


_SURE = 1e-12
"""Probabilities nearer to 0 or 1 than this count as this near, so that their log-odds are finite."""


def sample_size(
    alpha: float, delta: float, categories: int = 1, *, true_rate: float = 0.0, power: float = 0.9
) -> int:
    """Benign prompts per category needed to certify "false refusal rate <= alpha".

    With `true_rate` 0 no error will be seen and n solves (1 - alpha)^n <= delta / categories. Else it is
    the least n at which the test passes with at least `power` when the rate at the threshold is `true_rate`.

    >>> sample_size(0.05, 0.1), sample_size(0.05, 0.1, 5)
    (45, 77)
    """
    _check_share("alpha", alpha)
    _check_share("delta", delta)
    level = delta / categories
    if true_rate == 0:
        return math.ceil(math.log(level) / math.log1p(-alpha))
    if not 0 < true_rate < alpha:
        raise InputError(f"true_rate={true_rate}: must be below alpha={alpha}, else no n certifies it")
    n = np.arange(1, 100_001)
    # the most errors that still pass: the largest k whose binomial tail at alpha is within the level
    k = np.floor(special.bdtrik(level, n, alpha))
    k = np.where(special.bdtr(np.maximum(k, 0), n, alpha) > level, k - 1, k)
    enough = (k >= 0) & (special.bdtr(np.maximum(k, 0), n, true_rate) >= power)
    if not enough.any():
        raise InputError(
            f"true_rate={true_rate} is too close to alpha={alpha}: it takes more than 100,000 prompts"
        )
    return int(n[enough.argmax()])


def hoeffding_bentkus(risk: npt.ArrayLike, n: int, alpha: float) -> FloatArray:
    """p-value of "the mean of n independent losses in [0, 1] exceeds alpha", given their observed mean.

    min(exp(-n kl(min(risk, alpha), alpha)), e P(Bin(n, alpha) <= ceil(n risk))), elementwise.
    """
    r = np.asarray(risk, float)
    low = np.minimum(r, alpha)
    kl = special.rel_entr(low, alpha) + special.rel_entr(1 - low, 1 - alpha)
    tail = special.bdtr(np.minimum(np.ceil(n * r - 1e-9), n), n, alpha)
    return np.asarray(np.minimum(np.exp(-n * kl), np.e * tail), dtype=np.float64)


def _risk_bound(risk: float, n: int, level: float) -> float:
    """Smallest alpha that `hoeffding_bentkus` rejects at `level`, by bisection."""
    low, high = risk, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if middle < 1 and float(hoeffding_bentkus(risk, n, middle)) > level:
            low = middle
        else:
            high = middle
    return high


def _logit(p: npt.ArrayLike) -> FloatArray:
    """Log-odds, capped at certainty; -inf stays what it is."""
    q = np.asarray(p, float)
    capped = special.logit(np.clip(q, _SURE, 1 - _SURE))
    return np.asarray(np.where(np.isneginf(q), q, capped), dtype=np.float64)


def _draws(s: Slice) -> int:
    """Independent draws among the benign prompts: prompts, or groups of them."""
    return s.benign.size if s.benign_groups is None else len(np.unique(s.benign_groups))


def _group_risk(benign: FloatArray, groups: npt.NDArray[Any], taus: FloatArray) -> FloatArray:
    """Mean over groups of the share of the group's benign prompts that are refused, at each tau."""
    _, of, size = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / (size[of] * len(size))
    order = np.argsort(benign)
    above = np.append(np.cumsum(weight[order][::-1])[::-1], 0.0)
    return np.asarray(above[np.searchsorted(benign[order], taus, side="left")], dtype=np.float64)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name}={value}: must lie strictly between 0 and 1, e.g. 0.05")
