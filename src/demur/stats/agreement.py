"""How far two labellers, or a judge and people, agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.stats.intervals import rate
from demur.types import Rate


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Cohen's kappa: (p_o - p_e) / (1 - p_e), agreement beyond what the two label shares give by chance.

    Returns:
        None when it is undefined: no items, or both always use one and the same label (p_e = 1).

    >>> cohen_kappa("yyyn", "yynn")  # p_o = 3/4, p_e = 3/4 * 1/2 + 1/4 * 1/2 = 1/2
    0.5
    """
    if len(a) != len(b):
        raise InputError(f"cohen_kappa: {len(a)} and {len(b)} labels; both must label the same items")
    n = len(a)
    if n == 0:
        return None
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    labels = set(a) | set(b)
    count_a, count_b = (dict.fromkeys(labels, 0) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        count_a[x] += 1
        count_b[y] += 1
    chance = sum(count_a[c] * count_b[c] for c in labels) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def sensitivity_specificity(
    predicted: npt.ArrayLike, truth: npt.ArrayLike, *, judge: str | None = None, level: float = 0.95
) -> tuple[Rate, Rate]:
    """Share of true positives that were called so, and of true negatives, each with a Wilson interval.

    Args:
        predicted, truth: (n,) booleans over the same items.

    >>> se, sp = sensitivity_specificity([1, 1, 0, 0], [1, 1, 1, 0])
    >>> (se.k, se.n), (sp.k, sp.n)
    ((2, 3), (1, 1))
    """
    said, true = np.asarray(predicted, bool), np.asarray(truth, bool)
    if said.shape != true.shape or said.ndim != 1:
        raise InputError(f"predicted {said.shape} and truth {true.shape} must both be (n,)")
    return (
        rate(int(said[true].sum()), int(true.sum()), judge=judge, level=level),
        rate(int((~said[~true]).sum()), int((~true).sum()), judge=judge, level=level),
    )
