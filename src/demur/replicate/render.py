"""A result as a Report, and all stored results as the page `docs/replication.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from demur import methods
from demur.replicate import store
from demur.report.render import to_markdown
from demur.types import Report, Table

_HEAD = """# Replication

What each system's check found on organisms and public rows small enough for two CPU cores. This page is made from
the results that come with the package (`make replicate`); [how to run and read a check](replicate.md) says what the
words mean. Intervals are 95 % over what stands beside them; those of controls follow Holm. A result is marked stale
when the files it was made with have changed since.
"""


def number(value: float | None) -> str:
    """A value for people: three decimals, or four significant digits where those would say nothing.

    >>> number(0.87312), number(0.00012), number(1234.5), number(None)
    ('0.873', '0.00012', '1234', '–')
    """
    if value is None:
        return "–"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.4g}"


def _with_interval(row: Mapping[str, Any]) -> str:
    text = number(row["value"])
    if row["interval"] is not None:
        low, high = row["interval"]
        text += f" [{number(low)}, {number(high)}]"
    return text


def _status(row: Mapping[str, Any]) -> str:
    return f"{row['status']} ({row['why']})" if row.get("why") else str(row["status"])


def report(document: Mapping[str, Any], *, stale: bool = False) -> Report:
    """One result as tables: entry conditions, claims, controls, baselines, anchors."""
    tables = []
    rows: list[tuple[Any, ...]]
    columns: tuple[str, ...]
    if document["entry"]:
        rows = [
            (r["text"], r["goal"], ", ".join(map(number, r["values"])), r["status"])
            for r in document["entry"]
        ]
        tables.append(Table("Entry conditions", ("condition", "goal", "by seed", "status"), tuple(rows)))
    if document["claims"]:
        rows = [
            (r["text"], r["goal"], number(r["null"]), _with_interval(r), r["over"], _status(r))
            for r in document["claims"]
        ]
        columns = ("claim", "goal", "no effect", "value [95 %]", "over", "status")
        tables.append(Table("Claims", columns, tuple(rows)))
    if document["controls"]:
        rows = [_control(r) for r in document["controls"]]
        columns = ("control", "silent within", "value", "level", "over", "status")
        tables.append(Table("Controls", columns, tuple(rows)))
    if document["baselines"]:
        rows = [_baseline(r) for r in document["baselines"]]
        columns = ("trivial rule", "value [95 %]", "over", "claim less rule [95 %]", "status")
        tables.append(Table("Baselines", columns, tuple(rows)))
    if document["anchors"]:
        rows = [
            (r["text"], _exact(r["expected"]), _exact(r["found"]), ", ".join(r["needs"]), r["status"])
            for r in document["anchors"]
        ]
        columns = ("published", "expected", "recounted", "from", "status")
        tables.append(Table("Anchors", columns, tuple(rows)))
    outcome = document["outcome"] + (" (stale)" if stale else "")
    title = f"{document['slug']}: {outcome}"
    return Report(title=title, tables=tuple(tables), notes=tuple(_notes(document)))


def _exact(value: float | None) -> str:
    return "–" if value is None else f"{value:.10g}"


def _control(r: Mapping[str, Any]) -> tuple[Any, ...]:
    within = f"{r['null']:g} ± {r['margin']:.3g}"
    return r["text"], within, _with_interval(r), f"{100 * r['level']:.3g} %", r["over"], _status(r)


def _baseline(r: Mapping[str, Any]) -> tuple[Any, ...]:
    gap = r["difference"]
    less = "–" if gap is None else f"{number(gap[0])} [{number(gap[1])}, {number(gap[2])}]"
    return r["text"], _with_interval(r), r["over"], less, f"{r['status']} (by {r['against']})"


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [document["reason"] + "."]
    if document["seeds"]:
        seeds, minutes = ", ".join(map(str, document["seeds"])), document["minutes"]
        took = f"{minutes:.1f}" if minutes >= 0.1 else "less than 0.1"
        notes.append(f"Seeds {seeds}; {took} minutes of computing in all.")
    if document["stored_seeds"]:
        stored = ", ".join(map(str, document["stored_seeds"]))
        notes.append(f"Not run here but taken from the results that come with demur: seeds {stored}.")
    notes += [f"Seed {s} left out, its organism is unfit: {why}." for s, why in document["unfit"].items()]
    notes += [f"Skipped {r['key']}: {r['why']}." for r in document["anchors"] if r["status"] == "skipped"]
    versions = ", ".join(f"{k} {v}" for k, v in document["provenance"]["versions"].items())
    notes.append(
        f"Made with demur {document['provenance']['demur']}" + (f"; {versions}." if versions else ".")
    )
    return [*notes, *document["notes"]]


def overview(documents: Mapping[str, Mapping[str, Any]], stale: Sequence[str] = ()) -> Table:
    """One row for each system."""
    rows = tuple(_overview_row(d, slug in stale) for slug, d in sorted(documents.items()))
    columns = ("system", "outcome", "claims met", "controls silent", "rules beaten", "anchors exact", "seeds")
    return Table("All systems", columns, rows)


def _overview_row(d: Mapping[str, Any], stale: bool) -> tuple[str, ...]:
    def share(part: str, status: str) -> str:
        return f"{sum(r['status'] == status for r in d[part])} of {len(d[part])}" if d[part] else "–"

    fit = len(d["seeds"]) - len(d["unfit"])
    return (
        d["slug"],
        d["outcome"] + (" (stale)" if stale else ""),
        share("claims", "met"),
        share("controls", "silent"),
        share("baselines", "beaten"),
        share("anchors", "exact"),
        f"{fit} of {len(d['seeds'])} fit" if d["unfit"] else str(len(d["seeds"]) or "–"),
    )


def page(documents: Mapping[str, Mapping[str, Any]], stale: Sequence[str] = ()) -> str:
    """The Markdown page over all results: one table, then one section for each system."""
    if not documents:
        return _HEAD + "\nNothing has been run yet.\n"
    table = to_markdown(Report(title="-", tables=(overview(documents, stale),))).split("\n", 2)[2]
    titles = {c.slug: f"{c.title}. {c.paper}, <{c.url}>\n" for c in methods.cards()}
    parts = [_HEAD, table]
    for slug, document in sorted(documents.items()):
        body = to_markdown(report(document, stale=slug in stale))
        heading, rest = body.replace("\n## ", "\n### ").split("\n", 1)
        about = titles.get(slug, "")
        parts.append(f"#{heading}\n\n{about}{rest}")
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def stored_page() -> str:
    """The page of the results that come with the package, stale ones marked."""
    documents = store.read_results()
    return page(documents, [slug for slug, d in documents.items() if store.stale(d)])
