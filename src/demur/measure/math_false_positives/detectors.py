"""How well checkers find false positives: precision, recall and F1 beside rules that read no solution.

The positive class is the false positive: a right answer from invalid reasoning, by a person's label. A checker
finds one by the verdict False. An unreadable verdict finds nothing and is counted apart. Intervals resample
problems, because the same problem, and often the same solution, stands in several rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.measure.math_false_positives.solutions import Solution
from demur.stats import bootstrap_interval, share_interval
from demur.types import Rate, Report, Table

BoolArray = npt.NDArray[np.bool_]
N_BOOT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Counts and rates of one detector on labelled rows. Undefined values are None.

    tp, fp, fn, tn: rows by human label and verdict, unreadable ones among fn and tn. f1 = 2 tp / (2 tp + fp + fn).
    """

    name: str
    tp: int
    fp: int
    fn: int
    tn: int
    unread: int
    precision: Rate
    recall: Rate
    f1: float | None
    f1_interval: tuple[float, float] | None


def f1_of(tp: float, fp: float, fn: float) -> float | None:
    """2 tp / (2 tp + fp + fn); None where there is neither a false positive nor a flag.

    >>> round(f1_of(45, 59, 18), 3)
    0.539
    """
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn > 0 else None


def detection(
    name: str,
    flagged: npt.ArrayLike,
    human: npt.ArrayLike,
    problems: Sequence[str],
    *,
    unread: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> Detection:
    """Counts, precision, recall and F1 of flags against human labels.

    Args:
        flagged, human: (n,) booleans, True is "false positive". problems: (n,) ids, the unit of the bootstrap.
    """
    said, true = np.asarray(flagged, bool), np.asarray(human, bool)
    ids = np.asarray(problems)
    tp, fp, fn, tn = (
        int((a & b).sum()) for a, b in ((said, true), (said, ~true), (~said, true), (~said, ~true))
    )
    cells = _cells(said, true, ids)
    return Detection(
        name=name,
        tp=tp,
        fp=fp,
        fn=fn,
        tn=tn,
        unread=unread,
        precision=_rate(true[said], ids[said], seed, level),
        recall=_rate(said[true], ids[true], seed, level),
        f1=f1_of(tp, fp, fn),
        f1_interval=_known(bootstrap_interval(_f1, cells, n_boot=N_BOOT, seed=seed, level=level)),
    )


def _cells(said: BoolArray, true: BoolArray, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """tp, fp, fn for each problem, shape (problems, 3)."""
    _, of = np.unique(ids, return_inverse=True)
    return np.stack(
        [np.bincount(of, weights=w) for w in (said & true, said & ~true, ~said & true)], axis=1
    ).astype(float)


def _f1(cells: npt.NDArray[np.float64]) -> float:
    found = f1_of(*cells.sum(axis=0))
    return float("nan") if found is None else found


def _rate(hits: BoolArray, ids: npt.NDArray[Any], seed: int, level: float) -> Rate:
    interval = share_interval(hits, ids, seed=seed, level=level) or (None, None)
    return Rate(k=int(hits.sum()), n=int(hits.size), low=interval[0], high=interval[1], judge="human")


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return None if any(np.isnan(interval)) else interval


# --- rules that never read a solution ---------------------------------------------------------------------------


def folds_by_problem(problems: Sequence[str], folds: int = 5, seed: int = 0) -> npt.NDArray[np.intp]:
    """(n,) fold of each row; all rows of a problem share one.

    >>> len(set(folds_by_problem(["a", "b", "a"], 2)[[0, 2]].tolist()))
    1
    """
    names, of = np.unique(np.asarray(problems), return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(names)) % folds)[of]


def cross_fitted(
    fit: Callable[[npt.NDArray[np.intp]], Callable[[npt.NDArray[np.intp]], BoolArray]],
    problems: Sequence[str],
    *,
    folds: int = 5,
    seed: int = 0,
) -> BoolArray:
    """Flags of a rule that was chosen, for each row, on the problems of the other folds.

    Args:
        fit: takes row indices to choose on, returns a function from row indices to flags.
    """
    fold = folds_by_problem(problems, folds, seed)
    out = np.zeros(len(fold), bool)
    for f in range(folds):
        rows = np.flatnonzero(fold == f)
        if rows.size:
            out[rows] = fit(np.flatnonzero(fold != f))(rows)
    return out


def longer_than(lengths: npt.ArrayLike, human: npt.ArrayLike, rows: npt.NDArray[np.intp]) -> float:
    """The length above which flagging gives the best F1 on `rows`; infinity where no rule finds anything."""
    size, true = np.asarray(lengths, float)[rows], np.asarray(human, bool)[rows]
    return _best_cut(size, true)


def _best_cut(values: npt.NDArray[np.float64], true: BoolArray) -> float:
    """The c for which `values > c` has the best F1, midway between two values."""
    if not true.any():
        return float("inf")
    levels, of = np.unique(values, return_inverse=True)
    flagged = np.cumsum(np.bincount(of)[::-1])[::-1]
    tp = np.cumsum(np.bincount(of, weights=true)[::-1])[::-1]
    best = int(np.argmax(2 * tp / (flagged + true.sum())))
    return float(levels[best] - 1 if best == 0 else (levels[best] + levels[best - 1]) / 2)


def trivial(
    solutions: Sequence[Solution], human: BoolArray, *, folds: int = 5, seed: int = 0
) -> dict[str, BoolArray]:
    """Flags of the rules that any checker has to beat, {name: (n,) booleans}.

    "always False" flags all. "long" flags solutions longer than a number of characters, and "source" those of
    sources with a high share of false positives; both are chosen on other problems than they are used on.
    The rules are left out where they cannot be made: no texts, one source, one problem.
    """
    problems = [s.problem for s in solutions]
    out = {"always False": np.ones(len(human), bool)}
    if len(set(problems)) < 2:
        return out
    lengths = np.array([len(s.text) for s in solutions], float)
    if lengths.any():

        def by_length(rows: npt.NDArray[np.intp]) -> Callable[[npt.NDArray[np.intp]], BoolArray]:
            cut = longer_than(lengths, human, rows)
            return lambda use: lengths[use] > cut

        out["longer than a threshold"] = cross_fitted(by_length, problems, folds=folds, seed=seed)
    names, of = np.unique([s.source for s in solutions], return_inverse=True)
    if len(names) > 1:

        def by_source(rows: npt.NDArray[np.intp]) -> Callable[[npt.NDArray[np.intp]], BoolArray]:
            count = np.bincount(of[rows], minlength=len(names))
            rates = np.bincount(of[rows], weights=human[rows], minlength=len(names)) / np.maximum(count, 1)
            cut = _best_cut(rates[of[rows]], human[rows])
            return lambda use: rates[of[use]] > cut

        out["written by certain sources"] = cross_fitted(by_source, problems, folds=folds, seed=seed)
    return out


# --- report -----------------------------------------------------------------------------------------------------


def detector_report(
    solutions: Sequence[Solution], *, folds: int = 5, seed: int = 0, level: float = 0.95
) -> Report:
    """Precision, recall and F1 of every checker and of the trivial rules, together and by source.

    Only answer-correct solutions with a human label enter. A checker is scored on the rows that have a verdict
    of its own (also an unreadable one); its F1 minus that of the best trivial rule on the same rows is given with
    an interval.

    Raises:
        InputError: no labelled rows, no checker, or labels of one kind only.
    """
    rows = [s for s in solutions if s.correct and s.false_positive is not None]
    human = np.array([bool(s.false_positive) for s in rows])
    checkers = list(dict.fromkeys(name for s in rows for name in s.verdicts))
    if not rows:
        raise InputError(
            "detector_report: no answer-correct solution has a human label (`false_positive`); a checker can only "
            "be scored against people"
        )
    if not human.any() or human.all():
        raise InputError(
            f"detector_report: all {len(rows)} labels say {'flawed' if human.all() else 'sound'}; precision and "
            "recall need both kinds"
        )
    rules = trivial(rows, human, folds=folds, seed=seed)
    found = [_checker(name, rows, human, rules, seed, level) for name in checkers]
    plain = [
        detection(name, flags, human, [s.problem for s in rows], seed=seed, level=level)
        for name, flags in rules.items()
    ]
    prevalence = float(human.mean())
    sources = list(dict.fromkeys(s.source for s in rows))
    by_source = _source_table(rows, human, checkers, rules, sources)
    return Report(
        title="Checkers of reasoning against human labels",
        tables=(
            Table(
                "Detecting false positives",
                (
                    "detector",
                    "n",
                    "found",
                    "false alarms",
                    "missed",
                    "unread",
                    "precision",
                    "recall",
                    "F1",
                    "minus best rule",
                ),
                (
                    *(_line(d, gap) for d, gap, _ in found),
                    *(_line(d, None) for d in plain),
                    (
                        "random at prevalence (expected)",
                        len(rows),
                        *(None,) * 4,
                        *(f"{prevalence:.3f}",) * 3,
                        None,
                    ),
                ),
                note=f"{int(human.sum())} false positives among {len(rows)} labelled right answers of "
                f"{len({s.problem for s in rows})} problems. Rules in the lower lines read no solution.",
            ),
            *([by_source] if len(sources) > 1 else []),
        ),
        values={
            "checkers": {d.name: {**_values(d), "minus_best_rule": gap} for d, gap, _ in found},
            "rules": {d.name: _values(d) for d in plain},
            "random_f1": prevalence,
            "by_source": [dict(zip(by_source.columns, r, strict=True)) for r in by_source.rows],
        },
        notes=tuple(_remarks(found)),
    )


def _verdicts(name: str, rows: Sequence[Solution]) -> tuple[npt.NDArray[np.intp], BoolArray, int]:
    """Rows that a checker has seen, its flags on them, and how many of its verdicts are unreadable."""
    seen = [i for i, s in enumerate(rows) if name in s.verdicts]
    flags = np.array([rows[i].verdicts[name] is False for i in seen], bool)
    return np.array(seen, np.intp), flags, sum(rows[i].verdicts[name] is None for i in seen)


def _checker(
    name: str,
    rows: Sequence[Solution],
    human: BoolArray,
    rules: dict[str, BoolArray],
    seed: int,
    level: float,
) -> tuple[Detection, tuple[float, float, float] | None, str]:
    seen, flags, unread = _verdicts(name, rows)
    problems = np.array([rows[i].problem for i in seen])
    true = human[seen]
    result = detection(name, flags, true, [str(p) for p in problems], unread=unread, seed=seed, level=level)
    rivals = {rule: _cells(f[seen], true, problems) for rule, f in rules.items()}
    best = max(rivals, key=lambda r: np.nan_to_num(_f1(rivals[r])))
    both = np.concatenate([_cells(flags, true, problems), rivals[best]], axis=1)

    def gap(cells: npt.NDArray[np.float64]) -> float:
        return _f1(cells[:, :3]) - _f1(cells[:, 3:])

    value = gap(both)
    interval = _known(bootstrap_interval(gap, both, n_boot=N_BOOT, seed=seed, level=level))
    return result, None if interval is None or np.isnan(value) else (value, *interval), best


def _line(d: Detection, gap: tuple[float, float, float] | None) -> tuple[Any, ...]:
    return (
        d.name,
        d.tp + d.fp + d.fn + d.tn,
        d.tp,
        d.fp,
        d.fn,
        d.unread,
        d.precision,
        d.recall,
        _spread(d.f1, d.f1_interval),
        None if gap is None else _spread(gap[0], gap[1:], "+"),
    )


def _spread(value: float | None, interval: tuple[float, ...] | None, sign: str = "") -> str | None:
    if value is None:
        return None
    tail = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{tail}"


def _values(d: Detection) -> dict[str, Any]:
    return {
        **{k: getattr(d, k) for k in ("tp", "fp", "fn", "tn", "unread", "f1", "f1_interval")},
        "precision": d.precision,
        "recall": d.recall,
    }


def _source_table(
    rows: Sequence[Solution],
    human: BoolArray,
    checkers: Sequence[str],
    rules: dict[str, BoolArray],
    sources: Sequence[str],
) -> Table:
    """F1 by source; "-" where a source has neither a false positive nor a flag."""

    def f1(flags: BoolArray, true: BoolArray) -> float | None:
        return f1_of(int((flags & true).sum()), int((flags & ~true).sum()), int((~flags & true).sum()))

    names = np.array([s.source for s in rows])
    seen = {c: _verdicts(c, rows) for c in checkers}
    lines = []
    for source in sources:
        inside = names == source
        scores = [f1(flags[inside[i]], human[i][inside[i]]) for i, flags, _ in seen.values()]
        trivial_scores = [f1(flags[inside], human[inside]) for flags in rules.values()]
        lines.append((source, int(inside.sum()), int((inside & human).sum()), *scores, *trivial_scores))
    return Table(
        "F1 by source",
        ("source", "n", "false positives", *checkers, *rules),
        tuple(lines),
        note="A few false positives a source: read these as counts, not as properties of the checker.",
    )


def _remarks(found: Sequence[tuple[Detection, tuple[float, float, float] | None, str]]) -> list[str]:
    out = [
        f"{d.name} {'is below' if gap[0] < 0 else 'is not shown to beat'} the rule '{best}', which never reads a "
        f"solution (F1 difference {gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}])."
        for d, gap, best in found
        if gap is not None and gap[1] <= 0
    ]
    out += [
        f"{d.unread} of {d.name}'s verdicts could not be read; they count as not flagged."
        for d, _, _ in found
        if d.unread
    ]
    return out
