"""`diff`: what changed between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import say, warn
from demur.report.render import to_text

RUN = "Run folder, or a file of answers."
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge", "-j", help="Judge of both; by default stored verdicts, and rules/demur-v1 without any."
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts, where a file of answers holds only ids and answers."),
]


def diff(
    ctx: typer.Context,
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help=RUN)],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help=RUN)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Gets diff.html and diff.json.")
    ] = Path("diff"),
    judge: JudgeOption = None,
    judge_model: o.JudgeModel = None,
    agreement: o.Agreement = None,
    prompts: PromptsOption = None,
    share: Annotated[bool, typer.Option("--share", help="Leave all texts out.")] = False,
    as_json: o.Json = False,
) -> None:
    """Compare two runs over the same prompts.

    Rates side by side with paired tests, and every answer that is declined in one run and not in the other.
    Prompts that stand in one run only are listed. To fail a build on a change, see `demur gate`.
    """
    from demur.flows import diff as flow

    o.add_agreement(ctx, agreement)
    made = flow.diff(
        run_a,
        run_b,
        out,
        judge=o.load_reader(judge, judge_model),
        prompts=o.load_prompt_file(prompts) if prompts else None,
        share=share,
    )
    say(made.json.read_text(encoding="utf-8").rstrip() if as_json else to_text(made.report))
    warn(f"\nThe page: {made.html}\nAs data:  {made.json}")
