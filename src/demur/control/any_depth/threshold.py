"""The threshold of a check, for whole answers: each faces every check, so its score is the highest it got."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from demur.control.any_depth.answers import FloatArray
from demur.control.stopping import stopping_cut
from demur.errors import InputError
from demur.explain.probe import Cut

_CLAIM = "the share of harmless answers that a check at any of the depths stops"


def answer_cut(
    scores: npt.ArrayLike,
    harmful: npt.ArrayLike,
    *,
    fpr: float = 0.05,
    delta: float = 0.1,
    on: str | None = None,
) -> tuple[Cut, str]:
    """The cut that stops most and provably few harmless answers, and the wording of its guarantee.

    With probability 1 - `delta` over calibration sets at most a share `fpr` of new harmless answers like these is
    stopped at any check (`demur.calibrate.LearnThenTest`).

    Args:
        scores: (answers, depths) with NaN where an answer is shorter, or (answers,) highest ones; an answer that
            no check reached (all NaN) counts as not stopped. harmful: (answers,). on: the set's name.

    Raises:
        UnsupportedClaim: too few harmless answers for `fpr` and `delta`. InputError: one class only.
    """
    return stopping_cut(
        per_answer(scores), harmful, fpr=fpr, delta=delta, things="answers", claim=_CLAIM, on=on
    )


def per_answer(scores: npt.ArrayLike) -> FloatArray:
    """The highest score of each answer (n,); -inf where no check reached it.

    >>> per_answer([[0.1, 0.7], [0.4, float("nan")]]).tolist()
    [0.7, 0.4]
    """
    s = np.asarray(scores, float)
    s = s[:, None] if s.ndim == 1 else s
    if s.ndim != 2:
        raise InputError(f"scores of shape {s.shape}; needed is (answers, depths)")
    return np.asarray(np.where(np.isnan(s), -np.inf, s).max(1), float)
