"""How well a classifier does on rows it was not fitted on, beside rules that a person would try first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.measure.blackbox_refusal.classifier import Corpus, folds
from demur.measure.blackbox_refusal.features import FloatArray, IntArray, Words
from demur.stats import auroc, auroc_interval, bootstrap_interval, ece, paired_interval, share_interval
from demur.types import Rate

BoolArray = npt.NDArray[np.bool_]
MAJORITY, NGRAM, LENGTH = "majority label", "best single n-gram", "length"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Predictions for rows, each made by a fit that did not see the row's fold.

    Attributes:
        y: (n,) true class indices. groups: (n,) codes, the unit of intervals. probabilities: (n, classes).
        rules: {trivial rule: (n,) predicted class}, each chosen on the training rows of the same folds.
        chosen: what each fold chose: C, and the n-gram of its best rule.
    """

    classes: tuple[str, ...]
    y: IntArray
    groups: IntArray
    probabilities: FloatArray
    rules: Mapping[str, IntArray]
    chosen: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def predicted(self) -> IntArray:
        """(n,) most probable class."""
        return np.asarray(self.probabilities.argmax(axis=1), np.intp)

    @property
    def right(self) -> BoolArray:
        """(n,) whether the prediction is the label."""
        return np.asarray(self.predicted == self.y, bool)


def held_out(
    texts: Sequence[str],
    labels: Sequence[str],
    words: Words,
    *,
    groups: Sequence[object] | None = None,
    C: float | None = None,
    k: int = 5,
    seed: int = 0,
    scored: npt.ArrayLike | None = None,
    training: Sequence[str] | None = None,
) -> HeldOut:
    """Predict every row from the other folds.

    Args:
        groups: rows of one group are in one fold and drawn together in intervals; None takes rows singly.
        C: inverse penalty; None chooses it on the training rows of each fold.
        scored: (n,) rows that count; the others only train. Default all.
        training: labels to fit on, where these differ from those to be predicted.

    Raises:
        InputError: a label with fewer than k rows, or one that stands in too few groups to be held out.
    """
    corpus = Corpus.of(texts, labels if training is None else training, words)
    truth = np.array([corpus.classes.index(x) if x in corpus.classes else -1 for x in labels], np.intp)
    if (truth < 0).any():
        raise InputError(
            f"the rows to predict hold labels that are not trained on; trained: {corpus.classes}"
        )
    codes = np.unique(
        [str(g) for g in (range(len(texts)) if groups is None else groups)], return_inverse=True
    )[1]
    few = {c: int((corpus.y == i).sum()) for i, c in enumerate(corpus.classes)}
    if short := [f"{c} ({n})" for c, n in few.items() if n < k]:
        raise InputError(
            f"{k} folds need {k} rows of each label; there are fewer of {', '.join(short)}. Map them to another "
            "label, or drop them"
        )
    fold = folds(corpus.y, codes, k, seed)
    counted = np.ones(len(texts), bool) if scored is None else np.asarray(scored, bool)
    n = len(texts)
    p = np.zeros((n, len(corpus.classes)))
    rules = {name: np.zeros(n, np.intp) for name in (MAJORITY, NGRAM, LENGTH)}
    lengths = np.array([len(t) for t in texts])
    chosen = []
    for f in range(k):
        train, test = np.flatnonzero(fold != f), np.flatnonzero((fold == f) & counted)
        if not test.size:
            continue
        if missing := [c for i, c in enumerate(corpus.classes) if not (corpus.y[train] == i).any()]:
            raise InputError(
                f"all rows labelled {', '.join(missing)} share a fold, because they share a group; regroup the rows"
            )
        made = corpus.fit(train, C=C, groups=codes, seed=seed)
        p[test] = corpus.chances(made, test)
        rules[MAJORITY][test] = np.bincount(corpus.y[train]).argmax()
        present = corpus.counts[:, made.columns].sign()
        best = stump(present[train], corpus.y[train], len(corpus.classes))
        rules[NGRAM][test] = best.apply(present[test])
        edges = np.unique(np.quantile(lengths[train], np.linspace(0, 1, 41)[1:-1]))
        short_texts = (lengths[:, None] <= edges).astype(float)
        rules[LENGTH][test] = stump(short_texts[train], corpus.y[train], len(corpus.classes)).apply(
            short_texts[test]
        )
        chosen.append({"C": made.C, "n-gram": corpus.names[made.columns[best.column]]})
    return HeldOut(
        classes=corpus.classes,
        y=truth[counted],
        groups=codes[counted],
        probabilities=p[counted],
        rules={name: rule[counted] for name, rule in rules.items()},
        chosen=tuple(chosen),
    )


@dataclass(frozen=True, slots=True)
class Stump:
    """A rule on one yes/no column: one class where it is set, another where it is not."""

    column: int
    present: int
    absent: int

    def apply(self, table: Any) -> IntArray:
        """(n,) classes of rows (n, m), sparse or dense."""
        column = table[:, [self.column]]
        there = np.asarray(column.toarray() if hasattr(column, "toarray") else column).ravel() > 0
        return np.where(there, self.present, self.absent)


def stump(table: Any, y: IntArray, classes: int) -> Stump:
    """The single column (of n rows, m columns of 0 and 1) whose rule is right most often.

    >>> stump(np.array([[1, 0], [1, 1], [0, 1]]), np.array([1, 1, 0]), 2)
    Stump(column=0, present=1, absent=0)
    """
    each = np.eye(classes)[y]
    there = np.asarray(table.T @ each)
    away = each.sum(axis=0) - there
    j = int((there.max(axis=1) + away.max(axis=1)).argmax())
    return Stump(j, int(there[j].argmax()), int(away[j].argmax()))


# --- numbers ----------------------------------------------------------------------------------------------------


def accuracy(right: npt.ArrayLike, groups: npt.ArrayLike | None = None, *, seed: int = 0) -> Rate:
    """Share of right predictions with its bootstrap interval over groups."""
    hits = np.asarray(right, bool)
    low, high = share_interval(hits, groups, seed=seed) or (None, None)
    return Rate(k=int(hits.sum()), n=int(hits.size), low=low, high=high)


def balanced_accuracy(y: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Mean over classes of the share of the class that was found.

    >>> balanced_accuracy([0, 0, 0, 1], [0, 0, 1, 1])  # (2/3 + 1) / 2
    0.8333333333333333
    """
    true, said = np.asarray(y), np.asarray(predicted)
    return float(np.mean([np.mean(said[true == c] == c) for c in np.unique(true)]))


def f1(y: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """2 tp / (2 tp + fp + fn) of class 1; NaN without any.

    >>> round(f1([1, 1, 0, 0], [1, 0, 1, 0]), 3)
    0.5
    """
    true, said = np.asarray(y) == 1, np.asarray(predicted) == 1
    hit, missed = int((true & said).sum()), int((true ^ said).sum())
    return 2 * hit / (2 * hit + missed) if hit + missed else float("nan")


def numbers(found: HeldOut, *, seed: int = 0, n_boot: int = 500) -> dict[str, Any]:
    """Accuracy, balanced accuracy and, with two classes, F1, AUROC and calibration error, with intervals."""
    y, said, groups = found.y, found.predicted, found.groups
    own = groups if len(np.unique(groups)) < len(groups) else None

    def between(statistic: Any, *arrays: npt.ArrayLike) -> tuple[float, float]:
        return bootstrap_interval(statistic, *arrays, clusters=own, seed=seed, n_boot=n_boot)

    out: dict[str, Any] = {
        "accuracy": accuracy(found.right, own, seed=seed),
        "balanced_accuracy": balanced_accuracy(y, said),
        "balanced_accuracy_interval": between(balanced_accuracy, y, said),
    }
    if len(found.classes) == 2:
        p = found.probabilities[:, 1]
        out["f1"], out["f1_interval"] = f1(y, said), between(f1, y, said)
        out["auroc"] = auroc(p, y == 1)
        out["auroc_interval"] = auroc_interval(p, y == 1, clusters=own, seed=seed, n_boot=n_boot)
        out["calibration_error"] = ece(p, y == 1)
    return out


def beyond(found: HeldOut, rule: npt.ArrayLike, *, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Accuracy minus that of a rule on the same rows, with the paired bootstrap interval over groups."""
    other = np.asarray(rule) == found.y
    return (
        float(found.right.mean() - other.mean()),
        paired_interval(other, found.right, clusters=found.groups, seed=seed),
    )
