"""Two runs over the same prompts: which answers belong together, what changed, and how sure that is.

The interval of a change is Tango's score interval for paired shares (Statistics in Medicine 17, 1998), which
keeps a width where nothing flipped; the test is McNemar's, exact. Where one prompt has several answers, or
prompts share a source, answers of one cluster move together: the interval then uses the number of clusters and
flips that have the same mean and variance, and the test flips signs of whole clusters, which for clusters of
one answer is McNemar's test again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.judges.base import PREREAD
from demur.measure.refusal import Record, declined
from demur.stats import minimum_detectable_difference, paired_interval

Key = tuple[str, str, int]
"""Prompt id, condition, sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Share of declined answers in runs a and b, over answers that could be read in both.

    Attributes:
        n, clusters: answers in pairs, and independent groups of them.
        a, b: answers declined in each. gained, lost: declined in b only, in a only.
        difference: share(b) - share(a), None for n = 0. interval: 95 %, score. bootstrap: 95 %, percentile
            bootstrap over clusters.
        p_value: two-sided, exact. p_greater, p_less: one-sided, for more and for fewer declined in b.
        detectable: smallest true change that this n finds with 80 % power; None where even a change of every
            answer would be missed.
        effective: (gained, lost, n) as the score interval takes them.
    """

    n: int
    clusters: int
    a: int
    b: int
    gained: int
    lost: int
    difference: float | None
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p_value: float
    p_greater: float
    p_less: float
    detectable: float | None
    effective: tuple[float, float, float]


def compare(
    a: Sequence[bool], b: Sequence[bool], clusters: Sequence[str] | None = None, *, level: float = 0.95
) -> Paired:
    """Compare yes/no outcomes of two runs, item by item.

    Args:
        a, b: (n,) outcomes over the same items. clusters: (n,) labels of items that move together.

    >>> made = compare([False] * 5, [True] * 5)
    >>> made.difference, round(made.p_value, 6)  # 2 * (1/2)**5
    (1.0, 0.0625)
    """
    x, y = np.asarray(a, bool), np.asarray(b, bool)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"outcomes of shapes {x.shape} and {y.shape}; both must be (n,) over the same items")
    labels = np.arange(x.size) if clusters is None else np.asarray(clusters)
    _, of = np.unique(labels, return_inverse=True)
    size = np.bincount(of)
    total = np.bincount(of, weights=y.astype(int) - x.astype(int)).astype(int)
    n, d = int(x.size), (float(total.sum() / x.size) if x.size else 0.0)
    gained, lost = int((y & ~x).sum()), int((x & ~y).sum())
    n_eff = n**2 / float((size**2).sum()) if n else 0.0
    discordant = max(float((total**2).sum()) / float((size**2).sum()), abs(d)) if n else 0.0
    effective = (n_eff * (discordant + d) / 2, n_eff * (discordant - d) / 2, n_eff)
    greater, less = flip_test(total)
    k = int(n_eff)
    return Paired(
        n=n,
        clusters=len(size),
        a=int(x.sum()),
        b=int(y.sum()),
        gained=gained,
        lost=lost,
        difference=d if n else None,
        interval=score_interval(*effective, level=level) if n else None,
        bootstrap=paired_interval(x, y, clusters=clusters, level=level),
        p_value=min(1.0, 2 * min(greater, less)),
        p_greater=greater,
        p_less=less,
        # with hardly a flip the observed share of flips says nothing about power: 8 flips are what it takes
        detectable=minimum_detectable_difference(k, min(1.0, max(discordant, 8 / k)), level=level)
        if k
        else None,
        effective=effective,
    )


def score_interval(gained: float, lost: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (gained - lost) / n, the change of a share between paired measurements.

    The d with |gained - lost - n d| = z sqrt(n (2 q(d) + d (1 - d))), q(d) being the restricted maximum
    likelihood estimate of the share of lost items. Without flips it is +-z^2 / (n + z^2).

    >>> [round(x, 4) for x in score_interval(0, 0, 100)]
    [-0.037, 0.037]
    """
    low, high = _upper(lost, gained, n, level), _upper(gained, lost, n, level)
    return -low, high


def _upper(b: float, c: float, n: float, level: float) -> float:
    z = float(special.ndtri((1 + level) / 2))

    def excess(d: float) -> float:
        half = -b - c + (2 * n - b + c) * d
        q = (sqrt(max(half * half + 8 * n * c * d * (1 - d), 0.0)) - half) / (4 * n)
        return b - c - n * d + z * sqrt(max(n * (2 * q + d * (1 - d)), 0.0))

    low, high = (b - c) / n + 1e-9, 1.0  # just beyond the estimate, where the half-width is above 0
    if low >= high or excess(low) <= 0:
        return min(low, 1.0)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def flip_test(totals: npt.ArrayLike) -> tuple[float, float]:
    """Exact one-sided p-values that the cluster totals have mean above 0, and below 0.

    Under no change each cluster's total is as likely with the other sign. The distribution of their sum is a
    convolution over the few sizes of totals that occur.

    >>> [round(p, 6) for p in flip_test([1, 1, 1, 1, 1])]  # (1/2)**5, and certainty
    [0.03125, 1.0]
    """
    t = np.asarray(totals, int)
    observed = int(t.sum())
    sizes, counts = np.unique(np.abs(t[t != 0]), return_counts=True)
    chances, lowest = np.ones(1), 0
    for size, m in zip(sizes.tolist(), counts.tolist(), strict=True):
        # sum of m signs times size: -m size, ..., m size in steps of 2 size
        log = special.gammaln(m + 1) - special.gammaln(np.arange(m + 1) + 1)
        binomial = np.exp(log - special.gammaln(m - np.arange(m + 1) + 1) - m * np.log(2))
        spread = np.zeros(2 * size * m + 1)
        spread[:: 2 * size] = binomial
        chances, lowest = np.convolve(chances, spread), lowest - size * m
    at = observed - lowest
    return min(1.0, float(chances[at:].sum())), min(1.0, float(chances[: at + 1].sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Two runs joined. `pairs` hold labels of the second run's prompts; the others stand in one run only."""

    pairs: tuple[tuple[Record, Record], ...]
    only_a: tuple[Record, ...]
    only_b: tuple[Record, ...]
    warnings: tuple[str, ...]


def match(a: Sequence[Record], b: Sequence[Record]) -> Matched:
    """Join two runs by prompt id, condition and sample.

    Where each run has one condition its name need not be the same (that may be what is compared); the
    difference is a warning, and so are prompts whose category or expectation differ.

    Raises:
        InputError: other judges, other prompt texts under one id, or no answer in common.
    """
    judge_a, judge_b = judge_of(a), judge_of(b)
    if PREREAD not in (judge_a, judge_b) and judge_a != judge_b:
        raise InputError(
            f"the runs were judged by {judge_a} and by {judge_b}, so a difference could be the judge's; "
            "judge both by one (--judge ID)"
        )
    single, warnings = _conditions(a, b)
    left, right = ({_key(r, single): r for r in some} for some in (a, b))
    common = [key for key in right if key in left]
    if not common:
        raise InputError(
            "the runs have no prompt id in common" + ("" if single else " under one condition") + "; the "
            f"first has {_some(r.prompt.id for r in a)}, the second {_some(r.prompt.id for r in b)}"
        )
    other = sorted({k[0] for k in common if left[k].prompt.messages != right[k].prompt.messages})
    if other:
        raise InputError(
            f"{len(other)} prompts have another text in the two runs under the same id ({_some(other)}), so "
            "their answers cannot be compared; give changed prompts ids of their own"
        )
    relabelled = {k[0] for k in common if _labels(left[k]) != _labels(right[k])}
    if relabelled:
        warnings.append(
            f"{len(relabelled)} prompts have another category or expectation in the two runs "
            f"({_some(sorted(relabelled))}); those of the second are used"
        )
    return Matched(
        pairs=tuple((left[k], right[k]) for k in common),
        only_a=tuple(r for k, r in left.items() if k not in right),
        only_b=tuple(r for k, r in right.items() if k not in left),
        warnings=tuple(warnings),
    )


def _conditions(a: Sequence[Record], b: Sequence[Record]) -> tuple[bool, list[str]]:
    names = [sorted({r.reply.condition for r in some}) for some in (a, b)]
    single = all(len(some) < 2 for some in names)
    if names[0] == names[1]:
        return single, []
    first, second = (", ".join(some) for some in names)
    return single, [f"the conditions differ: {first} in the first run, {second} in the second"]


def _key(record: Record, single: bool) -> Key:
    return (record.prompt.id, "" if single else record.reply.condition, record.reply.sample)


def _labels(record: Record) -> tuple[object, ...]:
    return (record.prompt.category, record.prompt.expected)


def _some(ids: object) -> str:
    found = list(ids)  # type: ignore[call-overload]
    return ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "") or "none"


def judge_of(records: Sequence[Record]) -> str:
    """The one judge behind the verdicts; what a reply's own fields decide counts for every judge.

    Raises:
        InputError: several judges.
    """
    names = sorted({r.verdict.judge for r in records} - {PREREAD})
    if len(names) > 1:
        raise InputError(f"one run holds verdicts of several judges ({', '.join(names)}); keep one judge's")
    return names[0] if names else PREREAD


def readable(pairs: Sequence[tuple[Record, Record]]) -> list[tuple[Record, Record]]:
    """The pairs in which both answers could be read."""
    return [(x, y) for x, y in pairs if None not in (declined(x.verdict.label), declined(y.verdict.label))]


def cluster_of(record: Record) -> str:
    """What an answer shares its luck with: the prompt's source or twin, else all answers to the prompt."""
    return f"group:{record.prompt.group}" if record.prompt.group else f"id:{record.prompt.id}"


def compare_pairs(pairs: Sequence[tuple[Record, Record]]) -> Paired:
    """`compare` on what was declined, over readable pairs and clustered."""
    both = readable(pairs)
    return compare(
        [bool(declined(x.verdict.label)) for x, _ in both],
        [bool(declined(y.verdict.label)) for _, y in both],
        [cluster_of(y) for _, y in both],
    )
