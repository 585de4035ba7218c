"""Correct a judged rate for the judge's measured error (Rogan and Gladen 1978)."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from demur.errors import InputError
from demur.stats.intervals import FloatArray
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
        judge's error is undefined, or when Se + Sp <= 1 (with a warning).

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
    low, high = np.quantile(np.clip((r + b - 1) / np.maximum(informed, 0.01), 0, 1), [tail, 1 - tail])
    return replace(rate, corrected=corrected, corrected_interval=(float(low), float(high)))


def _value(x: Rate | float) -> float | None:
    return x.value if isinstance(x, Rate) else float(x)


def _posterior(x: Rate | float, draws: int, rng: np.random.Generator) -> FloatArray:
    if isinstance(x, Rate):
        return rng.beta(x.k + 0.5, x.n - x.k + 0.5, draws)
    return np.full(draws, float(x))
