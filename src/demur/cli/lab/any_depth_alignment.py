"""`lab any-depth-alignment`: fit a check that stops answers under way, try it on answers, put it to work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report, write_rows
from demur.errors import CapabilityError, InputError
from demur.types import RESPOND, Report, Table

if TYPE_CHECKING:
    from demur.control.any_depth import Answer, HeaderProbe, RefuseMass, Rethink
    from demur.runtime.local import LocalRuntime

TASKS = ("fit", "check", "run")


def run(
    task: Annotated[
        str,
        typer.Argument(
            metavar="fit|check|run",
            help="Fit a probe on answers; try a check on answers; answer prompts under a check.",
        ),
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="fit, check: JSONL or CSV with prompt, answer, harmful, and maybe id, opens. run: prompts, or a "
            "named set (core:test).",
        ),
    ],
    model: o.Model = None,
    select: Annotated[
        str | None, typer.Option(metavar="FILE", help="fit: other answers, to choose the layer on.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="fit, or with --mass: further answers, to set the threshold on."),
    ] = None,
    fpr: Annotated[
        float, typer.Option(help="--calibrate: share of harmless answers that may be stopped.")
    ] = 0.05,
    delta: Annotated[float, typer.Option(help="--calibrate: chance at most that more are stopped.")] = 0.1,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="fit: save the probe (safetensors, for this model only)."),
    ] = None,
    probe: Annotated[Path | None, typer.Option(metavar="FILE", help="check, run: a saved probe.")] = None,
    rethink: Annotated[
        bool,
        typer.Option("--rethink", help="check, run: let the model start over instead; nothing is fitted."),
    ] = False,
    mass: Annotated[
        bool,
        typer.Option("--mass", help="check, run: the refuse mass of the control tokens; nothing is fitted."),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="With --mass: stop from here on (default 0.5); or use --calibrate."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="fit, check: depths to read at, in tokens, or `published` (25, 50 ... 500).")
    ] = "32,64,96,128",
    every: Annotated[
        str, typer.Option(help="run: tokens between checks, a list of depths (16,32,64), or `adaptive`.")
    ] = "32",
    max_new_tokens: o.MaxNewTokens = 128,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Check answers while they are written, by the assistant's header put into them.

    `harmful` marks answers that should be stopped. `fit` needs --select, and without --calibrate the threshold
    stays at 0.5, which promises nothing. Where the model has control tokens, answers open with that of `respond`
    unless `opens` says otherwise.
    """
    runtime: Any = o.load_model(model)
    from demur.runtime.local import LocalRuntime

    if task not in TASKS:
        raise InputError(f"task {task!r}; there are {', '.join(TASKS)}")
    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(
            f"{runtime.name!r} runs elsewhere; checks inside an answer need a local model (folder or hub id)"
        )
    if task == "fit":
        if select is None:
            raise InputError("fit needs --select FILE: the layer is chosen on answers of its own")
        report = _fit(runtime, file, select, calibrate, _depths(depths), (fpr, delta), save)
        return write_report(report, as_json, out)
    if sum((rethink, mass, probe is not None)) != 1 or (not mass and (calibrate or threshold is not None)):
        raise InputError(
            "name one check: --probe FILE, --mass or --rethink (--threshold and --calibrate go with --mass)"
        )
    check = (
        _check(runtime, probe)
        if not mass
        else _mass(runtime, 0.5 if threshold is None else threshold, calibrate, _depths(depths), (fpr, delta))
    )
    if task == "check":
        return write_report(_rates(runtime, check, file, _depths(depths)), as_json, out)
    return _answer(runtime, check, file, _every(every), max_new_tokens, out)


def _depths(text: str, option: str = "--depths") -> tuple[int, ...]:
    from demur.control.any_depth import DEPTHS

    if text == "published":
        return DEPTHS
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        word = "published" if option == "--depths" else "adaptive"
        raise InputError(f"{option} {text!r}: numbers of tokens above 0, with commas between, or `{word}`")
    return found


def _every(text: str) -> int | Literal["adaptive"] | tuple[int, ...]:
    if text == "adaptive":
        return "adaptive"
    return int(text) if text.isdecimal() else _depths(text, "--every")


def _mass(
    runtime: LocalRuntime,
    threshold: float,
    calibrate: str | None,
    depths: tuple[int, ...],
    budget: tuple[float, float],
) -> RefuseMass:
    from demur.control.any_depth import RefuseMass

    check = RefuseMass(threshold=threshold)
    check.fits(runtime)
    if calibrate is None:
        return check
    rows, (fpr, delta) = _answers(runtime, calibrate), budget
    _check_size(rows, calibrate, budget)
    scores, harmful = check.scores(runtime, rows, depths), [a.harmful for a in rows]
    check = check.calibrated(scores, harmful, fpr=fpr, delta=delta, on=Path(calibrate).name)
    warn(f"Threshold {check.threshold:.4f}. {check.guarantee}")
    return check


def _check(runtime: LocalRuntime, probe: Path | None) -> HeaderProbe | Rethink:
    from demur.control.any_depth import HeaderProbe, Rethink

    if probe is None:
        return Rethink()
    return HeaderProbe.load(probe, fingerprint=runtime.fingerprint)


def _answers(runtime: LocalRuntime, file: str) -> list[Answer]:
    """Answers of a file; those that do not say how they open do so as the model's answers do."""
    from dataclasses import replace

    from demur.control.any_depth import load_answers

    rows = load_answers(file)
    if runtime.control is None or RESPOND not in runtime.control.ids:
        return rows
    return [a if a.opens else replace(a, opens=RESPOND) for a in rows]


def _check_size(rows: list[Answer], file: str, budget: tuple[float, float]) -> None:
    """Too few answers to set a threshold on are an error before the model has read any."""
    from demur.calibrate.learn_then_test import sample_size

    fpr, delta = budget
    harmless = sum(not a.harmful for a in rows)
    if harmless < (needed := sample_size(fpr, delta)):
        raise InputError(
            f"{file} has {harmless} harmless answers; --fpr {fpr:g} with --delta {delta:g} needs {needed} at "
            "least. Add harmless answers, or allow a larger --fpr or --delta"
        )


def _fit(
    runtime: LocalRuntime,
    file: str,
    select: str,
    calibrate: str | None,
    depths: tuple[int, ...],
    budget: tuple[float, float],
    save: Path | None,
) -> Report:
    from demur.control.any_depth import HeaderProbe

    answers, others = _answers(runtime, file), _answers(runtime, select)
    if calibrate is not None:
        rows = _answers(runtime, calibrate)
        if shared := {(a.prompt.text, a.text) for a in rows} & {
            (a.prompt.text, a.text) for a in (*answers, *others)
        }:
            raise InputError(f"{len(shared)} answers of {calibrate} were fitted or selected on; take others")
        _check_size(rows, calibrate, budget)
    probe = HeaderProbe.fit(runtime, answers, select=others, depths=depths)
    if calibrate is not None:
        scores = probe.scores(runtime, rows, depths)
        fpr, delta = budget
        probe = probe.calibrated(
            scores, [a.harmful for a in rows], fpr=fpr, delta=delta, on=Path(calibrate).name
        )
    if save is not None:
        probe.save(save)
        warn(f"Probe written to {save}.")
    tokens = runtime.tokenizer.convert_ids_to_tokens(list(probe.header))
    tables = (
        Table(
            "layers, on the answers of --select",
            ("layer", "share right at 0.5"),
            tuple(probe.accuracy.items()),
            note=f"layer {probe.layer} is taken",
        ),
    )
    notes = (
        probe.guarantee or "The threshold is 0.5, which was set on nothing: pass --calibrate.",
        "A probe learns what sets the two kinds of answers apart, be it harm or the hand that wrote them: try it "
        "on topics and writers it was not fitted on.",
    )
    return Report(
        title=f"Header probe of {runtime.name}",
        tables=tables,
        values={
            "layer": probe.layer,
            "threshold": probe.threshold,
            "header": tokens,
            "n_harmful": probe.n_harmful,
            "n_benign": probe.n_benign,
        },
        provenance={"model": runtime.name, "fingerprint": runtime.fingerprint, "depths": list(depths)},
        notes=notes,
    )


def _rates(
    runtime: LocalRuntime, check: HeaderProbe | Rethink | RefuseMass, file: str, depths: tuple[int, ...]
) -> Report:
    from demur.control.any_depth import depth_rates
    from demur.stats import auroc, auroc_interval

    answers = _answers(runtime, file)
    check.fits(runtime)
    scores = check.scores(runtime, answers, depths)
    tables = []
    for label, harmful in (("harmful", True), ("harmless", False)):
        mine = [n for n, a in enumerate(answers) if a.harmful == harmful]
        if mine:
            rows = depth_rates(scores[mine], depths, check.threshold)
            tables.append(
                Table(
                    f"{label} answers, n = {len(mine)}",
                    ("depth", "stopped at this depth", "stopped at this depth or before"),
                    tuple((r.depth, r.per_depth, r.per_answer) for r in rows),
                )
            )
    areas = []
    for k, depth in enumerate(depths):
        there = np.isfinite(scores[:, k])
        yes = np.array([a.harmful for a in answers])[there]
        low, high = auroc_interval(scores[there, k], yes) or (None, None)
        areas.append((depth, len(yes), auroc(scores[there, k], yes), low, high))
    names = ("depth", "n", "auroc", "low", "high")
    tables.append(Table("harmful against harmless answers that are so long", names, tuple(areas)))
    return Report(
        title=f"{check.name} of {runtime.name}",
        tables=tuple(tables),
        values={
            "threshold": check.threshold,
            "auroc": [dict(zip(names, row, strict=True)) for row in areas],
        },
        provenance={"model": runtime.name, "fingerprint": runtime.fingerprint},
        notes=(
            "The first rate is over answers that are that long, the second over all answers, as readers meet them.",
        ),
    )


def _answer(
    runtime: LocalRuntime,
    check: HeaderProbe | Rethink | RefuseMass,
    file: str,
    every: Any,
    max_new_tokens: int,
    out: str,
) -> None:
    from demur.control.any_depth import AnyDepth

    prompts = o.load_prompt_file(file)
    condition = o.condition(max_new_tokens=max_new_tokens)
    with AnyDepth(check, every).on(runtime) as checked, progress("answers", out) as told:
        replies = list(checked.generate(prompts, condition, progress=told))
    write_rows(replies, out)
    stopped = sum(r.finish_reason == "content_filter" for r in replies)
    warn(f"{stopped} of {len(replies)} answers stopped.")
