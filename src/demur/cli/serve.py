"""`serve`: the dial as a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import warn
from demur.errors import InputError


def serve(
    model: o.ModelArg = None,
    settings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings as YAML (docs/serve.md); options here win.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL#MODEL", help="An OpenAI-compatible engine that runs, instead of a model here."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="With --upstream: the model's tokenizer; prompts go out as token ids."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --upstream: the untouched model there, for --mode gate or `answers: base`.",
        ),
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the engine's API key.")
    ] = None,
    operating_point: o.Point = None,
    mode: Annotated[
        str | None,
        typer.Option(help="token: the decided control token opens the answer; gate: base model answers."),
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="When a request cannot be read: closed refuses it, open answers it.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|FILE|core", help="Stored scores for playground and drift, e.g. of demur card."
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write prompts and answers there as JSONL; default nowhere."),
    ] = None,
    guard: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Latent Guard in front of the model.")
    ] = None,
    keys_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Environment variable with the clients' API keys, by commas."),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with API keys, one a line.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Answer anybody, also from other machines, without a key.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 8321.")] = None,
    adapter: o.Adapter = None,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    allow_refusal_lowering: o.AllowLowering = False,
) -> None:
    """Serve a model, or stand before an engine, as an OpenAI-compatible API under an operating point.

    Routes: /v1/chat/completions, /v1/models, /health, /metrics, /demur/about, and the playground at /. Without API
    keys the server answers on this machine only. The operating-point file is read again when it changes.
    """
    from demur.serve.settings import Settings

    read = Settings.load(settings)
    engine = _engine(read, upstream, tokenizer, base_model, upstream_key_env, control_tokens)
    flags: dict[str, Any] = {
        "model": model,
        "upstream": engine,
        "operating_point": operating_point,
        "mode": mode,
        "on_error": on_error,
        "evaluation": evaluation,
        "texts": texts,
        "guard": guard,
        "keys": _keys(keys_env, keys_file),
        "no_auth": no_auth or None,
        "host": host,
        "port": port,
        "adapter": adapter,
        "control_tokens": control_tokens if engine is None else None,
        "dtype": dtype,
        "allow_refusal_lowering": allow_refusal_lowering or None,
    }
    from demur.serve.start import run

    run(Settings.load(settings, **flags), warn)


def _engine(
    read: Any,
    upstream: str | None,
    tokenizer: Path | None,
    base_model: str | None,
    key_env: str | None,
    control_tokens: str | None,
) -> dict[str, Any] | None:
    """The engine of the options, over the settings file's."""
    from demur import models

    told = read.upstream.model_dump() if read.upstream is not None else {}
    if upstream is not None:
        found = models.endpoint(upstream)
        if found is None:
            raise InputError(f"--upstream {upstream}: give the engine's address, http://host:8000/v1#model")
        told |= {"url": found[0], "model": found[1]}
    given = {"tokenizer": tokenizer, "base_model": base_model, "key_env": key_env}
    told |= {k: v for k, v in given.items() if v is not None}
    if told and control_tokens is not None:
        told["control_tokens"] = control_tokens
    if told and "url" not in told:
        raise InputError("--tokenizer, --base-model and --upstream-key-env belong to --upstream URL#MODEL")
    return told or None


def _keys(env: str | None, file: Path | None) -> dict[str, Any] | None:
    given = {"env": env, "file": file}
    return {k: v for k, v in given.items() if v is not None} or None
