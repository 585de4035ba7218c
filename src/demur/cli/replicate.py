"""`replicate`: run the checks of systems, and list what was found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say, say_json, warn
from demur.errors import DemurError, InputError

FAILED_CHECK, ERROR = 1, 2


def replicate(
    systems: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SLUG]...", help="Systems (--list), or spec files of your own (.py)."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every system that has a check.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="All methods with their stored outcome; nothing is run.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds; default as the check says.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Run all seeds, also where stored ones would be taken.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Seeds that run at the same time.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where seeds and results are kept.")
    ] = Path("replication"),
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 unless everything asked for is reproduced.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Run a system's replication check.

    Prints claims, controls, trivial rules and recounted numbers with their intervals, and an outcome. A check
    of more than 10 minutes runs one fresh seed and takes the others as stored; --full runs all. Finished
    seeds are kept in DIR and not run again. Exit 1 when a published number is recounted otherwise.
    """
    if list_:
        _list(as_json)
        return
    from demur.replicate import slugs

    if all_ == bool(systems):
        raise InputError(
            f"name systems or pass --all, not both; there are checks of {', '.join(slugs()) or 'none'}"
        )
    names = list(slugs()) if all_ else list(systems or ())
    documents, failed = _run(names, all_, seeds=seeds, full=full, jobs=jobs, out=out, quiet=as_json)
    if as_json:
        say_json(documents if all_ or len(names) > 1 else documents[0])
    elif len(names) > 1:
        _overview(documents)
    if failed:
        raise typer.Exit(ERROR)
    outcomes = {d["outcome"] for d in documents}
    if "anchor off" in outcomes or (strict and outcomes != {"reproduced"}):
        raise typer.Exit(FAILED_CHECK)


def _run(names: list[str], go_on: bool, *, quiet: bool, **settings: Any) -> tuple[list[dict[str, Any]], bool]:
    """Results of the named checks; with `go_on` one that cannot run is reported and the others still run."""
    from demur.replicate import replicate as run
    from demur.replicate import report
    from demur.report.render import to_text

    documents, failed = [], False
    for name in names:
        try:
            with _bars() as progress:
                document = run(name, progress=progress, say=warn, **settings)
        except DemurError as e:
            if not go_on:
                raise
            warn(f"error: {name}: {e}")
            failed = True
            continue
        except Exception:  # with --all a bug in one check must not hide the others
            if not go_on:
                raise
            logging.getLogger("demur").exception("error: %s: a bug in this check", name)
            failed = True
            continue
        documents.append(document)
        if not quiet:
            say(to_text(report(document)) + "\n")
    return documents, failed


@contextmanager
def _bars() -> Iterator[Any]:
    """One bar for each seed that is running, with the time left; silent where stderr is no terminal."""
    with bar() as shown:
        tasks: dict[int, Any] = {}

        def progress(seed: int, what: str, done: int, total: int | None) -> None:
            if seed not in tasks:
                tasks[seed] = shown.add_task("", total=None)
            shown.update(tasks[seed], description=f"seed {seed}: {what}", completed=done, total=total)

        yield progress


def _overview(documents: list[dict[str, Any]]) -> None:
    from demur.replicate import overview
    from demur.report.render import to_text
    from demur.types import Report

    table = overview({d["slug"]: d for d in documents})
    say(to_text(Report(title="Replication", tables=(table,))))


def _list(as_json: bool) -> None:
    from demur import methods
    from demur.cli.resources import table
    from demur.replicate import slugs

    found = outcomes()
    known = sorted({c.slug for c in methods.cards()} | set(slugs()))
    rows = [{"slug": s, "check": s in slugs(), **found.get(s, _NOTHING)} for s in known]
    if as_json:
        say_json(rows)
    else:
        cells = [(r["slug"], _outcome(r), ", ".join(map(str, r["seeds"])), r["minutes"]) for r in rows]
        table(("slug", "outcome", "seeds", "minutes"), cells)


_NOTHING: dict[str, Any] = {"outcome": None, "reason": None, "stale": None, "seeds": [], "minutes": None}


def _outcome(row: dict[str, Any]) -> str:
    if row["outcome"] is None:
        return "not run yet" if row["check"] else "no check yet"
    return str(row["outcome"]) + (" (stale)" if row["stale"] else "")


def outcomes() -> dict[str, dict[str, Any]]:
    """Outcome, reason, stale mark, seeds and minutes of the results that come with demur, by slug."""
    from demur.replicate import read_results, stale

    keys = ("outcome", "reason", "seeds", "minutes")
    return {s: {**{k: d[k] for k in keys}, "stale": stale(d)} for s, d in read_results().items()}
