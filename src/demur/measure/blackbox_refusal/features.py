"""Texts as tf-idf weights of word n-grams. Fitting and scoring share this code, and it needs no scikit-learn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from demur.judges.text import straighten

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_LETTERS = rf"(?:(?![{_CJK}])\w)+"
_TOKEN = {
    # "I" and "can't" stay whole; scripts without spaces give one token a character
    "words": re.compile(rf"[{_CJK}]|{_LETTERS}(?:'{_LETTERS})*"),
    "sklearn": re.compile(r"\b\w\w+\b"),
}
OPENING = "^"
"""Marks an n-gram of the first words of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is counted in a text.

    Attributes:
        longest: n-grams of 1 to so many tokens. min_docs: those in fewer training texts are left out.
        sublinear: weights grow as 1 + ln(count) instead of the count.
        opening: n-grams of so many first tokens are counted a second time, marked `^`.
        tokens: "words" (straight quotes, contractions and one-letter words kept) or "sklearn" (that library's
            default pattern, which drops "I" and cuts "can't" to "can").
    """

    longest: int = 3
    min_docs: int = 2
    sublinear: bool = True
    opening: int = 0
    tokens: Literal["words", "sklearn"] = "words"

    def terms(self, text: str) -> list[str]:
        """All n-grams of a text, repeats included.

        >>> Words(longest=2).terms("I can't.")
        ['i', "can't", "i can't"]
        """
        tidy = straighten(text) if self.tokens == "words" else text
        found = _TOKEN[self.tokens].findall(tidy.lower())
        start = found[: self.opening]
        return self._ngrams(found) + [OPENING + t for t in self._ngrams(start)]

    def _ngrams(self, tokens: Sequence[str]) -> list[str]:
        return [
            " ".join(tokens[i : i + n])
            for n in range(1, self.longest + 1)
            for i in range(len(tokens) - n + 1)
        ]


PAPER = Words(min_docs=1, sublinear=False, tokens="sklearn")
"""The features of Reuter and Schulze: TfidfVectorizer(ngram_range=(1, 3)), all else at its defaults."""

DEFAULTS: Mapping[str, Words] = {"response": Words(opening=20), "prompt": Words()}
"""Ours. Refusals open answers, so the first 20 words of a response count by themselves too."""


def count(texts: Sequence[str], words: Words, names: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """How often each n-gram stands in each text.

    Args:
        names: count only these n-grams; None counts all there are, in alphabetical order.

    Returns:
        Sparse counts (n, m) and the m names.
    """
    index: dict[str, int] = {} if names is None else {name: i for i, name in enumerate(names)}
    columns: list[int] = []
    values: list[int] = []
    ends = [0]
    for text in texts:
        for term, k in Counter(words.terms(text)).items():
            at = index.setdefault(term, len(index)) if names is None else index.get(term)
            if at is not None:
                columns.append(at)
                values.append(k)
        ends.append(len(columns))
    shape = (len(texts), len(index))
    table = sparse.csr_matrix((np.array(values, float), np.array(columns, np.int32), ends), shape=shape)
    found = list(index)
    if names is None:
        order = np.array(sorted(range(len(found)), key=found.__getitem__), np.intp)
        table, found = table[:, order], [found[i] for i in order]
    table.sort_indices()
    return table, found


def idf(counts: Any, min_docs: int) -> tuple[IntArray, FloatArray]:
    """Columns in at least `min_docs` rows, and their weight ln((1 + rows) / (1 + rows with it)) + 1."""
    docs = counts.getnnz(axis=0)
    kept = np.flatnonzero(docs >= max(1, min_docs))
    return kept, np.log((1 + counts.shape[0]) / (1 + docs[kept])) + 1


def weigh(counts: Any, weights: FloatArray, sublinear: bool) -> Any:
    """tf-idf of counts (n, m), each row of length 1; rows without a known n-gram stay zero."""
    table = counts.copy()
    if sublinear:
        table.data = 1 + np.log(table.data)
    table = sparse.csr_matrix(table.multiply(weights[None, :]))
    size = np.sqrt(np.asarray(table.multiply(table).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.where(size > 0, size, 1)) @ table)
