"""A page for labelling answers by keyboard: one file, offline, and the only page of demur with a script.

The page's policy allows that script and that style by their hashes and nothing else: no remote source, no frame, no
form. Texts stand in the page as data and are shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

import demur
from demur.report.html import jinja
from demur.report.render import clean


@dataclass(frozen=True, slots=True)
class Choice:
    """A label: the key that sets it, its value in the file, what it is called and when it fits."""

    key: str
    value: str
    title: str
    hint: str


@dataclass(frozen=True, slots=True)
class Item:
    """One answer to label. `row` is its name in the sheet."""

    row: str
    prompt: str
    answer: str


def to_html(sheet: str, items: Sequence[Item], choices: Sequence[Choice]) -> str:
    """The page. Texts may hold anything.

    Args:
        sheet: name of the sheet, the start of every row's name.
    """
    environment = jinja()
    script, style = (_source(name) for name in ("label.js", "label.css"))
    data = {
        "sheet": sheet,
        "choices": [{"key": c.key, "value": c.value} for c in choices],
        "items": [{"row": i.row, "prompt": clean(i.prompt), "answer": clean(i.answer)} for i in items],
    }
    page: str = environment.get_template("label.html.j2").render(
        choices=choices,
        total=len(items),
        sheet=sheet,
        version=demur.__version__,
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        data=Markup(_inert(json.dumps(data, ensure_ascii=True))),
    )
    return page


def _source(name: str) -> str:
    loader = jinja().loader
    assert loader is not None
    return loader.get_source(jinja(), name)[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inert(text: str) -> str:
    """JSON that cannot end the element it stands in."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
