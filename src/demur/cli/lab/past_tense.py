"""`demur lab past-tense`: refusals when only the tense changes, on one's own prompts, model or answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report, write_rows
from demur.errors import InputError
from demur.files import prompt_row
from demur.types import Prompt, PromptSet, Reply, Report

if TYPE_CHECKING:
    from demur.stress.past_tense import TenseSet

JUDGES = ("rules/demur-v1", "classifier/demur-v2", "rules/gcg-v1")
"""Three readings of each answer; the last one's list is that of the paper's rule judge."""


def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Prompts: JSONL, CSV, - or a named set (core:test).")
    ],
    model: o.Model = None,
    n: Annotated[int, typer.Option(min=1, help="At most so many prompts, evenly over categories.")] = 200,
    attempts: Annotated[
        int, typer.Option(min=0, help="Answers to draw for each prompt and tense; 0 reads scores instead.")
    ] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of the answers; default 1, or 0 for a single attempt.")
    ] = None,
    max_new_tokens: o.MaxNewTokens = 150,
    rewriter: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Have this model reword, instead of the rules.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help=f"Judges of the answers; default {', '.join(JUDGES)}.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that rubric/ and template/ judges ask.")
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the prompts in all tenses as JSONL; ask nothing."),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Judge these answers; FILE is then what --write has written."),
    ] = None,
    verdicts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every verdict as JSONL. Answers are not kept.")
    ] = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Ask the same in the present, past and future, and as a paraphrase of equal size.

    By default one forward pass a prompt reads the refusal score. --attempts K draws K answers in each tense, the
    present included, and shows the share answered within 1 to K of them, by several judges.
    """
    if answers is not None and (write is not None or rewriter is not None or attempts):
        raise InputError("--answers brings answers along: leave --write, --rewriter and --attempts out")
    if not attempts and answers is None and (judge or judge_model or verdicts):
        raise InputError("scores need no judge: ask for answers with --attempts, or leave the judges out")
    prompts = o.load_prompt_file(file)
    if answers is not None:
        report = _own(prompts, answers, judge, judge_model, verdicts)
    elif write is not None:
        return write_rows(map(prompt_row, _tenses(prompts, n, rewriter, max(attempts, 1), seed)), write)
    elif attempts:
        report = _drawn(
            _tenses(prompts, n, rewriter, attempts, seed),
            model,
            1 if rewriter else attempts,
            (temperature if temperature is not None else float(attempts > 1), max_new_tokens, seed),
            (judge, judge_model, verdicts),
        )
    else:
        report = _scored(prompts, n, model, rewriter, seed)
    write_report(report, as_json, out)
    return None


def _tenses(prompts: PromptSet, n: int, rewriter: str | None, attempts: int, seed: int) -> TenseSet:
    """At most n prompts in all tenses; says how many were left out and why."""
    from demur.prompts import stratified
    from demur.stress.past_tense import ModelRewriter, PastTense, drawn
    from demur.stress.past_tense.sets import reasons
    from demur.types import PromptSet

    if rewriter is None:
        made = drawn(PastTense().apply(prompts), prompts, n, seed)
    else:
        writer = ModelRewriter(o.load_model(rewriter), seed=seed)
        with progress("rewording", "") as bar:
            made = PastTense(rewriter=writer, attempts=attempts).apply(
                PromptSet(prompts.name, stratified(prompts, n, seed)), progress=bar
            )
    if made.left:
        why = "; ".join(f"{count} {reason}" for reason, count in reasons(made.left)[:5])
        warn(f"{len(made.left)} of {len(prompts)} prompts were not reworded: {why}")
    if not len(made):
        raise InputError("no prompt could be reworded; the lines above say why")
    return made


def _scored(prompts: PromptSet, n: int, model: str | None, rewriter: str | None, seed: int) -> Report:
    from demur.stress.past_tense import delta_report, tense_delta

    runtime = o.load_model(model)
    if rewriter is None:
        with progress("scoring", "") as bar:
            return tense_delta(runtime, prompts, n, seed=seed, progress=bar)
    made = _tenses(prompts, n, rewriter, 1, seed)
    with progress("scoring", "") as bar:
        return delta_report(made, {s.id: s for s in runtime.score(made, progress=bar)})


def _drawn(
    made: TenseSet,
    model: str | None,
    samples: int,
    drawing: tuple[float, int, int],
    judging: tuple[list[str] | None, str | None, str | None],
) -> Report:
    from demur.flows.asking import askable
    from demur.flows.settings import public_name

    warm, max_new_tokens, seed = drawing
    condition = o.condition(temperature=warm, samples=samples, seed=seed, max_new_tokens=max_new_tokens)
    runtime = o.load_model(model)
    chosen, _ = askable(runtime, made, condition)
    replies: list[Reply] = []
    for k in sorted({p.meta["attempt"] for p in chosen}):
        some = [p for p in chosen if p.meta["attempt"] == k]
        with progress("answering", "") as bar:
            # a seed for each attempt: under one seed a server answers the repeated present alike every time
            own = replace(condition, seed=seed + k)
            replies += runtime.generate(some, own, samples=samples, progress=bar)
    by_id = {p.id: p for p in chosen}
    report = _judged([(by_id[r.prompt_id], r) for r in replies], *judging)
    about = {"model": public_name(runtime.name), "prompts": made.name, "temperature": warm, "seed": seed}
    return replace(report, provenance={**report.provenance, **about, "max_new_tokens": max_new_tokens})


def _own(
    prompts: PromptSet, answers: str, judge: list[str] | None, judge_model: str | None, verdicts: str | None
) -> Report:
    from demur.report.importers import load_answers

    if not all("tense" in p.meta for p in prompts):
        raise InputError("these prompts carry no tense; give the file that --write has written")
    got = load_answers(answers, prompts)
    by_id = {p.id: p for p in prompts}
    return _judged([(by_id[r.prompt_id], r) for r in got.replies], judge, judge_model, verdicts)


def _judged(
    pairs: Sequence[tuple[Prompt, Reply]],
    ids: list[str] | None,
    judge_model: str | None,
    verdicts: str | None,
) -> Report:
    from demur import judges
    from demur.measure.refusal import Record
    from demur.stress.past_tense import gap_report

    wanted = dict.fromkeys(ids or [j for j in JUDGES if j in judges.available()])
    runtime = o.load_model(judge_model) if judge_model else None
    said = {}
    for id in wanted:
        with progress(f"judging, {id}", "") as bar:
            said[id] = judges.judge_all(judges.get(id, runtime=runtime), pairs, bar)
    if verdicts is not None:
        write_rows((replace(v, reason=None) for vs in said.values() for v in vs), verdicts)
    return gap_report(
        {id: [Record(p, r, v) for (p, r), v in zip(pairs, vs, strict=True)] for id, vs in said.items()}
    )
