"""`lab magic-tokens`: how far modes lie apart (any model), and the audit of a co-trained one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from demur.cli import options as o
from demur.cli.screen import bar, say
from demur.errors import InputError
from demur.files import public_name, read_text, write_atomic
from demur.report.render import to_json, to_text
from demur.types import Condition, PromptSet, Report

if TYPE_CHECKING:
    from demur.control.modes import ModeKey
    from demur.runtime.base import Runtime


def run(
    what: Annotated[
        Literal["sam", "audit"],
        typer.Argument(
            metavar="sam|audit", help="The margin between modes, or the audit of a co-trained model."
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Prompts to ask.")] = "core:test",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, folder or hub id of a local model.")
    ] = "smollm2",
    adapter: o.Adapter = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The mode key that training wrote (FILE.key or ADAPTER/modes.safetensors)."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="sam: a mode by its system message; give two or more."),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Prompts asked, drawn evenly over kinds.")] = 60,
    position: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="sam: answer positions; behind 0, the model's own answer without a mode stands before.",
        ),
    ] = None,
    guesses: Annotated[int, typer.Option(min=1, help="audit: random strings.")] = 200,
    edits: Annotated[int, typer.Option(min=1, help="audit: strings one edit away, for each mode.")] = 100,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Measure how far the modes of a switchable model lie apart, or what its tokens give away.

    `sam` takes a co-trained model (--adapter, --key), or any model with --mode NAME=SYSTEM_MESSAGE_FILE given at
    least twice. `audit` asks a co-trained model under each mode, without a token, behind unknown strings and with a
    token in the user's text, and ranks the token among random and edited strings. Reports never hold a token.
    """
    from demur.prompts import stratified

    runtime = o.load_model(model, adapter=adapter)
    prompts = o.load_prompt_file(file)
    prompts = PromptSet(prompts.name, tuple(stratified(prompts, min(limit, len(prompts)), seed)))
    found = _key(key, runtime) if key else None
    if what == "audit":
        if found is None or mode:
            raise InputError("audit looks at a co-trained model: give --adapter and --key, and no --mode")
        from demur.flows.mode_audit import audit

        with bar() as b:
            tasks: dict[str, int] = {}

            def tell(name: str, done: int, total: int | None) -> None:
                if name not in tasks:
                    tasks[name] = b.add_task(name, total=total)
                b.update(tasks[name], completed=done, total=total)

            report = audit(runtime, found, prompts, guesses=guesses, edits=edits, seed=seed, progress=tell)
    else:
        report = _sam(runtime, found, mode or [], prompts, position or [0], seed)
    if out is not None:
        write_atomic(out, to_json(report))
    say(to_json(report) if as_json else to_text(report))


def _key(path: Path, runtime: Runtime) -> ModeKey:
    from demur.control.modes import ModeKey

    return ModeKey.load(path, fingerprint=runtime.fingerprint)


def _sam(
    runtime: Runtime,
    key: ModeKey | None,
    modes: list[str],
    prompts: PromptSet,
    positions: list[int],
    seed: int,
) -> Report:
    from demur.control.modes import Modes
    from demur.measure.separation import logit_table, report, separation

    if (key is None) == (not modes):
        raise InputError("sam needs modes: those of --key, or two or more --mode NAME=FILE")
    views: dict[str, tuple[Runtime, Condition]] = {}
    if key is not None:
        views = {m: (Modes(key, m).switched(runtime), Condition()) for m in key.modes}
    for given in modes:
        name, eq, path = given.partition("=")
        if not eq or not name or name in views:
            raise InputError(
                f"--mode {given}: write NAME=FILE, each name once; the file holds a system message"
            )
        views[name] = (runtime, Condition(name=name, system=read_text(path).strip()))
    plain = Modes(key).switched(runtime) if key is not None else runtime
    said = _said(plain, prompts, max(positions))
    out = []
    for position in dict.fromkeys(positions):
        kept = [p for p in prompts if len(said.get(p.id, ())) >= position]
        table = logit_table(views, kept, position=position, said=said)
        for metric in ("cosine", "euclidean"):
            for centred in (False, True):
                out.append(
                    separation(
                        table, list(views), metric=metric, centred=centred, position=position, seed=seed
                    )
                )
    return report(out, public_name(runtime.name), prompts.name)


def _said(runtime: Runtime, prompts: PromptSet, longest: int) -> dict[str, list[int]]:
    """Token ids of the model's own answers, for positions behind the first."""
    if not longest:
        return {}
    tokenizer = getattr(runtime, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"{runtime.name!r} runs elsewhere; later positions need a local model")
    replies = runtime.generate(prompts, Condition(max_new_tokens=longest))
    return {r.prompt_id: tokenizer.encode(r.content, add_special_tokens=False) for r in replies}
