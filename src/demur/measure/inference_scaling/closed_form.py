"""Closed forms of "sample until a verifier accepts": task types, budgets of attempts, and what they earn.

A task type j has share p_j and single-sample correctness r_j; the verifier accepts a correct sample with
probability c (completeness) and rejects a wrong one with probability s (soundness). Then

    a_j = c r_j + (1 - s)(1 - r_j)      one attempt is accepted
    beta_j = 1 - a_j                    one attempt is rejected
    q_j = c r_j / a_j                   an accepted answer is correct

and everything else follows from geometric series. Attempts of one task are taken to be independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize

from demur.errors import InputError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What outcomes are worth, in one unit. No answer is worth 0.

    Attributes:
        value: V_c, an accepted correct answer; above 0.
        false: -V_f, what an accepted wrong answer costs; 0 or more.
        sample: C, what one attempt costs; 0 or more.
    """

    value: float = 1.0
    false: float = 0.0
    sample: float = 0.0

    def __post_init__(self) -> None:
        if not np.isfinite([self.value, self.false, self.sample]).all():
            raise InputError(f"{self}: costs must be finite numbers")
        if self.value <= 0:
            raise InputError(
                f"value={self.value:g}: a correct answer must be worth more than 0, no answer's worth"
            )
        if self.false < 0:
            raise InputError(
                f"false={self.false:g}: this would make V_f = {-self.false:g} and pay for wrong answers. Give "
                "what a wrong accepted answer costs as a number of 0 or more, e.g. 2 for twice the value of a "
                "correct one"
            )
        if self.sample < 0:
            raise InputError(f"sample={self.sample:g}: an attempt costs 0 or more")

    @property
    def ratio(self) -> float:
        """|V_f| / V_c."""
        return self.false / self.value


class Curve(NamedTuple):
    """Outcomes under budgets K, arrays of shape (m,). right + wrong + none = 1; samples is an expectation."""

    K: FloatArray
    right: FloatArray
    wrong: FloatArray
    none: FloatArray
    samples: FloatArray
    utility: FloatArray


class Best(NamedTuple):
    """The budget that earns most. `K` is None when no finite one does: each further attempt still gains.

    `utility` is then the limit. `enough` is the smallest budget whose utility is less than V_c / 100 below it
    (beyond 4,096 attempts to one part in 4,096).
    """

    K: int | None
    utility: float
    enough: int


class TaskTypes:
    """A mixture of task types before one verifier.

    Args:
        share: (J,) p_j > 0 with sum 1. correct: (J,) r_j.
        soundness, completeness: s and c, one number or (J,) where the verifier differs by type.
        names: J names; type 1, type 2, ... by default.

    Raises:
        InputError: lengths differ, a probability outside [0, 1], shares that are no shares.

    >>> types = TaskTypes([0.58, 0.42], [0.87, 0.13], soundness=0.75)
    >>> round(types.ceiling, 4), types.best(Costs(false=0.7)).K, types.best(Costs(false=0.1)).K
    (0.7162, 3, None)
    """

    def __init__(
        self,
        share: npt.ArrayLike,
        correct: npt.ArrayLike,
        *,
        soundness: npt.ArrayLike,
        completeness: npt.ArrayLike = 1.0,
        names: Sequence[str] = (),
    ) -> None:
        p, r = np.atleast_1d(np.asarray(share, float)), np.atleast_1d(np.asarray(correct, float))
        s, c = np.asarray(soundness, float), np.asarray(completeness, float)
        if p.ndim != 1 or not p.size or r.shape != p.shape or {s.shape, c.shape} - {(), p.shape}:
            raise InputError(
                f"share {p.shape}, correct {r.shape}, soundness {s.shape} and completeness {c.shape} do not fit; "
                "give one share and one correctness for each type, and a verifier for all or for each"
            )
        for what, x in (("share", p), ("correct", r), ("soundness", s), ("completeness", c)):
            if not ((x >= 0) & (x <= 1)).all():
                bad = x[~((x >= 0) & (x <= 1))].flat[0]
                raise InputError(f"{what} holds {bad:g}, which is no probability; it must lie in [0, 1]")
        if not (p > 0).all() or abs(p.sum() - 1) > 1e-6:
            raise InputError(
                f"shares {', '.join(f'{x:g}' for x in p)} sum to {p.sum():g}; give a share above 0 for each type, "
                "summing to 1"
            )
        if names and len(names) != p.size:
            raise InputError(f"{len(names)} names for {p.size} types")
        self.names = tuple(names) or tuple(f"type {j + 1}" for j in range(p.size))
        self.share: FloatArray = p / p.sum()
        self.correct: FloatArray = r
        self.soundness: FloatArray = np.broadcast_to(s, p.shape)
        self.completeness: FloatArray = np.broadcast_to(c, p.shape)

    @property
    def accept_right(self) -> FloatArray:
        """(J,) probability that one attempt is correct and accepted."""
        return self.completeness * self.correct

    @property
    def accept_wrong(self) -> FloatArray:
        """(J,) probability that one attempt is wrong and accepted."""
        return (1 - self.soundness) * (1 - self.correct)

    @property
    def accept(self) -> FloatArray:
        """(J,) a_j."""
        return self.accept_right + self.accept_wrong

    @property
    def reject(self) -> FloatArray:
        """(J,) beta_j = 1 - a_j, computed without the subtraction."""
        return (1 - self.completeness) * self.correct + self.soundness * (1 - self.correct)

    @property
    def precision(self) -> FloatArray:
        """(J,) q_j; 0 for a type that is never accepted."""
        right, accepted = self.accept_right, self.accept
        out: FloatArray = np.divide(right, accepted, out=np.zeros_like(right), where=accepted > 0)
        return out

    @property
    def ceiling(self) -> float:
        """Accuracy with unlimited attempts, sum of p_j q_j. Never-accepted types count as not solved."""
        return float(self.share @ self.precision)

    @property
    def single(self) -> float:
        """Accuracy of one sample without a verifier, sum of p_j r_j."""
        return float(self.share @ self.correct)

    def curve(self, K: npt.ArrayLike, costs: Costs | None = None) -> Curve:
        """Outcomes under budgets K (whole numbers from 0; infinity gives the limit)."""
        costs = costs or Costs()
        k = np.atleast_1d(np.asarray(K, float))
        if not ((k >= 0) & ((k == np.floor(k)) | np.isinf(k))).all():
            raise InputError(f"K={K!r}: a budget is a whole number of attempts, 0 or more")
        a, b = self.accept, self.reject
        with np.errstate(divide="ignore", invalid="ignore"):
            log_reject = np.where(b < 0.5, np.log(b), np.log1p(-a))
            exponent = np.where((k[:, None] == 0) | (a == 0), 0.0, k[:, None] * log_reject)
            reached = -np.expm1(exponent)  # (m, J): accepted within K
            attempts = np.where(a > 0, reached / a, k[:, None]) @ self.share
        right, wrong = reached @ (self.share * self.precision), reached @ (self.share * (1 - self.precision))
        spent = costs.sample * attempts if costs.sample else 0.0
        utility = costs.value * right - costs.false * wrong - spent
        return Curve(k, right, wrong, np.exp(exponent) @ self.share, attempts, utility)

    def gains(self, costs: Costs) -> FloatArray:
        """(J,) what one attempt at a task of type j earns: V_c c r_j + V_f (1 - s)(1 - r_j) - C."""
        gain = costs.value * self.accept_right - costs.false * self.accept_wrong - costs.sample
        return np.asarray(gain, dtype=np.float64)

    def marginal(self, k: npt.ArrayLike, costs: Costs) -> FloatArray:
        """(m,) what allowing attempt k (1, 2, ...) adds to the utility: sum of p_j beta_j^(k-1) gain_j."""
        at = np.atleast_1d(np.asarray(k, float))[:, None]
        return np.asarray(self.reject ** (at - 1) @ (self.share * self.gains(costs)), dtype=np.float64)

    def posterior(self, k: npt.ArrayLike) -> FloatArray:
        """(m, J) share of each type among tasks that are still without an accepted answer at attempt k."""
        weight = self.share * self.reject ** (np.atleast_1d(np.asarray(k, float))[:, None] - 1)
        total = weight.sum(axis=1, keepdims=True)
        out: FloatArray = np.divide(weight, total, out=np.full_like(weight, np.nan), where=total > 0)
        return out

    def long_run_ratio(self) -> float | None:
        """rho*: below this |V_f| / V_c the hardest type still earns, at C = 0, and no budget is too large.

        The hardest type is the accepted one with the largest beta. Infinite when it is never accepted wrongly;
        None when no type is ever accepted.
        """
        open_ = self.accept > 0
        if not open_.any():
            return None
        hard = open_ & (self.reject == self.reject[open_].max())
        share = self.share[hard]
        return _ratio(float(share @ self.accept_right[hard]), float(share @ self.accept_wrong[hard]))

    def first_ratio(self) -> float | None:
        """The |V_f| / V_c at which the first attempt earns nothing, at C = 0; None when nothing is accepted."""
        return _ratio(float(self.share @ self.accept_right), float(self.share @ self.accept_wrong))

    def best(self, costs: Costs) -> Best:
        """The budget with the highest utility, exactly, over all whole numbers; the smallest one on a tie.

        The marginal gain is a sum of exponentials in k, so it changes sign at few places, which are found one
        by one; a search over a table of utilities would stop where float increments vanish.
        """
        gain, beta = self.share * self.gains(costs), self.reject
        slow = np.unique(beta[beta > 0])[::-1]
        weight = np.array([gain[beta == b].sum() for b in slow])
        slow, weight = slow[weight != 0], weight[weight != 0]
        candidates = [0, 1]
        if slow.size:
            rate = np.log(slow[0]) - np.log(slow)
            for x in sign_changes(weight, rate):
                near = np.arange(max(int(x) - 1, 0), int(x) + 3)
                rising = near[(np.exp(-rate * near[:, None]) @ weight) > 0]
                candidates += [int(rising[-1]) + 1] if rising.size else []
        candidates = sorted(set(candidates))
        at = self.curve(candidates, costs).utility
        K, top = candidates[int(at.argmax())], float(at.max())
        limit = float(self.curve(np.inf, costs).utility[0])
        rises = bool(slow.size and weight[0] > 0)
        if rises and limit > 0 and limit >= top:
            return Best(None, limit, self._enough(None, limit, costs))
        return Best(K, top, self._enough(K, top, costs))

    def _enough(self, K: int | None, top: float, costs: Costs) -> int:
        goal, high = top - 0.01 * costs.value, 1 if K is None else K
        while K is None and self.curve(high, costs).utility[0] < goal:
            high *= 2
        at = self.curve(np.unique(np.linspace(0, high, 4097).astype(int)), costs)
        return int(at.K[at.utility >= goal][0])


def _ratio(right: float, wrong: float) -> float | None:
    if wrong == 0:
        return None if right == 0 else float("inf")
    return right / wrong


def sign_changes(weight: FloatArray, rate: FloatArray) -> list[float]:
    """The x > 0 where sum of weight_i exp(-rate_i x) changes sign, ascending.

    There are at most as many as sign changes in `weight` (Descartes' rule for exponentials): times
    exp(t x) with t between the two rates of such a change, the derivative has one change fewer, and between
    its zeros the function is monotone.

    Args:
        weight: (J,) non-zero. rate: (J,) ascending from 0.

    >>> [round(x, 6) for x in sign_changes(np.array([-1.0, 2.0]), np.array([0.0, 1.0]))]  # ln 2
    [0.693147]
    """
    turn = np.flatnonzero(np.sign(weight[1:]) != np.sign(weight[:-1]))
    if not turn.size:
        return []

    def value(x: float) -> float:
        return float(np.exp(-rate * x) @ weight)

    pivot = (rate[turn[0]] + rate[turn[0] + 1]) / 2
    edges = [0.0, *sign_changes((pivot - rate) * weight, rate)]
    last = max(1.0, 2 * edges[-1])
    while value(last) * weight[0] <= 0:
        last *= 2
    found = []
    for low, high in zip(edges, [*edges[1:], last], strict=True):
        if value(low) * value(high) < 0:
            found.append(float(optimize.brentq(value, low, high)))
    return found


class Plays(NamedTuple):
    """Simulated runs, arrays of shape (n,): the type, the attempts made, and what came out."""

    type: npt.NDArray[np.intp]
    attempts: npt.NDArray[np.int64]
    right: npt.NDArray[np.bool_]
    wrong: npt.NDArray[np.bool_]


def play(types: TaskTypes, K: int, n: int, rng: np.random.Generator) -> Plays:
    """Sample until accepted, n times, at most K attempts each; sample by sample, with no closed form."""
    of = rng.choice(types.share.size, n, p=types.share)
    attempts, right, wrong = np.zeros(n, np.int64), np.zeros(n, bool), np.zeros(n, bool)
    going = np.arange(n)
    for _ in range(K):
        j = of[going]
        attempts[going] += 1
        correct = rng.random(going.size) < types.correct[j]
        kept = np.where(correct, types.completeness[j], 1 - types.soundness[j])
        accepted = rng.random(going.size) < kept
        right[going], wrong[going] = accepted & correct, accepted & ~correct
        going = going[~accepted]
        if not going.size:
            break
    return Plays(of, attempts, right, wrong)
