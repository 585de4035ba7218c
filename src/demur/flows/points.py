"""Operating points on a card: the current one, the model's own choice, and the one with a guarantee."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from demur.errors import InputError, UnsupportedClaim
from demur.flows.carddata import CardData, refused, table
from demur.measure.refusal import by_category, cluster_of, clustered
from demur.prompts import row_of
from demur.report.render import percent
from demur.types import OperatingPoint, Table


def operating_points(data: CardData) -> tuple[list[dict[str, Any]], OperatingPoint | None, str | None]:
    """The points to mark (label, kind, choices), the guaranteed point, and why there is none."""
    if data.config["kind"] == "replies":
        return [], None, "Thresholds for scores of your own: demur calibrate FILE --score p_refuse."
    if not data.has_control:
        return [], None, "A model without control tokens has no dial, so there is no threshold to guarantee."
    found: list[dict[str, Any]] = []
    if data.point is not None:
        kind = "guaranteed" if data.point.guarantee else "current"
        label = "current, guaranteed" if data.point.guarantee else "current"
        found.append({"label": label, "kind": kind, "choices": data.choices(data.point)})
    own = "model's own choice" if data.point is not None else "current: own choice"
    found.append(
        {"label": own, "kind": "own" if data.point is not None else "current", "choices": data.choices(None)}
    )
    own_claim = data.point if data.point is not None and data.point.guarantee else None
    fits = own_claim is None or bool(data.calibrate_scores)
    fitted, why = fit_guaranteed(data) if fits else (None, None)
    guaranteed = fitted or own_claim
    if guaranteed is not None and guaranteed is not data.point:
        found.append({"label": "guaranteed", "kind": "guaranteed", "choices": data.choices(guaranteed)})
    for point in found:
        rates = by_category(data.scored, [refused(c) for c in point["choices"]])
        point["rates"] = {row: (two["refuse"], two["lookalike"]) for row, two in rates.items()}
    return found, guaranteed, why


def fit_guaranteed(data: CardData) -> tuple[OperatingPoint | None, str | None]:
    """Thresholds with the stated guarantee, from the scores of the calibrate part; or why there are none."""
    if data.calibrate is None or not data.calibrate_scores:
        unscored = (
            "No calibrate part was scored. `demur calibrate` makes a guaranteed operating point from one."
        )
        return None, data.notes.get("scores-calibrate", unscored)
    from demur.calibrate import CalibrationWarning, LearnThenTest

    asked = data.config["guarantee"]
    usable = [p for p in data.calibrate if p.should_refuse is not None and p.id in data.calibrate_scores]
    groups = [p.group or f"id:{p.id}" for p in usable]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # the guarantee's own wording says it
            point = LearnThenTest(alpha=asked["alpha"], delta=asked["delta"], seed=data.seed).fit(
                table([data.calibrate_scores[p.id] for p in usable], data.names),
                np.array([bool(p.should_refuse) for p in usable]),
                [row_of(p) for p in usable],
                groups if len(set(groups)) < len(groups) else None,
                names=data.names,
                calibrated_on=data.config["calibrate"]["name"],
                T=data.config["T"],
            )
    except (UnsupportedClaim, InputError) as e:
        return None, f"No guaranteed operating point: {e}"
    model = data.config["model"]
    return replace(
        point, model=model["name"], model_fingerprint=model["fingerprint"], dtype=model["dtype"]
    ), None


def point_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """What each operating point does on this card's prompts."""
    rows = tuple((p["label"], *p["rates"]["all"]) for p in points)
    note = "Choices at the first position, over all scored prompts; no judge is involved."
    return Table(
        "Operating points",
        ("operating point", "refuses what it should", "refuses harmless requests"),
        rows,
        note,
    )


def guarantee_tables(data: CardData, point: OperatingPoint | None) -> tuple[Table, ...]:
    """Thresholds by category with their bound, and the check on prompts that calibration never saw."""
    if point is None:
        return ()
    picked = data.choices(point)
    rows = []
    for category in point.steered:
        t = point.thresholds[category]
        here = [
            (c == category, cluster_of(p))
            for p, c, r, y in zip(data.scored, picked, data.rows, data.positive, strict=True)
            if r == category and not y
        ]
        fitted = f"{t.benign_errors}/{t.n_benign}" if t.n_benign else None
        rows.append(
            (category, t.tau, fitted, None if t.bound is None else percent(t.bound, 1), clustered(here))
        )
    return (
        Table(
            "Thresholds of the guaranteed operating point",
            ("category", "threshold", "false refusals in calibration", "upper bound", "false refusals here"),
            tuple(rows),
            "A false refusal of a category: a harmless look-alike that gets that category's refusal token.",
        ),
    )
