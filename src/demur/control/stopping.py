"""The threshold of whatever stops prompts or answers: stop most of what is harmful, and provably little else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from demur.calibrate.base import Slice
from demur.calibrate.learn_then_test import LearnThenTest
from demur.errors import InputError
from demur.explain.probe import Cut
from demur.stats.controls import labels


def stopping_cut(
    scores: npt.ArrayLike,
    harmful: npt.ArrayLike,
    *,
    fpr: float,
    delta: float,
    things: str,
    claim: str,
    on: str | None = None,
) -> tuple[Cut, str]:
    """The cut, and the wording of its guarantee.

    With probability 1 - `delta` over calibration sets at most a share `fpr` of new harmless ones like these is
    stopped (`demur.calibrate.LearnThenTest`).

    Args:
        scores: (n,), -inf for one that nothing could stop. harmful: labels (n,).
        things: what is stopped ("prompts"). claim: what the guarantee is about. on: the set's name.

    Raises:
        UnsupportedClaim: too few harmless ones for `fpr` and `delta`. InputError: one class only, or NaN.
    """
    s = np.asarray(scores, float)
    yes = labels(harmful, s.size)
    if yes.all() or not yes.any():
        raise InputError(f"all {yes.size} {things} are labelled {bool(yes[0])}; a threshold needs both kinds")
    if np.isnan(s).any() or (s == np.inf).any():
        raise InputError(f"scores of {things} that are no numbers; read them again")
    rows, rule = Slice("harmful", s[yes], s[~yes]), LearnThenTest(fpr, delta)
    [choice] = rule.choose([rows])
    assert choice.bound is not None
    k, n = int((rows.benign >= choice.tau).sum()), rows.benign.size
    where = f"{things} drawn like {on or 'the calibration set'}"
    cut = Cut(threshold=choice.tau, target=fpr, k=k, n=n, delta=delta, upper=choice.bound)
    return cut, rule.guarantee([rows], where, claim)
