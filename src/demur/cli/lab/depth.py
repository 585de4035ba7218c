"""`lab depth`: what is left of refusal once the first tokens of an answer are forced?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import say, warn
from demur.errors import InputError
from demur.files import load_operating_point, write_atomic
from demur.report.render import to_json, to_text
from demur.types import PromptSet, Report

METHOD = "any-depth-alignment"
"""The method whose question this answers; its checks are another command."""


def run(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="JSONL or CSV with prompt and response; default: what the base answers."
        ),
    ] = None,
    model: o.Model = None,
    adapter: o.Adapter = None,
    depths: Annotated[str, typer.Option(help="Tokens of the answer that are forced.")] = "0,1,2,4,8,16,32,64",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model writes behind them.")] = 16,
    n: Annotated[
        int,
        typer.Option(
            "--prompts", min=1, help="Without FILE: requests to refuse, and half as many harmless ones."
        ),
    ] = 80,
    operating_point: o.Point = None,
    allow_refusal_lowering: o.AllowLowering = False,
    judge: Annotated[str, typer.Option("--judge", "-j", help="Judge of the texts.")] = "rules/demur-v1",
    system: o.System = None,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML page: drawing and tables.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Force the first tokens of an answer and measure two things at each depth.

    `continue`: the model writes on, and a judge reads whether it declines. `reheader`: the refuse mass at a new
    assistant header behind the forced tokens. Without FILE the forced text is the base model's own answer to
    packaged test prompts that should be declined for other reasons than safety, and to harmless ones. A model
    that came with an operating point answers under it.
    """
    from demur.control.refusal_tokens import RefusalTokens, check_point
    from demur.measure.depth import Depth, load_forced, own_answers

    measure = Depth(judge, depths=_depths(depths), new_tokens=new_tokens)
    forced = load_forced(file) if file is not None else None
    runtime = o.load_model(model, adapter=adapter)
    point = load_operating_point(operating_point) if operating_point else runtime.shipped_point
    rule = None
    if point is not None:
        check_point(point, runtime)
        rule = RefusalTokens(
            point, shipped=runtime.shipped_point, allow_refusal_lowering=allow_refusal_lowering
        )
    condition = o.condition(system=system, seed=seed, operating_point=point.id if point else None)
    if forced is None:
        base = o.load_model(model, base_only=True)
        warn(f"Forced text: answers of {base.name} to prompts of core/test.")
        asked = _prompts(n, seed)
        tokens = max(measure.depths) + new_tokens
        forced = own_answers(base, asked.prompts, tokens, judge=judge, condition=condition)
        warn(f"{len(forced)} of {len(asked)} answers read as plain answers; the others are left out.")
    report = measure.run(runtime, forced, condition, decide=rule)
    source = f"a file of {len(forced)} answers" if file else f"{len(forced)} answers of the base model"
    report = dataclasses.replace(report, provenance={**report.provenance, "forced_text": source})
    if rule is not None and rule.lowers:
        report = dataclasses.replace(report, notes=(*report.notes, f"Refusal was lowered: {rule.lowers}."))
    if out is not None:
        write_atomic(out, to_json(report))
    if page is not None:
        write_atomic(page, _page(report, source))
        warn(f"Page written to {page}.")
    say(to_json(report) if as_json else to_text(report))


def _depths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--depths {text!r}: whole numbers separated by commas, e.g. 0,4,16") from None


def _prompts(n: int, seed: int) -> PromptSet:
    from demur.measure.depth import UNHARMFUL
    from demur.prompts import core, stratified

    every = core("test")
    refuse = tuple(p for p in every if p.should_refuse and p.category in UNHARMFUL)
    answer = tuple(p for p in every if p.should_refuse is False)
    some = [
        *stratified(PromptSet("a", refuse), n, seed),
        *stratified(PromptSet("b", answer), (n + 1) // 2, seed),
    ]
    return PromptSet("depth", tuple(some))


def _page(report: Report, source: str) -> str:
    from demur.flows.section_depth import of_report, verdict
    from demur.flows.settings import public_name
    from demur.report.explainpage import PageView, to_html

    name = public_name(str(report.provenance["model"]))
    lead = "What the model does, and what a new assistant header sees, behind the first tokens of an answer."
    facts = {**report.provenance, "model": name, "fingerprint": str(report.provenance["fingerprint"])[:12]}
    return to_html(
        PageView(
            kicker="Refusal by depth",
            title=name,
            verdict=verdict(report.values),
            detail=f"Forced text: {source}, cut at each depth",
            sections=(of_report(report, lead),),
            facts=tuple((k, str(v)) for k, v in facts.items() if v),
        )
    )
