"""`lab post-training-mechanistic`: what differs inside two checkpoints of one architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say
from demur.errors import InputError
from demur.files import read_text, write_atomic
from demur.report.render import to_text


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Built-in name, folder or hub id.")] = "smollm2",
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="The same model after training.")
    ] = "demur-smollm2",
    part: Annotated[
        list[str] | None,
        typer.Option(help="knowledge, truth, refusal or confidence; repeat for several. Default all."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV or JSONL with true_statement and false_statement."),
    ] = None,
    no_question: Annotated[
        bool,
        typer.Option(
            "--no-question", help="Complete the sentences instead of asking whether statements are true."
        ),
    ] = False,
    noise: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Noise on the subject instead of a false statement, in standard deviations of its embeddings "
            "(3, say).",
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="With --noise: draws that are averaged; default 3.")
    ] = None,
    statements: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A set with statement and label (0, 1); at least three sets."),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text with labelled examples, put before each statement."),
    ] = None,
    max_pairs: Annotated[int, typer.Option(min=20, help="Pairs that are traced.")] = 40,
    cross: Annotated[
        bool, typer.Option("--cross", help="Also patch each model's states into the other.")
    ] = False,
    steer: Annotated[
        int,
        typer.Option(min=0, help="Requests answered under each change of the refusal direction; 0 for none."),
    ] = 24,
    lower: Annotated[
        bool,
        typer.Option(
            "--allow-refusal-lowering",
            help="Also subtract and ablate the refusal directions on harmful requests; it is noted in the result.",
        ),
    ] = False,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write everything as JSON.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Compare two checkpoints inside: facts, truth, refusal, confidence.

    Facts and truth need statements: the public files of this method, or your own. Refusal uses the safety requests
    of the shipped corpus. SmolLM2 with and without its adapter takes some minutes.
    """
    from demur.explain.post_training import PARTS, Noise, compare, load_pairs, load_statements

    if draws is not None and noise is None:
        raise InputError(f"--draws {draws} says how often noise is drawn; give its size with --noise")
    facts = not part or "knowledge" in part
    for option, given in (("--noise", noise is not None), ("--no-question", no_question), ("--cross", cross)):
        if given and not facts:
            raise InputError(
                f"{option} changes how facts are traced, and --part {' --part '.join(part or ())} leaves facts "
                f"out; add --part knowledge, or leave {option} out"
            )
    disturbed = None if noise is None else Noise(share=noise, draws=draws or 3, seed=seed)
    sets = dict(_named(text) for text in statements or ())
    runtimes = [o.load_model(name) for name in (base, tuned)]
    with bar() as b:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = b.add_task(what, total=total)
            b.update(tasks[what], completed=done, total=total)

        found = compare(
            *runtimes,
            parts=tuple(part) if part else PARTS,
            pairs=load_pairs(pairs) if pairs else None,
            before=read_text(before) if before else None,
            question=not no_question,
            noise=disturbed,
            statements=load_statements(sets, seed=seed) if sets else None,
            max_pairs=max_pairs,
            cross=cross,
            steer=steer,
            allow_refusal_lowering=lower,
            seed=seed,
            progress=report,
        )
    text = json.dumps(found.to_dict(), ensure_ascii=False, allow_nan=False)
    if out is not None:
        write_atomic(out, text + "\n")
    say(text if as_json else to_text(found.report))


def _named(text: str) -> tuple[str, Path]:
    name, sign, file = text.partition("=")
    if not (name and sign and file):
        raise InputError(f"--statements {text!r}; write NAME=FILE, for example cities=cities.csv")
    return name, Path(file)
