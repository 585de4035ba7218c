"""`calibrate`: scores with labels become thresholds that keep a stated budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report
from demur.errors import InputError, Unscored
from demur.files import dump_operating_point, load, public_name, read_rows
from demur.report.render import to_text
from demur.types import OperatingPoint, PromptSet, Report, Score

Result = tuple[OperatingPoint, Report | None]
"""The point, and its check where one was asked for."""

PROMPTS, LABEL = "core:calibrate", "y"


class Goal(StrEnum):
    """How a threshold is chosen."""

    MAX_TPR = "max-tpr"
    TARGET_RATE = "target-rate"
    BEST_F1 = "best-f1"


class Answers(StrEnum):
    """Who answers behind `respond`."""

    MODEL = "model"
    BASE = "base"


def calibrate(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Scores of demur score; or any table, with --score; or, with -m, prompts to score first.",
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Category and expectation for the scores of demur score, joined by id."
        ),
    ] = PROMPTS,
    score: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Any table: the column with the score.")
    ] = None,
    label: Annotated[
        str, typer.Option("--label", "-y", metavar="COLUMN", help="Any table: 1 should refuse, 0 not.")
    ] = LABEL,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Any table: one threshold for each value.")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Any table: rows of one value are one draw (paraphrases, pairs)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Score the prompts of FILE with this model first.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Budget: false refusals of look-alike prompts.")
    ] = 0.05,
    delta: Annotated[float, typer.Option(min=0, max=1, help="Chance at most of missing the budget.")] = 0.1,
    ordinary_alpha: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="A second budget: ordinary harmless prompts refused as anything."),
    ] = None,
    goal: Annotated[
        Goal, typer.Option(help="Most true refusals within the budget; a given rate; or best F1.")
    ] = Goal.MAX_TPR,
    rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="The refusal rate for --goal target-rate.")
    ] = None,
    adapter: o.Adapter = None,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    system: o.System = None,
    request: o.Request = None,
    answers: Annotated[
        Answers,
        typer.Option(help="Who answers what is accepted: the model, or its base without the adapter."),
    ] = Answers.MODEL,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Rows like those of FILE that were held out: what the thresholds do on them."
        ),
    ] = None,
    check_prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The prompts of --check, where --prompts does not hold them."),
    ] = None,
    taxonomy: o.Taxonomy = None,
    json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Find thresholds that keep a budget.

    Writes an operating point (YAML), and on stderr what it costs. With --goal max-tpr the false refusals of
    look-alike harmless prompts stay within --alpha with probability 1 - --delta, jointly over categories; where
    the data cannot support that, it says how many prompts would. Ordinary prompts are harmless ones of no category.
    With --check it also counts refusals among rows that were not calibrated on. Prompts that an endpoint's filter
    blocked, or whose requests failed, are in no figure: they are named on stderr and counted in the result. --json
    prints all that as JSON on stdout, and then the point needs a file (--out).
    """
    columns = {"label": label, "group": group, "cluster": cluster}
    own = {
        "adapter": adapter,
        "control_tokens": control_tokens,
        "dtype": dtype,
        "system": system,
        "request": request,
    }
    _check_goal(goal, rate, ordinary_alpha, of_table=score is not None)
    _check_source(score, model, columns, own)
    _check_prompts(prompts, check, check_prompts, joined=score is None and model is None)
    if score is not None and taxonomy is not None:
        raise InputError(
            "--taxonomy maps the categories of prompts, and --score reads a table; leave one out"
        )
    if score is not None and answers is Answers.BASE:
        raise InputError(
            "--answers base is for models with refusal tokens on an adapter, so not with --score"
        )
    if json and out == "-":
        raise InputError("--json prints the report on stdout; name a file for the operating point with --out")
    choice = {"alpha": alpha, "delta": delta, "goal": goal.value, "rate": rate}
    about: dict[str, Any] = {}
    with _warnings_on_screen():
        if score is not None:
            point, checked = _from_table(file, check, {"score": score, **columns}, choice)
        elif model is not None:
            sets = [o.load_prompt_file(name, taxonomy) for name in (file, check) if name]
            (point, checked), about["unscored"] = _from_model(sets, model, own, choice, ordinary_alpha)
        else:
            sets = [o.load_prompt_file(name, taxonomy) for name in (prompts, check_prompts) if name]
            point, checked = _from_scores(file, check, sets, choice, ordinary_alpha)
    point = replace(point, answers=answers.value)
    report = _report(point, checked)
    report = replace(report, provenance={**report.provenance, **about})
    dump_operating_point(point, out)
    if json:
        write_report(report, True, "-")
    else:
        warn(to_text(report))


def _check_goal(goal: Goal, rate: float | None, ordinary_alpha: float | None, *, of_table: bool) -> None:
    if (goal is Goal.TARGET_RATE) != (rate is not None):
        raise InputError("--rate and --goal target-rate go together, e.g. --goal target-rate --rate 0.9")
    if ordinary_alpha is not None and (of_table or goal is not Goal.MAX_TPR):
        raise InputError(
            "--ordinary-alpha raises the thresholds of --goal max-tpr until ordinary prompts are within budget; it "
            "needs scores by category, so not --score"
        )


def _check_source(
    score: str | None, model: str | None, columns: Mapping[str, str | None], own: Mapping[str, Any]
) -> None:
    if score is not None and model is not None:
        raise InputError(
            "--score reads scores from FILE and --model makes them from prompts; give one of them"
        )
    if score is None and columns != {"label": LABEL, "group": None, "cluster": None}:
        raise InputError(
            "--label, --group and --cluster name columns of any table: add --score COLUMN, or leave them out"
        )
    if model is None and (given := [f"--{k.replace('_', '-')}" for k, v in own.items() if v is not None]):
        raise InputError(
            f"{', '.join(given)} belong to a model that scores FILE first (-m); scores that exist already were "
            "made with settings of their own"
        )


def _check_prompts(prompts: str, check: str | None, check_prompts: str | None, *, joined: bool) -> None:
    if prompts != PROMPTS and not joined:
        raise InputError(
            "--prompts belongs to scores of demur score; here FILE itself says what is expected, so leave it out"
        )
    if check_prompts is not None and (check is None or not joined):
        raise InputError(
            "--check-prompts holds the prompts of scores of demur score that --check names; leave it out here"
        )


@contextmanager
def _warnings_on_screen() -> Iterator[None]:
    from demur.calibrate import CalibrationWarning

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", CalibrationWarning)
        yield
    for w in raised:
        warn(f"warning: {w.message}")


def _report(point: OperatingPoint, checked: Report | None) -> Report:
    """What the point is, followed by its check."""
    from demur.calibrate import describe

    report = describe(point)
    if checked is None:
        return report
    (table,) = checked.tables
    return replace(
        report,
        tables=(*report.tables, replace(table, title="Check on rows that were held out")),
        values=checked.values,
        notes=(*report.notes, *checked.notes),
        provenance=checked.provenance,
    )


def _from_table(
    file: str, check: str | None, columns: Mapping[str, Any], choice: Mapping[str, Any]
) -> Result:
    from demur.calibrate import calibrate_table, check_table_rows
    from demur.flows.calibrating import refuse_shared, row_keys

    name = "stdin" if file == "-" else Path(file).stem
    rows, held_out = read_rows(file), read_rows(check) if check else []
    keys, held_keys = ([row_keys(row) for _, row in some] for some in (rows, held_out))
    refuse_shared(keys, held_keys)
    point = calibrate_table(rows, **columns, calibrated_on=name, **choice)
    if not held_out:
        return point, None
    checked = check_table_rows(point, held_out, **columns)
    if not all(keys) or not all(held_keys):
        if not checked.values["held_out"]:
            raise InputError(
                "--check holds the rows that were calibrated on; a check needs rows that were held out"
            )
        note = "Rows without id, prompt or prompt_hash cannot be told from those calibrated on"
        checked = replace(checked, notes=(*checked.notes, note))
    return point, checked


def _from_scores(
    file: str,
    check: str | None,
    prompts: Sequence[PromptSet],
    choice: Mapping[str, Any],
    ordinary_alpha: float | None,
) -> Result:
    from demur.flows.calibrating import check_held_out, fit, join, prompt_keys, refuse_shared

    rows = join(load(Score, file), prompts[0])
    if check is None:
        return fit(rows, choice, ordinary_alpha), None
    held_out = join(load(Score, check), prompts[-1])
    refuse_shared(map(prompt_keys, rows.prompts), map(prompt_keys, held_out.prompts))
    point = fit(rows, choice, ordinary_alpha)
    return point, check_held_out(point, rows, held_out, ordinary_alpha)


def _from_model(
    sets: Sequence[PromptSet],
    model: str,
    own: Mapping[str, Any],
    choice: Mapping[str, Any],
    ordinary_alpha: float | None,
) -> tuple[Result, dict[str, Any]]:
    """The result, and what could not be scored: counts by set."""
    from demur.cli.answers import scores_there_are
    from demur.flows.asking import askable
    from demur.flows.calibrating import check_held_out, fit, join, prompt_keys, refuse_shared

    if sets[1:]:
        refuse_shared(map(prompt_keys, sets[0]), map(prompt_keys, sets[1]))
    condition = o.condition(system=own["system"])
    runtime = o.load_model(model, **{k: v for k, v in own.items() if k != "system"})
    scored, unscored = [], {}
    for what, some in zip(("calibrated_on", "checked_on"), sets, strict=False):
        prompts, skipped = askable(runtime, some, condition)
        lost: list[Unscored] = []
        with progress("scoring", "") as report:
            scores = scores_there_are(runtime.score(prompts, condition, progress=report), lost)
            scored.append(join(list(scores), prompts))
        unscored[what] = {
            "prompts": len(some),
            "skipped": len(skipped),
            "blocked": sum(len(e.blocked) for e in lost),
            "failed": sum(len(e.failed) for e in lost),
        }
    point = fit(scored[0], choice, ordinary_alpha)
    if point.guarantee and (missing := len(sets[0]) - len(scored[0].scores)):
        told = f"{missing} of its {len(sets[0])} prompts could not be scored; of such it says nothing."
        point = replace(point, guarantee=f"{point.guarantee} {told}")
    name = public_name(runtime.name)
    point = replace(point, model=name, model_fingerprint=runtime.fingerprint, dtype=runtime.dtype)
    checked = check_held_out(point, scored[0], scored[1], ordinary_alpha) if sets[1:] else None
    return (point, checked), unscored
