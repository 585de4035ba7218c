"""Verdicts of a verifier and of an oracle on sampled answers: what resampling would have given, without simulation.

With n samples of a task, of which b were accepted and g accepted and correct, a random order of them gives

    P(none accepted within K) = C(n - b, K) / C(n, K)        P(accepted answer is correct) = g / b

so the mean over all orders is exact, and for independent samples it is an unbiased estimate of the mean over
new ones (for K <= n). Intervals are over tasks, which are drawn again whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.measure.inference_scaling.closed_form import Costs, Curve, FloatArray, TaskTypes
from demur.stats import proportion_interval

IntArray = npt.NDArray[np.int64]

_WORDS: Mapping[str, bool] = {
    "1": True,
    "true": True,
    "yes": True,
    "pass": True,
    "0": False,
    "false": False,
    "no": False,
    "fail": False,
}


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """Counts per task, arrays of shape (T,); n may differ.

    Attributes:
        tasks: names. n: samples. correct: samples that the oracle calls correct.
        accepted: samples that the verifier accepts (b). both: accepted and correct (g).
    """

    tasks: tuple[str, ...]
    n: IntArray
    correct: IntArray
    accepted: IntArray
    both: IntArray

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("no tasks")
        n, p, b, g = self.n, self.correct, self.accepted, self.both
        if not ((n > 0) & (g <= p) & (g <= b) & (p + b - g <= n) & (g >= 0)).all():
            raise InputError(
                "counts of a task must satisfy 0 <= both <= accepted, correct and fit into n > 0 samples"
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, keep: npt.ArrayLike) -> Verdicts:
        """The tasks of a mask or of indices."""
        at = np.arange(len(self))[np.asarray(keep)]
        names = tuple(self.tasks[i] for i in at)
        return Verdicts(names, self.n[at], self.correct[at], self.accepted[at], self.both[at])

    @property
    def budget(self) -> int:
        """The largest budget for which every task has samples."""
        return int(self.n.min())

    @property
    def precision(self) -> FloatArray:
        """(T,) g / b: share of accepted samples that are correct; NaN where none was accepted."""
        nothing = np.full(len(self), np.nan)
        out: FloatArray = np.divide(self.both, self.accepted, out=nothing, where=self.accepted > 0)
        return out

    def outcomes(self, K: int | None = None) -> Outcomes:
        """Expected outcomes of each task under budgets 0 ... K (default `budget`).

        Raises:
            InputError: a task has fewer than K samples.
        """
        K = self.budget if K is None else K
        if not 0 <= K <= self.budget:
            short = self.tasks[int(self.n.argmin())]
            raise InputError(
                f"a budget of {K} attempts cannot be read off {self.budget} samples (task {short!r}); draw more, "
                "or leave such tasks out (min_samples)"
            )
        i = np.arange(K)
        left = np.maximum(self.n[:, None] - self.accepted[:, None] - i, 0) / (self.n[:, None] - i)
        none = np.concatenate([np.ones((len(self), 1)), np.cumprod(left, axis=1)], axis=1)
        good = np.nan_to_num(self.precision)[:, None]
        tried = np.concatenate([np.zeros((len(self), 1)), np.cumsum(none[:, :-1], axis=1)], axis=1)
        return Outcomes(good * (1 - none), (1 - good) * (1 - none), none, tried)


class Outcomes(NamedTuple):
    """Arrays (T, K + 1): probability of a right, a wrong and no answer, and expected samples, by budget 0 ... K."""

    right: FloatArray
    wrong: FloatArray
    none: FloatArray
    samples: FloatArray

    def utility(self, costs: Costs) -> FloatArray:
        """(T, K + 1) V_c right + V_f wrong - C samples."""
        total = costs.value * self.right - costs.false * self.wrong - costs.sample * self.samples
        return np.asarray(total, dtype=np.float64)

    def mean(self, costs: Costs, weights: FloatArray | None = None) -> Curve:
        """The mean over tasks as a `Curve`."""
        parts = [np.average(x, axis=0, weights=weights) for x in (*self, self.utility(costs))]
        return Curve(np.arange(len(parts[0]), dtype=float), *parts)


def read_verdicts(
    rows: Sequence[tuple[int, Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
    *,
    task: str = "task",
    sample: str | None = None,
    base: str = "accepted",
    plus: str = "correct",
) -> Verdicts:
    """Count a table with one row for each sample.

    Args:
        rows: as `demur.files.read_rows` gives them, (line, row), or plain mappings.
        task, sample, base, plus: columns. `base`: did the verifier accept; `plus`: was it correct. Both are
            1 / 0, true / false, yes / no or pass / fail. `sample` (optional) tells samples of one task apart.

    Raises:
        InputError: a missing column or value, a verdict that is neither yes nor no, a sample given twice.

    >>> read_verdicts([{"task": "a", "accepted": 1, "correct": 0}]).accepted.tolist()
    [1]
    """
    if not rows:
        raise InputError("no rows: give one row for each sampled answer")
    counts: dict[str, list[int]] = {}
    seen: dict[tuple[str, str], int] = {}
    for i, item in enumerate(rows):
        line, row = item if isinstance(item, tuple) else (i + 1, item)
        name = str(_cell(row, task, line))
        b, p = _verdict(row, base, line), _verdict(row, plus, line)
        if sample is not None:
            key = (name, str(_cell(row, sample, line)))
            if key in seen:
                raise InputError(
                    f"line {line}: task {key[0]!r}, sample {key[1]!r} stands on line {seen[key]} too; a sample "
                    "counts once (of several models? then separate them)"
                )
            seen[key] = line
        total = counts.setdefault(name, [0, 0, 0, 0])
        for j, hit in enumerate((True, p, b, p and b)):
            total[j] += hit
    table = np.array(list(counts.values()), np.int64).T
    return Verdicts(tuple(counts), *table)


def _cell(row: Mapping[str, Any], column: str, line: int) -> Any:
    value = row.get(column)
    if value is None or value == "":
        raise InputError(
            f"line {line}: nothing in column {column!r}; the row has {', '.join(map(str, row)) or 'none'}. Name "
            "the columns: task, sample, base (did the verifier accept it), plus (was it correct)"
        )
    return value


def _verdict(row: Mapping[str, Any], column: str, line: int) -> bool:
    value = _cell(row, column, line)
    word = str(value).strip().lower()
    word = word.removesuffix(".0") if not isinstance(value, bool) else word
    if word not in _WORDS:
        raise InputError(
            f"line {line}: {column}={value!r} is neither yes nor no; use 1 / 0, true / false, yes / no or pass / "
            "fail (a score becomes a verdict by a threshold, which is for you to choose)"
        )
    return _WORDS[word]


def sample_verdicts(
    types: TaskTypes, n: npt.ArrayLike, rng: np.random.Generator
) -> tuple[Verdicts, npt.NDArray[np.intp]]:
    """Verdicts of a synthetic world, and each task's type: n (T,) samples of T tasks drawn from the mixture."""
    many = np.asarray(n, np.int64)
    of = rng.choice(types.share.size, many.size, p=types.share)
    correct = rng.binomial(many, types.correct[of])
    both = rng.binomial(correct, types.completeness[of])
    passed = both + rng.binomial(many - correct, 1 - types.soundness[of])
    names = tuple(f"task {i}" for i in range(many.size))
    return Verdicts(names, many, correct.astype(np.int64), passed.astype(np.int64), both.astype(np.int64)), of


def two_types(verdicts: Verdicts, *, published: bool = False) -> TaskTypes:
    """The two-type model: tasks that are correct more often than not, and the rest.

    The verifier's c and s are pooled over all samples. With `published` they are the paper's: c = 1 and
    s = (1 - B - P + G B) / (1 - P), with B, P the mean shares of accepted and of correct samples and G the
    mean of g / b over tasks; this assumes that correct samples are always accepted.

    Raises:
        InputError: all tasks fall on one side, or no sample is wrong (or correct), so that s (or c) is unknown.
    """
    rate = verdicts.correct / verdicts.n
    easy = rate > 0.5
    if easy.all() or not easy.any():
        side = "more than" if easy.all() else "at most"
        raise InputError(f"one type only: in all {len(easy)} tasks {side} half of the samples are correct")
    right, wrong = verdicts.correct.sum(), (verdicts.n - verdicts.correct).sum()
    if not right or not wrong:
        raise InputError("every sample is correct, or none is, so one of the verifier's two rates is unknown")
    if published:
        B, P, G = (verdicts.accepted / verdicts.n).mean(), rate.mean(), np.nanmean(verdicts.precision)
        c, s = 1.0, (1 - B - P + G * B) / (1 - P)
        if not 0 <= s <= 1:
            raise InputError(f"the published formula gives s = {s:.3f}, no probability, on these verdicts")
    else:
        c, s = verdicts.both.sum() / right, 1 - (verdicts.accepted - verdicts.both).sum() / wrong
    share = [easy.mean(), 1 - easy.mean()]
    return TaskTypes(
        share, [rate[easy].mean(), rate[~easy].mean()], soundness=s, completeness=c, names=("easy", "hard")
    )


class Estimate(NamedTuple):
    """A value with its 95 % interval over tasks; None where undefined. `n` tasks (or samples) are behind it."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def resamples(tasks: int, n_boot: int, seed: int, block: int = 200) -> Iterator[FloatArray]:
    """Bootstrap weights over tasks: blocks of shape (<= block, tasks), each row summing to 1."""
    rng = np.random.default_rng(seed)
    for done in range(0, n_boot, block):
        yield rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=min(block, n_boot - done)) / tasks


def mean_over(values: FloatArray, weights: list[FloatArray]) -> Estimate:
    """Mean over tasks of values (T,), tasks with NaN left out, with a bootstrap interval.

    Where all values are equal a bootstrap would claim certainty: a value of 0 or 1 gets Wilson's interval for that
    many tasks, another one none.
    """
    known = np.isfinite(values)
    n, x = int(known.sum()), np.where(known, values, 0.0)
    if not n:
        return Estimate(None, None, None, 0)
    value = float(x.sum() / n)
    if n == 1:
        return Estimate(value, None, None, 1)
    if np.ptp(values[known]) == 0:
        if value not in (0.0, 1.0):
            return Estimate(value, None, None, n)
        low, high = proportion_interval(value * n, n)
        return Estimate(value, float(low), float(high), n)
    return Estimate(value, *_spread(lambda w: (w @ x) / (w @ known), weights), n)


def ratio_over(top: IntArray, bottom: IntArray, weights: list[FloatArray]) -> Estimate:
    """sum(top) / sum(bottom) with a bootstrap interval over tasks; at 0 and 1 Wilson's for that many tasks.

    `n` counts the samples in `bottom`.
    """
    k, n = int(top.sum()), int(bottom.sum())
    if not n:
        return Estimate(None, None, None, 0)
    if k in (0, n):
        tasks = int((bottom > 0).sum())
        low, high = proportion_interval(k / n * tasks, tasks)
        return Estimate(k / n, float(low), float(high), n)
    if len(top) == 1:
        return Estimate(k / n, None, None, n)
    return Estimate(k / n, *_spread(lambda w: (w @ top) / (w @ bottom), weights), n)


def _spread(
    statistic: Callable[[FloatArray], FloatArray], weights: Iterable[FloatArray]
) -> tuple[float | None, float | None]:
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.concatenate([statistic(w) for w in weights])
    values = values[np.isfinite(values)]
    if not values.size:
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


class Choice(NamedTuple):
    """The budget that earns most on a table of verdicts.

    Attributes:
        K: the smallest budget with the highest mean utility; 0 means abstaining always.
        open_ended: no larger budget that could be measured earns less, so the optimum may lie beyond.
        low, high: 95 % bootstrap interval of K over tasks; None for one task.
        at_zero, at_end: shares of the resamples whose best budget is 0, or the largest.
        utility: of K, on the tasks that chose it (optimistic). crossfit: each task under the K chosen by others.
    """

    K: int
    open_ended: bool
    low: int | None
    high: int | None
    at_zero: float | None
    at_end: float | None
    utility: Estimate
    crossfit: Estimate


def choose(utility: FloatArray, weights: list[FloatArray], *, folds: int = 5, seed: int = 0) -> Choice:
    """Choose K from the utilities (T, K + 1) of tasks; ties within 1e-12 go to the smaller budget.

    The interval looks at every budget up to 256 and at about 130 spread over larger ones.
    """
    tasks, end = len(utility), utility.shape[1] - 1
    mean = utility.mean(axis=0)
    K = _first_best(mean)
    open_ended = bool(K > 0 and mean[-1] >= mean.max() - _TIE)
    if tasks == 1:
        nothing = Estimate(None, None, None, 0)
        return Choice(K, open_ended, None, None, None, None, mean_over(utility[:, K], weights), nothing)
    grid = budgets(end)
    at = utility[:, grid]
    chosen = np.concatenate([grid[_first_best(w @ at)] for w in weights])
    low, high = np.quantile(chosen, [0.025, 0.975], method="inverted_cdf")
    part = np.random.default_rng(seed).permutation(tasks) % min(folds, tasks)
    held = np.empty(tasks)
    for f in np.unique(part):
        held[part == f] = utility[part == f, _first_best(utility[part != f].mean(axis=0))]
    return Choice(
        K,
        open_ended,
        int(low),
        int(high),
        float((chosen == 0).mean()),
        float((chosen == end).mean()),
        mean_over(utility[:, K], weights),
        mean_over(held, weights),
    )


_TIE = 1e-12


def _first_best(utility: FloatArray) -> Any:
    """Index of the first entry within 1e-12 of the maximum along the last axis."""
    return np.argmax(utility >= utility.max(axis=-1, keepdims=True) - _TIE, axis=-1)


def budgets(end: int) -> IntArray:
    """0 ... end, thinned beyond 256."""
    if end <= 256:
        return np.arange(end + 1)
    return np.unique(np.concatenate([np.arange(65), np.geomspace(64, end, 128).round().astype(np.int64)]))


class Line(NamedTuple):
    """Least squares of ceiling on single-sample accuracy."""

    slope: float
    intercept: float
    r2: float
    n: int


def line(single: npt.ArrayLike, ceiling: npt.ArrayLike) -> Line:
    """Fit ceiling = slope * single + intercept over models.

    Raises:
        InputError: fewer than three models, or equal single-sample accuracies.
    """
    x, y = np.asarray(single, float), np.asarray(ceiling, float)
    if x.shape != y.shape or x.ndim != 1 or x.size < 3 or np.ptp(x) == 0:
        raise InputError(f"a line needs three models or more that differ in accuracy; got {x.size}")
    slope, intercept = np.polyfit(x, y, 1)
    rest, total = ((y - slope * x - intercept) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return Line(float(slope), float(intercept), float(1 - rest / total) if total else float("nan"), x.size)
