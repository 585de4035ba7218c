"""Correct a judged rate: by the judge's error measured elsewhere, or by people's labels of a part of the answers.

`rogan_gladen` (Rogan and Gladen 1978) needs sensitivity and specificity and trusts that they hold here too;
`corrected_change` does the same for the difference of two such rates.
`prediction_powered` (Angelopoulos et al. 2023) needs labels of a random part of these very answers and trusts
nothing else. `from_cells` does the same where the labelled answers were drawn at a known rate from each of several
cells, and gives the judge's sensitivity, specificity and kappa with it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.stats.intervals import FloatArray, rate
from demur.types import Rate


class WeakJudgeWarning(UserWarning):
    """The judge is hardly better than chance, so a corrected rate says little or nothing."""


def rogan_gladen(
    rate: Rate,
    sensitivity: Rate | float,
    specificity: Rate | float,
    *,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> Rate:
    """The rate that a perfect judge would have seen: (r + Sp - 1) / (Se + Sp - 1), clipped to [0, 1].

    The interval draws r, Se and Sp from their Jeffreys posteriors Beta(k + 1/2, n - k + 1/2), so it carries
    the uncertainty of the judge's own evaluation; a plain float is taken as known. It assumes that the judge
    errs on these answers as it did where it was measured.

    Args:
        rate: the judged rate. sensitivity, specificity: `Rate` of the judge, or floats in [0, 1].

    Returns:
        The same `Rate` with `corrected` and `corrected_interval` set. Both stay None when n is 0, when the
        judge's error is undefined, when Se + Sp <= 1 (with a warning), or when the rate lies so far beyond what
        that error allows that clipping would leave an interval without width.

    >>> from demur.stats import rate
    >>> round(rogan_gladen(rate(50, 100), 0.9, 0.8).corrected, 4)  # (0.5 - 0.2) / 0.7
    0.4286
    """
    se, sp = _value(sensitivity), _value(specificity)
    if rate.value is None or se is None or sp is None:
        return rate
    for name, value in (("sensitivity", se), ("specificity", sp)):
        if not 0 <= value <= 1:
            raise InputError(f"{name}={value}: must lie in [0, 1]")
    if se + sp - 1 <= 0.2:
        warnings.warn(
            f"judge {rate.judge or '(unnamed)'}: sensitivity {se:.2f} + specificity {sp:.2f} - 1 is "
            f"{se + sp - 1:.2f}; a correction by so weak a judge says little. Use a better judge.",
            WeakJudgeWarning,
            stacklevel=2,
        )
    if se + sp <= 1:
        return rate
    corrected = float(np.clip((rate.value + sp - 1) / (se + sp - 1), 0, 1))
    rng = np.random.default_rng(seed)
    r, a, b = (_posterior(x, draws, rng) for x in (rate, sensitivity, specificity))
    informed = a + b - 1
    tail = (1 - level) / 2
    if (informed <= 0.01).mean() > tail:  # the judge may be no better than chance: nothing is known
        return replace(rate, corrected=corrected, corrected_interval=(0.0, 1.0))
    low, high = _middle(np.clip((r + b - 1) / np.maximum(informed, 0.01), 0, 1), level, corrected)
    return replace(rate, corrected=corrected, corrected_interval=(low, high)) if low < high else rate


def corrected_change(
    change: float,
    interval: tuple[float, float],
    sensitivity: Rate | float,
    specificity: Rate | float,
    *,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]] | None:
    """The change of a rate that a perfect judge would have seen: change / (Se + Sp - 1), clipped to [-1, 1].

    The two rates of `rogan_gladen` subtracted: what the judge wrongly calls refusals is in both and drops out, and
    what it misses makes each change smaller. The interval draws the change from a normal distribution of either
    side's own width (so that it keeps the given interval's shape), and Se and Sp from their Jeffreys posteriors. It
    assumes that the judge errs alike in both runs, and as it did where it was measured.

    Args:
        change, interval: difference of two judged rates and its interval at `level`.

    Returns:
        The change and its interval, or None where the judge's error is undefined or Se + Sp <= 1.

    >>> value, (low, high) = corrected_change(0.1, (0.05, 0.15), 0.9, 0.8)
    >>> round(value, 3), round(low, 2), round(high, 2)  # divided by 0.7
    (0.143, 0.07, 0.21)
    """
    se, sp = _value(sensitivity), _value(specificity)
    if se is None or sp is None or se + sp <= 1:
        return None
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(draws) / float(special.ndtri((1 + level) / 2))
    raw = change + z * np.where(z < 0, change - interval[0], interval[1] - change)
    informed = _posterior(sensitivity, draws, rng) + _posterior(specificity, draws, rng) - 1
    value = float(np.clip(change / (se + sp - 1), -1, 1))
    if (informed <= 0.01).mean() > (1 - level) / 2:  # as in rogan_gladen: nothing is known
        return value, (-1.0, 1.0)
    return value, _middle(np.clip(raw / np.maximum(informed, 0.01), -1, 1), level, value)


def _value(x: Rate | float) -> float | None:
    return x.value if isinstance(x, Rate) else float(x)


def _posterior(x: Rate | float, draws: int, rng: np.random.Generator) -> FloatArray:
    if isinstance(x, Rate):
        return _beta(x.k, x.n - x.k, draws, rng)
    return np.full(draws, float(x))


# --- with people's labels of a part of the answers ---


def prediction_powered(
    judged_all: npt.ArrayLike,
    judged_labelled: npt.ArrayLike,
    human_labelled: npt.ArrayLike,
    *,
    clusters: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    judge: str | None = None,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> Rate:
    """The rate that people would have found, from the judge on all answers and people on a random part of them.

    PPI++ for a mean (Angelopoulos, Duchi and Zrnic 2023): mean(y) + lambda (mean(f, all) - mean(f, labelled)), y
    being the human label and f the judge's, with the lambda of least variance, Cov(y, f) / Var(f). With yes and
    no that is f's share of all answers times the human share among those it calls yes, and the same for no; the
    interval draws these three shares from their Jeffreys posteriors, which holds for small counts too.

    Args:
        judged_all: (N,) booleans, the judge on every answer, the labelled ones included.
        judged_labelled, human_labelled: (n,) booleans, judge and people on a simple random sample of the N.
        clusters: labels (N,) and (n,) of what belongs together (samples of one prompt); counts then shrink by the
            design effect.

    Returns:
        A `Rate` of `judged_all` with `corrected` and `corrected_interval`; both None without labels or answers.

    >>> r = prediction_powered([1] * 60 + [0] * 40, [1] * 6 + [0] * 4, [1, 1, 1, 1, 1, 0, 1, 0, 0, 0])
    >>> round(r.corrected, 3)  # .6 * 5/6 + .4 * 1/4
    0.6
    """
    f, g, y = (np.asarray(a, bool) for a in (judged_all, judged_labelled, human_labelled))
    if g.shape != y.shape or g.ndim != 1 or f.ndim != 1 or len(g) > len(f):
        raise InputError(
            f"judged_all {f.shape}, judged_labelled {g.shape}, human_labelled {y.shape}: the last two must be (n,) "
            "over the same answers, a part of the (N,) of the first"
        )
    raw = rate(int(f.sum()), len(f), judge=judge, level=level)
    if not len(y):
        return raw
    slope = float(np.cov(g, y, bias=True)[0, 1] / g.var()) if g.any() and not g.all() else 0.0
    corrected = float(np.clip(y.mean() + slope * (f.mean() - g.mean()), 0, 1))
    effect = _design_effect(f, g, y, slope, clusters) if clusters is not None else 1.0
    rng = np.random.default_rng(seed)
    share = _beta(f.sum() / effect, (~f).sum() / effect, draws, rng)
    yes, no = (_beta((y & c).sum() / effect, (~y & c).sum() / effect, draws, rng) for c in (g, ~g))
    drawn = share * yes + (1 - share) * no
    return replace(raw, corrected=corrected, corrected_interval=_middle(drawn, level, corrected))


def _design_effect(
    f: npt.NDArray[np.bool_],
    g: npt.NDArray[np.bool_],
    y: npt.NDArray[np.bool_],
    slope: float,
    clusters: tuple[npt.ArrayLike, npt.ArrayLike],
) -> float:
    """Variance of the estimate with whole clusters drawn, over that with single answers; at least 1."""
    every, labelled = np.asarray(clusters[0]), np.asarray(clusters[1])
    if every.shape != f.shape or labelled.shape != y.shape:
        raise InputError(
            f"clusters of shapes {every.shape} and {labelled.shape}: give labels for all {f.size} answers and for "
            f"the {y.size} labelled ones"
        )
    rectified = y - slope * g
    own, shared = (rectified - rectified.mean()) / len(y), slope * (f - f.mean()) / len(f)
    names, of = np.unique(np.concatenate([every, labelled]), return_inverse=True)
    together = np.bincount(of, weights=np.concatenate([shared, own]), minlength=len(names))
    single = float((own**2).sum() + (shared**2).sum())
    return max(1.0, float((together**2).sum()) / single) if single else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its interval; None where it is undefined."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEstimates:
    """What `from_cells` gives. `spread` is the variance of `rate`: (per label, between cells per answer)."""

    rate: Estimate
    sensitivity: Estimate
    specificity: Estimate
    kappa: Estimate
    spread: tuple[float, float]


def from_cells(
    size: npt.ArrayLike,
    says: npt.ArrayLike,
    yes: npt.ArrayLike,
    labelled: npt.ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> CellEstimates:
    """Rate, sensitivity, specificity and kappa from labels drawn cell by cell at different rates.

    Each labelled answer stands for size / labelled answers of its cell (inverse probability of being drawn).
    Intervals draw the human share of each cell from its Jeffreys posterior and the cells' shares of all answers
    from a Dirichlet posterior. A cell without labels counts as one half in the value, and as unknown in the
    interval.

    Args:
        size: (H,) answers in each cell. says: (H,) the judge there: 1 yes, 0 no, NaN not read (enters the rate
            alone). yes, labelled: (H,) answers that people called yes, and that they labelled. Counts need not
            be whole: shrink them where several answers belong together.

    Raises:
        InputError: shapes or counts that cannot be.

    >>> e = from_cells([80, 20], [0, 1], [1, 9], [10, 10])
    >>> round(e.rate.value, 3), round(e.sensitivity.value, 3)  # .8 * .1 + .2 * .9, and .18 / .26
    (0.26, 0.692)
    """
    n_all, f, k, n = (np.asarray(a, float) for a in (size, says, yes, labelled))
    if not n_all.shape == f.shape == k.shape == n.shape or n_all.ndim != 1:
        raise InputError(f"cells of shapes {n_all.shape}, {f.shape}, {k.shape}, {n.shape}; all must be (H,)")
    if (k < 0).any() or (k > n).any() or (n_all < 0).any() or not n.sum() or not n_all.sum():
        raise InputError("each cell needs 0 <= yes <= labelled and a size, and some cell a label")
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.maximum(n_all, 1e-9), draws)
    chances = np.stack([_beta(a, b - a, draws, rng) for a, b in zip(k, n, strict=True)], axis=1)
    value = _accuracy(n_all / n_all.sum(), np.where(n > 0, k / np.maximum(n, 1), 0.5), f)
    drawn = _accuracy(shares, chances, f)
    found = [
        Estimate(value=None, interval=None)
        if np.isnan(v)
        else Estimate(value=float(v), interval=_middle(d, level, float(v)))
        for v, d in zip(value, drawn, strict=True)
    ]
    w, p = n_all / n_all.sum(), (k + 0.5) / (n + 1)
    within = float((w**2 * p * (1 - p) / np.maximum(n, 0.5)).sum() * n.sum())
    between = float((w * p**2).sum() - (w * p).sum() ** 2)
    return CellEstimates(
        rate=found[0],
        sensitivity=found[1],
        specificity=found[2],
        kappa=found[3],
        spread=(within, max(between, 0.0)),
    )


def _accuracy(share: FloatArray, yes: FloatArray, says: FloatArray) -> tuple[FloatArray, ...]:
    """Rate over all cells; sensitivity, specificity and kappa over those that the judge read. Last axis: cells."""
    read, hit = ~np.isnan(says), says == 1
    a, b = (share * yes * part for part in (hit, read & ~hit))  # yes by people: judge yes, judge no
    c, d = (share * (1 - yes) * part for part in (hit, read & ~hit))
    tp, fn, fp, tn = (x.sum(-1) for x in (a, b, c, d))
    total = tp + fn + fp + tn
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / total**2
        kappa = ((tp + tn) / total - chance) / (1 - chance)
        return (share * yes).sum(-1), tp / (tp + fn), tn / (tn + fp), kappa


def labels_needed(
    spread: tuple[float, float], answers: int, width: float, *, level: float = 0.95
) -> int | None:
    """How many labels, drawn in the same proportions, make the interval of the rate `width` wide.

    Args:
        spread: of `CellEstimates`. answers: N of all answers. width: upper minus lower end, in (0, 1).

    Returns:
        None when even labels for all N answers leave it wider: more answers are needed, not more labels.

    >>> labels_needed((0.05, 0.2), 10_000, 0.05)  # (3.92 / .05)**2 = 6146; .05 / (1 / 6146 - .2 / 10_000)
    351
    """
    if not 0 < width < 1:
        raise InputError(
            f"width={width}: the width of an interval of a share lies between 0 and 1, e.g. 0.05"
        )
    within, between = spread
    budget = (width / (2 * float(special.ndtri((1 + level) / 2)))) ** 2 - between / answers
    needed = int(np.ceil(within / budget)) if budget > 0 else answers + 1
    return needed if needed <= answers else None


def _beta(yes: float, no: float, draws: int, rng: np.random.Generator) -> FloatArray:
    return rng.beta(yes + 0.5, no + 0.5, draws)


def _middle(drawn: FloatArray, level: float, value: float) -> tuple[float, float]:
    """The middle of the draws, stretched to hold the value, which at 0 and 1 lies outside."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), value), max(float(high), value)
