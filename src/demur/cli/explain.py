"""`explain`: why a model decides as it does about one prompt, or what two checkpoints do differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say, say_json, warn
from demur.errors import InputError
from demur.report.render import plain, to_text
from demur.runtime.base import Progress
from demur.types import Prompt, Report, Table


def explain(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="One prompt as text; not with --vs.")
    ] = None,
    model: o.Model = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER|FILE.html", help="Gets the page, and in a folder the data."
        ),
    ] = Path("explain"),
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Only show the prompt's tokens and the named positions.")
    ] = False,
    vs: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--vs", metavar="BASE TUNED", help="Compare two checkpoints of one architecture inside."
        ),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Of --vs: knowledge,truth,refusal,confidence; all by default."),
    ] = None,
    allow_refusal_lowering: Annotated[
        bool,
        typer.Option(
            "--allow-refusal-lowering", help="Of --vs: also take the refusal directions out; it is noted."
        ),
    ] = False,
    system: o.System = None,
    seed: o.Seed = 0,
    adapter: o.Adapter = None,
    base_only: o.BaseOnly = False,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    as_json: o.Json = False,
) -> None:
    """Show where a decision comes from: beliefs, layers, tokens, words, nearest prompts.

    The first time for a model, 530 packaged prompts are read (one to two minutes for the default model) and the
    result is kept in the user's cache. What the readings are worth on held-out prompts, beside a bag of words and
    random labels, stands on every page.
    """
    from demur.flows.explain import places

    if (prompt is None) == (vs is None):
        raise InputError('give one prompt, as in demur explain "How do I boil an egg?", or --vs BASE TUNED')
    if not tokens:
        places(out)
    load: dict[str, Any] = {"dtype": dtype, "control_tokens": control_tokens}
    if vs is not None:
        given = {"--model": model, "--adapter": adapter, "--base-only": base_only or None, "--system": system}
        given["--tokens"] = tokens or None
        if wrong := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--vs names both models and asks no prompt: leave {', '.join(wrong)} out")
        _compare(vs, out, parts, allow_refusal_lowering, seed, load, as_json)
        return
    assert prompt is not None
    if parts is not None or allow_refusal_lowering:
        raise InputError("--parts and --allow-refusal-lowering belong to --vs BASE TUNED")
    runtime = o.load_model(model, adapter=adapter, base_only=base_only, **load)
    condition = o.condition(system=system, seed=seed)
    if tokens:
        from demur.explain import show_positions

        found = show_positions(runtime, Prompt.of(prompt).with_system(condition.system))
        if as_json:
            say_json([{name: getattr(t, name) for name in t.__dataclass_fields__} for t in found])
        else:
            rows = tuple((t.index, t.end, t.id, repr(t.text), ", ".join(t.names)) for t in found)
            say(to_text(Report(title=runtime.name, tables=(Table("Tokens", _TOKEN_COLUMNS, rows),))))
        return
    from demur.flows import explain as flow
    from demur.flows.explain_page import report

    with _steps("reading the packaged prompts (once for a model)") as progress:
        explained = flow.explain(runtime, prompt, condition=condition, progress=progress)
    html, data = flow.write(explained, out)
    say_json(explained.to_dict()) if as_json else say(to_text(report(explained)))
    _where(html, data)


_TOKEN_COLUMNS = ("index", "from the end", "id", "text", "names")


def _compare(
    vs: tuple[str, str],
    out: Path,
    parts: str | None,
    allow_refusal_lowering: bool,
    seed: int,
    load: dict[str, Any],
    as_json: bool,
) -> None:
    from demur.explain.post_training import PARTS, compare
    from demur.flows.explain_vs import write

    base, tuned = (o.load_model(name, **load) for name in vs)
    wanted = [p.strip() for p in parts.split(",") if p.strip()] if parts else list(PARTS)
    with bar() as shown:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        found = compare(
            base,
            tuned,
            parts=wanted,
            allow_refusal_lowering=allow_refusal_lowering,
            seed=seed,
            progress=progress,
        )
    html, data = write(found, out)
    say_json(plain(found.to_dict())) if as_json else say(to_text(found.report))
    _where(html, data)


@contextmanager
def _steps(what: str) -> Iterator[Progress]:
    """A bar that appears with the first step; nothing is shown where nothing has to be done."""
    with bar() as shown:
        tasks: list[int] = []

        def progress(done: int, total: int | None) -> None:
            if not tasks:
                tasks.append(shown.add_task(what, total=total))
                if shown.disable:
                    warn(f"{what}: {total} steps")
            shown.update(tasks[0], completed=done, total=total)

        yield progress


def _where(html: Path, data: Path | None) -> None:
    warn(f"\nThe page: {html}" + (f"\nAs data:  {data}" if data else ""))
