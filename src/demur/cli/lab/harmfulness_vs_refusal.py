"""`lab harmfulness-vs-refusal`: what a model takes for harmful, what it will refuse, and a guard on the first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say, warn
from demur.errors import DataUnavailable
from demur.files import dumps_row, write_atomic
from demur.report.render import to_json, to_text


def run(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Test prompts of category safety with expected refuse or comply; default core:test, and xstest "
            "and coconot where they can be had.",
        ),
    ] = None,
    model: o.Model = None,
    system: o.System = None,
    fit: Annotated[int, typer.Option(min=20, help="Prompts of each kind to fit on (core:train).")] = 300,
    beliefs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take saved beliefs of this model instead of fitting.")
    ] = None,
    fpr: Annotated[float, typer.Option(help="Share of look-alikes that the guard may stop.")] = 0.05,
    delta: Annotated[float, typer.Option(help="Chance at most that it stops more.")] = 0.1,
    inversion: Annotated[
        int, typer.Option(min=0, help="Also ask so many harmless prompts, layer by layer, under steering.")
    ] = 0,
    coefficient: Annotated[float, typer.Option(help="Of the steering; negative ones need consent.")] = 1.0,
    allow_refusal_lowering: o.AllowLowering = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write beliefs and quadrant of each prompt as JSONL.")
    ] = None,
    save_beliefs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the beliefs (safetensors, for this model only).")
    ] = None,
    save_guard: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the calibrated guard, for demur measure --guard."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Read two beliefs before the answer: is the request harmful, and will it be refused?

    Centres are fitted on core:train, layers chosen on core:select, cuts and the guard's threshold set on
    core:calibrate, and everything is tested on prompts that none of these saw, beside a bag of words. SmolLM2
    takes some minutes.
    """
    from dataclasses import replace

    from demur import prompts
    from demur.control.latent_guard_report import contrast, examine, fit_beliefs, inversion_table
    from demur.explain.harmfulness import Beliefs
    from demur.types import PromptSet

    runtime = o.load_model(model)
    runtime.require("states")
    tests = [o.load_prompt_file(f) for f in files] if files else _tests()
    calibrate, condition = prompts.core("calibrate"), o.condition(system=system)
    with bar() as b:
        tasks: dict[str, Any] = {}

        def stage(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = b.add_task(what, total=total)
            b.update(tasks[what], completed=done, total=total)

        sides = contrast(prompts.core("train"), fit)
        words = PromptSet("core/train", (*sides["harmful"], *sides["harmless"]))
        notes: tuple[str, ...] = ()
        if beliefs is not None:
            fitted = Beliefs.load(beliefs, fingerprint=runtime.fingerprint)
        else:
            fitted, notes = fit_beliefs(
                runtime, words, prompts.core("select"), calibrate, n=fit, condition=condition, stage=stage
            )
        found = examine(
            runtime,
            fitted,
            calibrate,
            tests,
            words=words,
            fpr=fpr,
            delta=delta,
            condition=condition,
            notes=notes,
            stage=stage,
        )
        report = found.report
        if inversion:
            asked = contrast(prompts.core("test"), inversion)["harmless"]
            consent: dict[str, Any] = {"allow_refusal_lowering": allow_refusal_lowering, "stage": stage}
            table = inversion_table(runtime, fitted, asked, coefficient=coefficient, **consent)
            report = replace(report, tables=(*report.tables, table))
    if out is not None:
        write_atomic(out, to_json(report))
    if rows is not None:
        write_atomic(rows, "".join(dumps_row(row) + "\n" for row in found.rows))
    if save_beliefs is not None:
        fitted.save(save_beliefs)
        warn(f"Beliefs written to {save_beliefs}. They belong to {runtime.name} only.")
    if save_guard is not None:
        found.guard.save(save_guard)
        warn(f"Guard written to {save_guard}: demur measure --guard {save_guard}")
    say(to_json(report) if as_json else to_text(report))


def _tests() -> list[Any]:
    """The test part of our corpus, and the public sets that can be had here."""
    from demur import prompts

    out: list[Any] = [prompts.core("test")]
    for load in (prompts.xstest, prompts.coconot):
        try:
            out.append(load())
        except DataUnavailable as e:
            warn(f"{load.__name__} left out: {e}")
    return out
