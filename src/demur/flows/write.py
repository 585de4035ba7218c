"""The reporting half of a card: from a run folder to card.html, card.json and guaranteed thresholds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur.files import dump_operating_point, from_row, to_row, write_atomic
from demur.flows.carddata import STREAMS, CardData
from demur.flows.runs import RunFolder
from demur.flows.sections import view
from demur.judges import agreement
from demur.measure.refusal import count
from demur.report.html import to_html
from demur.report.render import plain, to_json
from demur.report.view import CardView
from demur.types import SCHEMA_VERSION, OperatingPoint, Report, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class CardResult:
    """Where the card is, and what it says. `report` renders to text, Markdown and JSON (`demur.report`)."""

    html: Path
    json: Path
    report: Report


def report(out: str | Path, *, share: bool = False) -> CardResult:
    """Write card.html and card.json of a run folder again, without asking the model.

    Raises:
        InputError: no run there.
    """
    with RunFolder(out) as run:
        return write_card(run, share=share)


def write_card(run: RunFolder, *, share: bool = False) -> CardResult:
    """The reporting half: from the run folder to card.html, card.json and a guaranteed operating point."""
    data = CardData.read(run)
    if share:
        data = replace(data, config=_without_system(data.config))
    with agreement.adding(run.agreement):
        made = view(data, share=share)
    result = Report(
        title=f"Refusal Card: {made.model}",
        tables=(
            Table(
                made.verdict, ("category", "should refuse", "should answer"), made.headline.rows, made.detail
            ),
        ),
        values={**card_values(made), "skipped": dict(data.skipped), "unscored": data.lost},
        provenance=data.config,
        notes=tuple(
            [f"Skipped: {why}" for why in data.skipped.values()]
            + [gap for stream in STREAMS if (gap := data.no_score(stream))]
            + [f"{s.title.rstrip(':?')}: {s.missing}" for s in made.sections if s.missing]
        ),
    )
    curve = next(s for s in made.sections if s.slug == "curve")
    if curve.values.get("guaranteed") and curve.values["guaranteed"] != data.config.get("operating_point"):
        point = from_row(OperatingPoint, curve.values["guaranteed"], "guaranteed operating point")
        dump_operating_point(point, run.path / "operating_point.yaml")
    json_path, html_path = run.path / "card.json", run.path / "card.html"
    write_atomic(json_path, card_json(result))
    write_atomic(html_path, to_html(made))
    return CardResult(html=html_path, json=json_path, report=result)


def _without_system(config: Any) -> Any:
    """The settings without the text of system messages, at any depth."""
    if isinstance(config, Mapping):
        return {
            k: "left out" if k == "system" and isinstance(v, str) else _without_system(v)
            for k, v in config.items()
        }
    return config


def card_values(made: CardView) -> dict[str, Any]:
    """The JSON twin of the page: every number and word on it."""
    rows = {name: {"refuse": refuse, "lookalike": other} for name, refuse, other in made.headline.rows}
    rows.setdefault("all", {"refuse": count([]), "lookalike": count([])})  # gates always find it
    sections: dict[str, Mapping[str, Any]] = {}
    for s in made.sections:
        body = {
            "title": s.title,
            "lead": s.lead,
            "values": s.values,
            "tables": (*s.tables, *s.folded),
            "notes": s.notes,
            "figures": [{"title": f.title, "alt": f.alt, "caption": f.caption} for f in s.figures],
            "examples": [to_row(e) for e in s.examples],
            "missing": s.missing,
        }
        sections[s.slug] = {k: v for k, v in body.items() if v or k in ("title", "missing")}
    document = {
        "model": made.model,
        "verdict": made.verdict,
        "detail": made.detail,
        "shared": made.shared,
        "headline": {"source": made.headline.source, "note": made.headline.note, "rows": rows},
        "sections": sections,
    }
    values: dict[str, Any] = plain(document)
    return values


def card_json(result: Report) -> str:
    """card.json: the values at the top level, then provenance.

    Example:
        >>> json.loads(card_json(Report(title="t", values={"model": "m"})))["model"]
        'm'
    """
    document = json.loads(to_json(result))
    flat = {"schema_version": SCHEMA_VERSION, "kind": "refusal_card", **document["values"]}
    flat["provenance"] = document["provenance"]
    return json.dumps(flat, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
