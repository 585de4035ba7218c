"""The classifier: fitted with scikit-learn, kept as plain numbers, scored with numpy and scipy alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError, MissingExtra
from demur.files import write_atomic
from demur.measure.blackbox_refusal.features import DEFAULTS, FloatArray, IntArray, Words, count, idf, weigh

Reads = Literal["prompt", "response"]
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Inverse penalties C to choose from, by log-loss on inner folds of the training rows."""
PAPER_C = 10.0
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RefusalClassifier:
    """Labels and probabilities from text alone.

    Attributes:
        reads: whether it was fitted on prompts (predicts) or on responses (recognises).
        classes: labels in alphabetical order. With two, positive coefficients speak for the second one
            ("rejected" after "complied").
        terms: m n-grams. idf: (m,). coef: (1, m) with two classes, else (classes, m). intercept: one each.
        C: inverse penalty. rows: training rows by class. about: what else is known, e.g. the label map.
    """

    reads: Reads
    words: Words
    classes: tuple[str, ...]
    terms: tuple[str, ...]
    idf: FloatArray
    coef: FloatArray
    intercept: FloatArray
    C: float
    rows: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, texts: Sequence[str]) -> FloatArray:
        """Probability of each class, shape (n, classes)."""
        counts, _ = count(texts, self.words, self.terms)
        return chances(weigh(counts, self.idf, self.words.sublinear), self.coef, self.intercept)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable class of each text."""
        return [self.classes[i] for i in self.probabilities(texts).argmax(axis=1)]

    def known(self, texts: Sequence[str]) -> FloatArray:
        """(n,) share of each text's different n-grams that were in training; NaN for a text without words."""
        index = set(self.terms)
        found = [set(self.words.terms(t)) for t in texts]
        return np.array([len(f & index) / len(f) if f else np.nan for f in found])

    def save(self, path: str | Path) -> None:
        """Write an .npz file of plain arrays; no pickle, and the same model gives the same bytes."""
        header = {
            "format": _FORMAT,
            "what": "demur refusal classifier",
            "reads": self.reads,
            "words": asdict(self.words),
            "classes": self.classes,
            "C": self.C,
            "rows": dict(self.rows),
            "about": dict(self.about),
        }
        out = io.BytesIO()
        np.savez_compressed(
            out,
            header=_bytes(json.dumps(header, sort_keys=True)),
            terms=_bytes("\n".join(self.terms)),
            idf=self.idf,
            coef=self.coef,
            intercept=self.intercept,
        )
        write_atomic(path, out.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> RefusalClassifier:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or no whole model of this kind.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; make one with `demur lab predict-refusal train`")
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                terms = tuple(file["terms"].tobytes().decode().split("\n"))
                weights, coef, intercept = (np.asarray(file[k], float) for k in ("idf", "coef", "intercept"))
            if header["format"] != _FORMAT:
                raise InputError(f"{path}: format {header['format']}; this demur reads format {_FORMAT}")
            made = cls(
                reads=header["reads"],
                words=Words(**header["words"]),
                classes=tuple(header["classes"]),
                terms=terms,
                idf=weights,
                coef=coef,
                intercept=intercept,
                C=float(header["C"]),
                rows=header["rows"],
                about=header["about"],
            )
        except InputError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            raise InputError(f"{path}: is no whole model saved by predict-refusal ({e})") from None
        lines = 1 if len(made.classes) == 2 else len(made.classes)
        if coef.shape != (lines, len(terms)) or weights.shape != (len(terms),) or intercept.shape != (lines,):
            raise InputError(f"{path}: its arrays do not fit together; save the model again")
        return made


def _bytes(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


def chances(table: Any, coef: FloatArray, intercept: FloatArray) -> FloatArray:
    """Class probabilities (n, classes) of weighed texts."""
    logits = np.asarray(table @ coef.T) + intercept
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return np.asarray(special.softmax(logits, axis=1), float)


# --- fitting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """One fit on some rows of a corpus: which columns it kept, and their weights."""

    columns: IntArray
    idf: FloatArray
    coef: FloatArray
    intercept: FloatArray
    C: float


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Texts counted once, so that folds are cheap: (n, m) counts, m names, labels as (n,) indices into classes."""

    counts: Any
    names: list[str]
    y: IntArray
    classes: tuple[str, ...]
    words: Words

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[str], words: Words) -> Corpus:
        """Count texts.

        Raises:
            InputError: lengths differ, or fewer than two labels.
        """
        if len(texts) != len(labels):
            raise InputError(f"{len(texts)} texts and {len(labels)} labels; give one label for each text")
        classes = tuple(sorted(set(labels)))
        if len(classes) < 2:
            raise InputError(
                f"all {len(labels)} rows are labelled {', '.join(classes) or 'not at all'}; two labels are needed"
            )
        counts, names = count(texts, words)
        y = np.array([classes.index(label) for label in labels], np.intp)
        return cls(counts, names, y, classes, words)

    def fit(
        self,
        rows: IntArray,
        *,
        C: float | None = None,
        groups: npt.NDArray[Any] | None = None,
        seed: int = 0,
    ) -> Fitted:
        """Fit on some rows. Without C it is chosen on inner folds, in which rows of one group stay together."""
        if C is None:
            C = self._strength(rows, groups, seed)
        columns, weights = idf(self.counts[rows], self.words.min_docs)
        if not columns.size:
            raise InputError(
                f"no n-gram stands in {self.words.min_docs} of the {len(rows)} training texts; give more rows"
            )
        coef, intercept = solve(self.table(rows, columns, weights), self.y[rows], C, seed=seed)
        return Fitted(columns=columns, idf=weights, coef=coef, intercept=intercept, C=C)

    def table(self, rows: IntArray, columns: IntArray, weights: FloatArray) -> Any:
        """Weighed texts (rows, columns)."""
        return weigh(self.counts[rows][:, columns], weights, self.words.sublinear)

    def chances(self, fitted: Fitted, rows: IntArray) -> FloatArray:
        """Class probabilities (rows, classes)."""
        return chances(self.table(rows, fitted.columns, fitted.idf), fitted.coef, fitted.intercept)

    def _strength(self, rows: IntArray, groups: npt.NDArray[Any] | None, seed: int) -> float:
        y = self.y[rows]
        own = rows if groups is None else groups[rows]
        fold = folds(y, own, 3, seed) if np.bincount(y, minlength=len(self.classes)).min() >= 3 else None
        if fold is None or any(len(set(y[fold != f])) < len(self.classes) for f in range(3)):
            return PAPER_C  # a class that is too rare to hold any of it out
        loss = np.zeros(len(STRENGTHS))
        for f in range(3):
            inner, outer = rows[fold != f], rows[fold == f]
            columns, weights = idf(self.counts[inner], self.words.min_docs)
            if not columns.size:
                return PAPER_C
            table, held = (self.table(r, columns, weights) for r in (inner, outer))
            for i, C in enumerate(STRENGTHS):
                p = chances(held, *solve(table, self.y[inner], C, seed=seed))
                loss[i] -= np.log(np.maximum(p[np.arange(len(outer)), self.y[outer]], 1e-12)).sum()
        return STRENGTHS[int(loss.argmin())]


def solve(
    table: Any, y: IntArray, C: float, *, weight: FloatArray | None = None, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Coefficients (1 or classes, m) and intercepts of an L2 logistic regression."""
    LogisticRegression = sklearn_part("linear_model").LogisticRegression
    solver = "liblinear" if len(set(y.tolist())) == 2 else "lbfgs"
    model = LogisticRegression(C=C, solver=solver, max_iter=10_000, random_state=seed)
    model.fit(table, y, sample_weight=weight)
    return np.asarray(model.coef_, float), np.asarray(model.intercept_, float)


def folds(y: IntArray, groups: npt.ArrayLike, k: int, seed: int) -> IntArray:
    """(n,) fold of each row, 0..k-1: rows of one group together, classes about equal in all folds.

    Groups are dealt out in random order, the largest first, each to the fold that has the fewest rows of its main
    class (of all rows, on a tie).

    >>> folds(np.array([0, 0, 1, 1]), ["a", "a", "b", "c"], 2, 0).tolist()
    [0, 0, 0, 1]
    """
    _, of, size = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    each = np.zeros((len(size), int(y.max()) + 1), int)
    np.add.at(each, (of, y), 1)
    shuffled = np.random.default_rng(seed).permutation(len(size))
    order = shuffled[np.argsort(-size[shuffled], kind="stable")]
    loads = [[0] * each.shape[1] for _ in range(k)]
    out = np.empty(len(size), np.intp)
    for g, row in zip(order.tolist(), each[order].tolist(), strict=True):
        main = row.index(max(row))
        fold = min((load[main], sum(load), f) for f, load in enumerate(loads))[2]
        loads[fold] = [a + b for a, b in zip(loads[fold], row, strict=True)]
        out[g] = fold
    return out[of]


def sklearn_part(part: str) -> Any:
    """A module of scikit-learn, or `MissingExtra`."""
    try:
        import importlib

        return importlib.import_module(f"sklearn.{part}")
    except ImportError:
        raise MissingExtra("Fitting a refusal classifier", "predict") from None


def fit(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    reads: Reads,
    words: Words | None = None,
    C: float | None = None,
    groups: Sequence[object] | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> RefusalClassifier:
    """Fit a classifier on labelled texts.

    Args:
        reads: what the texts are, "prompt" or "response"; it also decides the default of `words`.
        C: inverse penalty; None chooses it on inner folds. groups: rows of one group stay together there.

    Raises:
        InputError: fewer than two labels, or lengths differ. MissingExtra: scikit-learn is not installed.

    Example:
        >>> texts = ["Sorry, I can't help.", "Here is a list."] * 4
        >>> made = fit(texts, ["rejected", "complied"] * 4, reads="response")  # doctest: +SKIP
        >>> made.predict(["Sorry, I can't."])  # doctest: +SKIP
        ['rejected']
    """
    if reads not in DEFAULTS:
        raise InputError(f"reads={reads!r}; a classifier reads 'prompt' or 'response'")
    corpus = Corpus.of(texts, labels, words or DEFAULTS[reads])
    codes = None if groups is None else np.unique([str(g) for g in groups], return_inverse=True)[1]
    made = corpus.fit(np.arange(len(texts)), C=C, groups=codes, seed=seed)
    return RefusalClassifier(
        reads=reads,
        words=corpus.words,
        classes=corpus.classes,
        terms=tuple(corpus.names[i] for i in made.columns),
        idf=made.idf,
        coef=made.coef,
        intercept=made.intercept,
        C=made.C,
        rows=cast(Mapping[str, int], dict(sorted(Counter(labels).items()))),
        about=dict(about or {}),
    )
