"""`demur lab math-false-positives`: accuracy by answer and by reasoning on one's own solutions."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report, write_rows
from demur.errors import InputError
from demur.files import dumps_row, iter_jsonl, write_atomic

if TYPE_CHECKING:
    from demur.measure.math_false_positives import Cost
    from demur.measure.math_false_positives.solutions import Solution


class Aggregate(StrEnum):
    """How step rewards become one number."""

    LAST = "last"
    MIN = "min"
    MEAN = "mean"


def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Solutions, one in each row: JSONL, CSV or - (standard input)."),
    ],
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Have this model check the right answers: URL#model or local."),
    ] = None,
    verdicts: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Where its verdicts go as they come; those in it are not asked again."
        ),
    ] = Path("verdicts.jsonl"),
    n: Annotated[
        list[int] | None,
        typer.Option("--n", min=1, help="Number of samples to report on; repeat it. Default powers of four."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Name of the problem set where rows have none; with aime in it, answers are integers."
        ),
    ] = None,
    aggregate: Annotated[
        Aggregate, typer.Option(help="Rewards given as a list of steps: their last, min or mean.")
    ] = Aggregate.LAST,
    audit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead of a report, draw so many right answers at random, for people to label."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="Such a draw with false_positive filled in.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Token budget of one check, thinking included.")
    ] = 4096,
    price_in: Annotated[
        float | None, typer.Option(min=0, help="Price of a million prompt tokens, to show costs.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option(min=0, help="Price of a million answer tokens, to show costs.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that comparing one answer may take.")
    ] = 10.0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """How many right answers rest on wrong reasoning.

    Columns: problem (or problem_id), solution, gold, and as you have them sample, source, reward, correct,
    false_positive (a person's label of a right answer), verdict_NAME (what a checker said). Answers are graded, and
    accuracy by answer stands beside accuracy by reasoning, for every number of samples.
    """
    from demur.measure.math_false_positives import MathFalsePositives, with_verdicts
    from demur.measure.math_false_positives.grading import Grader
    from demur.measure.math_false_positives.solutions import audit_sample, graded, load_solutions, with_labels

    if (price_in is None) != (price_out is None) or (price_in is not None and judge is None):
        raise InputError("--price-in and --price-out go together, and with --judge")
    if audit is not None and judge is not None:
        raise InputError("--audit draws rows for people and --judge asks a model; run one after the other")
    solutions = load_solutions(file, aggregate=aggregate.value, dataset=dataset)
    if labels is not None:
        solutions = with_labels(solutions, labels)
    with Grader(timeout) as grader:
        solutions = graded(solutions, grader)
    if audit is not None:
        return _write_audit(audit_sample(solutions, audit, seed), out)
    name = None
    if judge is not None:
        said, name = _check(solutions, judge, verdicts, max_new_tokens, price_in, price_out)
        solutions = with_verdicts(solutions, said, name)
    report = MathFalsePositives(n or None, seed=seed).score(solutions)
    made = {"aggregate": aggregate.value, "checker": name, "timeout": timeout}
    report = replace(report, provenance={**report.provenance, **made})
    write_report(report, as_json, out)
    return None


def _write_audit(chosen: list[Solution], out: str) -> None:
    if not chosen:
        raise InputError(
            "nothing to audit: no right answer without a human label (`false_positive`) is left to draw"
        )
    write_rows(
        (
            {
                "problem_id": s.problem,
                "source": s.source,
                "sample": s.sample,
                "problem": s.statement,
                "solution": s.text,
                "gold": s.gold,
                "false_positive": None,
            }
            for s in chosen
        ),
        out,
    )
    warn(
        f"{len(chosen)} right answers to read. Set false_positive to true where the reasoning is invalid (a jump, "
        "a logical, calculation or conceptual error that matters) and to false where it is sound. Then run again "
        "with --labels."
    )


def _check(
    solutions: list[Solution],
    judge: str,
    path: Path,
    max_new_tokens: int,
    price_in: float | None,
    price_out: float | None,
) -> tuple[dict[str, str], str]:
    """Labels of the checker by question, those of an earlier run included; each is on disk when it is there."""
    from demur.flows.asking import askable
    from demur.flows.settings import public_name
    from demur.measure.math_false_positives import CHECKING, ERROR, UNPARSED, Cost, check, check_prompts
    from demur.types import PromptSet

    prompts = check_prompts(solutions)
    runtime = o.load_model(judge)
    name = public_name(runtime.name)
    condition = replace(CHECKING, max_new_tokens=max_new_tokens)
    if max_new_tokens != CHECKING.max_new_tokens:  # told apart, as a check that was cut off holds no verdict
        condition = replace(condition, name=f"{CHECKING.name}, {max_new_tokens} tokens")

    def usable(r: dict[str, object]) -> bool:
        """Whether a verdict need not be asked for again."""
        unread = r["label"] == UNPARSED and r.get("condition") != condition.name
        return r["judge"] != name or not (unread or r["label"] == ERROR)

    kept = [r for r in _earlier(path) if usable(r)]
    labels = {str(r["prompt_id"]): str(r["label"]) for r in kept if r["judge"] == name}
    todo = PromptSet(prompts.name, tuple(p for p in prompts if p.id not in labels))
    size = sum(len(p.text) for p in todo)
    warn(
        f"{len(todo)} solutions to check with {name} ({len(prompts) - len(todo)} have a verdict in {path}): "
        f"{size:,} characters of prompts, about {size // 3:,} tokens, and at most {max_new_tokens:,} tokens each "
        "of answer."
    )
    if not len(todo):
        return labels, name
    todo, _ = askable(runtime, todo, condition)
    write_atomic(path, "".join(dumps_row(r) + "\n" for r in kept))
    cost, found = Cost(), Counter[str]()
    with path.open("a", encoding="utf-8") as f, progress("checking", "") as report:
        for verdict, so_far in check(runtime, todo, condition, progress=report):
            cost = so_far
            f.write(dumps_row(replace(verdict, judge=name)) + "\n")
            f.flush()
            os.fsync(f.fileno())
            labels[verdict.prompt_id] = verdict.label
            found[verdict.label] += 1
            first = verdict.reason if verdict.label == ERROR and found[ERROR] == 1 else None
            if first:
                warn(f"no verdict on {verdict.prompt_id}: {first}")
    if found[ERROR] == len(todo):
        raise InputError(f"{name} answered none of {len(todo)} questions; see the line above")
    warn(
        ", ".join(f"{k} {label}" for label, k in found.most_common())
        + ". "
        + _spent(cost, price_in, price_out)
    )
    return labels, name


def _earlier(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    try:
        rows = list(iter_jsonl(path))
    except ValueError:
        rows = [{}]
    if not all(isinstance(r, dict) and {"prompt_id", "judge", "label"} <= set(r) for r in rows):
        raise InputError(f"{path}: is no file of verdicts; name another one with --verdicts")
    return rows


def _spent(cost: Cost, price_in: float | None, price_out: float | None) -> str:
    text = (
        f"{cost.calls} calls, {cost.seconds:.0f} s, {cost.prompt_tokens:,} prompt and {cost.completion_tokens:,} "
        "answer tokens"
    )
    if cost.known < cost.calls:
        text += f" (told for {cost.known} of them)"
    if price_in is not None and price_out is not None:
        price = (cost.prompt_tokens * price_in + cost.completion_tokens * price_out) / 1e6
        text += f", price {price:.4f}"
    return text + "."
