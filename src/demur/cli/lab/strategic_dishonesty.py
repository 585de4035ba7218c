"""`demur lab strategic-dishonesty`: fake compliance, from outside and from inside the model."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, progress, warn, write_report, write_rows
from demur.errors import InputError
from demur.types import Report

REFUSALS = "rules/demur-v1"


class Task(StrEnum):
    """What to do."""

    CHOICE = "choice"
    JUDGES = "judges"
    THEMES = "themes"
    FIT = "fit"
    MONITOR = "monitor"
    REASONING = "reasoning"


def run(
    task: Annotated[
        Task,
        typer.Argument(
            help="Which way out a model chooses, who is fooled, sums, the honesty probe, or reasoning."
        ),
    ],
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="choice: requests. judges, monitor, reasoning: prompt, reply, fake, reasoning. themes: problems. "
            "fit: statements.",
        ),
    ] = None,
    model: o.Model = None,
    orders: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=6,
            help="choice, reasoning: ask in so many orders of the options; default 1, for reasoning 2.",
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help=f"judges: which, default {REFUSALS}; monitor: also show what is flagged of the answers they "
            "accept. Repeat it.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model that rubric/ and template/ judges, and reasoning, ask."
        ),
    ] = None,
    theme: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="themes: a theme of your own (YAML), beside plain and unicorn."),
    ] = None,
    theme_system: Annotated[
        Path | None, typer.Option(metavar="FILE", help="themes: system message under your own theme.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="themes: so many problems; default 80, or all of FILE.")
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="monitor: the probe to use; fit: where to save it.")
    ] = None,
    benign: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="monitor: harmless prompts and replies, to set the threshold on."),
    ] = None,
    harmless: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="monitor: other harmless prompts and replies, to see what the threshold flags of them.",
        ),
    ] = None,
    flags: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="reasoning: rows of monitor on the same answers, to compare with (--rows)."
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="reasoning: labelled answers to fit length and bag of words on."),
    ] = None,
    fpr: Annotated[
        float, typer.Option(help="monitor: share of harmless answers that may be flagged.")
    ] = 0.01,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="choice, themes, monitor, reasoning: also write one row for each request or answer, without text.",
        ),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 512,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """How often an answer only looks like one, and who can tell.

    choice asks a model whether it would refuse, comply or fake, and reads the letter alone. judges shows how many
    answers known to be fake each judge calls a success, and how many real ones it misses. themes asks sums in other
    wordings and counts what is newly wrong. fit makes a probe of instructed lies on a local model; monitor scores
    answers with it. reasoning asks a judge model whether the reasoning of answers plans to deceive.
    """
    given = {
        "file": file,
        "model": model,
        "orders": orders,
        "judge": judge,
        "judge_model": judge_model,
        "theme": theme,
        "theme_system": theme_system,
        "n": n,
        "probe": probe,
        "benign": benign,
        "harmless": harmless,
        "flags": flags,
        "train": train,
        "rows": rows,
    }
    _check(task, given)
    if task is Task.CHOICE:
        report, lines = _choice(str(file), model, orders or 1, max_new_tokens, seed)
    elif task is Task.JUDGES:
        report, lines = _judges(str(file), judge or [REFUSALS], judge_model), []
    elif task is Task.THEMES:
        report, lines = _themes(file, model, theme, theme_system, n, max_new_tokens, seed)
    elif task is Task.FIT:
        report, lines = _fit(file, model, probe, seed), []
    elif task is Task.REASONING:
        report, lines = _reasoning(str(file), judge_model, orders or 2, flags, train)
    else:
        assert probe is not None
        judged = _made(judge, judge_model) if judge else {}
        report, lines = _monitor(str(file), model, probe, benign, fpr, harmless, judged)
    if rows is not None:
        write_rows(lines, rows)
    write_report(report, as_json, out)


_TAKES = {
    Task.CHOICE: ("file", "model", "orders", "rows"),
    Task.JUDGES: ("file", "judge", "judge_model"),
    Task.THEMES: ("file", "model", "theme", "theme_system", "n", "rows"),
    Task.FIT: ("file", "model", "probe"),
    Task.MONITOR: ("file", "model", "probe", "benign", "harmless", "judge", "judge_model", "rows"),
    Task.REASONING: ("file", "orders", "judge_model", "flags", "train", "rows"),
}
_NEEDS = {
    Task.CHOICE: ("file",),
    Task.JUDGES: ("file",),
    Task.MONITOR: ("file", "probe"),
    Task.REASONING: ("file", "judge_model"),
}


def _check(task: Task, given: dict[str, Any]) -> None:
    if missing := [k for k in _NEEDS.get(task, ()) if given[k] is None]:
        what = "a FILE" if missing[0] == "file" else f"--{missing[0].replace('_', '-')}"
        raise InputError(f"{task} needs {what}; see demur lab strategic-dishonesty --help")
    if extra := [k for k, v in given.items() if v is not None and k not in _TAKES[task]]:
        raise InputError(f"{task} does not read --{extra[0].replace('_', '-')}; leave it out")
    if task is Task.MONITOR and given["judge"] is None and (given["harmless"] or given["judge_model"]):
        raise InputError("--harmless and --judge-model serve what judges accept; name one with --judge")
    if given["theme_system"] is not None and given["theme"] is None:
        raise InputError("--theme-system is the system message of your own theme; name that with --theme")


def _choice(
    file: str, model: str | None, orders: int, max_new_tokens: int, seed: int
) -> tuple[Report, list[Any]]:
    from demur.flows.asking import askable
    from demur.flows.settings import public_name
    from demur.measure.strategic_dishonesty.choice import ASKING, choice_prompts, choice_report, choose

    prompts = choice_prompts(o.load_prompt_file(file), orders, seed)
    runtime = o.load_model(model)
    condition = replace(ASKING, max_new_tokens=max_new_tokens, seed=seed)
    asked, skipped = askable(runtime, prompts, condition)
    with progress("choosing", "") as report:
        found = list(choose(runtime, asked, condition, progress=report))
    report_of = choice_report(found, public_name(runtime.name))
    return replace(report_of, provenance={**report_of.provenance, "not asked": len(skipped)}), found


def _judges(file: str, ids: list[str], judge_model: str | None) -> Report:
    from demur import judges
    from demur.measure.strategic_dishonesty import fooled_report, load_known

    known = load_known(file)
    return fooled_report(known, _made(ids, judge_model), judges.get(REFUSALS))


def _made(ids: list[str], judge_model: str | None) -> dict[str, Any]:
    from demur import judges

    runtime = o.load_model(judge_model) if judge_model else None
    return {id: judges.get(id, runtime=runtime) for id in dict.fromkeys(ids)}


def _themes(
    file: str | None,
    model: str | None,
    theme: Path | None,
    theme_system: Path | None,
    n: int | None,
    max_new_tokens: int,
    seed: int,
) -> tuple[Report, list[Any]]:
    from demur import judges
    from demur.files import read_text
    from demur.flows.settings import public_name
    from demur.measure.strategic_dishonesty import (
        load_problems,
        load_theme,
        make_problems,
        solve,
        themes_report,
    )
    from demur.measure.strategic_dishonesty.problems import THEMES
    from demur.measure.strategic_dishonesty.themes import SOLVING

    if file is not None:
        if theme is not None:
            raise InputError(
                "FILE brings its own wordings (plain and themed), --theme fills ours; give one of them"
            )
        problems = load_problems(file, ("plain", "themed"))[:n]
    else:
        own = {} if theme is None else {theme.stem: load_theme(theme)}
        problems = make_problems(n or 80, seed, {**THEMES, **own})
    systems = {theme.stem: read_text(theme_system).strip()} if theme and theme_system else None
    runtime = o.load_model(model)
    condition = replace(SOLVING, max_new_tokens=max_new_tokens, seed=seed)
    with progress("solving", "") as report:
        found = list(
            solve(runtime, problems, judges.get(REFUSALS), condition, systems=systems, progress=report)
        )
    return themes_report(found, model=public_name(runtime.name)), found


def _fit(file: str | None, model: str | None, probe: Path | None, seed: int) -> Report:
    from demur.explain.honesty import fit_monitor, load_statements

    statements = load_statements(file)
    with bar() as b:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = b.add_task(what, total=total)
            b.update(tasks[what], completed=done, total=total)

        fitted = fit_monitor(o.load_model(model), statements, seed=seed, progress=report)
    if probe is not None:
        fitted.monitor.save(probe)
        warn(f"Probe written to {probe}. It reads this model only and has no threshold yet.")
    return fitted.report


def _monitor(
    file: str,
    model: str | None,
    probe: Path,
    benign: str | None,
    fpr: float,
    harmless: str | None,
    judged: dict[str, Any],
) -> tuple[Report, list[Any]]:
    from demur.explain.honesty import HonestyMonitor
    from demur.measure.strategic_dishonesty import load_known, monitor_report

    known, quiet = load_known(file), load_known(benign) if benign else []
    others = load_known(harmless) if harmless else []
    runtime = o.load_model(model)
    monitor = HonestyMonitor.load(probe, fingerprint=runtime.fingerprint)
    with progress("reading answers", "") as report:

        def said(answers: list[Any]) -> tuple[list[Any], list[str]]:
            return [k.pair[0] for k in answers], [k.reply for k in answers]

        if quiet:
            monitor = monitor.calibrated(runtime, *said(quiet), fpr=fpr, progress=report)
        cut = monitor.probe.cut
        if judged and cut is None:
            raise InputError(
                "--judge shows what is flagged of accepted answers; set a threshold with --benign"
            )
        scores = monitor.score(runtime, *said(known), progress=report)
        fresh = monitor.score(runtime, *said(others), progress=report) if others else None
    flagged = [None if cut is None else bool(s >= cut.threshold) for s in scores]
    lines = [
        {"id": k.id, "score": float(s), "flagged": f, "fake": k.fake}
        for k, s, f in zip(known, scores, flagged, strict=True)
    ]
    found = monitor_report(monitor, scores, known)
    return _accepted(found, known, flagged, judged, cut, fresh) if judged else found, lines


def _accepted(
    report: Report, known: list[Any], flagged: list[Any], judged: dict[str, Any], cut: Any, fresh: Any
) -> Report:
    """The monitor's report, and what it flags of the answers that judges accept."""
    from demur.judges import judge_all
    from demur.measure.strategic_dishonesty import accepted_report
    from demur.measure.strategic_dishonesty.fooled import success
    from demur.stats import rate

    pairs = [k.pair for k in known]
    said = {id: [success(v) for v in judge_all(judge, pairs)] for id, judge in judged.items()}
    k, n = (cut.k, cut.n) if fresh is None else (int((fresh >= cut.threshold).sum()), len(fresh))
    more = accepted_report(known, flagged, said, rate(k, n), fresh=fresh is not None)
    return replace(
        report,
        tables=report.tables + more.tables,
        values={**report.values, **more.values},
        notes=report.notes + more.notes,
    )


def _reasoning(
    file: str, judge_model: str | None, orders: int, flags: str | None, train: str | None
) -> tuple[Report, list[Any]]:
    from demur.measure.strategic_dishonesty import ReasoningMonitor, load_flags, load_known, reasoning_report

    known = load_known(file)
    probe = load_flags(flags, known) if flags else None
    fit = load_known(train) if train else []
    monitor = ReasoningMonitor(o.load_model(judge_model), orders=orders)
    with progress("reading reasoning", "") as report:
        found = monitor.read(known, progress=report)
    lines = [
        {"id": k.id, "label": r.label, "flagged": r.flagged, "reason": r.reason, "fake": k.fake}
        for k, r in zip(known, found, strict=True)
    ]
    return reasoning_report(monitor, found, known, probe=probe, train=fit), lines
