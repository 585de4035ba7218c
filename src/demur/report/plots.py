"""The card's drawings: Altair specifications turned into static SVG whose colours follow the page.

A chart is drawn in marker colours that no palette uses, and these are then replaced by CSS variables, so that
one SVG serves light, dark and print. No scripts, no fonts and no links remain in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from demur.report.render import clean

_VARIABLES = {
    "#010203": "--ink",
    "#010204": "--muted",
    "#010205": "--grid",
    "#010206": "--refuse",
    "#010207": "--over",
    "#010208": "--paper",
    "#010209": "--mark",
}
INK, MUTED, GRID, REFUSE, OVER, PAPER, MARK = _VARIABLES
_FONT = "system-ui"

Point = Mapping[str, Any]


def to_svg(chart: Any, name: str) -> str:
    """Draw an Altair chart. `name` makes the ids inside unique on the page.

    The size moves into the viewBox, so that the drawing shrinks with a narrow screen.
    """
    import vl_convert

    chart = chart.configure(background="transparent", font=_FONT, padding=4, aria=False)
    chart = chart.configure_view(stroke=None).configure_axis(
        labelColor=MUTED,
        titleColor=INK,
        gridColor=GRID,
        domainColor=MUTED,
        tickColor=GRID,
        labelFontSize=13,
        titleFontSize=13.5,
        titleFontWeight="normal",
        titlePadding=8,
    )
    chart = chart.configure_legend(labelColor=INK, titleColor=INK)
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict())
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f'"{colour}"', f'"var({variable})"')
    svg = svg.replace(f'font-family="{_FONT}"', 'font-family="inherit"')
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    size = re.search(r'<svg[^>]*?width="([\d.]+)" height="([\d.]+)"', svg)
    width = size.group(1) if size else "400"
    return re.sub(
        r"<svg([^>]*?) width=\"[\d.]+\" height=\"[\d.]+\"",
        rf'<svg\1 style="width:100%;max-width:{width}px;height:auto" aria-hidden="true" focusable="false"',
        svg,
        count=1,
    )


def percent_axis(title: str | None, **more: Any) -> Any:
    """An axis from 0 to 100 % in quarters."""
    import altair as alt

    return alt.Axis(title=title, format="%", values=[0, 0.25, 0.5, 0.75, 1], **more)


def trade_off(
    curve: Sequence[tuple[float, float]],
    band: Sequence[tuple[float, float, float]],
    points: Sequence[Point],
    *,
    name: str,
    size: tuple[int, int] = (345, 300),
    labels: bool = True,
) -> str:
    """Refusal of what should be refused against refusal of what should not, over all thresholds.

    Args:
        curve: (over-refusal, refusal) pairs along the thresholds.
        band: (over-refusal, low, high) of a bootstrap interval.
        points: operating points {x, y, label, kind} with kind "current", "own" or "guaranteed".
        name: unique on the page.
        size: width and height in pixels.
        labels: write the points' names beside them.
    """
    import altair as alt

    x = alt.X("x:Q", axis=percent_axis("refuses harmless requests"), scale=alt.Scale(domain=[0, 1]))
    y_title = "refuses what it should"
    y = alt.Y("y:Q", axis=percent_axis(y_title), scale=alt.Scale(domain=[0, 1]))
    diagonal = alt.Chart(data_rows([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
    layers = [diagonal.mark_line(color=GRID, strokeDash=[4, 4], strokeWidth=1.5).encode(x=x, y=y)]
    if band:
        rows = [{"x": a, "y": low, "high": high} for a, low, high in band]
        layers.append(
            alt.Chart(data_rows(rows)).mark_area(color=REFUSE, opacity=0.16).encode(x=x, y=y, y2="high:Q")
        )
    line = alt.Chart(data_rows([{"x": a, "y": b, "o": i} for i, (a, b) in enumerate(curve)]))
    layers.append(
        line.mark_line(color=REFUSE, strokeWidth=2.5, strokeJoin="round").encode(x=x, y=y, order="o:Q")
    )
    layers += _point_layers(points, x, y, drops(points, size[1]) if labels else None)
    return to_svg(alt.layer(*layers).properties(width=size[0], height=size[1]), name)


_SHAPES = {"current": ("circle", MARK), "own": ("circle", PAPER), "guaranteed": ("diamond", PAPER)}
LEGEND = {
    "current": "filled circle: the current operating point",
    "own": "open circle: the model's own choice",
    "guaranteed": "open diamond: a guaranteed operating point",
}
"""What the shape of each kind of point says, in words."""


def drops(points: Sequence[Point], height: float, first: float = 12, apart: float = 18) -> list[float]:
    """How far below its point each name is written, in pixels: clear of the curve, which rises, and of other names.

    >>> drops([{"x": 0.1, "y": 0.9, "label": "a", "kind": "own"}], 300)
    [12.0]
    """
    out, last = [0.0] * len(points), float("-inf")
    for i in sorted(range(len(points)), key=lambda i: -points[i]["y"]):
        at = (1 - points[i]["y"]) * height
        last = max(at + first, last + apart)
        out[i] = round(last - at, 1)
    return out


def _point_layers(points: Sequence[Point], x: Any, y: Any, below: Sequence[float] | None) -> list[Any]:
    import altair as alt

    layers = []
    for i, point in enumerate(points):
        shape, fill = _SHAPES[point["kind"]]
        base = alt.Chart(data_rows([dict(point)]))
        layers.append(
            base.mark_point(
                shape=shape, filled=True, fill=fill, stroke=MARK, strokeWidth=2, size=130, opacity=1
            ).encode(x=x, y=y)
        )
        if below:
            right = point["x"] < 0.5
            text = base.mark_text(
                align="left" if right else "right",
                dx=11 if right else -11,
                dy=below[i],
                fontSize=13.5,
                color=INK,
            )
            layers.append(text.encode(x=x, y=y, text="label:N"))
    return layers


def dial(taus: Sequence[float], refusal: Sequence[float], over: Sequence[float], *, name: str) -> str:
    """Both rates over the threshold: what turning the dial does."""
    import altair as alt

    lines = {"should refuse": (REFUSE, [1, 0], refusal), "should answer": (OVER, [6, 3], over)}
    rows = [
        {"x": float(t), "y": float(v), "requests that it": label}
        for label, (_, _, values) in lines.items()
        for t, v in zip(taus, values, strict=True)
    ]
    legend = alt.Legend(
        orient="top",
        title="requests that it",
        titleFontWeight="normal",
        titleFontSize=13,
        labelFontSize=13,
        symbolSize=300,
    )
    axis = alt.Axis(
        title="threshold on the probability of refusing", values=[0, 0.25, 0.5, 0.75, 1], format=".2f"
    )
    kind = {"sort": list(lines), "legend": legend}
    chart = alt.Chart(data_rows(rows)).mark_line(strokeWidth=2.5)
    chart = chart.encode(
        x=alt.X("x:Q", axis=axis, scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("y:Q", axis=percent_axis("refused"), scale=alt.Scale(domain=[0, 1])),
        color=alt.Color(
            "requests that it:N",
            scale=alt.Scale(domain=list(lines), range=[c for c, _, _ in lines.values()]),
            **kind,
        ),
        strokeDash=alt.StrokeDash(
            "requests that it:N",
            scale=alt.Scale(domain=list(lines), range=[d for _, d, _ in lines.values()]),
            **kind,
        ),
    )
    return to_svg(chart.properties(width=345, height=240), name)


def reliability(bins: Sequence[tuple[float, float, int]], *, name: str) -> str:
    """Reliability diagram from (mean predicted, share observed, n) per non-empty bin; area shows n."""
    import altair as alt

    x = alt.X("x:Q", axis=percent_axis("predicted probability of refusing"), scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("y:Q", axis=percent_axis("share that should be refused"), scale=alt.Scale(domain=[0, 1]))
    diagonal = alt.Chart(data_rows([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
    base = alt.Chart(data_rows([{"x": float(p), "y": float(o), "n": int(n)} for p, o, n in bins]))
    layers = [
        diagonal.mark_line(color=GRID, strokeDash=[4, 4], strokeWidth=1.5).encode(x=x, y=y),
        base.mark_line(color=REFUSE, strokeWidth=2).encode(x=x, y=y, order="x:Q"),
        base.mark_circle(color=REFUSE, opacity=0.85).encode(
            x=x, y=y, size=alt.Size("n:Q", legend=None, scale=alt.Scale(range=[30, 420], zero=True))
        ),
    ]
    return to_svg(alt.layer(*layers).properties(width=320, height=270), name)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float]], *, name: str
) -> str:
    """A matrix of row shares, darker where more; the share is written into each cell."""
    import altair as alt

    rows, columns = _labels(rows), _labels(columns)
    cells = [
        {
            "row": r,
            "column": c,
            "share": shares[i][j],
            "text": "" if not shares[i][j] else f"{100 * shares[i][j]:.0f}",
        }
        for i, r in enumerate(rows)
        for j, c in enumerate(columns)
    ]
    x = alt.X("column:N", sort=list(columns), axis=_label_axis("emitted", orient="top", labelAngle=-35))
    y = alt.Y("row:N", sort=list(rows), axis=_label_axis("true category"))
    base = alt.Chart(data_rows(cells))
    box = base.mark_rect(fill=REFUSE, stroke=PAPER, strokeWidth=2).encode(
        x=x,
        y=y,
        fillOpacity=alt.FillOpacity("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.05, 1])),
    )
    text = base.mark_text(fontSize=13).encode(
        x=x, y=y, text="text:N", color=alt.condition("datum.share > 0.55", alt.value(PAPER), alt.value(INK))
    )
    return to_svg((box + text).properties(width=46 * len(columns), height=36 * len(rows)), name)


def _labels(names: Sequence[str], longest: int = 18) -> list[str]:
    """Names short enough for an axis and still distinct. (Vega would cut an emoji in half and fail.)"""
    out: list[str] = []
    for name in map(plain_word, names):
        short = name if len(name) <= longest else name[: longest - 1] + "…"
        out.append(short if short not in out else f"{short} {len(out) + 1}")
    return out


def _label_axis(title: str, **more: Any) -> Any:
    import altair as alt

    return alt.Axis(title=title, grid=False, domain=False, ticks=False, labelLimit=0, **more)


def data_rows(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as chart data, cleaned of characters that labels may not hold."""
    import altair as alt

    # A control character in a label aborts the whole process inside the text measurement.
    return alt.Data(values=[{k: plain_word(v) for k, v in r.items()} for r in rows])


def plain_word(value: Any) -> Any:
    """A text as one clean line; other values as they are."""
    return " ".join(clean(value).split()) if isinstance(value, str) else value
