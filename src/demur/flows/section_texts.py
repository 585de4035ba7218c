"""Sections drawn from answers: what the texts say, flips across samples, the base model, and examples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from demur.flows.carddata import CardData, refused
from demur.flows.people import People
from demur.judges import material_warning, token_text_agreement
from demur.measure.refusal import (
    JudgeError,
    Record,
    by_category,
    by_text,
    cluster_of,
    clustered,
    declined,
    judge_error,
    judge_note,
)
from demur.prompts import in_house, row_of
from demur.report.render import cell, percent
from demur.report.view import Example, Section
from demur.types import Label, Rate, Table, Verdict

SHOWABLE_REFUSALS = frozenset({"humanizing", "unsupported", "indeterminate", "incomplete"})
"""Categories whose refusals are shown in words. Elsewhere a judge's mistake could print a harmful answer."""

PLAIN_REFUSALS = frozenset({Label.FULL_REFUSAL, Label.ABSTENTION, Label.CLARIFICATION})
EXAMPLES_EACH = 1
TEXT_LIMIT = 600


def no_texts(data: CardData) -> str | None:
    """Why the text sections are empty, or None."""
    if data.records:
        return None
    return data.notes.get("texts") or "No answers were collected."


# --- what the answers say ---


def text_section(data: CardData) -> Section:
    """Rates read from the answers' text, the judge's error, and whether the text follows the token."""
    head: dict[str, Any] = {"slug": "text", "title": "What the answers say"}
    why = no_texts(data)
    if why:
        return Section(**head, missing=why)
    records = [r for r in data.records if r.prompt.should_refuse is not None]
    rates = text_rates(data)
    judge = data.config["judge"]
    errors = {side: judge_error(judge, should_refuse=side == "refuse") for side in ("refuse", "lookalike")}
    tables = [label_table(data.records)]
    if rates:
        tables.insert(0, _rate_table("Rates read from the text", rates, data.people))
    house = in_house(r.prompt for r in records)
    own = {}
    if house:
        own = by_text([replace(r, prompt=p) for r, p in zip(records, house, strict=True)], data.said(records))
        tables.insert(1, _rate_table("The same by your own categories", own, data.people))
    agreement = text_agreement(data)
    elsewhere = material_warning(judge, (r.prompt for r in records)) if any(errors.values()) else None
    notes = data.people.notes if data.people else [judge_note(judge), *([elsewhere] if elsewhere else [])]
    if agreement is not None:
        notes.append(
            f"Token and text agree in {cell(agreement)} answers: the token announced a refusal (or answer) "
            "and the text is one. Tokens that a decision rule put there count too: this tests the text."
        )
    if _withheld(data):
        notes.append(
            f"{_withheld(data)} answers to requests that should be refused were no plain refusals; "
            "their text was not kept."
        )
    return Section(
        **head,
        lead=f"{len(data.records)} answers, read by {judge}. Declining is anything but plain compliance.",
        tables=tuple(tables),
        notes=tuple(notes),
        values={
            "categories": rates,
            "house_categories": own,
            "labels": _label_counts(data.records),
            "token_text_agreement": agreement,
            "judge": judge,
            "judge_error": {k: error_values(e) for k, e in errors.items()},
            **({"correction": data.people.values} if data.people else {}),
            "withheld": _withheld(data),
        },
    )


def text_rates(data: CardData) -> dict[str, dict[str, Rate]]:
    """Rates of the labelled prompts by row and side, read from the text; {} without any."""
    records = [r for r in data.records if r.prompt.should_refuse is not None]
    return by_text(records, data.said(records)) if records else {}


def _rate_table(title: str, rates: Mapping[str, Mapping[str, Rate]], people: People | None) -> Table:
    columns = ("category", "refuses what it should", "corrected", "refuses harmless requests", "corrected ")
    rows = tuple(
        (
            name,
            two["refuse"],
            corrected_cell(two["refuse"]),
            two["lookalike"],
            corrected_cell(two["lookalike"]),
        )
        for name, two in rates.items()
    )
    how = (
        "with the judge's measured error taken out (Rogan-Gladen); left out where the raw "
        "rate lies beyond what that error allows"
    )
    return Table(title, columns, rows, f"Corrected: {people.how if people else how}.")


def _withheld(data: CardData) -> int:
    return sum(r.withheld is not None for r in data.replies.values())


def corrected_cell(rate: Rate) -> str | None:
    """A rate with the judge's error taken out, as tables show it; behind it the labels that it comes from.

    >>> corrected_cell(Rate(k=9, n=10, low=0.6, high=0.98, corrected=0.8, corrected_interval=(0.5, 0.9), labels=10))
    '80% [50–90] (10)'
    """
    labels = "" if rate.labels is None else f" ({rate.labels})"
    if rate.corrected is None or rate.corrected_interval is None:
        return f"–{labels}" if labels else None
    low, high = rate.corrected_interval
    return f"{percent(rate.corrected)} [{100 * low:.0f}–{100 * high:.0f}]{labels}"


def error_values(error: JudgeError | None) -> dict[str, Any] | None:
    """A judge's error as JSON holds it."""
    if error is None:
        return None
    return {k: getattr(error, k) for k in ("dataset", "stratum", "sensitivity", "specificity")}


def _label_counts(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    sides: dict[str, Counter[str]] = {
        "should refuse": Counter(),
        "should answer": Counter(),
        "unlabelled": Counter(),
    }
    names = {True: "should refuse", False: "should answer", None: "unlabelled"}
    for r in records:
        sides[names[r.prompt.should_refuse]][str(r.verdict.label)] += 1
    return {side: {k: c[k] for k in sorted(c)} for side, c in sides.items() if c}


def label_table(records: Sequence[Record]) -> Table:
    """How many answers landed in each verdict."""
    counts = _label_counts(records)
    labels = [label.value for label in Label if any(label.value in c for c in counts.values())]
    rows = tuple((label.replace("_", " "), *(c.get(label, 0) for c in counts.values())) for label in labels)
    return Table(
        "Verdicts", ("verdict", *counts), rows, "Truncated, empty, unparsed and error enter no rate."
    )


def text_agreement(data: CardData) -> Rate | None:
    """Share of readable answers whose text does what the opening token said; None without tokens."""
    opened = [r for r in data.records if r.reply.control_token is not None]
    if not opened:
        return None
    agreement = token_text_agreement([r.reply for r in opened], [r.verdict for r in opened])
    return replace(agreement, judge=data.config["judge"])


# --- flips ---


def flips_section(data: CardData) -> Section:
    """Does the same request meet another decision when it is asked again?"""
    head: dict[str, Any] = {"slug": "flips", "title": "Ask again: does the decision flip?"}
    samples = int(data.config["samples"])
    if samples < 2:
        model = f"{data.model} " if data.config["kind"] == "card" else ""
        return Section(
            **head,
            missing=f"One answer per prompt was asked. Run: demur card {model}--samples 5 --temperature 0.7",
        )
    by_prompt: dict[str, list[bool]] = {}
    for (prompt_id, _), verdict in data.verdicts.items():
        says = declined(verdict.label)
        if says is not None:
            by_prompt.setdefault(prompt_id, []).append(says)
    asked = [p for p in data.prompts if len(by_prompt.get(p.id, [])) > 1]
    flags: list[bool | None] = [len(set(by_prompt[p.id])) > 1 for p in asked]
    rates = by_category(asked, flags, data.config["judge"])
    overall = clustered(zip(flags, map(cluster_of, asked), strict=True), data.config["judge"])
    rows = tuple((name, two["refuse"], two["lookalike"]) for name, two in rates.items() if asked)
    return Section(
        **head,
        lead=f"In {cell(overall)} prompts, {samples} samples did not all agree on refusing.",
        tables=(Table("Prompts whose decision flips", ("category", "should refuse", "should answer"), rows),),
        values={"samples": samples, "overall": overall, "categories": rates},
    )


# --- the base model ---


def comparison_section(data: CardData) -> Section:
    """The same prompts, read by the same judge, on the same base without its adapter."""
    from demur.stats import mcnemar

    head: dict[str, Any] = {"slug": "comparison", "title": "Against the model it was made from"}
    if not data.baseline_records:
        return Section(
            **head, missing=data.notes.get("baseline") or "Not measured: no baseline model was given."
        )
    name = data.config["baseline"]["name"]
    mine = {r.prompt.id: declined(r.verdict.label) for r in data.records}
    other = {r.prompt.id: declined(r.verdict.label) for r in data.baseline_records}
    both = [p for p in data.prompts if mine.get(p.id) is not None and other.get(p.id) is not None]
    judge = data.config["judge"]
    ours = by_category(both, [mine[p.id] for p in both], judge)
    theirs = by_category(both, [other[p.id] for p in both], judge)
    rows = tuple(
        (row, theirs[row]["refuse"], ours[row]["refuse"], theirs[row]["lookalike"], ours[row]["lookalike"])
        for row in ours
    )
    tests, notes = {}, []
    for side, wanted in (("should refuse", True), ("should answer", False)):
        some = [p for p in both if p.should_refuse is wanted]
        if some:
            test = mcnemar([bool(other[p.id]) for p in some], [bool(mine[p.id]) for p in some])
            tests[side] = {
                "difference": test.difference,
                "interval": test.interval,
                "p_value": test.p_value,
                "n": test.n,
            }
            low, high = test.interval or (0.0, 0.0)
            notes.append(
                f"Requests that it {side}: {100 * (test.difference or 0):+.0f} points "
                f"[{100 * low:+.0f} to {100 * high:+.0f}] against {name}, "
                f"exact McNemar p = {test.p_value:.2g}, n = {test.n}."
            )
    columns = ("category", f"should refuse: {name}", "this model", f"should answer: {name}", "this model ")
    return Section(
        **head,
        lead=f"Refusals read from the text by {judge}, on the same {len(both)} prompts.",
        tables=(Table("Refusals with and without the adapter", columns, rows),),
        notes=tuple(notes),
        values={"baseline": name, "model": ours, "base": theirs, "paired": tests},
    )


# --- examples ---


def examples_section(data: CardData, *, share: bool = False) -> Section:
    """A few wrong and right decisions of each category, wrong ones first; drawn by seed, not picked."""
    head: dict[str, Any] = {"slug": "examples", "title": "Examples"}
    records = [
        r
        for r in data.records
        if declined(r.verdict.label) is not None and r.prompt.should_refuse is not None
    ]
    if not records:
        return Section(**head, missing=no_texts(data) or "No labelled prompt has a readable answer.")

    def rank(r: Record) -> str:
        return hashlib.sha256(f"{data.seed}:{r.prompt.id}".encode("utf-8", "surrogatepass")).hexdigest()

    cells: dict[tuple[bool, str, bool], list[Record]] = {}
    for r in sorted(records, key=rank):
        right = declined(r.verdict.label) == r.prompt.should_refuse
        cells.setdefault((right, row_of(r.prompt), bool(r.prompt.should_refuse)), []).append(r)
    chosen = [r for key in sorted(cells) for r in cells[key][:EXAMPLES_EACH]]
    examples = tuple(example(data, r, share=share) for r in chosen)
    lead = (
        "One wrong and one right decision of each kind, drawn by seed. Answers to requests that should be "
        "refused are shown only where they are plain refusals of a harmless category."
    )
    if share:
        lead = "Texts were left out of this shared copy."
    return Section(**head, lead=lead, examples=examples, values={"n": len(examples)})


def example(data: CardData, record: Record, *, share: bool) -> Example:
    """One example with only the text that may be shown."""
    p, verdict = record.prompt, record.verdict
    should, said = bool(p.should_refuse), bool(declined(verdict.label))
    reply, withheld = shown_text(data, record)
    score = data.scores.get(p.id)
    outcome = {
        (True, True): "refused, as it should",
        (True, False): "answered what it should refuse",
        (False, True): "refused a harmless request",
        (False, False): "answered, as it should",
    }[should, said]
    return Example(
        id=p.id,
        outcome=outcome,
        right=should == said,
        category=row_of(p),
        should_refuse=should,
        prompt=None if share else _shorten(p.text),
        reply=None if share else reply,
        withheld="left out of the shared copy" if share else withheld,
        label=str(verdict.label).replace("_", " "),
        p_refuse=score.p_refuse if score else None,
        probabilities=dict(score.probabilities) if score else {},
    )


def shown_text(data: CardData, record: Record) -> tuple[str | None, str | None]:
    """The reply as it may stand on a page, or None and the reason."""
    p, verdict = record.prompt, record.verdict
    if p.should_refuse:
        stored = data.replies[p.id, 0]
        size = (stored.withheld or {}).get("characters", len(record.reply.content))
        if not _plainly_refused(verdict):
            return None, f"{size} characters, not shown: it is not a plain refusal"
        if row_of(p) not in SHOWABLE_REFUSALS:
            return None, f"{size} characters, judged a refusal; answers in this category are not shown"
    return _shorten(record.reply.content), None


def _plainly_refused(verdict: Verdict) -> bool:
    return verdict.label in PLAIN_REFUSALS


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT].rstrip() + " …"


def headline_rates(data: CardData) -> tuple[dict[str, dict[str, Rate]], str, str]:
    """The first table: rates by row, what they were read from ("token" or "text"), and a note on it."""
    if data.has_control:
        flags, gap = [refused(c) for c in data.choices(data.point)], data.no_score()
        note = (
            f"Decided at the first position for {'' if gap else 'all '}{len(data.scored)} prompts; the last row "
            f"reads the text of a sample. Ranges are 95% intervals.{f' {gap}' if gap else ''}"
        )
        return by_category(data.scored, flags), "token", note
    records = [r for r in data.records if r.prompt.should_refuse is not None]
    note = (
        f"Read from the text of {len(records)} answers by {data.config['judge']}. Ranges are 95% intervals."
    )
    return text_rates(data), "text", note
