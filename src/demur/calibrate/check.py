"""Look at an operating point: in words and numbers, and on data it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.calibrate.base import Slice, data_hash, make_slices
from demur.calibrate.decide import cuts, decide
from demur.errors import InputError
from demur.stats import rate, share_interval
from demur.types import OperatingPoint, Rate, Report, Table


def describe(point: OperatingPoint) -> Report:
    """The operating point as a table of n, errors and bound by category; the guarantee is a note."""
    rows = tuple(
        (
            name,
            t.tau,
            t.bias,
            _counted(t.refusal_rate, t.n_refuse, t.refusal_interval),
            None if t.n_benign is None or t.benign_errors is None else rate(t.benign_errors, t.n_benign),
            t.bound,
            t.mode,
        )
        for name, t in sorted(point.thresholds.items())
    )
    columns = ("category", "threshold", "bias", "true refusals", "false refusals", "upper bound", "mode")
    return Report(
        title=f"Operating point {point.id}",
        tables=(Table(f"rule {point.rule}, goal {point.goal}", columns, rows),),
        provenance=_provenance(point),
        notes=(
            point.guarantee or "Nothing is guaranteed: this goal makes no claim about new prompts.",
            *(["What is accepted is answered by the base, without the adapter."] * (point.answers == "base")),
        ),
    )


def check(
    point: OperatingPoint,
    scores: npt.ArrayLike,
    expected: npt.ArrayLike,
    category: Sequence[str | None] | npt.NDArray[Any] | None,
    group: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    names: Sequence[str],
) -> Report:
    """How an operating point does on held-out prompts. Arguments as in `Calibrator.fit`.

    Returns:
        A table with true and false refusals of each category, and in `values` the rates of any refusal
        ("refusal", "over_refusal") and "exceeded", the categories whose false refusal rate is above alpha
        beyond chance (its interval lies wholly above).
    """
    digest = data_hash(np.asarray(scores, float), np.asarray(expected, bool), category)
    steered = tuple(cuts(point))
    slices = make_slices(scores, expected, category, group, names=names, rule=point.rule, steer=steered)
    refused = decide(scores, names, cuts(point), point.rule) < len(names) - 1
    should, groups = np.asarray(expected, bool), None if group is None else np.asarray(group)
    values = {
        "refusal": clustered_rate(refused[should], None if groups is None else groups[should]),
        "over_refusal": clustered_rate(refused[~should], None if groups is None else groups[~should]),
    }
    return check_slices(point, slices, digest=digest, values=values)


def check_slices(
    point: OperatingPoint, slices: Sequence[Slice], *, digest: str, values: dict[str, Any] | None = None
) -> Report:
    """`check` for problems that are already cut into slices."""
    if point.rule == "compare":
        raise InputError("the rule 'compare' has no thresholds to check")
    tau = cuts(point)
    rows, exceeded, notes = [], [], []
    for s in slices:
        hit = clustered_rate(s.refuse >= tau[s.name], s.refuse_groups)
        wrong = clustered_rate(s.benign >= tau[s.name], s.benign_groups)
        outcome = _outcome(wrong, point.alpha)
        if outcome == "exceeded":
            exceeded.append(s.name)
        if s.general:
            notes.append(
                f"{s.name}: no look-alike benign prompts here; false refusals are of general benign ones"
            )
        rows.append((s.name, tau[s.name], hit, wrong, point.alpha, outcome))
    if digest == point.calibration_hash:
        notes.append("These are the prompts it was calibrated on, so this is no held-out check")
    columns = ("category", "threshold", "true refusals", "false refusals", "budget", "outcome")
    return Report(
        title=f"Check of operating point {point.id}",
        tables=(Table("Per category", columns, tuple(rows)),),
        values={**(values or {}), "exceeded": exceeded, "held_out": digest != point.calibration_hash},
        provenance={**_provenance(point), "checked_on": digest},
        notes=tuple(notes),
    )


def clustered_rate(hits: npt.NDArray[np.bool_], groups: npt.NDArray[Any] | None) -> Rate:
    """A `Rate` with the Wilson interval, or the bootstrap over groups where there are groups."""
    r = rate(int(hits.sum()), int(hits.size))
    if groups is None or (interval := share_interval(hits, groups)) is None:
        return r
    return Rate(k=r.k, n=r.n, low=interval[0], high=interval[1])


def _outcome(wrong: Rate, alpha: float | None) -> str:
    if alpha is None:
        return "no budget"
    if wrong.value is None or wrong.low is None:
        return "no data"
    if wrong.value <= alpha:
        return "within"
    return "exceeded" if wrong.low > alpha else "above, within chance"


def _counted(value: float | None, n: int | None, interval: tuple[float, float] | None) -> Rate | float | None:
    if value is None or n is None or interval is None:
        return value
    return Rate(k=round(value * n), n=n, low=interval[0], high=interval[1])


def _provenance(point: OperatingPoint) -> dict[str, Any]:
    keys = ("model", "model_fingerprint", "dtype", "T", "calibrated_on", "calibration_hash", "alpha", "delta")
    return {k: getattr(point, k) for k in keys}
