"""Which n-grams speak for a refusal, with intervals.

A coefficient is part of a whole model, so it depends on what else is in the text. The share of refusals among the
texts with the n-gram stands beside it. Intervals are the coefficient -+ 1.96 times its standard deviation over
refits on resampled groups, with n-grams, weights and penalty as they are. The penalty draws all coefficients
towards 0, and the n-grams were picked by size on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demur.errors import InputError
from demur.measure.blackbox_refusal.classifier import RefusalClassifier, solve
from demur.measure.blackbox_refusal.features import FloatArray, count, weigh
from demur.stats import rate
from demur.types import Rate

TOP = 18
"""As many as the paper plots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ngram:
    """One n-gram.

    Attributes:
        ngram: the longest of those that stand in exactly the same texts; a leading `^`: among the first words.
        toward: the class that a positive coefficient speaks for.
        low, high: 95 % interval of the coefficient. share: of the class among the texts with the n-gram.
    """

    ngram: str
    toward: str
    coefficient: float
    low: float
    high: float
    share: Rate

    @property
    def settled(self) -> bool:
        """Whether the interval leaves the sign no doubt."""
        return self.low > 0 or self.high < 0


def ngram_report(
    classifier: RefusalClassifier,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    groups: Sequence[object] | None = None,
    top: int = TOP,
    draws: int = 200,
    seed: int = 0,
) -> list[Ngram]:
    """The `top` n-grams by absolute coefficient, in signed order; with more than two classes, for each class.

    Args:
        texts, labels: the rows that the classifier was fitted on.
        groups: resampled together; default each row by itself. draws: refits.

    Raises:
        InputError: a label that the classifier does not have. MissingExtra: scikit-learn is not installed.
    """
    if unknown := set(labels) - set(classifier.classes):
        raise InputError(f"labels {', '.join(sorted(unknown))} are not among {', '.join(classifier.classes)}")
    if draws < 20:
        raise InputError(f"draws={draws}: an interval needs at least 20")
    counts, _ = count(texts, classifier.words, classifier.terms)
    table = weigh(counts, classifier.idf, classifier.words.sublinear)
    y = np.array([classifier.classes.index(label) for label in labels], np.intp)
    named = [str(g) for g in (range(len(texts)) if groups is None else groups)]
    _, of = np.unique(named, return_inverse=True)
    columns = counts.tocsc()
    picked = [_top(classifier, line, columns, top) for line in classifier.coef]
    rng = np.random.default_rng(seed)
    drawn: list[list[FloatArray]] = []
    while len(drawn) < draws:
        weight = np.bincount(rng.integers(0, of.max() + 1, of.max() + 1), minlength=of.max() + 1)[of].astype(
            float
        )
        if len(set(y[weight > 0].tolist())) < len(classifier.classes):
            continue  # a resample without one of the classes cannot be fitted
        coef, _ = solve(table, y, classifier.C, weight=weight, seed=seed)
        drawn.append([line[rows] for line, rows in zip(coef, picked, strict=True)])
    out = []
    for i, rows in enumerate(picked):
        positive = 1 if len(classifier.classes) == 2 else i
        spread = np.std(np.array([d[i] for d in drawn]), axis=0, ddof=1)
        for j, column in enumerate(rows):
            there = np.asarray(columns[:, [column]].toarray()).ravel() > 0
            value, half = float(classifier.coef[i, column]), 1.96 * float(spread[j])
            out.append(
                Ngram(
                    ngram=classifier.terms[column],
                    toward=classifier.classes[positive],
                    coefficient=value,
                    low=value - half,
                    high=value + half,
                    share=rate(int((y[there] == positive).sum()), int(there.sum())),
                )
            )
    return out


def _top(classifier: RefusalClassifier, line: FloatArray, columns: Any, top: int) -> list[int]:
    """Columns of the largest coefficients, one for each set of texts, in signed order."""
    best: dict[bytes, int] = {}
    for i in np.argsort(-np.abs(line), kind="stable"):
        texts = columns.indices[columns.indptr[i] : columns.indptr[i + 1]].tobytes()
        if texts not in best and len(best) == top:
            break
        known = best.setdefault(texts, int(i))
        if len(classifier.terms[i]) > len(classifier.terms[known]):
            best[texts] = int(i)
    return sorted(best.values(), key=lambda i: -line[i])
