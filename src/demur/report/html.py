"""A card as one HTML file that loads nothing, runs nothing and treats every word in it as foreign.

Autoescaping is on for all text; the only markup taken as it is are the drawings of `demur.report.plots`. The
page's own policy forbids scripts, frames, forms and every remote address.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import demur
from demur.report.render import cell, clean, interval, percent
from demur.report.view import CardView
from demur.types import Rate


def to_html(card: CardView) -> str:
    """The page. Model and user text in `card` may hold anything; it comes out as text."""
    page: str = (
        jinja()
        .get_template("card.html.j2")
        .render(
            card=card,
            version=demur.__version__,
            measured=[s for s in card.sections if not s.missing and s.slug != "provenance"],
            missing=[s for s in card.sections if s.missing],
            provenance=next((s for s in card.sections if s.slug == "provenance"), None),
        )
    )
    return page.lstrip()


@cache
def jinja() -> Environment:
    """The templates, with escaping on and undefined names as errors."""
    env = Environment(
        loader=PackageLoader("demur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["clean"] = _clean
    env.filters["percent"] = percent
    env.filters["cell"] = cell
    env.filters["drawing"] = Markup
    env.globals["interval"] = interval
    env.tests["rate"] = lambda value: isinstance(value, Rate)
    env.tests["numeric"] = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return env


def _clean(value: Any) -> str:
    return "" if value is None else clean(str(value))
