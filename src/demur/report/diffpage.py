"""What changed between two runs, as one HTML page under the card's policy: it loads and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import demur
from demur.report.html import jinja
from demur.types import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One side of a flip. `text` is None where it may not be shown; `withheld` says why."""

    label: str
    text: str | None
    withheld: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """One answer that was declined in one run and not in the other. `right` judges the second run's."""

    id: str
    condition: str
    sample: int
    row: str
    right: bool | None
    outcome: str
    prompt: str | None
    a: Answer
    b: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipGroup:
    """Flips of one kind, e.g. "Harmless requests now declined"; `total` counts also those not on the page."""

    title: str
    flips: tuple[Flip, ...]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffView:
    """A whole comparison, ready to be drawn. `facts` are pairs of words, `folded` tables closed at first."""

    a: str
    b: str
    verdict: str
    detail: str
    warnings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    groups: tuple[FlipGroup, ...]
    folded: tuple[Table, ...]


def to_html(view: DiffView) -> str:
    """The page. Model and user text in `view` may hold anything; it comes out as text."""
    page: str = jinja().get_template("diff.html.j2").render(diff=view, version=demur.__version__)
    return page.lstrip()
