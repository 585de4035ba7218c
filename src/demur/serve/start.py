"""From settings to a running server: the upstream they name, its operating point, uvicorn around it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur import models
from demur.errors import InputError, MissingExtra
from demur.files import load_operating_point
from demur.flows.evaluation import Evaluation, core_evaluation
from demur.flows.load import load_runtime
from demur.flows.settings import public_name
from demur.serve.base import Upstream
from demur.serve.settings import CORE, Engine, Settings
from demur.types import OperatingPoint

Say = Callable[[str], None]
SAVED = Path("operating-points")
"""Where saved operating points go when the loaded one came with the model."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is served: `settings` with what follows from the model, and the operating point that came with it.

    `evaluation` is there where it was computed at the start.
    """

    settings: Settings
    upstream: Upstream
    shipped: OperatingPoint | None = None
    evaluation: Evaluation | None = None


def prepare(settings: Settings, say: Say) -> Prepared:
    """Load the model, or reach for the engine, that the settings name.

    Raises:
        InputError, DataUnavailable, MissingExtra, MismatchError, CapabilityError: something cannot be served.
    """
    settings.read_keys()  # before anything slow
    if settings.upstream is not None:
        return _remote(settings, settings.upstream)
    return _local(settings, say)


def _remote(settings: Settings, engine: Engine) -> Prepared:
    from demur.serve.engine import export_of
    from demur.serve.remote import RemoteUpstream

    if settings.evaluation == CORE:
        raise InputError("evaluation core: for a model here; for an engine, name a stored run (demur card)")
    point = export_of(engine.tokenizer).point if engine.tokenizer is not None else None
    shipped = load_operating_point(point) if point is not None else None
    if settings.operating_point is None and point is not None:
        saved = settings.points_folder or SAVED
        settings = settings.model_copy(update={"operating_point": point, "points_folder": saved})
    gate = settings.mode == "gate"
    upstream = RemoteUpstream.of(engine, gate=gate, timeout_s=settings.limits.timeout_s)
    return Prepared(settings, upstream, shipped)


def _local(settings: Settings, say: Say) -> Prepared:
    if settings.model is not None and models.endpoint(settings.model) is not None:
        raise InputError(f"{settings.model}: an engine that already runs is served with --upstream URL#MODEL")
    runtime: Any = load_runtime(
        settings.model,
        dtype=settings.dtype,
        adapter=settings.adapter,
        control_tokens=settings.control_tokens,
        say=say,
    )
    from demur.serve.local import LocalUpstream, base_view

    shipped: OperatingPoint | None = runtime.shipped_point
    settings = with_shipped_point(settings, shipped)
    stored = None
    if settings.evaluation == CORE:
        say(
            "scoring the packaged prompts for the playground, some minutes on a processor; kept for the next start"
        )
        stored = core_evaluation(runtime, T=shipped.T if shipped is not None else 1.0)
    answers: Any = base_view(runtime) if settings.mode == "gate" else runtime
    upstream: Any = LocalUpstream(
        runtime,
        answers=answers,
        guard=_guard(settings, runtime),
        any_depth=_any_depth(settings, answers),
        max_rows=settings.batch.rows,
        max_wait_ms=settings.batch.wait_ms,
    )
    upstream.name = public_name(upstream.name)
    return Prepared(settings, upstream, shipped, stored)


def with_shipped_point(settings: Settings, shipped: OperatingPoint | None) -> Settings:
    """The settings with the operating point of the model's adapter, where they name none."""
    if settings.operating_point is not None or shipped is None:
        return settings
    from demur.train.adapter import POINT_FILE

    adapter = settings.adapter or models.resolve(settings.model or models.DEFAULT_MODEL).adapter
    if adapter is None:
        return settings
    saved = settings.points_folder or SAVED
    return settings.model_copy(update={"operating_point": adapter / POINT_FILE, "points_folder": saved})


def run(settings: Settings, say: Say) -> None:
    """Serve until a stop signal; answers under way then have `limits.shutdown_s` to end.

    Raises:
        MissingExtra: the packages of the extra "serve" are not installed. Others as `prepare` and `create_app`.
    """
    from demur.serve.app import create_app

    if importlib.util.find_spec("uvicorn") is None:
        raise MissingExtra("The gateway (demur serve)", "serve")
    ready = prepare(settings, say)
    app = create_app(ready.settings, ready.upstream, shipped=ready.shipped, evaluation=ready.evaluation)
    running = server(app, ready.settings)
    for line in opening_lines(ready.settings, ready.upstream):
        say(line)
    _log_to_stderr()
    running.run()


def server(app: Any, settings: Settings) -> Any:
    """uvicorn around the application: times for heads and for the end, and no log of its own requests."""
    import uvicorn

    from demur.serve.limits import head_timed

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=head_timed(settings.limits.header_s),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.limits.shutdown_s)),
    )
    return uvicorn.Server(config)


def _log_to_stderr() -> None:
    """A line for each answer, without its text, and what uvicorn has to say."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("demur.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(handler)


def opening_lines(settings: Settings, upstream: Upstream) -> list[str]:
    """What the operator reads when the server starts."""
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    at = f"http://{shown}:{settings.port}"
    point = settings.operating_point
    lines = [
        f"{upstream.name} at {at}/v1 (mode {settings.mode}, fail-{settings.on_error}); playground: {at}/",
        f"operating point: {point}"
        if point is not None
        else "no operating point: every answer is the model's own",
    ]
    if settings.texts is not None:
        lines.append(f"prompts and answers are written to {settings.texts}")
    return [*lines, *(f"note: {caution}" for caution in settings.cautions(upstream.names))]


def _guard(settings: Settings, runtime: Any) -> Any:
    if settings.guard is None:
        return None
    from demur.control.latent_guard import LatentGuard

    return LatentGuard.load(settings.guard, fingerprint=runtime.fingerprint)


def _any_depth(settings: Settings, answers: Any) -> Any:
    if settings.any_depth is None:
        return None
    from demur.control.any_depth import AnyDepth, HeaderProbe, RefuseMass

    checks = settings.any_depth
    if checks.probe is None:
        return AnyDepth(RefuseMass(threshold=checks.mass or 1.0), every=checks.every)
    probe = HeaderProbe.load(checks.probe, fingerprint=answers.fingerprint)
    return AnyDepth(probe, every=checks.every)
