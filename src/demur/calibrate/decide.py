"""From first-position probabilities to a decision: the one implementation of the decision rules.

Let C be the refuse categories, S the steered ones (those with a threshold), c* the likeliest refuse category
(the first in `names` on a tie). Where c* is not in S the model's own likeliest control token stands. Else
refuse with c* iff

    threshold   p_c* >= tau_c*
    total_mass  sum of p_c over S >= tau_c*
    bias        p_c* / (p_c* + p_respond) >= tau_c* = 1 / (1 + e^b), the same as adding b to c*'s logit
    compare     p_c* >= p_respond (thresholds play no part)

and respond otherwise. A tau of 0 refuses always, one above 1 never, and a negative one means "compare" for
its category. Calibration and control both decide here, so what was calibrated is what runs.

Reference: Jain et al. 2024, arXiv 2412.06748, and the decoding code published with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.types import RESPOND, OperatingPoint

Rule = Literal["compare", "threshold", "total_mass", "bias"]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]


def decide(
    P: npt.ArrayLike, names: Sequence[str], thresholds: Mapping[str, float], rule: Rule = "threshold"
) -> IntArray:
    """Index in `names` of the control token to emit, for each row.

    Args:
        P: (n, K+1) probabilities with columns `names`; rows may sum to less than 1 (off-control mass).
        names: K refuse categories, then "respond".
        thresholds: tau per steered category; for the rule "bias" on the two-way share (see `bias_to_tau`).

    Raises:
        InputError: another shape, NaN, no probabilities, an unknown category or rule.

    >>> P = [[0.3, 0.1, 0.6], [0.1, 0.2, 0.7]]
    >>> decide(P, ["safety", "humanizing", "respond"], {"safety": 0.25}).tolist()
    [0, 2]
    """
    table = check_table(P, names)
    tau = _tau_by_column(names, thresholds)
    own = table.argmax(axis=1)
    best, score = steering_score(table, names, thresholds, rule)
    respond = len(names) - 1
    compare = table[np.arange(len(table)), best] >= table[:, respond]
    cut = tau[best]
    refuse = compare if rule == "compare" else np.where(cut < 0, compare, score >= cut)
    return np.where(np.isnan(cut), own, np.where(refuse, best, respond))


def is_steered(
    P: npt.ArrayLike, names: Sequence[str], thresholds: Mapping[str, float]
) -> npt.NDArray[np.bool_]:
    """(n,) True where c* has a threshold, so that `decide` and not the model's own choice speaks."""
    table = check_table(P, names)
    cut = _tau_by_column(names, thresholds)[table[:, :-1].argmax(axis=1)]
    return np.asarray(~np.isnan(cut), dtype=np.bool_)


def steering_score(
    P: FloatArray, names: Sequence[str], steered: Iterable[str], rule: Rule = "threshold"
) -> tuple[IntArray, FloatArray]:
    """c* (column index) and the number that the rule compares with tau, each of shape (n,)."""
    if rule not in get_args(Rule):
        raise InputError(f"rule={rule!r}: use one of {', '.join(get_args(Rule))}")
    refuse = P[:, :-1]
    best = refuse.argmax(axis=1)
    top = refuse[np.arange(len(P)), best]
    if rule == "total_mass":
        chosen = set(steered)
        return best, refuse[:, [name in chosen for name in names[:-1]]].sum(axis=1)
    if rule == "bias":
        both = top + P[:, -1]
        # neither token has any mass: a tie, as in the limit of equal logits
        return best, np.divide(top, both, out=np.full(len(P), 0.5), where=both > 0)
    return best, top


def cuts(point: OperatingPoint) -> dict[str, float]:
    """Thresholds of an operating point in the form `decide` takes, without categories in shadow mode."""
    out = {}
    for category, t in point.thresholds.items():
        if t.mode == "shadow":
            continue
        out[category] = t.tau
        if point.rule == "bias" and t.bias is not None:
            out[category] = bias_to_tau(t.bias)
            if abs(out[category] - t.tau) > 1e-6:
                raise InputError(
                    f"operating point {point.id!r}, category {category!r}: tau {t.tau} and bias {t.bias} "
                    f"disagree; for the rule 'bias' tau must be {out[category]:.6g}, or leave bias out"
                )
    return out


def bias_to_tau(bias: float) -> float:
    """Threshold on the two-way share p_c / (p_c + p_respond) that equals adding `bias` to the refuse logit.

    >>> bias_to_tau(0.0)
    0.5
    """
    return float(special.expit(-bias))


def tau_to_bias(tau: float) -> float:
    """The refuse-logit bias equal to a threshold on the two-way share; inf at 0 (always), -inf from 1 on.

    The share reaches 1 only where p_respond is 0.
    """
    if tau < 0:
        raise InputError(f"tau={tau}: a negative threshold means 'compare' and has no bias (bias 0 compares)")
    return float(-special.logit(min(tau, 1.0)))


def check_table(P: npt.ArrayLike, names: Sequence[str]) -> FloatArray:
    """`P` as a float array (n, K+1), or an `InputError` that names the first offending row."""
    if len(names) < 2 or names[-1] != RESPOND or len(set(names)) != len(names):
        raise InputError(
            f"names={list(names)}: needs distinct refuse categories and {RESPOND!r} as the last one "
            "(runtime.control.names has this form)"
        )
    table = np.asarray(P, float)
    if table.size == 0:
        table = table.reshape(0, len(names))
    if table.ndim != 2 or table.shape[1] != len(names):
        raise InputError(
            f"probabilities of shape {table.shape}, expected (n, {len(names)}) for {list(names)}"
        )
    wrong = ~np.isfinite(table).all(axis=1) | (table < 0).any(axis=1) | (table.sum(axis=1) > 1.01)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {row} holds {table[row].round(4).tolist()}, which are no probabilities "
            f"({int(wrong.sum())} such rows); pass the softmax over the whole vocabulary, or use "
            "calibrate_table for scores of another kind"
        )
    return table


def _tau_by_column(names: Sequence[str], thresholds: Mapping[str, float]) -> FloatArray:
    known = list(names[:-1])
    for category, tau in thresholds.items():
        if category not in known:
            raise InputError(f"threshold for {category!r}, but the refuse categories are {', '.join(known)}")
        if np.isnan(tau):
            raise InputError(f"the threshold of {category!r} is NaN; leave the category out to not steer it")
    return np.array([thresholds.get(name, np.nan) for name in known], dtype=np.float64)
