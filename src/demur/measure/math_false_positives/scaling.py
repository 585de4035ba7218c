"""Accuracy by answer and accuracy by reasoning, as the number of samples N grows.

All estimators use all M samples of a problem and give the expectation over a random N of them. A value per
problem lies in [0, 1], and intervals are over problems: Wilson's with the (possibly fractional) count, which
is never too narrow, since no variable on [0, 1] varies more than a yes / no of the same mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.measure.math_false_positives.grading import normalise
from demur.measure.math_false_positives.solutions import Solution
from demur.report.render import percent
from demur.stats import proportion_interval
from demur.types import Report, Table

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """k of n with an interval, where k and n may be fractional. `value` is None when n is 0."""

    k: float
    n: float
    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        return f"{percent(self.value, 1)} [{100 * (self.low or 0):.1f}–{100 * (self.high or 0):.1f}]"

    def row(self) -> dict[str, float | None]:
        """As plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "k": self.k, "n": self.n}


def share(k: float, n: float, *, level: float = 0.95) -> Share:
    """k / n with its Wilson interval.

    >>> print(share(3, 10)), share(0, 0).value
    30.0% [10.8–60.3]
    (None, None)
    """
    if n <= 0:
        return Share(0, 0, None, None, None)
    k = min(max(k, 0.0), n)  # sums of weights may miss the ends by rounding
    low, high = proportion_interval(k, n, level=level)
    return Share(k, n, k / n, float(low), float(high))


def pass_at_n(total: int, good: int, n: int) -> float:
    """Chance that at least one of n samples is good, from `total` samples of which `good` are: unbiased.

    1 - C(total - good, n) / C(total, n).

    >>> pass_at_n(4, 1, 2)
    0.5
    """
    if not 0 <= good <= total or not 1 <= n <= total:
        raise InputError(
            f"pass_at_n(total={total}, good={good}, n={n}): needs 0 <= good <= total, 1 <= n <= total"
        )
    return 1 - math.comb(total - good, n) / math.comb(total, n)


def best_of_n(rewards: npt.ArrayLike, n: int) -> FloatArray:
    """Chance of each of M samples to have the highest reward among a random n of them; equal: the first wins.

    The sample of rank r (0 is best) wins in C(M - 1 - r, n - 1) of the C(M, n) draws.

    >>> best_of_n([0.2, 0.9, 0.5], 2).round(3).tolist()
    [0.0, 0.667, 0.333]
    """
    values = np.asarray(rewards, float)
    total = len(values)
    if not 1 <= n <= total:
        raise InputError(f"best_of_n: n={n} of {total} samples; n lies between 1 and the number of samples")
    weights = np.zeros(total)
    weights[np.argsort(-values, kind="stable")] = _rank_weights(total, n)
    return weights


@cache
def _rank_weights(total: int, n: int) -> tuple[float, ...]:
    return tuple(math.comb(total - 1 - rank, n - 1) / math.comb(total, n) for rank in range(total))


def weighted_vote(
    rewards: npt.ArrayLike | None,
    answers: Sequence[Hashable | None],
    n: int,
    *,
    draws: int = 100,
    seed: int = 0,
) -> FloatArray:
    """Chance of each of M samples to be chosen by reward-weighted self-consistency over a random n of them.

    Rewards are scaled to [0, 1] within the draw (all equal, or None: 1 each, a plain majority), summed by answer,
    and the highest reward of the winning answer is taken; on a tie the earlier one. Samples without answer
    (None) do not vote and are chosen only where nothing votes. For n < M it is a mean over `draws` random draws.

    >>> weighted_vote([0.9, 0.4, 0.5], ["1", "2", "2"], 3).tolist()  # scaled: 1.0, 0.0, 0.2
    [1.0, 0.0, 0.0]
    """
    total = len(answers)
    values = np.ones(total) if rewards is None else np.asarray(rewards, float)
    if len(values) != total or not 1 <= n <= total:
        raise InputError(f"weighted_vote: {len(values)} rewards, {total} answers, n={n}")
    rng = np.random.default_rng(seed)
    out = np.zeros(total)
    rounds = 1 if n == total else draws
    for _ in range(rounds):
        rows = np.arange(total) if n == total else np.sort(rng.choice(total, n, replace=False))
        out[_vote(values, answers, rows)] += 1
    return out / rounds


def _vote(values: FloatArray, answers: Sequence[Hashable | None], rows: npt.NDArray[np.intp]) -> int:
    low, high = values[rows].min(), values[rows].max()
    sums: dict[Hashable, float] = {}
    best: dict[Hashable, int] = {}
    for i in map(int, rows):
        answer = answers[i]
        if answer is None:
            continue
        sums[answer] = sums.get(answer, 0.0) + (
            1.0 if high == low else float((values[i] - low) / (high - low))
        )
        if answer not in best or values[i] > values[best[answer]]:
            best[answer] = i
    return best[max(sums, key=sums.__getitem__)] if sums else int(rows[0])


def fp_correct(
    correct: float,
    problems: float,
    audited: float,
    false_positives: float,
    *,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> Share:
    """Accuracy with valid reasoning, from accuracy by answer and an audit of some of the right answers.

    correct / problems * (1 - false_positives / audited). The interval multiplies draws from the Jeffreys
    posteriors of both shares. The audited solutions must be a random part of the answer-correct ones, one for
    each problem, and the interval speaks of problems like these, not of these alone.

    Returns:
        A `Share` over problems; undefined without problems, or without an audit of at least one right answer.

    >>> print(fp_correct(90, 100, 90, 4))
    86.0% [77.5–91.3]
    """
    slack = 1e-9 * max(1.0, problems)
    if not (
        -slack <= false_positives <= audited + slack
        and audited <= correct + slack
        and correct <= problems + slack
    ):
        raise InputError(
            "fp_correct: needs false_positives <= audited <= correct <= problems, none below 0; got "
            f"{false_positives:g}, {audited:g}, {correct:g}, {problems:g}"
        )
    if problems <= 0 or (audited <= 0 and correct > 0):
        return Share(0, 0, None, None, None)
    rng = np.random.default_rng(seed)
    hit = rng.beta(correct + 0.5, max(problems - correct, 0) + 0.5, draws)
    flawed = rng.beta(false_positives + 0.5, max(audited - false_positives, 0) + 0.5, draws)
    low, high = np.quantile(hit * (1 - flawed), [(1 - level) / 2, (1 + level) / 2])
    value = correct / problems * (1 - false_positives / audited) if audited > 0 else 0.0
    low = 0.0 if value == 0 else min(float(low), value)
    return Share(value * problems, problems, value, low, max(float(high), value))


# --- from solutions to a report ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    """The samples of one problem of one source, in sample order."""

    correct: npt.NDArray[np.bool_]
    labelled: npt.NDArray[np.bool_]
    flawed: npt.NDArray[np.bool_]
    rewards: FloatArray | None
    answers: tuple[str | None, ...]


def _by_source(solutions: Iterable[Solution]) -> dict[str, list[_Problem]]:
    groups: dict[str, dict[str, list[Solution]]] = {}
    for s in solutions:
        groups.setdefault(s.source, {}).setdefault(s.problem, []).append(s)
    return {
        source: [_problem(sorted(some, key=lambda s: s.sample)) for some in by_problem.values()]
        for source, by_problem in groups.items()
    }


def _problem(samples: Sequence[Solution]) -> _Problem:
    correct = np.array([bool(s.correct) for s in samples])
    labelled = correct & np.array([s.false_positive is not None for s in samples])
    rewards = [s.reward for s in samples]
    return _Problem(
        correct=correct,
        labelled=labelled,
        flawed=labelled & np.array([bool(s.false_positive) for s in samples]),
        rewards=None if None in rewards else np.array(rewards, float),
        answers=tuple(None if s.answer is None else normalise(s.answer) for s in samples),
    )


def sample_counts(solutions: Sequence[Solution]) -> tuple[int, ...]:
    """The powers of four up to the smallest number of samples that any problem has, and that number."""
    least = min(len(p.correct) for some in _by_source(solutions).values() for p in some)
    return tuple(sorted({4**i for i in range(12) if 4**i <= least} | {least}))


def scaling_report(
    solutions: Sequence[Solution],
    ns: Sequence[int] | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Report:
    """Per source and number of samples: accuracy by answer, false positives, accuracy by reasoning, pass@N.

    Args:
        solutions: graded (`correct` set); an undecided answer counts as not correct and is noted.
        ns: numbers of samples; default the powers of four up to the smallest number any problem has.

    Returns:
        Tables "One answer chosen from N" and "Pass@N", the same as numbers in `values`, notes on what is missing.

    Raises:
        InputError: no solutions, ungraded ones, or an N beyond the samples of some problem.
    """
    if not solutions:
        raise InputError("scaling_report: no solutions")
    if all(s.correct is None for s in solutions):
        raise InputError("no solution is graded; pass them through graded(solutions) first")
    possible = sample_counts(solutions)[-1]
    ns = tuple(sorted(set(ns))) if ns else sample_counts(solutions)
    if wrong := [n for n in ns if not 1 <= n <= possible]:
        raise InputError(
            f"N={wrong[0]}: the problem with the fewest samples has {possible}; N lies between 1 and that"
        )
    chosen: list[dict[str, Any]] = []
    passed: list[dict[str, Any]] = []
    for source, problems in _by_source(solutions).items():
        for n in ns:
            for name, choose in _selections(problems, n, draws, seed).items():
                chosen.append(_chosen(source, name, n, problems, choose, level))
            passed.append(_passed(source, n, problems, level))
    return Report(
        title="Answers and reasoning, by number of samples",
        tables=(_chosen_table(chosen), _passed_table(passed)),
        values={"selection": [_numbers(r) for r in chosen], "pass_at_n": [_numbers(r) for r in passed]},
        notes=tuple(_notes(solutions)),
    )


Choose = Callable[[_Problem], FloatArray]


def _selections(problems: Sequence[_Problem], n: int, draws: int, seed: int) -> dict[str, Choose]:
    if n == 1:
        return {"one sample": lambda p: np.full(len(p.correct), 1 / len(p.correct))}
    out: dict[str, Choose] = {}
    if all(p.rewards is not None for p in problems):
        out["best-of-N"] = lambda p: best_of_n(p.rewards if p.rewards is not None else [], n)
        name = "weighted vote"
    else:
        name = "majority vote"
    if any(a is not None for p in problems for a in p.answers):
        out[name] = lambda p: weighted_vote(
            p.rewards if name == "weighted vote" else None, p.answers, n, draws=draws, seed=seed
        )
    return out


def _chosen(
    source: str, name: str, n: int, problems: Sequence[_Problem], choose: Choose, level: float
) -> dict[str, Any]:
    hit = seen = bad = 0.0
    labels = 0
    for p in problems:
        w = choose(p)
        right, labelled = float(w[p.correct].sum()), float(w[p.labelled].sum())
        hit += right
        labels += int((w[p.labelled] > 0).sum())
        if labelled > 0:  # labels stand for all right answers of their own problem
            seen += right
            bad += right * float(w[p.flawed].sum()) / labelled
    nothing = Share(0, 0, None, None, None)
    return {
        "source": source,
        "selection": name,
        "N": n,
        "problems": len(problems),
        "labels": labels,
        "automatic": share(hit, len(problems), level=level),
        "false_positive_rate": share(bad, seen, level=level),
        "manual": fp_correct(hit, len(problems), seen, bad, level=level) if seen > 0 else nothing,
    }


def _passed(source: str, n: int, problems: Sequence[_Problem], level: float) -> dict[str, Any]:
    def total(good: Callable[[_Problem], Any]) -> float:
        return math.fsum(pass_at_n(len(p.correct), int(good(p)), n) for p in problems)

    auto = total(lambda p: p.correct.sum())
    most = total(lambda p: p.correct.sum() - p.flawed.sum())  # who has no label is taken for sound
    least = total(lambda p: p.labelled.sum() - p.flawed.sum())  # ... for flawed
    known = any(p.labelled.any() for p in problems)
    complete = known and all((p.labelled == p.correct).all() for p in problems)
    size = len(problems)
    return {
        "source": source,
        "N": n,
        "problems": size,
        "automatic": share(auto, size, level=level),
        "manual": share(most, size, level=level) if complete else None,
        "manual_between": (least / size, most / size) if known and not complete else None,
        "gap": share(auto - most, size, level=level) if complete else None,
    }


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v.row() if isinstance(v, Share) else v for k, v in row.items()}


def _chosen_table(rows: Sequence[dict[str, Any]]) -> Table:
    keys = ("source", "selection", "N", "problems", "automatic", "labels", "false_positive_rate", "manual")
    names = {
        "automatic": "answer right",
        "false_positive_rate": "false positives",
        "manual": "reasoning valid",
    }
    return Table(
        "One answer chosen from N",
        tuple(names.get(k, k) for k in keys),
        tuple(tuple(str(r[k]) if isinstance(r[k], Share) else r[k] for k in keys) for r in rows),
        note="False positives: of the right answers, by people's labels. Reasoning valid: corrected for them.",
    )


def _passed_table(rows: Sequence[dict[str, Any]]) -> Table:
    def manual(r: dict[str, Any]) -> str:
        if (between := r["manual_between"]) is not None:
            return f"between {percent(between[0], 1)} and {percent(between[1], 1)}"
        return "–" if r["manual"] is None else str(r["manual"])

    return Table(
        "Pass@N: at least one of N",
        ("source", "N", "problems", "answer right", "reasoning valid", "gap"),
        tuple(
            (r["source"], r["N"], r["problems"], str(r["automatic"]), manual(r), str(r["gap"] or "–"))
            for r in rows
        ),
        note="Between: right answers without a human label taken for flawed, and for sound.",
    )


def _notes(solutions: Sequence[Solution]) -> list[str]:
    out = []
    if undecided := sum(s.correct is None for s in solutions):
        out.append(
            f"{undecided} answers could not be compared with the reference in time; they count as not right."
        )
    if nothing := sum(s.answer is None and s.correct is False and bool(s.text) for s in solutions):
        out.append(f"{nothing} solutions have no final answer; they count as not right.")
    if all(s.correct for s in solutions):
        out.append(
            "Every answer here is right. If wrong ones were left out of the file, its accuracies and pass@N mean "
            "nothing; the false-positive rate does."
        )
    if not any(s.correct for s in solutions):
        out.append("No answer here is right, so there is no false-positive rate.")
    labels = [s for s in solutions if s.correct and s.false_positive is not None]
    if not labels:
        out.append(
            "No right answer has a human label (`false_positive`), so accuracy by reasoning is unknown."
        )
    if ignored := sum(s.false_positive is not None and not s.correct for s in solutions):
        out.append(f"{ignored} human labels are on solutions whose answer is not right; they are not used.")
    sizes = {
        len({s.problem for s in solutions if s.source == source}) for source in {s.source for s in solutions}
    }
    if min(sizes) == 1:
        out.append("A source has one problem only: its numbers say nothing about other problems.")
    return out
