"""The curves of `demur.measure.inference_scaling` as one static SVG that needs nothing around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from demur.errors import InputError
from demur.report.plots import INK, MARK, MUTED, OVER, REFUSE, to_svg
from demur.types import Report

_LINES = {"right": (REFUSE, [1, 0]), "wrong": (OVER, [6, 3]), "none": (MUTED, [2, 3])}
_NAMES = {"right": "right answer", "wrong": "wrong answer", "none": "no answer"}
_STYLE = (
    "<style>svg{--paper:#fbfaf7;--ink:#1d1c1a;--muted:#625e56;--grid:#d6d1c5;--refuse:#0f6b63;--over:#b04619;"
    "--mark:#1d1c1a;background:var(--paper);font-family:system-ui,sans-serif}@media (prefers-color-scheme:dark)"
    "{svg{--paper:#171715;--ink:#eeece6;--muted:#aaa69b;--grid:#45433b;--refuse:#5fc7b9;--over:#f2965f;"
    "--mark:#f5f3ec}}</style>"
)


def drawing(report: Report, *, alone: bool = True) -> str:
    """Outcomes and utility over the number of attempts, K* marked, with 95 % bands where there are intervals.

    Args:
        report: of `InferenceScaling.score` or `.expect`.
        alone: bring the colours along (a file of its own), or leave them to the page.

    Raises:
        InputError: the report has no curve, or one of a single attempt.
    """
    import altair as alt

    curve: Mapping[str, Sequence[float]] = report.values.get("curve", {})
    if len(curve.get("K", ())) < 3:
        raise InputError("nothing to draw: the curve has less than two attempts; draw more samples per task")
    best = report.values["best"]
    end = curve["K"][-1]
    scale = alt.Scale(type="log" if end > 20 else "linear", domain=[1, end])
    whole = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**4, 10**5) if k <= end]
    axis = alt.Axis(title="attempts at most", values=whole, format="d", grid=False)
    x = alt.X("x:Q", scale=scale, axis=axis)
    top = [layer for name in _LINES for layer in _line(curve, name, x, "share of tasks", [0, 1])]
    legend = alt.Chart(alt.Data(values=[{"x": 1, "y": 0, "outcome": n} for n in _NAMES.values()]))
    looks = {
        "color": (alt.Color, [c for c, _ in _LINES.values()]),
        "strokeDash": (alt.StrokeDash, [d for _, d in _LINES.values()]),
    }
    shown = alt.Legend(orient="top", title=None, labelFontSize=13, symbolSize=300)
    encoding = {
        channel: make(
            "outcome:N", sort=None, legend=shown, scale=alt.Scale(domain=list(_NAMES.values()), range=of)
        )
        for channel, (make, of) in looks.items()
    }
    top.append(legend.mark_line(strokeWidth=2.5).encode(x=x, y="y:Q", **encoding))
    bottom = _line(curve, "utility", x, "utility per task", None)
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color=MUTED, strokeWidth=1)
    bottom.append(zero.encode(y="y:Q"))
    if best["K"]:
        at = [{"x": best["K"], "y": _at(curve, best["K"])}]
        if best["K"] <= end and at[0]["y"] is not None:
            mark = alt.Chart(alt.Data(values=at))
            bottom.append(
                mark.mark_point(shape="diamond", filled=True, size=130, color=MARK).encode(x=x, y="y:Q")
            )
            text = mark.mark_text(dy=-14, fontSize=13.5, color=INK, align="left").encode(x=x, y="y:Q")
            bottom.append(text.encode(text=alt.value(f"K* = {best['K']}")))
    size = {"width": 420}
    both = alt.vconcat(
        alt.layer(*top).properties(**size, height=230), alt.layer(*bottom).properties(**size, height=190)
    )
    svg = to_svg(both, "resampling")
    if not alone:
        return svg
    words = 'role="img" aria-label="Outcomes and utility over the number of attempts"'
    return svg.replace('aria-hidden="true" focusable="false"', words, 1).replace(">", f">{_STYLE}", 1)


def _at(curve: Mapping[str, Sequence[float]], K: int) -> float | None:
    return next((u for k, u in zip(curve["K"], curve["utility"], strict=True) if k == K), None)


def _line(curve: Mapping[str, Any], name: str, x: Any, title: str, domain: list[float] | None) -> list[Any]:
    """A line with its band, without budget 0 (which a log axis cannot show)."""
    import altair as alt

    colour, dash = _LINES.get(name, (REFUSE, [1, 0]))
    low, high = curve.get(f"{name}_low"), curve.get(f"{name}_high")
    rows = [
        {"x": k, "y": y, **({"low": low[i], "high": high[i]} if low and high else {})}
        for i, (k, y) in enumerate(zip(curve["K"], curve[name], strict=True))
        if k > 0
    ]
    scale = alt.Scale(domain=domain) if domain else alt.Scale(zero=False)
    chart = alt.Chart(alt.Data(values=rows))
    out = []
    if low and high:
        band = chart.mark_area(color=colour, opacity=0.16)
        out.append(band.encode(x=x, y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"))
    line = chart.mark_line(color=colour, strokeDash=dash, strokeWidth=2.5)
    return [*out, line.encode(x=x, y=alt.Y("y:Q", title=title, scale=scale), order="x:Q")]
