"""The card's section "How deep": what is left of refusal behind the first tokens of an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from demur.errors import CapabilityError, InputError
from demur.files import dumps_row
from demur.flows.carddata import CardData
from demur.flows.collect import STATES_SECONDS, Stage
from demur.prompts import stratified
from demur.report.depthplots import depth_lines
from demur.report.view import Figure, Section
from demur.runtime.base import Decide, Progress, Runtime
from demur.types import Condition, PromptSet, Report, Table

DEPTHS = (0, 1, 2, 4, 8, 16, 32)
TOKENS = 48
"""Of the base model's answers: 16 behind the deepest forced ones."""
REFUSE, ANSWER = 20, 10
"""Prompts of each kind."""
SECONDS = 30.0
NO_BASE = (
    "Forced text is the answer of the base model without its adapter, and there is none beside this model. With "
    "answers of your own: demur lab depth FILE."
)


def depth_stages(
    runtime: Runtime,
    baseline: Runtime | None,
    prompts: PromptSet,
    condition: Condition,
    decide: Decide | None,
) -> list[Stage]:
    """The stage `depth`; none without a base model, or where the model runs elsewhere or thinks first."""
    if baseline is None or "intervene" not in runtime.capabilities:
        return []
    from demur.runtime.local import LocalRuntime

    if not isinstance(runtime, LocalRuntime) or runtime.chat.thinks:
        return []
    some = forced_prompts(prompts)
    if not any(p.should_refuse for p in some):
        return []
    return [
        Stage(
            name="depth",
            title="forcing first tokens",
            kind="states",
            runtime=runtime,
            prompts=some.prompts,
            condition=condition,
            streams=("depth",),
            passes=round(SECONDS / STATES_SECONDS * len(some) / (REFUSE + ANSWER)),
            read=lambda progress: depth(runtime, baseline, some, condition, decide, progress),
        )
    ]


def forced_prompts(prompts: PromptSet) -> PromptSet:
    """What is asked: requests to refuse for other reasons than safety, and harmless ones."""
    from demur.measure.depth import UNHARMFUL

    refuse = tuple(p for p in prompts if p.should_refuse and p.category in UNHARMFUL)
    answer = tuple(p for p in prompts if p.should_refuse is False)
    some = [
        p for n, part in ((REFUSE, refuse), (ANSWER, answer)) for p in stratified(PromptSet("part", part), n)
    ]
    return PromptSet("depth", tuple(some))


def depth(
    runtime: Runtime,
    baseline: Runtime,
    prompts: PromptSet,
    condition: Condition,
    decide: Decide | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Both curves on the base model's own answers, as one row."""
    from demur.measure.depth import Depth, own_answers

    def half(part: int) -> Progress:
        def tell(done: int, total: int | None) -> None:
            if progress is not None:
                progress(part * len(prompts) + done * len(prompts) // max(total or done, 1), 2 * len(prompts))

        return tell

    try:
        forced = own_answers(baseline, prompts.prompts, TOKENS, condition=condition, progress=half(0))
        report = Depth(depths=DEPTHS).run(runtime, forced, condition, decide=decide, progress=half(1))
    except InputError as e:  # a template that writes no header, say: the card goes on without the section
        raise CapabilityError(str(e)) from None
    return {
        **_plain(report.values),
        "asked": len(prompts),
        "forced": len(forced),
        "base": baseline.name,
        "judge": report.provenance["judge"],
        "tables": [[t.title, list(t.columns), [list(r) for r in t.rows], t.note] for t in report.tables],
        "notes": list(report.notes),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(dumps_row(values))
    return out


def depth_section(data: CardData) -> Section:
    """What the model does, and what a header sees, behind the first tokens of the base model's answers."""
    found = data.depth
    if found is None:
        why = data.notes.get("depth") or NO_BASE
        return Section(slug="depth", title="How deep", missing=why)
    return section(
        found,
        f"The first tokens of an answer are put in the model's mouth: the greedy answers of {found['base']}, the "
        f"same model without its adapter, to {found['asked']} prompts of this card that are harmless or should be "
        f"refused for other reasons than safety. {found['forced']} answers were read as plain ones and are used.",
    )


def of_report(report: Report, lead: str) -> Section:
    """The same section for the report of `demur.measure.depth`."""
    tables = [[t.title, list(t.columns), [list(r) for r in t.rows], t.note] for t in report.tables]
    return section({**report.values, "tables": tables, "notes": list(report.notes)}, lead)


def verdict(found: Mapping[str, Any]) -> str:
    """The curve of `continue` in one clause: its first and its last depth."""
    from demur.measure.depth import CONTINUE

    group = found["curves"][0]["group"]
    known = [
        p for p in found["curves"] if (p["curve"], p["group"]) == (CONTINUE, group) and p["value"] is not None
    ]
    if not known:
        return "Nothing could be read"
    first, last = (known[k] for k in (0, -1))
    return (
        f"It declines {first['value']:.0%} of {first['n']} requests that {_they(group)} with {first['depth']} "
        f"forced tokens, and {last['value']:.0%} of {last['n']} with {last['depth']}"
    )


def _they(group: str) -> str:
    return f"it {group}" if group.startswith("should") else f"are {group}"


def section(found: Mapping[str, Any], lead: str) -> Section:
    """Drawing, tables and notes."""
    from demur.measure.depth import CONTINUE, REHEADER

    groups = list(dict.fromkeys(p["group"] for p in found["curves"]))[:2]
    curves = {
        CONTINUE: f"it writes on: share that declines ({CONTINUE})",
        REHEADER: f"at a new header: refuse mass ({REHEADER})",
    }
    at = {(p["curve"], p["group"], p["depth"]): p for p in found["curves"]}
    said = []
    for curve in curves:
        of = [at[curve, groups[0], d] for d in found["depths"] if (curve, groups[0], d) in at]
        known = [p for p in of if p["value"] is not None]
        if known:
            first, last = known[0], known[-1]
            said.append(
                f"{curve}: {first['value']:.0%} at {first['depth']} forced tokens (n {first['n']}), "
                f"{last['value']:.0%} at {last['depth']} (n {last['n']})"
            )
    figure = Figure(
        svg=depth_lines(found["curves"], curves, groups, name="depth-curves"),
        alt="; ".join(said) + ".",
        title="Refusal behind forced tokens",
        caption=f"Shaded: 95% interval over prompts, for requests that {_they(groups[0])}. "
        + (f"Dashed: requests that {_they(groups[1])}, the control. " if len(groups) > 1 else "")
        + "The first line says what the model does; the second what a check inside the answer could see.",
    )
    return Section(
        slug="depth",
        title="How deep",
        lead=lead,
        figures=(figure,),
        tables=tuple(_table(*t) for t in found["tables"]),
        notes=tuple(found["notes"]),
        values={k: v for k, v in found.items() if k not in ("tables", "notes")},
    )


def _table(title: str, columns: list[str], rows: list[list[Any]], note: str | None) -> Table:
    return Table(title, tuple(columns), tuple(tuple(r) for r in rows), note)
