"""What a card's section hands to the renderers: words, tables, figures and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from demur.types import Rate, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One drawing. `svg` comes from `demur.report.plots`, `alt` says in words what it shows."""

    svg: str
    alt: str
    title: str = ""
    caption: str = ""
    group: str | None = None
    """Figures of one group stand side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with what became of it. `reply` is None when the text is not shown; `withheld` says why."""

    id: str
    outcome: str
    right: bool
    category: str
    should_refuse: bool
    prompt: str | None
    reply: str | None
    withheld: str | None
    label: str
    p_refuse: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of a card. `folded` tables are closed at first; `missing` says why nothing was measured."""

    slug: str
    title: str
    lead: str = ""
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    missing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The first screen: rows of (name, should-refuse rate, should-answer rate), and how they were read."""

    rows: tuple[tuple[str, Rate, Rate], ...]
    source: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CardView:
    """A whole card, ready to be drawn."""

    model: str
    verdict: str
    detail: str
    facts: tuple[tuple[str, str], ...]
    headline: Headline
    curve: Figure | None
    sections: tuple[Section, ...]
    shared: bool = False
