"""A Report as text, Markdown, JSON and CSV; and how numbers and foreign text are written everywhere.

Model and user text is untrusted: `clean` takes out what could steer a terminal, Markdown is escaped, CSV
cells that a spreadsheet would run are neutralised (`demur.files.csv_safe`). HTML is in `demur.report.html`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from demur.files import csv_safe
from demur.types import SCHEMA_VERSION, Rate, Report, Table

# Escape sequences first (colours, cursor moves, titles, links), then any control character that is left,
# marks that reverse the reading direction, and what no XML document may hold.
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b.?", re.DOTALL)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")


def clean(text: str) -> str:
    r"""Text without escape sequences, control characters, direction marks and lone surrogates.

    >>> clean("\x1b[31mred\x1b[0m\x07")
    'red'
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage; unknown is a dash, and a small non-zero share never reads as zero.

    >>> percent(0.934), percent(None), percent(0.001), percent(0.0001, 1), percent(0.999)
    ('93%', '–', '<1%', '<0.1%', '>99%')
    """
    if value is None or math.isnan(value):
        return "–"
    shown, least = f"{100 * value:.{digits}f}%", 10.0**-digits
    if 0 < value < 1 and shown in (f"{0:.{digits}f}%", f"{100:.{digits}f}%"):
        return f"<{least:.{digits}f}%" if value < 0.5 else f">{100 - least:.{digits}f}%"
    return shown


def interval(low: float | None, high: float | None) -> str:
    """An interval of shares, in percent.

    >>> interval(0.881, 0.9601)
    '88–96'
    """
    return "" if low is None or high is None else f"{100 * low:.0f}–{100 * high:.0f}"


def rate_row(rate: Rate) -> dict[str, Any]:
    """A rate as JSON: k, n, value, low, high, judge, unread, and the corrected value with interval and labels."""
    low, high = rate.corrected_interval or (None, None)
    return {
        "k": rate.k,
        "n": rate.n,
        "value": rate.value,
        "low": rate.low,
        "high": rate.high,
        "judge": rate.judge,
        "unread": rate.unread,
        "corrected": rate.corrected,
        "corrected_low": low,
        "corrected_high": high,
        **({} if rate.labels is None else {"labels": rate.labels}),
    }


def cell(value: Any) -> str:
    """One table cell as plain text.

    >>> cell(Rate(k=9, n=10, low=0.6, high=0.98))
    '90% [60–98] 9/10'
    """
    if value is None:
        return "–"
    if isinstance(value, Rate):
        if not value.n:
            return f"– ({value.unread} unread)" if value.unread else "–"
        return f"{percent(value.value)} [{interval(value.low, value.high)}] {value.k}/{value.n}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return clean(str(value))


def plain(value: Any) -> Any:
    """Any report value as JSON-ready data: rates spelled out, NaN as null.

    >>> plain({"x": float("nan"), "y": (1, 2)})
    {'x': None, 'y': [1, 2]}
    """
    if isinstance(value, Rate):
        return rate_row(value)
    if isinstance(value, Table):
        table = {"title": value.title, "columns": list(value.columns), "rows": plain(value.rows)}
        return {**table, "note": value.note} if value.note else table
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (frozenset, set)):
        return sorted(plain(v) for v in value)
    if isinstance(value, str):  # a lone surrogate has no UTF-8 form
        return value.encode("utf-8", "replace").decode()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return None if not math.isfinite(value) else round(value, 10)
    return value


def to_json(report: Report) -> str:
    """The report as a JSON document. Every rate has k, n, low, high, judge and unread."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "title": report.title,
        "values": plain(report.values),
        "tables": plain(report.tables),
        "notes": list(report.notes),
        "provenance": plain(report.provenance),
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_text(report: Report) -> str:
    """The report for a terminal: aligned columns, foreign text cleaned.

    >>> print(to_text(Report(title="R", tables=(Table("t", ("a", "b"), (("x", 1),)),))))
    R
    <BLANKLINE>
    t
      a  b
      x  1
    """
    blocks = [clean(report.title), *(_text_table(t) for t in report.tables)]
    blocks += ["\n".join(f"- {clean(n)}" for n in report.notes)] if report.notes else []
    return "\n\n".join(blocks)


def _text_table(table: Table) -> str:
    rows = [
        [clean(c) for c in table.columns],
        *([cell(v).replace("\n", " ") for v in row] for row in table.rows),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([clean(table.title), *lines, *([f"  {clean(table.note)}"] if table.note else [])])


def to_markdown(report: Report) -> str:
    """The report as Markdown with pipe tables; markup in foreign text is escaped."""
    blocks = [f"# {_escape(report.title)}"]
    for table in report.tables:
        head = (
            "| " + " | ".join(_escape(c) for c in table.columns) + " |\n" + "|---" * len(table.columns) + "|"
        )
        body = ["| " + " | ".join(_escape(cell(v)) for v in row) + " |" for row in table.rows]
        note = f"\n\n{_escape(table.note)}" if table.note else ""
        blocks.append(f"## {_escape(table.title)}\n\n" + "\n".join([head, *body]) + note)
    if report.notes:
        blocks.append("\n".join(f"- {_escape(n)}" for n in report.notes))
    return "\n\n".join(blocks) + "\n"


def _escape(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", clean(text)).replace("\n", " ")


def to_csv(table: Table) -> str:
    """One table as CSV; a rate fills four columns (share, low, high, n), formula cells are neutralised.

    >>> to_csv(Table("t", ("a",), (("=1+1",),)))
    "a\\r\\n'=1+1\\r\\n"
    """
    is_rate = [any(isinstance(row[i], Rate) for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        csv_safe(c) for c in _spread(table.columns, is_rate, lambda c: [f"{c} {x}" for x in _PARTS])
    )
    for row in table.rows:
        cells = _spread(
            row, is_rate, lambda r: [r.value, r.low, r.high, r.n] if r is not None else [None] * 4
        )
        writer.writerow(csv_safe(clean(c) if isinstance(c, str) else c) for c in cells)
    return out.getvalue()


_PARTS = ("share", "low", "high", "n")


def _spread(values: Iterable[Any], is_rate: list[bool], spread: Any) -> Iterable[Any]:
    for value, rate in zip(values, is_rate, strict=True):
        if rate:
            yield from spread(value)
        else:
            yield value
