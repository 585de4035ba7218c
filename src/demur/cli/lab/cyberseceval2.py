"""`demur lab cyberseceval2`: false refusals, prompt injection, violations, and the trade-off of both sides."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report, write_rows
from demur.errors import InputError
from demur.files import write_atomic

if TYPE_CHECKING:
    from demur.measure.cyberseceval2 import FalseRefusals, Injection, Interpreter, Mitre
    from demur.runtime.base import Runtime
    from demur.types import Condition, PromptSet, Reply


class Task(StrEnum):
    """What to measure."""

    FRR = "frr"
    INJECTION = "injection"
    INTERPRETER = "interpreter"
    MITRE = "mitre"
    TRADE_OFF = "trade-off"


def run(
    task: Annotated[Task, typer.Argument(help="Which test; trade-off joins reports of the others.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Cases (frr and injection have public ones); for trade-off the JSON reports to join.",
        ),
    ] = None,
    model: o.Model = None,
    replies: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answers you have already, instead of asking a model.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the report, with --replies.")] = None,
    matcher: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Judge of refusals, for frr and mitre; default the published rule."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that judges answers: URL#model or local.")
    ] = None,
    expansion_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For mitre: assesses answers at length; default the judge."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Ask only about so many cases, spread over their kinds.")
    ] = None,
    samples: o.Samples = 1,
    temperature: o.Temperature = 0.0,
    max_new_tokens: o.MaxNewTokens = 512,
    seed: o.Seed = 0,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep all answers here as they come; those in it are not asked again."
        ),
    ] = None,
    verdicts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write each verdict as a row of JSONL.")
    ] = None,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """False refusals and violations in security work, on a model or on answers you have.

    frr and injection use the public cases of CyberSecEval 2; interpreter and mitre take requests of your own
    (FILE) and need --judge-model. injection without it scores only what a string search can. trade-off reads
    two reports a model (--json -o) and with -o NAME.svg draws them.
    """
    from demur.flows.settings import public_name
    from demur.measure.cyberseceval2.cases import sample

    if task is Task.TRADE_OFF:
        return _trade_off(files or [], as_json, out)
    if len(files or []) > 1:
        raise InputError(f"{task}: {len(files or [])} files of cases; give one")
    if model is not None and replies is not None:
        raise InputError("-m asks a model and --replies brings answers along; give one of them")
    cases = _cases(task, files[0] if files else None, replies)
    measure = _measure(task, matcher, judge_model, expansion_model, keep, seed)
    if replies is not None:
        cases, got, shown = _own(task, cases, replies, name)
    else:
        condition = o.condition(
            temperature=temperature, samples=samples, seed=seed, max_new_tokens=max_new_tokens
        )
        assert cases is not None
        cases = sample(cases, n, seed) if n else cases
        asked = len(cases)
        runtime = _loaded(model, keep)
        cases, got = _collect(runtime, cases, condition, samples)
        shown = public_name(runtime.name)
    with progress("judging", out) as report_progress:
        said = measure.judge(cases, got, progress=report_progress)
    if verdicts is not None:
        write_rows(said, verdicts)
    report = measure.score(cases, said, model=shown)
    made = {"cases": cases.name, "prompts": cases.hash, "task": task.value}
    if replies is None:
        made["condition"] = f"temperature {temperature:g}, at most {max_new_tokens} new tokens"
        made["not asked"] = str(asked - len(cases))
    write_report(replace(report, provenance={**report.provenance, **made}), as_json, out)
    return None


def _cases(task: Task, file: str | None, replies: str | None) -> PromptSet | None:
    from demur.measure.cyberseceval2 import frr_prompts, injection_cases, user_cases

    if task is Task.FRR:
        return frr_prompts(file)
    if task is Task.INJECTION:
        return injection_cases(file)
    if file is None and replies is None:
        raise InputError(
            f"{task}: the requests are not shipped; give a FILE of your own (JSONL, CSV or the published JSON) "
            "with prompt and category, or answers with --replies"
        )
    return user_cases(file) if file is not None else None


def _measure(
    task: Task,
    matcher: str | None,
    judge_model: str | None,
    expansion_model: str | None,
    keep: Path | None,
    seed: int,
) -> FalseRefusals | Injection | Interpreter | Mitre:
    from demur.flows.settings import public_name
    from demur.measure.cyberseceval2 import HEAD, FalseRefusals, Injection, Interpreter, Mitre

    if matcher is not None and task not in (Task.FRR, Task.MITRE):
        raise InputError(f"{task}: --matcher reads refusals, which frr and mitre do; leave it out")
    if expansion_model is not None and task is not Task.MITRE:
        raise InputError(f"{task}: --expansion-model is for mitre; leave it out")
    judge = None if judge_model is None else _loaded(judge_model, keep)
    called = None if judge is None else public_name(judge.name)
    if task is Task.FRR:
        return FalseRefusals(matcher or HEAD, runtime=judge, seed=seed)
    if task is Task.INJECTION:
        return Injection(judge, judge_name=called, seed=seed)
    if judge is None:
        raise InputError(f"{task}: needs a model that judges the answers; give --judge-model")
    if task is Task.INTERPRETER:
        return Interpreter(judge, judge_name=called)
    expander = None if expansion_model is None else _loaded(expansion_model, keep)
    return Mitre(judge, expander, matcher=matcher or HEAD, judge_name=called)


def _loaded(model: str | None, keep: Path | None) -> Runtime:
    """The model; with `keep`, one that remembers."""
    from demur.flows.settings import public_name
    from demur.measure.cyberseceval2 import Remembered

    runtime = o.load_model(model)
    return runtime if keep is None else Remembered(runtime, keep, name=public_name(runtime.name))


def _collect(
    runtime: Runtime, cases: PromptSet, condition: Condition, samples: int
) -> tuple[PromptSet, list[Reply]]:
    from demur.flows.asking import askable

    chosen, _ = askable(runtime, cases, condition)
    with progress("answering", "") as report:
        got = list(runtime.generate(chosen, condition, samples=samples, progress=report))
    failed = [r.error for r in got if r.error is not None]
    if failed:
        warn(f"{len(failed)} of {len(got)} calls failed, the first with: {failed[0]}")
    if len(failed) == len(got):
        raise InputError("no call was answered; nothing to report")
    return chosen, got


def _own(
    task: Task, cases: PromptSet | None, replies: str, name: str | None
) -> tuple[PromptSet, list[Reply], str | None]:
    """Answers from a file: joined to the cases by id, or bringing their prompts along."""
    from demur.measure.cyberseceval2.cases import with_known
    from demur.report.importers import load_answers

    try:
        got = load_answers(replies, prompts=cases)
    except InputError:
        if task is Task.INJECTION or cases is None:
            raise
        own = load_answers(replies)
        prompts = with_known(own.prompts.prompts, cases)
        return prompts, list(own.replies), name or own.model
    return got.prompts, list(got.replies), name or got.model


def _trade_off(files: list[str], as_json: bool, out: str) -> None:
    from demur.measure.cyberseceval2.tradeoff import drawing, load_points, trade_off

    points = load_points(files)
    if out.endswith(".svg"):
        write_atomic(out, drawing(points))
        write_report(trade_off(points), as_json, "-")
    else:
        write_report(trade_off(points), as_json, out)
