"""`train`: methods that make an adapter."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import bar, warn

app = typer.Typer(help="Train an adapter.", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def _methods() -> None:
    pass


@app.command("refusal-tokens")
def refusal_tokens(
    file: Annotated[
        str,
        typer.Argument(metavar="[FILE]", help="Prompts to train on; refusals need category and reference."),
    ] = "core:train",
    select: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts for early stopping, written by others.")
    ] = "core:select",
    model: Annotated[
        str, typer.Option("--model", "-m", help="The base: built-in name, folder or hub id.")
    ] = "smollm2",
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the adapter goes.")
    ] = Path("adapter"),
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="An adapter of the same base to train on from."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Training settings as YAML.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="category, single (one refuse token) or none (baseline).")
    ] = None,
    contrast: Annotated[bool | None, typer.Option(help="Keep look-alike harmless prompts.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    taxonomy: o.Taxonomy = None,
) -> None:
    """Teach a model to open each answer with a token that says whether it refuses, and why.

    Options given here win over the recipe file. Prompts longer than the model's context are skipped and
    listed. Use the result with --adapter, for example demur card smollm2 --adapter FOLDER. A run that is stopped
    leaves the best adapter so far, from which --from trains on.
    """
    from demur.flows.asking import askable
    from demur.train.adapter import Adapter
    from demur.train.refusal_tokens import Recipe, RefusalTokens

    given = {"mode": mode, "contrast": contrast, "epochs": epochs, "seed": seed}
    settings = _recipe(recipe, {k: v for k, v in given.items() if v is not None}, Recipe)
    prompts, picks = (o.load_prompt_file(f, taxonomy) for f in (file, select))
    first = Adapter.load(start) if start else None
    runtime = o.load_model(model, base_only=True)
    prompts, picks = askable(runtime, prompts)[0], askable(runtime, picks)[0]
    with _stages() as report, _best_so_far(out):
        RefusalTokens(settings).fit(runtime, prompts, picks, out, start=first, progress=report)
    warn(f"Adapter written to {out}. Next: demur card {model} --adapter {out}")


@contextmanager
def _best_so_far(folder: Path) -> Iterator[None]:
    """Say, when training is stopped, that it left an adapter."""
    began = time.time() - 1  # a file's time may lag behind the clock
    try:
        yield
    except KeyboardInterrupt:
        about = folder / "demur.json"
        if about.is_file() and about.stat().st_mtime >= began:
            warn(f"Stopped. The best adapter so far is in {folder}; --from {folder} trains on from it.")
        raise


@app.command("magic-tokens")
def magic_tokens(
    file: Annotated[
        str,
        typer.Argument(
            metavar="[FILE]", help="Prompts; those to refuse need a reference, all may bring meta.answers."
        ),
    ] = "core:train",
    model: Annotated[
        str, typer.Option("--model", "-m", help="The base: built-in name, folder or hub id.")
    ] = "smollm2",
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the adapter goes.")
    ] = Path("modes"),
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where secret strings go; default FOLDER.key, readable by you alone."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="string (a secret) or reserved (an id without text).")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Prompts taken, drawn evenly over kinds and categories.")
    ] = 400,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Training settings as YAML.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random but the strings.")] = None,
    allow_refusal_lowering: o.AllowLowering = False,
) -> None:
    """Co-train a constructive and a refusing mode, each switched on by a token in the system message.

    Without a valid token the model takes the recipe's fallback, refusals by default. An unfiltered mode is not
    made.
    """
    from demur.flows.asking import askable
    from demur.prompts import stratified
    from demur.train.magic_tokens import MagicTokens, Recipe, key_path
    from demur.types import PromptSet

    given = {"kind": kind, "epochs": epochs, "seed": seed}
    settings = _recipe(recipe, {k: v for k, v in given.items() if v is not None}, Recipe)
    prompts = o.load_prompt_file(file)
    prompts = PromptSet(prompts.name, tuple(stratified(prompts, min(limit, len(prompts)), settings.seed)))
    runtime = o.load_model(model, base_only=True)
    prompts = askable(runtime, prompts)[0]
    if allow_refusal_lowering:
        logging.getLogger("demur").warning("allowed: modes that answer prompts which should be refused")
    with _stages() as report:
        MagicTokens(settings).fit(
            runtime,
            prompts,
            out,
            key_file=key,
            allow_refusal_lowering=allow_refusal_lowering,
            progress=report,
        )
    made = key_path(out, settings.kind, key)
    warn(
        f"Adapter written to {out}, key to {made}. Next: demur lab magic-tokens audit --adapter {out} --key {made}"
    )


def _recipe(path: Path | None, given: dict[str, Any], kind: type[Any]) -> Any:
    """The recipe of a YAML file, with the options laid over it."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from demur.errors import InputError
    from demur.files import read_text

    try:
        data = yaml.safe_load(read_text(path)) if path else {}
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not YAML ({e})") from None
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(data, dict) or set(data) - set(known):
        raise InputError(f"{path}: a recipe holds `name: value` lines; names are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python({**data, **given})
    except ValidationError as e:
        first = e.errors()[0]
        if not first["loc"]:  # what the recipe itself says of its values
            raise InputError(f"recipe: {first['ctx']['error']}") from None
        raise InputError(
            f"recipe: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})"
        ) from None


@contextmanager
def _stages() -> Iterator[Any]:
    """Progress of a run with named stages: one line each, with the time left."""
    with bar() as b:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = b.add_task(what, total=total)
            b.update(tasks[what], completed=done, total=total)

        yield report
