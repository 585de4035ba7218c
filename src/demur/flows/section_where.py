"""Sections drawn from hidden states: where refusal and harmfulness are told apart, and what an adapter moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from demur.flows.carddata import CardData
from demur.flows.explain_page import TITLES, cautions, worth_table
from demur.flows.explained import Worth
from demur.prompts import row_of
from demur.report.layerplots import layer_lines, layer_map
from demur.report.view import Figure, Section
from demur.types import Prompt, Table

LISTED = 6
"""Prompts shown of a quadrant."""
COSINES = (-0.4, 1.0)
OVER, MISSED = "believed harmless, will refuse", "believed harmful, will answer"
NO_STATES = (
    "Only a model that runs here shows its states; for an endpoint or given answers there is nothing to read."
)


def where_section(data: CardData, *, share: bool = False) -> Section:
    """At which layer and position refusal and harmfulness can be read, and what the two say about the prompts."""
    head: dict[str, Any] = {"slug": "where", "title": "Where it lives"}
    found = data.where
    if found is None:
        return Section(**head, missing=data.notes.get("where") or NO_STATES)
    worth = [Worth(**w) for w in found["worth"]]
    words = {w.axis: w.words for w in worth}
    figures = [_map(found, words)]
    if found["cosines"]:
        figures.append(
            Figure(
                svg=layer_lines(
                    {"cosine": found["cosines"]}, name="where-cosine", title="cosine", domain=COSINES
                ),
                alt="Cosine of the direction of harmfulness and the direction of refusing, by layer.",
                title="How alike the two directions are",
                caption="Cosine of the direction of harmfulness (at t_inst) and that of refusing (at t_post). At "
                "0 the two are separate things, at 1 they are one.",
            )
        )
    lead = (
        f"Centres of the states of {found['fitted']} prompts of core/train, read on prompts of core/test: what "
        "tells harmful requests from harmless ones that resemble them, and what the model declines from what it "
        "answers. "
        "t_inst is the last token of the request, t_post the last before the answer."
    )
    notes = list(cautions(worth))
    if (why := found["unclear"]) is not None:
        reason = found["labels"] if "refuse" not in found["axes"] else why
        notes.append(f"Whether it believes one thing and does another was not read: {reason}.")
    tables = [worth_table(worth)]
    if found["unclear"] is None:
        tables.append(_quadrants(data, found))
    return Section(
        **head,
        lead=lead,
        figures=tuple(figures),
        tables=tuple(tables),
        folded=() if share or found["unclear"] is not None else _lists(data, found),
        notes=tuple(notes),
        values=found,
    )


def _map(found: Mapping[str, Any], words: Mapping[str, float]) -> Figure:
    rows = [name.split() for name in found["maps"]]
    return Figure(
        svg=layer_map(
            [f"{TITLES[axis].lower()}, {at}" for axis, at in rows],
            list(found["maps"].values()),
            middle=0.5,
            limit=0.5,
            beside=("words", [words.get(axis) for axis, _ in rows]),
        ),
        alt="AUROC of four readings at each layer, with a bag of words beside each; all values are in card.json.",
        title="AUROC by layer and position",
        caption="No colour is 0.5 (chance), full colour 1. The column on the right is a bag of words on the same "
        "prompts: where it is as dark as the map, the words alone would do.",
    )


def _quadrants(data: CardData, found: Mapping[str, Any]) -> Table:
    by_id = {p.id: p for p in data.prompts}
    names = sorted({q["quadrant"] for q in found["prompts"]})
    rows = []
    for name in names:
        some = [by_id[q["id"]] for q in found["prompts"] if q["quadrant"] == name]
        sides = [sum(p.should_refuse is side for p in some) for side in (True, False)]
        rows.append((name, *sides))
    return Table(
        f"What it believes about {len(found['prompts'])} prompts of this card",
        ("belief", "should refuse", "should answer"),
        tuple(rows),
        "What is harmless and yet to be refused (a question about the model's feelings, say) belongs to "
        f"{OVER!r}.",
    )


def _lists(data: CardData, found: Mapping[str, Any]) -> tuple[Table, ...]:
    by_id = {p.id: p for p in data.prompts}
    out = []
    for quadrant, side, title in (
        (OVER, False, "Believed harmless, and yet it will refuse: harmless requests"),
        (MISSED, True, "Believed harmful, and yet it will answer: requests to refuse"),
    ):
        hits = [q for q in found["prompts"] if q["quadrant"] == quadrant]
        hits = [q for q in hits if by_id[q["id"]].should_refuse is side]
        hits.sort(key=lambda q: (-q["refuse"] if quadrant == OVER else -q["harmful"], q["id"]))
        if hits:
            rows = tuple(_row(by_id[q["id"]], q) for q in hits[:LISTED])
            note = f"{len(rows)} of {len(hits)}, the clearest first."
            out.append(Table(title, ("prompt", "category", "harmfulness", "refusing"), rows, note))
    return tuple(out)


def _row(prompt: Prompt, q: Mapping[str, Any]) -> tuple[str, str, str, str]:
    text = " ".join(prompt.text.split())
    shown = text if len(text) <= 160 else text[:159] + "…"
    return shown, row_of(prompt), f"{q['harmful']:+.2f}", f"{q['refuse']:+.2f}"


def changed_section(data: CardData) -> Section:
    """What the adapter moved inside: directions against the base's, and the beliefs about the same prompts."""
    head: dict[str, Any] = {"slug": "changed", "title": "What changed inside"}
    found = data.changed
    if found is None:
        why = data.notes.get("changed") or "There is no base model beside it, or its states cannot be read."
        return Section(**head, missing=f"{why} Two checkpoints: demur explain --vs BASE TUNED.")
    figures = []
    for name, axis in found["axes"].items():
        figures.append(
            Figure(
                svg=layer_lines(
                    {"base and this model": axis["cosines"], "two halves of the base": axis["halves"]},
                    name=f"changed-{name}",
                    title="cosine",
                    domain=COSINES,
                ),
                alt=f"Cosine of the two models' directions of {TITLES[name].lower()} by layer.",
                title=f"{TITLES[name]}, {axis['position']}",
                caption="Both on the same prompts, so a direction that stayed is near 1. Two halves of the prompts "
                "in the base alone: how far the choice of prompts moves it.",
            )
        )
    pairs = [(name, which) for name in found["axes"] for which in ("base", "tuned")]
    maps = [found["axes"][name]["auroc"][which] for name, which in pairs]
    labels = [f"{TITLES[name].lower()}, {_WHO[which]}" for name, which in pairs]
    figures.append(
        Figure(
            svg=layer_map(
                labels, [[float("nan") if v is None else v for v in m] for m in maps], middle=0.5, limit=0.5
            ),
            alt="AUROC by layer in the base and in this model.",
            title="AUROC by layer",
            caption="Labels are those of this model: what it declines. No colour is 0.5, full colour 1.",
        )
    )
    return Section(
        **head,
        lead="The base and this model read on the same prompts. The full comparison (facts, truth, refusal, "
        "confidence) is demur explain --vs BASE TUNED.",
        figures=tuple(figures),
        tables=(_shifts(found["shifts"]),),
        values=found,
    )


_WHO = {"base": "base", "tuned": "this model"}


def _shifts(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = tuple(
        (
            f"{TITLES[r['axis']].lower()}, requests {r['group']}",
            r["n"],
            f"{r['base']:+.2f}",
            f"{r['tuned']:+.2f}",
            f"{r['tuned'] - r['base']:+.2f} [{r['low']:+.2f} to {r['high']:+.2f}]",
        )
        for r in rows
    )
    return Table(
        "How far beliefs moved",
        ("belief", "n", "base", "this model", "shift"),
        shown,
        "Mean belief in standard deviations, both read with this model's centres; 95% bootstrap interval.",
    )
