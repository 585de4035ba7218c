"""`gate`: fail a build on what a run shows. `measure --fail-if` goes through `enforce`, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.diff import RUN, JudgeOption, PromptsOption
from demur.cli.screen import say, say_json, warn
from demur.types import PromptSet

if TYPE_CHECKING:
    from demur.judges import Judge

FAILED = 1

FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="EXPR",
        help="Exit 1 if shown: 'over_refusal.safety > 0.10', 'refusal < baseline - 0.03'; repeatable.",
    ),
]
Baseline = Annotated[
    str | None, typer.Option(metavar="RUN", help="The run that `baseline` means in a condition.")
]
JUnit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the outcomes as JUnit XML.")]


def gate(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN)],
    fail_if: FailIf = None,
    baseline: Baseline = None,
    junit: JUnit = None,
    judge: JudgeOption = None,
    judge_model: o.JudgeModel = None,
    agreement: o.Agreement = None,
    prompts: PromptsOption = None,
    as_json: o.Json = False,
) -> None:
    """Fail (exit 1) if a run shows that a condition holds.

    EXPR is MEASURE[.ROW][.point|.low|.high] > LIMIT. Measures: over_refusal, refusal, unread. A condition holds
    where its one-sided 95% bound lies beyond the limit; a model at the limit fails in at most 5% of runs. Too few
    answers to decide fail, too, and say how many are needed. Exit codes: 0 pass, 1 failed, 2 error.
    """
    o.add_agreement(ctx, agreement)
    enforce(
        run,
        fail_if or [],
        baseline=baseline,
        junit=junit,
        judge=o.load_reader(judge, judge_model),
        prompts=o.load_prompt_file(prompts) if prompts else None,
        as_json=as_json,
    )


def enforce(
    run: str | Path,
    rules: Sequence[str],
    *,
    baseline: str | Path | None = None,
    junit: Path | None = None,
    judge: Judge | None = None,
    prompts: PromptSet | None = None,
    as_json: bool = False,
) -> None:
    """Check conditions on a run, print one line each, and end with exit code 1 where one fails.

    Raises:
        typer.Exit: code 1, a condition holds or cannot be decided.
        InputError: as `demur.measure.gate.gate` and `demur.flows.readrun.read_run`.
    """
    from demur.files import write_atomic
    from demur.flows.readrun import read_run
    from demur.judges import agreement
    from demur.measure.gate import gate as check
    from demur.measure.refusal import judge_note
    from demur.report.exports.junit import Case, to_junit

    other = read_run(baseline, judge=judge, prompts=prompts).records if baseline is not None else None
    read = read_run(run, judge=judge, prompts=prompts)
    with agreement.adding(read.agreement):
        said = read.people.said if read.people else None
        outcomes, warnings = check(read.records, rules, baseline=other, said=said)
        note = " ".join(read.people.notes) if read.people else judge_note(read.judge)
    several = len({x.condition for x in outcomes}) > 1
    cases = [
        Case(
            name=f"{x.rule.text} ({x.condition})" if several else x.rule.text,
            status=x.status,
            message=x.message,
        )
        for x in outcomes
    ]
    if junit is not None:
        write_atomic(junit, to_junit(f"demur gate {read.name}", cases))
    for line in warnings:
        warn(f"warning: {line}")
    skipped = read.provenance.get("skipped", {}).get("prompts", {})
    answered = {r.prompt.id for r in read.records}
    if left := sum(p.id not in answered and p.id not in skipped for p in read.prompts):
        part = read.provenance.get("shard")
        why = f"this is part {part['i']} of {part['n']}" if part else "the run was stopped before its end"
        warn(f"warning: {left} of {len(read.prompts)} prompts have no answer; {why}")
    warn(f"{len(read.records)} answers judged by {read.judge}. {note}")
    if as_json:
        say_json(
            {
                "judge": read.judge,
                "judge_note": note,
                "warnings": warnings,
                "outcomes": [asdict(x) for x in outcomes],
            }
        )
    else:
        for case in cases:
            say(f"{case.status.upper():8} {case.name}\n         {case.message}")
    if any(c.status != "pass" for c in cases):
        raise typer.Exit(FAILED)
