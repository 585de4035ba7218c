"""The report of `lab refusal-cliff` as one HTML page under the card's policy: it loads and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape

import demur
from demur.report.explainpage import Shaded
from demur.report.html import jinja
from demur.report.view import Figure
from demur.types import Report

SHOWN = 6
"""Single traces on a page."""
LONGEST = 400
"""Thinking tokens of one trace that are written out; the last ones are kept."""
POINTS = 160
"""Points of the line of one trace; longer ones are averaged."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 430, 220, 34, 10, 48

Place = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One thought: a score for each of `tokens`, whose `spans` say where they come from, and its two heights."""

    id: str
    prompt: str
    thinking: str
    tokens: Sequence[str]
    spans: Sequence[str]
    scores: Sequence[float]
    plateau: float
    final: float

    @property
    def drop(self) -> float:
        """plateau - final."""
        return self.plateau - self.final


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    id: str
    prompt: str
    said: str
    figure: Figure
    text: tuple[Shaded, ...]
    left_out: int


def to_html(report: Report, traces: Sequence[Traced]) -> str:
    """The page. `report` is the command's; model and user text in it and in `traces` comes out as text.

    Its first table holds the cliff's statistics (plateau, final, drop, the drop on shuffled labels), its second
    the AUROC of the readers, and a third heads. Of its values, "curve" is drawn, and "shuffled_curve" if any.
    """
    cliff, fitted, *heads = report.tables
    page: str = (
        jinja()
        .get_template("cliff.html.j2")
        .render(
            title=report.title,
            verdict=_verdict(cliff.rows),
            warnings=[*report.notes, *_warnings(report.values["held_out"])],
            facts=[("layer", report.values["layer"]), *report.provenance.items()],
            curve=_curve(report.values["curve"], report.values.get("shuffled_curve")),
            cliff=cliff,
            fitted=fitted,
            heads=heads,
            traces=[_shown(t) for t in pick(traces)],
            n=len(traces),
            by=report.provenance["by"],
            version=demur.__version__,
        )
    )
    return page.lstrip()


def pick(traces: Sequence[Traced]) -> list[Traced]:
    """At most six traces, evenly spaced from the largest drop to the smallest, so that none is a choice."""
    ranked = sorted(traces, key=lambda t: -t.drop)
    places = np.linspace(0, len(ranked) - 1, min(SHOWN, len(ranked))).round().astype(int)
    return [ranked[i] for i in places]


def _verdict(rows: Sequence[tuple[Any, ...]]) -> str:
    (_, plateau, *_), (_, final, *_), (_, drop, low, high, _), (_, _, least, most, _) = rows
    if low > most:
        against = "more than"
    elif high < least:
        against = "less than"
    else:
        against = "not clearly apart from"
    return (
        f"A drop of {drop:.2f} [{low:.2f}, {high:.2f}], with the score at {plateau:.2f} late in the thinking and "
        f"at {final:.2f} before the answer: {against} the {least:.2f} to {most:.2f} of shuffled labels"
    )


def _warnings(held_out: Mapping[str, float]) -> list[str]:
    words, final = held_out["bag_of_words"], held_out["final"]
    if words < final:
        return []
    return [
        f"A bag of words on prompt and thinking does as well on the thoughts kept back (AUROC {words:.2f}) as the "
        f"reader before the answer ({final:.2f}): the score may follow the wording"
    ]


def _curve(points: Sequence[Place], shuffled: Sequence[Place] | None) -> Figure:
    thinking: int = 1 + max((p["place"] for p in points if p["span"] == "thinking"), default=0)
    closing: int = -min(p["place"] for p in points if p["span"] == "close")
    split, right = LEFT + round(0.58 * (WIDTH - LEFT)), WIDTH - 8

    def x(p: Place) -> float:
        if p["span"] == "thinking":
            return LEFT + (float(p["place"]) + 0.5) / thinking * (split - LEFT)
        return split + (closing + float(p["place"]) + 0.5) / closing * (right - split)

    out = [*_frame(WIDTH, right), _box(split, right)]
    for line, colour, dash in (
        (shuffled or (), "--over", ' stroke-dasharray="6 4"'),
        (points, "--refuse", ""),
    ):
        if line:
            ways = [(x(p), _y(p["low"]), _y(p["median"]), _y(p["high"])) for p in line]
            edge = [f"{a:.1f} {low:.1f}" for a, low, _, _ in ways]
            edge += [f"{a:.1f} {high:.1f}" for a, _, _, high in reversed(ways)]
            out.append(f'<path d="M{"L".join(edge)}Z" fill="var({colour})" fill-opacity="0.17"/>')
            middle = "L".join(f"{a:.1f} {m:.1f}" for a, _, m, _ in ways)
            out.append(
                f'<path d="M{middle}" fill="none" stroke="var({colour})" stroke-width="2.5"{dash} '
                'stroke-linejoin="round"/>'
            )
            out.append(
                f'<circle cx="{ways[-1][0]:.1f}" cy="{ways[-1][2]:.1f}" r="4.5" fill="var({colour})"/>'
            )
    below = TOP + HEIGHT + 14
    out += [
        _text((LEFT + split) / 2, below, f"thinking, in {thinking} equal parts", "middle"),
        _text((split + right) / 2, below, f"closing, {closing} token{'s' * (closing > 1)}", "middle"),
        _text(right, below + 18, "end: before the answer", "end", "--muted"),
        "</svg>",
    ]
    counts = sorted({p["n"] for p in points})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    chance = " Dashed: readers fitted on shuffled labels, median and middle 95 % of them." if shuffled else ""
    first, last = points[0]["median"], points[-1]["median"]
    return Figure(
        svg="".join(out),
        alt=f"Median score along the thinking and its closing: {first:.2f} at the start, {last:.2f} at the end.",
        title="Probability of refusing that the readers see",
        caption=f"Median over the traces that have a token there ({n}), with its 95 % interval; nothing is padded "
        f"or stretched.{chance}",
    )


def _shown(t: Traced) -> _Shown:
    start = list(t.spans).index("thinking")
    inside = sum(s == "thinking" for s in t.spans)
    cut = start + max(0, inside - LONGEST)
    words = [*t.tokens[:start], *_spaced(t.tokens[start : start + inside], t.thinking)]
    words += t.tokens[start + inside :]
    text = tuple(
        Shaded(text=word, strength=2 * p - 1, hint=f"{span}, {p:.2f}")
        for word, span, p in zip(words[cut:], t.spans[cut:], t.scores[cut:], strict=True)
        if span in ("thinking", "close", "answer")
    )
    said = f"plateau {t.plateau:.2f}, before the answer {t.final:.2f}, drop {t.drop:.2f}"
    return _Shown(
        id=t.id,
        prompt=t.prompt,
        said=said,
        figure=Figure(svg=_line(t, start), alt=f"Score along the tokens: {said}."),
        text=text,
        left_out=cut - start,
    )


def _spaced(tokens: Sequence[str], text: str) -> list[str]:
    """Tokens with the spaces before them in `text`, which some tokenizers leave out of single tokens."""
    out, at = [], 0
    for token in tokens:
        gap = at
        while gap < len(text) and text[gap].isspace():
            gap += 1
        if not token[:1].isspace() and text.startswith(token, gap):
            out.append(text[at:gap] + token)
            at = gap + len(token)
        else:
            out.append(token)
            at += len(token) if text.startswith(token, at) else 0
    return out


def _line(t: Traced, start: int) -> str:
    """The scores of a trace from its thinking on, with its closing tokens shaded and the last of them marked."""
    scores, spans = np.asarray(t.scores[start:], float), np.array(t.spans[start:])
    closing = np.flatnonzero(spans == "close")
    right, width = WIDTH - 8, max(1, len(scores))
    step = (right - LEFT) / width
    parts = np.array_split(np.arange(len(scores)), min(POINTS, len(scores)))
    ways = "L".join(f"{LEFT + (p.mean() + 0.5) * step:.1f} {_y(scores[p].mean()):.1f}" for p in parts)
    a, b = LEFT + closing[0] * step, LEFT + (closing[-1] + 1) * step
    return "".join(
        (
            *_frame(WIDTH, right, 24),
            _box(a, b),
            f'<path d="M{ways}" fill="none" stroke="var(--refuse)" stroke-width="2.5" stroke-linejoin="round"/>',
            f'<circle cx="{b - step / 2:.1f}" cy="{_y(t.final):.1f}" r="6" fill="var(--refuse)"/>',
            _text(LEFT, TOP + HEIGHT + 15, f"{int((spans == 'thinking').sum())} tokens of thinking", "start"),
            "</svg>",
        )
    )


def _y(score: float) -> float:
    return TOP + (1 - score) * HEIGHT


def _frame(width: int, right: int, below: int = BOTTOM) -> list[str]:
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + below}" '
        'style="width:100%;height:auto" aria-hidden="true" focusable="false" font-family="inherit" '
        'font-size="13.5">'
    ]
    for tick in (0.0, 0.5, 1.0):
        out.append(f'<path d="M{LEFT} {_y(tick):g}H{right}" stroke="var(--grid)"/>')
        out.append(_text(LEFT - 6, _y(tick), f"{tick:g}", "end", "--muted"))
    return out


def _box(left: float, right: float) -> str:
    return (
        f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT}" fill="var(--muted)" '
        'fill-opacity="0.12"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "--ink") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" dy="0.35em" text-anchor="{anchor}" fill="var({colour})">'
        f"{escape(text)}</text>"
    )
