"""The drawing of `demur.measure.depth`: what the model does and what a header sees, along the forced tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from demur.report.plots import OVER, REFUSE, data_rows, percent_axis, to_svg

Place = Mapping[str, Any]


def depth_lines(
    places: Sequence[Place], curves: Mapping[str, str], groups: Sequence[str], *, name: str
) -> str:
    """Lines over the depth: a colour for each curve, solid for the first group and dashed for the second.

    Args:
        places: {curve, group, depth, value, low, high} each; others than those named are passed over, and so
            are places without a value.
        curves: curve -> what the legend calls it, at most two. groups: at most two; the first has its interval.
        name: unique on the page.

    >>> at = [{"curve": "a", "group": "g", "depth": d, "value": 0.5, "low": 0.4, "high": 0.6} for d in (0, 8)]
    >>> depth_lines(at, {"a": "writes on"}, ["g"], name="d").count("<svg")
    1
    """
    import altair as alt

    shown = [
        {
            "depth": str(p["depth"]),
            "order": p["depth"],
            "y": p["value"],
            "low": p["low"],
            "high": p["high"],
            "curve": curves[p["curve"]],
            "group": p["group"],
        }
        for p in places
        if p["curve"] in curves and p["group"] in groups and p["value"] is not None
    ]
    steps = [str(d) for d in sorted({p["order"] for p in shown})]
    x = alt.X(
        "depth:O",
        sort=steps,
        axis=alt.Axis(title="forced tokens of the answer", labelAngle=0, grid=False),
        scale=alt.Scale(type="point", padding=0.4),
    )
    y = alt.Y("y:Q", axis=percent_axis("refusal"), scale=alt.Scale(domain=[0, 1]))
    labels = list(curves.values())
    colour = alt.Color(
        "curve:N",
        scale=alt.Scale(domain=labels, range=[REFUSE, OVER][: len(labels)]),
        legend=alt.Legend(
            orient="top",
            title=None,
            labelFontSize=13,
            labelLimit=0,
            columns=1,
            symbolType="stroke",
            symbolStrokeWidth=3,
            symbolOpacity=1,
        ),
    )
    dash = alt.StrokeDash(
        "group:N",
        scale=alt.Scale(domain=list(groups), range=[[1, 0], [6, 4]][: len(groups)]),
        legend=None,
    )
    band = alt.Chart(data_rows([r for r in shown if r["group"] == groups[0] and r["low"] is not None]))
    every = alt.Chart(data_rows(shown))
    layers = [
        band.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
        every.mark_line(strokeWidth=2.5).encode(
            x=x, y=y, color=colour, strokeDash=dash, order=alt.Order("order:Q")
        ),
        every.mark_point(filled=True, size=45, opacity=1).encode(x=x, y=y, color=colour),
    ]
    return to_svg(alt.layer(*layers).properties(width=345, height=230), name)
