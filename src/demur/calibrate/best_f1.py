"""Thresholds with the best F1 between a category's should-refuse and look-alike benign prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demur.calibrate.base import Calibrator, Choice, Slice, candidates, count_at_least


@dataclass(frozen=True)
class BestF1(Calibrator):
    """Maximises F1 = 2 tp / (2 tp + fp + fn) in each category, "should refuse" being positive.

    The highest threshold wins a tie. F1 depends on how many benign prompts the data hold per should-refuse
    prompt, so the threshold is only as meaningful as that share. Nothing is guaranteed.

    Example:
        >>> import numpy as np
        >>> p = np.array([0.9, 0.8, 0.4, 0.5, 0.1])  # F1 4/5 above 0.5, and 6/7 between 0.1 and 0.4
        >>> point = BestF1().fit(np.c_[p, 1 - p], [1, 1, 1, 0, 0], None, names=["refuse", "respond"])
        >>> round(point.thresholds["refuse"].tau, 2)
        0.25
    """

    @property
    def goal(self) -> str:
        """Always "best_f1"."""
        return "best_f1"

    def choose(self, slices: Sequence[Slice]) -> list[Choice]:
        """One threshold per slice."""
        out = []
        for s in slices:
            taus = candidates(s)
            tp, fp = count_at_least(s.refuse, taus), count_at_least(s.benign, taus)
            out.append(Choice(float(taus[(2 * tp / (tp + fp + s.refuse.size)).argmax()])))
        return out
