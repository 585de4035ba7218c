"""`calibrate`: scores with labels become thresholds that keep a stated budget."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn
from demur.errors import InputError
from demur.files import dump_operating_point, load, read_rows
from demur.report.render import to_text
from demur.types import RESPOND, OperatingPoint, PromptSet, Score

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
    answers: Annotated[
        Answers,
        typer.Option(help="Who answers what is accepted: the model, or its base without the adapter."),
    ] = Answers.MODEL,
    out: o.Out = "-",
) -> None:
    """Find thresholds that keep a budget.

    Writes an operating point (YAML). With --goal max-tpr the false refusals of look-alike harmless prompts
    stay within --alpha with probability 1 - --delta, jointly over categories; where the data cannot support
    that, it says how many prompts would. Ordinary prompts are harmless ones of no category.
    """
    if (goal is Goal.TARGET_RATE) != (rate is not None):
        raise InputError("--rate and --goal target-rate go together, e.g. --goal target-rate --rate 0.9")
    if ordinary_alpha is not None and (score is not None or goal is not Goal.MAX_TPR):
        raise InputError(
            "--ordinary-alpha raises the thresholds of --goal max-tpr until ordinary prompts are within budget; it "
            "needs scores by category, so not --score"
        )
    if score is not None and model is not None:
        raise InputError(
            "--score reads scores from FILE and --model makes them from prompts; give one of them"
        )
    if score is not None and answers is Answers.BASE:
        raise InputError(
            "--answers base is for models with refusal tokens on an adapter, so not with --score"
        )
    if score is None and (group is not None or label != LABEL):
        raise InputError(
            "--label and --group name columns of any table: add --score COLUMN, or leave them out"
        )
    if prompts != PROMPTS and (score is not None or model is not None):
        raise InputError(
            "--prompts belongs to scores of demur score; here FILE itself says what is expected, so leave it out"
        )
    own: dict[str, Any] = {
        "adapter": adapter,
        "control_tokens": control_tokens,
        "dtype": dtype,
        "system": system,
    }
    if model is None and (given := [f"--{k.replace('_', '-')}" for k, v in own.items() if v is not None]):
        raise InputError(
            f"{', '.join(given)} belong to a model that scores FILE first (-m); scores that exist already were "
            "made with settings of their own"
        )
    from demur.calibrate import CalibrationWarning, describe

    choice: dict[str, Any] = {"alpha": alpha, "delta": delta, "goal": goal.value, "rate": rate}
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", CalibrationWarning)
        if score is not None:
            point = _from_table(file, score, label, group, choice)
        elif model is not None:
            point = _from_model(file, model, own, choice, ordinary_alpha)
        else:
            point = fit(load(Score, file), o.load_prompt_file(prompts), choice, ordinary_alpha)
    for w in raised:
        warn(f"warning: {w.message}")
    point = replace(point, answers=answers.value)
    dump_operating_point(point, out)
    warn(to_text(describe(point)))


def _from_table(
    file: str, score: str, label: str, group: str | None, choice: dict[str, Any]
) -> OperatingPoint:
    from demur.calibrate import calibrate_table

    name = "stdin" if file == "-" else Path(file).stem
    return calibrate_table(read_rows(file), score, label, group, calibrated_on=name, **choice)


def _from_model(
    file: str, model: str, own: dict[str, Any], choice: dict[str, Any], ordinary_alpha: float | None
) -> OperatingPoint:
    from demur.flows.asking import askable

    prompts, condition = o.load_prompt_file(file), o.condition(system=own["system"])
    runtime = o.load_model(model, **{k: v for k, v in own.items() if k != "system"})
    prompts, _ = askable(runtime, prompts, condition)
    with progress("scoring", "") as report:
        scores = list(runtime.score(prompts, condition, progress=report))
    return replace(
        fit(scores, prompts, choice, ordinary_alpha),
        model=runtime.name,
        model_fingerprint=runtime.fingerprint,
        dtype=runtime.dtype,
    )


def fit(
    scores: list[Score], prompts: PromptSet, choice: dict[str, Any], ordinary_alpha: float | None = None
) -> OperatingPoint:
    """Join scores with their prompts by id and calibrate.

    Args:
        choice: alpha, delta, goal and rate, as `demur.calibrate.calibrate_table` takes them.
        ordinary_alpha: budget for ordinary prompts, see `demur.calibrate.LearnThenTest`.

    Raises:
        InputError: an id without prompt or expectation, or scores that differ in categories, T or source.
    """
    from demur.calibrate import BestF1, Calibrator, LearnThenTest, TargetRate, calibrate_table

    known = {p.id: p for p in prompts}
    lost = [s.id for s in scores if s.id not in known or known[s.id].should_refuse is None]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(scores)} scores (first: {lost[0]!r}) have no prompt with `expected` in "
            f"{prompts.name!r}; name the file they were scored on with --prompts"
        )
    if len({s.id for s in scores}) < len(scores):
        twice = next(i for i, n in Counter(s.id for s in scores).items() if n > 1)
        raise InputError(
            f"id {twice!r} has several scores; counting a prompt twice would claim more than the data hold. Keep "
            "one row per prompt"
        )
    if wrong := [s for s in scores if not 0 <= s.p_refuse <= 1]:
        raise InputError(
            f"score {wrong[0].id!r}: p_refuse is {wrong[0].p_refuse:g}, no probability. For scores of another "
            "kind name the column: --score p_refuse --label y"
        )
    if len({(tuple(s.probabilities), s.T) for s in scores}) > 1:
        raise InputError(
            "the scores differ in their categories or in T; calibrate the scores of one model at one T"
        )
    if len({(s.condition, s.model, s.fingerprint, s.dtype) for s in scores}) > 1:
        raise InputError(
            "the scores come from several models or conditions (columns model, fingerprint, dtype, condition); "
            "thresholds hold for one of each"
        )
    first = scores[0]
    rows = [known[s.id] for s in scores]
    expected = [bool(p.should_refuse) for p in rows]
    draws = [p.group for p in rows] if any(p.group for p in rows) else None
    if not first.probabilities:
        if ordinary_alpha is not None:
            raise InputError(
                "these scores have no categories, so --ordinary-alpha has nothing to hold; leave it out"
            )
        flat = [
            {"p": s.p_refuse, "y": int(e), "g": p.category or "", "c": p.group or f"prompt {p.id}"}
            for s, e, p in zip(scores, expected, rows, strict=True)
        ]
        group = "g" if any(p.category for p in rows) else None
        return replace(
            calibrate_table(
                flat, "p", "y", group, cluster="c" if draws else None, calibrated_on=prompts.name, **choice
            ),
            T=first.T,
        )
    names = [*(c for c in first.probabilities if c != RESPOND), RESPOND]
    calibrator: Calibrator = BestF1()
    if choice["goal"] == "max-tpr":
        calibrator = LearnThenTest(choice["alpha"], choice["delta"], ordinary_alpha=ordinary_alpha)
    elif choice["goal"] == "target-rate":
        calibrator = TargetRate(choice["rate"])
    point = calibrator.fit(
        [[s.probabilities[c] for c in names] for s in scores],
        expected,
        [p.category for p in rows],
        draws,
        names=names,
        calibrated_on=prompts.name,
        T=first.T,
    )
    return replace(point, model=first.model, model_fingerprint=first.fingerprint, dtype=first.dtype)
