"""`score` and `generate`: from prompts to probabilities and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, say, warn, write_rows
from demur.errors import InputError, Unscored
from demur.files import load_operating_point
from demur.types import Prompt, PromptSet, Reply, Score

PromptFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="Prompts: JSONL, CSV, - (standard input) or a set such as core:test."
    ),
]


def score(
    file: PromptFile,
    model: o.Model = None,
    out: o.Out = "-",
    system: o.System = None,
    temperature: Annotated[
        float, typer.Option(min=1e-6, help="Softmax temperature T of the probabilities.")
    ] = 1.0,
    adapter: o.Adapter = None,
    base_only: o.BaseOnly = False,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    request: o.Request = None,
) -> None:
    """Probabilities of refusing, without generating.

    Writes JSONL: id, p_refuse, probabilities by category, off_control_mass, token, and the model they came from.
    One forward pass a prompt serves every operating point. Prompts that the model cannot be asked (too long, say)
    are skipped and listed on stderr first; those that an endpoint's filter blocked, or whose requests failed, get
    no row and are named on stderr at the end. Exit code 2 when no prompt was scored.
    """
    from demur.flows.asking import askable
    from demur.flows.settings import public_name

    prompts = o.load_prompt_file(file)
    runtime = o.load_model(
        model,
        dtype=dtype,
        adapter=adapter,
        base_only=base_only,
        control_tokens=control_tokens,
        request=request,
    )
    condition = o.condition(system=system)
    asked, _ = askable(runtime, prompts, condition)
    name, dtype = public_name(runtime.name), getattr(runtime, "dtype", None)
    with progress("scoring", out) as report:
        rows = scores_there_are(runtime.score(asked, condition, T=temperature, progress=report))
        told = (replace(r, model=name, fingerprint=runtime.fingerprint, dtype=dtype) for r in rows)
        write_rows(told, out)


def generate(
    text: Annotated[
        str, typer.Argument(metavar="PROMPT|FILE", help="One prompt as text, or a file of prompts, or -.")
    ],
    model: o.Model = None,
    out: o.Out = "-",
    system: o.System = None,
    samples: o.Samples = 1,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    max_new_tokens: o.MaxNewTokens = 128,
    operating_point: o.Point = None,
    allow_refusal_lowering: o.AllowLowering = False,
    adapter: o.Adapter = None,
    base_only: o.BaseOnly = False,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    request: o.Request = None,
    as_json: o.Json = False,
) -> None:
    """Answer one prompt, or a file of prompts.

    One prompt is answered as plain text, a file as JSONL replies. Without --operating-point, the one that came
    with the model decides, as on its card. A prompt without an answer keeps its row, with the reason in
    `error`; exit code 2 when no prompt was answered.
    """
    from demur.flows.asking import askable

    point = load_operating_point(operating_point) if operating_point else None
    single = not _is_file(text)
    prompts = PromptSet("prompt", (Prompt.of(text),)) if single else o.load_prompt_file(text)
    runtime = o.load_model(
        model,
        dtype=dtype,
        adapter=adapter,
        base_only=base_only,
        control_tokens=control_tokens,
        request=request,
    )
    point = point or runtime.shipped_point
    condition = o.condition(
        system=system,
        temperature=temperature,
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        operating_point=point.id if point else None,
    )
    askable(runtime, prompts, condition)
    failed: list[str] = []
    with o.steered(runtime, point, allow_refusal_lowering) as steered, progress("answering", out) as report:
        replies = _noting(steered.generate(prompts, condition, samples=samples, progress=report), failed)
        if not single or as_json or out != "-":
            write_rows(replies, out)
        else:
            for reply in replies:
                if reply.error is None:
                    say(reply.content)
    if failed:
        n = len(prompts) * samples
        message = (
            f"{len(failed)} of {n} answers did not come, their rows have `error`. The first: {failed[0]}"
        )
        if len(failed) == n:
            raise InputError(failed[0] if single else message)
        warn(message)


def scores_there_are(scores: Iterable[Score], lost: list[Unscored] | None = None) -> Iterator[Score]:
    """Pass scores on and name the prompts without one on stderr, and in `lost`; an error when there is no score."""
    n = 0
    try:
        for n, score in enumerate(scores, 1):  # noqa: B007
            yield score
    except Unscored as e:
        if not n:
            raise
        warn(str(e))
        if lost is not None:
            lost.append(e)


def _noting(replies: Iterable[Reply], failed: list[str]) -> Iterator[Reply]:
    """Pass replies on and collect the errors among them."""
    for reply in replies:
        if reply.error is not None:
            failed.append(reply.error)
        yield reply


def _is_file(text: str) -> bool:
    """Whether PROMPT|FILE is a file: `-`, a named set, a known suffix, or something that exists."""
    if text == "-" or o.named_set(text):
        return True
    if len(text) > 1000 or "\n" in text:
        return False
    return Path(text).suffix.lower() in (".jsonl", ".ndjson", ".csv") or Path(text).is_file()
