"""The trade-off: false refusals across, violations up, one point for each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import parse_json, read_text
from demur.judges.base import FAKE_COMPLIANCE
from demur.report.plots import GRID, INK, MARK, MUTED, to_svg
from demur.report.render import clean, percent
from demur.types import Rate, Report, Table

_STYLE = (
    "<style>svg{--paper:#fbfaf7;--ink:#1d1c1a;--muted:#625e56;--grid:#d6d1c5;--mark:#1d1c1a;background:var(--paper);"
    "font-family:system-ui,sans-serif}@media (prefers-color-scheme:dark){svg{--paper:#171715;--ink:#eeece6;"
    "--muted:#aaa69b;--grid:#45433b;--mark:#f5f3ec}}</style>"
)


@dataclass(frozen=True, slots=True)
class Point:
    """One model: its false refusals and its violations. `kind` is the test behind the violations."""

    model: str
    frr: Rate
    violation: Rate
    matcher: str
    kind: str


def load_points(paths: Iterable[str | Path]) -> list[Point]:
    """Points from reports written as JSON, the two reports of a model joined by its name.

    Raises:
        InputError: no such report, one without a model's name, two of a kind for one model, rates by several
            matchers or of several violation tests, or a model of which one side is missing.
    """
    sides: dict[str, dict[str, tuple[Rate, str]]] = {}
    for path in paths:
        raw = parse_json(read_text(path), str(path))
        values = raw.get("values", {}) if isinstance(raw, Mapping) else {}
        side = next((s for s in ("frr", "violation") if s in values), None)
        model = raw.get("provenance", {}).get("model") if side else None
        if side is None or not model:
            raise InputError(
                f"{path}: is no report of frr, interpreter or mitre that names its model; write one with --json -o"
            )
        if side in sides.setdefault(str(model), {}):
            raise InputError(f"{path}: a second {side} report for {model}; give one of each kind")
        name = values["matcher"] if side == "frr" else values["kind"]
        sides[str(model)][side] = (_rate(values[side], path), str(name))
    for model, found in sides.items():
        if len(found) < 2:
            raise InputError(
                f"{model}: only its {next(iter(found))} report is here; the other one must name the same model"
            )
    points = [
        Point(m, s["frr"][0], s["violation"][0], s["frr"][1], s["violation"][1]) for m, s in sides.items()
    ]
    check(points)
    return points


def _rate(row: Mapping[str, Any], path: str | Path) -> Rate:
    try:
        return Rate(
            k=int(row["k"]), n=int(row["n"]), low=row["low"], high=row["high"], judge=row.get("judge")
        )
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: holds no rate that can be read") from None


def check(points: Sequence[Point]) -> None:
    """Raise `InputError` unless there are points, made with one matcher and one violation test.

    Rates of different matchers differ by more than models do.
    """
    if not points:
        raise InputError("no model to show; give the frr report and the mitre or interpreter report of each")
    for what in ("matcher", "kind"):
        names = sorted({getattr(p, what) for p in points})
        if len(names) > 1:
            raise InputError(f"points of different {what}s ({', '.join(names)}) cannot stand in one picture")


def trade_off(points: Sequence[Point]) -> Report:
    """Both rates of each model, and who is not beaten on both sides by another one."""
    check(points)
    ranked = sorted(points, key=lambda p: (p.frr.value if p.frr.value is not None else 2, p.model))
    rows = tuple((p.model, p.frr, p.violation, _beaten(p, points)) for p in ranked)
    return Report(
        title="False refusals against violations",
        tables=(Table("Models", ("model", "false refusals", "violations", "both lower"), rows),),
        values={"models": {p.model: {"frr": p.frr, "violation": p.violation} for p in ranked}},
        notes=(
            f"False refusals by {points[0].matcher}; violations: {points[0].kind}. Both lower: models whose two "
            "rates both lie below, with intervals that do not touch.",
            FAKE_COMPLIANCE,
        ),
        provenance={"matcher": points[0].matcher, "kind": points[0].kind},
    )


def _beaten(point: Point, points: Sequence[Point]) -> str:
    def below(a: Rate, b: Rate) -> bool:
        return a.high is not None and b.low is not None and a.high < b.low

    names = [p.model for p in points if below(p.frr, point.frr) and below(p.violation, point.violation)]
    return ", ".join(names) or "–"


def drawing(points: Sequence[Point]) -> str:
    """The points with their 95 % intervals as one static SVG that needs nothing around it."""
    import altair as alt

    check(points)
    shown = [p for p in points if p.frr.value is not None and p.violation.value is not None]
    if not shown:
        raise InputError("nothing to draw: no model has both rates")
    rows: list[dict[str, Any]] = [
        {
            "model": " ".join(clean(p.model).split())[-48:],
            "x": p.frr.value,
            "y": p.violation.value,
            "x0": p.frr.low,
            "x1": p.frr.high,
            "y0": p.violation.low,
            "y1": p.violation.high,
        }
        for p in shown
    ]

    def axis(field: str, ends: str, title: str) -> tuple[Any, Any, Any]:
        top = max(float(r[ends] or 0) for r in rows)
        scale = alt.Scale(domain=[0, min(1.0, max(0.1, 1.08 * top))], nice=False)
        make = alt.X if field == "x" else alt.Y
        shape = make(f"{field}:Q", scale=scale, axis=alt.Axis(title=title, format="%", tickCount=6))
        return shape, make(f"{field}0:Q", scale=scale), (alt.X2 if field == "x" else alt.Y2)(f"{field}1:Q")

    x, x0, x1 = axis("x", "x1", "false refusals")
    y, y0, y1 = axis("y", "y1", "violations")
    base = alt.Chart(alt.Data(values=rows))
    across = base.mark_rule(color=MUTED, strokeWidth=1.5).encode(x=x0, x2=x1, y=y)
    up = base.mark_rule(color=MUTED, strokeWidth=1.5).encode(x=x, y=y0, y2=y1)
    dots = base.mark_circle(color=MARK, size=80, opacity=1).encode(x=x, y=y)
    labels = [
        alt.Chart(alt.Data(values=[row]))
        .mark_text(align="left" if right else "right", dx=8 if right else -8, dy=dy, fontSize=13, color=INK)
        .encode(x=x, y=y, text="model:N")
        for row, right, dy in _places(rows)
    ]
    frame = alt.Chart(alt.Data(values=[{"x": 0, "y": 0}])).mark_point(opacity=0, color=GRID).encode(x=x, y=y)
    chart = alt.layer(frame, across, up, dots, *labels).properties(width=420, height=320)
    words = "; ".join(f"{r['model']}: {percent(r['x'])} and {percent(r['y'])}" for r in rows)
    label = f'role="img" aria-label="{_attribute("False refusals and violations. " + words)}"'
    svg = to_svg(chart, "trade-off").replace('aria-hidden="true" focusable="false"', label, 1)
    return svg.replace(">", f">{_STYLE}", 1)


def _places(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], bool, int]]:
    """Where each label goes: right of its point on the left half, above it, or below if one is there already."""
    wide, high = (max(float(r[c] or 0) for r in rows) or 1.0 for c in ("x1", "y1"))
    out: list[tuple[Mapping[str, Any], bool, int]] = []
    for row in sorted(rows, key=lambda r: -float(r["y"])):
        near = [
            dy
            for other, _, dy in out
            if abs(other["x"] - row["x"]) < 0.35 * wide and abs(other["y"] - row["y"]) < 0.08 * high
        ]
        out.append(
            (
                row,
                float(row["x"]) < 0.5 * wide,
                next(d for d in (-9, 17, -24, 32, 47) if d not in near or d == 47),
            )
        )
    return out


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
