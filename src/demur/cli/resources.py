"""`models`, `data` and `methods`: what is here, what can be had, and whether its bytes are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import say, say_json, warn

models_app = typer.Typer(help="List, fetch, verify and remove models.", rich_markup_mode=None)
data_app = typer.Typer(help="List, fetch and verify public data sets.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="A name from the list.")]
FAILED_CHECK = 1


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print left-aligned columns: plain text, the same on a screen and in a pipe."""
    cells = [tuple(columns), *(tuple("" if c is None else str(c) for c in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        say("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def listing(items: Iterable[Any], columns: Sequence[str], as_json: bool) -> None:
    """Print dataclasses or mappings as a table of some columns, or whole as JSON."""
    rows = [
        dataclasses.asdict(i) if dataclasses.is_dataclass(i) and not isinstance(i, type) else dict(i)
        for i in items
    ]
    if as_json:
        say_json(rows)
    else:
        table(columns, ([row.get(c) for c in columns] for row in rows))


def methods(
    slug: Annotated[str | None, typer.Argument(help="One method, in full; all of them without.")] = None,
    as_json: o.Json = False,
) -> None:
    """List the methods, or show one with its paper."""
    from demur import methods as index
    from demur.cli.replicate import outcomes

    found = {s: r["outcome"] + (" (stale)" if r["stale"] else "") for s, r in outcomes().items()}
    if slug is None:
        rows = [{**dataclasses.asdict(c), "replication": found.get(c.slug)} for c in index.cards()]
        listing(rows, ("slug", "room", "tier", "replication", "title"), as_json)
        return
    card = {**dataclasses.asdict(index.get(slug)), "replication": found.get(slug)}
    if as_json:
        say_json(card)
    else:
        table(("", ""), ((k, ", ".join(v) if isinstance(v, tuple) else v) for k, v in card.items() if v))


@models_app.callback(invoke_without_command=True)
def models(ctx: typer.Context, as_json: o.Json = False) -> None:
    """List the built-in models and their state here. Any folder, hub id or URL#model works as MODEL too."""
    if ctx.invoked_subcommand is None:
        from demur.models import list_models

        listing(list_models(), ("name", "state", "about"), as_json)


@models_app.command("pull")
def models_pull(
    name: Name, revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None
) -> None:
    """Fetch a model now, so that later runs need no network; prints its folder."""
    from demur.models import pull

    say(str(pull(name, revision=revision, say=warn).path))


@models_app.command("verify")
def models_verify(name: Name) -> None:
    """Read every byte of a model; exit 1 when something is wrong."""
    from demur.models import verify

    problems = verify(name)
    for problem in problems:
        warn(f"{name}: {problem}")
    if problems:
        warn(f"Repair with: demur models pull {name}")
        raise typer.Exit(FAILED_CHECK)
    say(f"{name}: all bytes are as they should be")


@models_app.command("remove")
def models_remove(name: Name) -> None:
    """Delete what demur stored for a built-in model."""
    from demur.models import remove

    say(f"{name}: {remove(name) / 1e6:.0f} MB freed")


@data_app.callback(invoke_without_command=True)
def data(ctx: typer.Context, as_json: o.Json = False) -> None:
    """List the public data sets; `demur data verify SLUG` shows the files of one."""
    if ctx.invoked_subcommand is None:
        from demur.data import list_sets

        listing(list_sets(), ("slug", "license", "title"), as_json)


@data_app.command("get")
def data_get(
    slug: Annotated[str, typer.Argument(help="The set.")],
    filename: Annotated[str | None, typer.Argument(help="One file; all of them without.")] = None,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Yes to the terms of a restricted set.")
    ] = False,
) -> None:
    """Fetch a set's files and print their paths."""
    from demur.data import about, get

    for name in [filename] if filename else [f.name for f in about(slug).files if f.url]:
        say(str(get(slug, name, accept_terms=accept_terms, say=warn)))


@data_app.command("verify")
def data_verify(slug: Annotated[str, typer.Argument(help="The set.")], as_json: o.Json = False) -> None:
    """Compare a set's files with their checksums; exit 1 when a cached file is damaged."""
    from demur.data import verify

    checks = verify(slug)
    listing(checks, ("name", "status", "where"), as_json)
    if any(c.status == "damaged" for c in checks):
        warn(f"Repair with: demur data get {slug}")
        raise typer.Exit(FAILED_CHECK)
