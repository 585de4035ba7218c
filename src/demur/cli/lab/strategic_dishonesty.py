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


def run(
    task: Annotated[
        Task, typer.Argument(help="Which way out a model chooses, who is fooled, sums, or the honesty probe.")
    ],
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="choice: requests. judges, monitor: prompt, reply, fake. themes: problems. fit: statements.",
        ),
    ] = None,
    model: o.Model = None,
    orders: Annotated[
        int, typer.Option(min=1, max=6, help="choice: ask each request in so many orders of the options.")
    ] = 1,
    judge: Annotated[
        list[str] | None, typer.Option(metavar="ID", help=f"judges: which; repeat it. Default {REFUSALS}.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that rubric/ and template/ judges ask.")
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
    fpr: Annotated[
        float, typer.Option(help="monitor: share of harmless answers that may be flagged.")
    ] = 0.01,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="choice, themes, monitor: also write one row for each request or answer, without text.",
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
    answers with it.
    """
    given = {
        "file": file,
        "judge": judge,
        "judge_model": judge_model,
        "theme": theme,
        "theme_system": theme_system,
        "n": n,
        "probe": probe,
        "benign": benign,
        "rows": rows,
    }
    _check(task, given)
    if task is Task.CHOICE:
        report, lines = _choice(str(file), model, orders, max_new_tokens, seed)
    elif task is Task.JUDGES:
        report, lines = _judges(str(file), judge or [REFUSALS], judge_model), []
    elif task is Task.THEMES:
        report, lines = _themes(file, model, theme, theme_system, n, max_new_tokens, seed)
    elif task is Task.FIT:
        report, lines = _fit(file, model, probe, seed), []
    else:
        assert probe is not None
        report, lines = _monitor(str(file), model, probe, benign, fpr)
    if rows is not None:
        write_rows(lines, rows)
    write_report(report, as_json, out)


_TAKES = {
    Task.CHOICE: ("file", "rows"),
    Task.JUDGES: ("file", "judge", "judge_model"),
    Task.THEMES: ("file", "theme", "theme_system", "n", "rows"),
    Task.FIT: ("file", "probe"),
    Task.MONITOR: ("file", "probe", "benign", "rows"),
}
_NEEDS = {Task.CHOICE: ("file",), Task.JUDGES: ("file",), Task.MONITOR: ("file", "probe")}


def _check(task: Task, given: dict[str, Any]) -> None:
    if missing := [k for k in _NEEDS.get(task, ()) if given[k] is None]:
        what = "a FILE" if missing[0] == "file" else f"--{missing[0]}"
        raise InputError(f"{task} needs {what}; see demur lab strategic-dishonesty --help")
    if extra := [k for k, v in given.items() if v is not None and k not in _TAKES[task]]:
        raise InputError(f"{task} does not read --{extra[0].replace('_', '-')}; leave it out")
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
    runtime = o.load_model(judge_model) if judge_model else None
    chosen = {id: judges.get(id, runtime=runtime) for id in dict.fromkeys(ids)}
    return fooled_report(known, chosen, judges.get(REFUSALS))


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
    file: str, model: str | None, probe: Path, benign: str | None, fpr: float
) -> tuple[Report, list[Any]]:
    from demur.explain.honesty import HonestyMonitor
    from demur.measure.strategic_dishonesty import load_known, monitor_report

    known = load_known(file)
    harmless = load_known(benign) if benign is not None else []
    runtime = o.load_model(model)
    monitor = HonestyMonitor.load(probe, fingerprint=runtime.fingerprint)
    with progress("reading answers", "") as report:
        if harmless:
            pairs = [k.pair for k in harmless]
            monitor = monitor.calibrated(
                runtime, [p for p, _ in pairs], [k.reply for k in harmless], fpr=fpr, progress=report
            )
        scores = monitor.score(runtime, [k.pair[0] for k in known], [k.reply for k in known], progress=report)
    threshold = monitor.probe.threshold
    lines = [
        {
            "id": k.id,
            "score": float(s),
            "flagged": None if threshold is None else bool(s >= threshold),
            "fake": k.fake,
        }
        for k, s in zip(known, scores, strict=True)
    ]
    return monitor_report(monitor, scores, known), lines
