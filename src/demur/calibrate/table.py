"""Thresholds for any scores: guard models, probes, moderation APIs. One score and one label per row.

The rule is "refuse iff score >= threshold of the row's group". Scores need not be probabilities: any finite
number will do, as long as more means more refusable; only their order and ties matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.calibrate.base import CalibrationWarning, Calibrator, Slice, data_hash
from demur.calibrate.best_f1 import BestF1
from demur.calibrate.check import check_slices
from demur.calibrate.decide import FloatArray, cuts
from demur.calibrate.learn_then_test import LearnThenTest
from demur.calibrate.target_rate import TargetRate
from demur.errors import InputError
from demur.types import OperatingPoint, Report

Goal = Literal["max-tpr", "target-rate", "best-f1"]
Rows = Sequence[tuple[int, Mapping[str, Any]]] | Sequence[Mapping[str, Any]]

_LABELS: Mapping[str, bool] = {
    "1": True,
    "true": True,
    "refuse": True,
    "0": False,
    "false": False,
    "comply": False,
}
_CLAIM = "the share of rows labelled 0 in group c with a score at or above its threshold"


def calibrate_table(
    rows: Rows,
    score: str,
    label: str,
    group: str | None = None,
    alpha: float = 0.05,
    delta: float = 0.1,
    goal: Goal = "max-tpr",
    *,
    rate: float | None = None,
    cluster: str | None = None,
    calibrated_on: str | None = None,
) -> OperatingPoint:
    """Calibrate a threshold for each group of a table.

    Args:
        rows: as `demur.files.read_rows` gives them, (line number, row), or plain mappings.
        score, label, group: column names. Labels: 1 / true / refuse for rows that should be refused, 0 /
            false / comply for those that should not. Without `group` there is one threshold, named "all".
            Rows labelled 0 without a group serve groups that have none of their own, which the guarantee
            then says.
        goal: "max-tpr" (`LearnThenTest` at alpha, delta), "target-rate" (needs `rate`) or "best-f1".
        cluster: column naming rows of one source; a source counts as one draw.

    Where there is a column `id`, rows of one id (within a group) that are equal in everything count once, with a
    `CalibrationWarning`.

    Raises:
        InputError: a missing column; a score or label that cannot be read, with its line; an id on rows
            that differ. UnsupportedClaim: too few rows for alpha and delta.

    >>> rows = [{"p": 0.9, "y": 1}] * 20 + [{"p": 0.1, "y": 0}] * 50
    >>> calibrate_table(rows, "p", "y").thresholds["all"].tau
    0.5
    """
    p, y, kind, clusters = _read(rows, score, label, group, cluster)
    slices = _slices(p, y, kind, clusters, [str(g) for g in np.unique(kind) if g])
    if bare := [s.name for s in slices if not s.benign.size]:
        raise InputError(
            f"group {bare[0]!r} has no rows labelled 0 (should not be refused), so nothing bounds its errors"
        )
    return _calibrator(goal, alpha, delta, rate).fit_slices(
        slices, digest=data_hash(p, y, kind), calibrated_on=calibrated_on, claim=_CLAIM
    )


def check_table_rows(
    point: OperatingPoint,
    rows: Rows,
    score: str,
    label: str,
    group: str | None = None,
    *,
    cluster: str | None = None,
) -> Report:
    """`check` for a table's operating point; rows of groups without a threshold are left out and noted."""
    p, y, kind, clusters = _read(rows, score, label, group, cluster)
    digest, names = data_hash(p, y, kind), sorted(cuts(point))
    steered = np.isin(kind, ["", *names])
    if not (steered & (kind != "")).any():
        raise InputError(f"none of the groups here has a threshold; the point has {', '.join(point.steered)}")
    report = check_slices(point, _slices(p, y, kind, clusters, names), digest=digest)
    if steered.all():
        return report
    left = f"{int((~steered).sum())} rows of groups without a threshold were left out: "
    return replace(report, notes=(*report.notes, left + ", ".join(np.unique(kind[~steered]))))


def refuse_rows(point: OperatingPoint, scores: npt.ArrayLike, groups: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Apply a table's operating point: (n,) True where the score reaches the threshold of the row's group."""
    tau = cuts(point)
    unknown = set(groups) - set(tau)
    if unknown:
        raise InputError(
            f"no threshold for {', '.join(sorted(unknown))}; the point has {', '.join(point.steered)}"
        )
    return np.asarray(np.asarray(scores, float) >= np.array([tau[g] for g in groups], dtype=np.float64))


def _calibrator(goal: str, alpha: float, delta: float, rate: float | None) -> Calibrator:
    if goal == "max-tpr":
        return LearnThenTest(alpha, delta, rule="threshold")
    if goal == "best-f1":
        return BestF1(rule="threshold")
    if goal == "target-rate":
        if rate is None:
            raise InputError("goal 'target-rate' needs the rate, e.g. rate=0.9")
        return TargetRate(rate, rule="threshold")
    raise InputError(f"goal={goal!r}: use max-tpr, target-rate or best-f1")


def _slices(
    p: FloatArray,
    y: npt.NDArray[np.bool_],
    kind: npt.NDArray[np.str_],
    clusters: npt.NDArray[np.str_] | None,
    names: Sequence[str],
) -> list[Slice]:
    spare = ~y & (kind == "")
    out = []
    for name in names:
        yes, no = y & (kind == name), ~y & (kind == name)
        general = not no.any()
        if general:
            no = spare
        own = (None, None) if clusters is None else (clusters[yes], clusters[no])
        out.append(Slice(name, p[yes], p[no], own[0], own[1], general))
    return out


def _read(
    rows: Rows, score: str, label: str, group: str | None, cluster: str | None
) -> tuple[FloatArray, npt.NDArray[np.bool_], npt.NDArray[np.str_], npt.NDArray[np.str_] | None]:
    if not rows:
        raise InputError("no rows to calibrate on")
    numbered = [item if isinstance(item, tuple) else (i + 1, item) for i, item in enumerate(rows)]
    if "id" not in (score, label, group, cluster):  # rows of one source may share the id that names it
        numbered = _once(numbered, group)
    p, y, kind, clusters = np.empty(len(numbered)), np.empty(len(numbered), bool), [], []
    for i, (line, row) in enumerate(numbered):
        p[i] = _number(row, score, line)
        y[i] = _label(row, label, line)
        value = "all" if group is None else row.get(group)
        name = "" if value is None else str(value)
        if not name and y[i]:
            raise InputError(f"line {line}: a row to refuse needs a group, and column {group!r} is empty")
        kind.append(name)
        if cluster is not None:
            clusters.append(str(_cell(row, cluster, line)))
    return p, y, np.array(kind, dtype=np.str_), None if cluster is None else np.array(clusters, dtype=np.str_)


def _once(
    rows: list[tuple[int, Mapping[str, Any]]], group: str | None
) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows without copies. An id may stand once in each group: one request scored for several categories."""
    first: dict[tuple[str, str], tuple[int, Mapping[str, Any]]] = {}
    kept: list[tuple[int, Mapping[str, Any]]] = []
    copies: list[str] = []
    clashes: list[str] = []
    for line, row in rows:
        if row.get("id") in (None, ""):
            kept.append((line, row))
            continue
        key = (str(row["id"]), str(row.get(group) if group else ""))
        earlier, same = first.setdefault(key, (line, row))
        if earlier == line:
            kept.append((line, row))
        else:
            (copies if same == row else clashes).append(f"{key[0]!r} on lines {earlier} and {line}")
    if clashes:
        raise InputError(
            f"{len(clashes)} rows repeat an id with other values (the first: {clashes[0]}); counting a prompt "
            "twice would claim more than the data hold. Keep one row per id, or, where an id names the source "
            "of several rows, count it as one draw (cluster 'id')"
        )
    if copies:
        warnings.warn(
            f"{len(copies)} rows are copies of others, id and all (the first: {copies[0]}); each is counted once",
            CalibrationWarning,
            stacklevel=4,
        )
    return kept


def _cell(row: Mapping[str, Any], column: str, line: int) -> Any:
    value = row.get(column)
    if value is None or value == "":
        raise InputError(
            f"line {line}: nothing in column {column!r}; the row has {', '.join(map(str, row)) or 'none'}"
        )
    return value


def _number(row: Mapping[str, Any], column: str, line: int) -> float:
    value = _cell(row, column, line)
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"line {line}: score {column}={value!r} is no finite number; repair or drop the row")
    return number


def _label(row: Mapping[str, Any], column: str, line: int) -> bool:
    value = _cell(row, column, line)
    word = str(value).strip().lower().removesuffix(".0")
    if word not in _LABELS:
        raise InputError(
            f"line {line}: label {column}={value!r}; use 1 / true / refuse or 0 / false / comply"
        )
    return _LABELS[word]
