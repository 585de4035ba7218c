"""Thresholds that give a wanted refusal rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demur.calibrate.base import Calibrator, Choice, Slice, candidates, count_at_least
from demur.errors import InputError, UnsupportedClaim


@dataclass(frozen=True)
class TargetRate(Calibrator):
    """The highest threshold at which at least `rate` of a category's should-refuse prompts get its token.

    Ties between scores can push the achieved rate above the target; the operating point records it.
    Nothing is guaranteed about false refusals, which are counted all the same.

    Args:
        rate: wanted share in [0, 1]. Others: see `Calibrator`.

    Example:
        >>> import numpy as np
        >>> p = np.linspace(0.1, 1, 10)
        >>> point = TargetRate(0.3).fit(
        ...     np.r_[np.c_[p, 1 - p], [[0.0, 1.0]]], [1] * 10 + [0], None, names=["refuse", "respond"])
        >>> round(point.thresholds["refuse"].tau, 2), point.thresholds["refuse"].refusal_rate
        (0.75, 0.3)
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise InputError(f"rate={self.rate}: a refusal rate lies in [0, 1], e.g. 0.9")

    @property
    def goal(self) -> str:
        """For example "refusal_rate=0.9"."""
        return f"refusal_rate={self.rate:g}"

    def choose(self, slices: Sequence[Slice]) -> list[Choice]:
        """One threshold per slice; `UnsupportedClaim` where the rate is out of reach."""
        reach = {s.name: float(np.isfinite(s.refuse).mean()) for s in slices}
        short = [f"{name} at most {r:.1%}" for name, r in reach.items() if r < self.rate]
        if short:
            raise UnsupportedClaim(
                f"a refusal rate of {self.rate:g} cannot be reached: {', '.join(short)}, because for "
                "the other should-refuse prompts another category is likelier. Ask for less, or steer others"
            )
        out = []
        for s in slices:
            taus = candidates(s)
            needed = np.ceil(self.rate * s.refuse.size - 1e-9)
            out.append(Choice(float(taus[np.argmax(count_at_least(s.refuse, taus) >= needed)])))
        return out
