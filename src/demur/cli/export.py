"""`export`: a run in another tool's files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from demur.cli import options as o
from demur.cli.diff import RUN, JudgeOption, PromptsOption
from demur.cli.screen import warn


class Format(StrEnum):
    """What `--to` may name."""

    INSPECT = "inspect"
    LM_EVAL = "lm-eval"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN)],
    to: Annotated[Format, typer.Option("--to", help="inspect: one log file; lm-eval: results and samples.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="A .json file (inspect) or a folder (lm-eval)."),
    ],
    judge: JudgeOption = None,
    prompts: PromptsOption = None,
    unsafe_text: Annotated[
        bool,
        typer.Option("--unsafe-text", help="Also the answers that complied with what should be refused."),
    ] = False,
) -> None:
    """Write a run for Inspect (`inspect view` opens it) or in lm-eval's result files.

    Answers that complied with what should be refused are left out; their verdicts stay.
    """
    from demur.flows.export import export as write
    from demur.flows.readrun import read_run

    read = read_run(run, judge=judge, prompts=o.load_prompt_file(prompts) if prompts else None)
    for path in write(read, out, to.value, unsafe=unsafe_text):
        warn(f"wrote {path}")
