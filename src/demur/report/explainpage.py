"""Why a model decides as it does, as one HTML page under the card's policy: it loads and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import demur
from demur.report.html import jinja
from demur.report.view import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaded:
    """A piece of a text, coloured from -1 (towards answering) to 1 (towards refusing); `hint` says how much."""

    text: str
    strength: float = 0.0
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageView:
    """A page: what was asked (`text`, where it is one prompt), the clause that sums it up, and its sections."""

    kicker: str
    title: str
    verdict: str
    detail: str
    sections: tuple[Section, ...]
    text: tuple[Shaded, ...] = ()
    legend: str = ""
    warnings: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


def to_html(view: PageView) -> str:
    """The page. Model and user text in `view` may hold anything; it comes out as text."""
    page: str = jinja().get_template("explain.html.j2").render(page=view, version=demur.__version__)
    return page.lstrip()
