"""Look at an operating point: in words and numbers, and on data it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.calibrate.base import GENERAL, Slice, data_hash, make_slices
from demur.calibrate.decide import cuts, decide
from demur.errors import InputError
from demur.stats import rate, share_interval
from demur.types import OperatingPoint, Rate, Report, Table

ORDINARY = "ordinary requests"
"""Name of their row in the table of `check`."""

_Row = tuple[str, float | None, Rate | None, Rate, float | None, str]
"""Name, threshold, true refusals, false refusals, budget and outcome."""


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
    ordinary_alpha: float | None = None,
) -> Report:
    """How an operating point does on held-out prompts. Arguments as in `Calibrator.fit`.

    Args:
        ordinary_alpha: the budget of ordinary prompts, where it was calibrated with one.

    Returns:
        A table with true and false refusals of each category, and the false ones of ordinary prompts where there
        are any, with the outcome: "kept" where the 95 % interval lies within the budget, "exceeded" where it lies
        above, else "cannot tell". In `values` the rates of any refusal ("refusal", "over_refusal"), "outcomes" by
        row, and "exceeded", the rows with that outcome.
    """
    digest = data_hash(np.asarray(scores, float), np.asarray(expected, bool), category)
    steered = tuple(cuts(point))
    slices = make_slices(
        scores, expected, category, group, names=names, rule=point.rule, steer=steered, missing="empty"
    )
    chosen = decide(scores, names, cuts(point), point.rule)
    refused, should = chosen < len(names) - 1, np.asarray(expected, bool)
    groups = None if group is None else np.asarray(group)

    def rate_of(hits: npt.NDArray[np.bool_], rows: npt.NDArray[np.bool_]) -> Rate:
        return clustered_rate(hits[rows], None if groups is None else groups[rows])

    values = {"refusal": rate_of(refused, should), "over_refusal": rate_of(refused, ~should)}
    extra = []
    if category is not None:
        plain = ~should & np.array([(c or "") in GENERAL for c in category])
        as_steered = np.isin(chosen, [names.index(c) for c in steered])
        if plain.any():
            extra.append(_row(ORDINARY, None, None, rate_of(as_steered, plain), ordinary_alpha))
    return check_slices(point, slices, digest=digest, values=values, extra=extra)


def check_slices(
    point: OperatingPoint,
    slices: Sequence[Slice],
    *,
    digest: str,
    values: dict[str, Any] | None = None,
    extra: Sequence[_Row] = (),
) -> Report:
    """`check` for problems that are already cut into slices; `extra` rows end the table."""
    if point.rule == "compare":
        raise InputError("the rule 'compare' has no thresholds to check")
    tau = cuts(point)
    rows, notes = [], []
    for s in slices:
        hit = clustered_rate(s.refuse >= tau[s.name], s.refuse_groups)
        wrong = clustered_rate(s.benign >= tau[s.name], s.benign_groups)
        row = _row(s.name, tau[s.name], hit, wrong, point.alpha)
        if s.general and s.benign.size:
            notes.append(
                f"{s.name}: no look-alike benign prompts here; the false refusals are of general benign ones, "
                "which say nothing on the budget for look-alikes"
            )
            row = (*row[:-1], "cannot tell" if point.alpha is not None else row[-1])
        rows.append(row)
    rows += extra
    if digest == point.calibration_hash:
        notes.append(
            "Scores and labels are those it was calibrated on: if the prompts are too, this is no held-out check"
        )
    columns = ("category", "threshold", "true refusals", "false refusals", "budget", "outcome")
    return Report(
        title=f"Check of operating point {point.id}",
        tables=(Table("Per category", columns, tuple(rows)),),
        values={
            **(values or {}),
            "outcomes": {row[0]: row[-1] for row in rows},
            "exceeded": [row[0] for row in rows if row[-1] == "exceeded"],
            "held_out": digest != point.calibration_hash,
        },
        provenance={**_provenance(point), "checked_on": digest},
        notes=tuple(notes),
    )


def clustered_rate(hits: npt.NDArray[np.bool_], groups: npt.NDArray[Any] | None) -> Rate:
    """A `Rate` with the Wilson interval, or the bootstrap over groups where there are groups."""
    r = rate(int(hits.sum()), int(hits.size))
    if groups is None or (interval := share_interval(hits, groups)) is None:
        return r
    return Rate(k=r.k, n=r.n, low=interval[0], high=interval[1])


def _row(name: str, tau: float | None, hit: Rate | None, wrong: Rate, budget: float | None) -> _Row:
    outcome = "cannot tell"
    if budget is None:
        outcome = "no budget"
    elif wrong.high is not None and wrong.high <= budget:
        outcome = "kept"
    elif wrong.low is not None and wrong.low > budget:
        outcome = "exceeded"
    return name, tau, hit, wrong, budget, outcome


def _counted(value: float | None, n: int | None, interval: tuple[float, float] | None) -> Rate | float | None:
    if value is None or n is None or interval is None:
        return value
    return Rate(k=round(value * n), n=n, low=interval[0], high=interval[1])


def _provenance(point: OperatingPoint) -> dict[str, Any]:
    keys = ("model", "model_fingerprint", "dtype", "T", "calibrated_on", "calibration_hash", "alpha", "delta")
    return {k: getattr(point, k) for k in keys}
