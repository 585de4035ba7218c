"""The threshold of a check, for whole answers: each faces every check, so its score is the highest it got."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from demur.calibrate.base import Slice
from demur.calibrate.learn_then_test import LearnThenTest
from demur.control.any_depth.answers import FloatArray
from demur.errors import InputError
from demur.explain.probe import Cut
from demur.stats.controls import labels

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
    highest = per_answer(scores)
    yes = labels(harmful, highest.size)
    if yes.all() or not yes.any():
        raise InputError(f"all {yes.size} answers are labelled {bool(yes[0])}; a threshold needs both kinds")
    rows, rule = Slice("harmful", highest[yes], highest[~yes]), LearnThenTest(fpr, delta)
    [choice] = rule.choose([rows])
    assert choice.bound is not None
    k, n = int((rows.benign >= choice.tau).sum()), rows.benign.size
    where = f"answers drawn like {on}" if on else "answers drawn like the calibration set"
    cut = Cut(threshold=choice.tau, target=fpr, k=k, n=n, delta=delta, upper=choice.bound)
    return cut, rule.guarantee([rows], where, _CLAIM)


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
