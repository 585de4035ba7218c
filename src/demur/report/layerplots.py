"""Drawings over the layers of a network: heat maps with a row for each token or reading, and lines.

The heat maps are written as SVG directly: their labels are tokens, which may repeat and may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import escape

from demur.report.plots import INK, MUTED, OVER, REFUSE, data_rows, plain_word, to_svg

GAP, BESIDE, BELOW = 14, 38, 38
"""Pixels: before the column beside a map, of that column, of the axis below."""
LONGEST = 20


def layer_map(
    rows: Sequence[str],
    values: npt.ArrayLike,
    *,
    limit: float,
    middle: float = 0.0,
    beside: tuple[str, Sequence[float | None]] | None = None,
    marked: Sequence[int] = (),
    window: tuple[int, int] | None = None,
) -> str:
    """A heat map with one row for each of `rows` and one column per layer, coloured away from `middle`.

    Args:
        values: (rows, layers). Above the middle they take the colour of refusing, below it that of answering;
            NaN is left empty.
        limit: distance from the middle at which a colour is full.
        beside: a title and one value a row, written out in a column to the right: a control, say.
        marked: rows whose label stands out; all when empty.
        window: first and last layer of a frame.

    >>> layer_map(["a"], [[0.0, 1.0]], limit=1).count("<rect")
    2
    """
    table = np.atleast_2d(np.asarray(values, float))
    n, layers = table.shape
    high, wide = (20 if n > 6 else 30), max(10, min(18, 310 // layers))
    left = 12 + round(7.4 * max(len(_short(r)) for r in rows))
    right, bottom = left + layers * wide, n * high
    width = right + (GAP + BESIDE if beside else 0)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + BELOW}" '
        f'style="width:100%;max-width:{width}px;height:auto" aria-hidden="true" focusable="false" '
        'font-family="inherit" font-size="13">'
    ]
    for i, row in enumerate(rows):
        colour = "--ink" if not marked or i in marked else "--muted"
        out.append(_text(left - 7, (i + 0.5) * high, _short(row), "end", colour))
        for j, value in enumerate(table[i].tolist()):
            out.append(_cell(left + j * wide, i * high, wide, high, value, middle, limit))
    if beside is not None:
        out.append(_text(right + GAP + BESIDE / 2, bottom + 13, beside[0], "middle", "--muted"))
        for i, control in enumerate(beside[1]):
            at = right + GAP
            shade = float("nan") if control is None else control
            out.append(_cell(at, i * high, BESIDE, high, shade, middle, limit))
            strong = control is not None and abs(control - middle) > 0.6 * limit
            said = "–" if control is None else f"{control:.2f}"
            out.append(
                _text(at + BESIDE / 2, (i + 0.5) * high, said, "middle", "--paper" if strong else "--ink")
            )
    every = 1 if layers <= 12 else 5
    for j in range(0, layers, every):
        out.append(_text(left + (j + 0.5) * wide, bottom + 13, str(j), "middle", "--muted"))
    out.append(_text((left + right) / 2, bottom + 30, "layer", "middle", "--muted"))
    edge = f'<path d="M{left} 0H{right}V{bottom}H{left}Z" fill="none" stroke="var(--grid)"/>'
    if window is not None:
        a, b = left + window[0] * wide, left + (window[1] + 1) * wide
        edge += f'<path d="M{a} 1H{b}V{bottom - 1}H{a}Z" fill="none" stroke="var(--ink)" stroke-width="1.5"/>'
    return "".join((*out, edge, "</svg>"))


def _cell(x: float, y: float, w: float, h: float, value: float, middle: float, limit: float) -> str:
    strength = (value - middle) / limit
    if not abs(strength) >= 0.04:  # NaN too
        return ""
    colour = "--refuse" if strength > 0 else "--over"
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="var({colour})" '
        f'fill-opacity="{min(1.0, abs(strength)):.2f}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" dy="0.35em" text-anchor="{anchor}" fill="var({colour})" '
        f'xml:space="preserve">{escape(text)}</text>'
    )


def _short(text: str) -> str:
    shown = str(plain_word(text))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def layer_lines(
    series: Mapping[str, Sequence[float]],
    *,
    name: str,
    title: str,
    domain: tuple[float, float],
    rule: tuple[str, float] | None = None,
) -> str:
    """At most two lines along the layers (the first in the colour of refusing), with a dashed line to compare with.

    Args:
        series: label -> one value a layer. name: unique on the page. title: of the vertical axis.
        rule: label and height of the dashed line.
    """
    import altair as alt

    rows = [
        {"layer": j, "y": float(v), "line": label}
        for label, values in series.items()
        for j, v in enumerate(values)
        if np.isfinite(v)
    ]
    y = alt.Y(
        "y:Q", axis=alt.Axis(title=title, tickCount=5), scale=alt.Scale(domain=list(domain), clamp=True)
    )
    x = alt.X("layer:Q", axis=alt.Axis(title="layer", tickMinStep=1, grid=False))
    legend = (
        alt.Legend(orient="top", title=None, labelFontSize=13, symbolSize=300, labelLimit=0)
        if len(series) > 1
        else None
    )
    kind = {"sort": list(series), "legend": legend}
    lines = alt.Chart(data_rows(rows)).mark_line(strokeWidth=2.5)
    lines = lines.encode(
        x=x,
        y=y,
        color=alt.Color(
            "line:N", scale=alt.Scale(domain=list(series), range=[REFUSE, OVER][: len(series)]), **kind
        ),
        strokeDash=alt.StrokeDash(
            "line:N", scale=alt.Scale(domain=list(series), range=[[1, 0], [6, 3]][: len(series)]), **kind
        ),
    )
    layers = [lines]
    if rule is not None:
        at = alt.Chart(data_rows([{"y": rule[1], "layer": 0, "t": rule[0]}]))
        layers.append(at.mark_rule(color=MUTED, strokeDash=[3, 3]).encode(y=y))
        layers.append(
            at.mark_text(align="left", baseline="bottom", dy=-3, fontSize=12.5, color=INK).encode(
                x=x, y=y, text="t:N"
            )
        )
    return to_svg(alt.layer(*layers).properties(width=345, height=200), name)
