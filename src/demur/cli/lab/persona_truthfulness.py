"""`lab persona-truthfulness`: can it be told before an answer whether a model leans to the true one?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say, warn
from demur.errors import CapabilityError
from demur.files import dumps_row, write_atomic
from demur.report.render import to_json, to_text


def run(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="CSV or JSONL with question, category and true + false (answers) or truthful (a judge's label).",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, folder or hub id of a local model.")
    ] = "smollm2",
    system: o.System = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts that the categories are dealt out to.")] = 5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take this many questions only, the same ones each time.")
    ] = None,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write label and score of each question as JSONL.")
    ] = None,
    save_probe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the probe (safetensors, for this model only).")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Probe the state before an answer for whether the model leans to the true one.

    Without FILE the questions are those of TruthfulQA. The label is the model's own leaning: likelihood of
    the true answer per token above that of the false one; or a judge's label from the column `truthful`. Each
    category is tested with probes that never saw it, beside a bag of words and the question's length. SmolLM2
    on all of TruthfulQA takes some minutes.
    """
    from demur.explain.persona_truthfulness import load_questions, read_before_answer
    from demur.runtime.local import LocalRuntime

    questions = load_questions(file)
    if limit is not None and limit < len(questions):
        step = len(questions) / limit  # spread over the file, which is often sorted by category
        questions = [questions[int(i * step)] for i in range(limit)]
    runtime = o.load_model(model)
    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(
            f"{model!r} runs elsewhere; hidden states need a local model (folder or hub id)"
        )
    with bar() as b:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = b.add_task(what, total=total)
            b.update(tasks[what], completed=done, total=total)

        found = read_before_answer(
            runtime, questions, o.condition(system=system), folds=folds, seed=seed, progress=report
        )
    if out is not None:
        write_atomic(out, to_json(found.report))
    if scores is not None:
        write_atomic(scores, "".join(dumps_row(row) + "\n" for row in found.rows(questions)))
    if save_probe is not None:
        found.probe.save(save_probe)
        warn(f"Probe written to {save_probe}. It reads {model} only.")
    say(to_json(found.report) if as_json else to_text(found.report))
