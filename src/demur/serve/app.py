"""The gateway over HTTP: routes, errors, streams, and what runs beside them."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import signal
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from demur.errors import DemurError, InputError, MissingExtra, UpstreamError
from demur.flows.evaluation import Evaluation, open_evaluation
from demur.serve import api, limits
from demur.serve.base import Decision, Piece, Upstream
from demur.serve.dial import Dial, Forbidden
from demur.serve.drift import LEAST
from demur.serve.gateway import MODEL, OPERATOR, Gateway, writable
from demur.serve.openapi import BODY, document, responses
from demur.serve.pointfile import PointFile
from demur.serve.settings import CORE, LOOPBACK, Settings
from demur.types import OperatingPoint

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from sse_starlette import EventSourceResponse
    from starlette.exceptions import HTTPException

    from demur.serve import metrics as metrics_room
    from demur.serve import playground
except ImportError as e:  # pragma: no cover - depends on what is installed
    raise MissingExtra("The gateway (demur serve)", "serve") from e

GRACE_S = 5.0
"""Seconds that a request gets beyond its time to say so itself, before it is cut off from outside."""
RELOAD_S = 1.0
"""Seconds between two looks at the operating-point files."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
Result = TypeVar("Result")


def create_app(
    settings: Settings,
    upstream: Upstream,
    *,
    shipped: OperatingPoint | None = None,
    evaluation: Evaluation | None = None,
) -> FastAPI:
    """The gateway as an ASGI application; `app.state.gateway` is its `Gateway`.

    Args:
        settings: the operator's. upstream: closed with the application.
        shipped: the operating point that came with the model: thresholds of category "safety" may not be looser.
        evaluation: stored scores, instead of those that the settings name.

    Raises:
        InputError, MismatchError, RefusalLowering: settings or operating points that cannot be used.

    >>> app = create_app(Settings(), upstream)  # doctest: +SKIP
    """
    gateway = _gateway(settings, upstream, shipped, evaluation)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with _watching(gateway.dial):
            yield
        await upstream.close()

    app = FastAPI(title="demur", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    _routes(app, gateway)
    app.include_router(playground.router(gateway))
    _errors(app, gateway)
    document(app)
    _layers(app, gateway)
    # it would log every chunk, text and all, where somebody turns debugging on
    logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)
    return app


def _gateway(
    settings: Settings, upstream: Upstream, shipped: OperatingPoint | None, stored: Evaluation | None
) -> Gateway:
    def opened(path: Path) -> PointFile:
        return PointFile(
            path,
            upstream.names,
            shipped=shipped,
            fingerprint=upstream.fingerprint,
            dtype=upstream.dtype,
            has_base=upstream.has_base,
            allow_refusal_lowering=settings.allow_refusal_lowering,
        )

    main = opened(settings.operating_point) if settings.operating_point is not None else None
    canary = opened(settings.canary.operating_point) if settings.canary is not None else None
    if settings.mode == "gate" and main is None:
        raise InputError(
            "mode gate: without an operating point nothing decides what may pass (--operating-point)"
        )
    if stored is None and settings.evaluation not in (None, CORE):
        stored = open_evaluation(settings.evaluation)
    if settings.texts is not None:
        writable(settings.texts)
    dial = Dial(settings, main, canary, opened=opened)
    metrics = metrics_room.Metrics(upstream.names, _reference(stored, upstream, dial))
    for role, file in (("main", main), ("canary", canary)):
        if file is not None:
            metrics.watch(role, file)
    return Gateway(settings, upstream, dial, metrics, stored)


def _reference(stored: Evaluation | None, upstream: Upstream, dial: Dial) -> Any:
    """The scores that drift is measured from; None, and a warning, where they cannot be compared."""
    if stored is None:
        return None
    problem = playground.evaluation_problem(stored, upstream, dial)
    if problem is None and len(stored.reference) < LEAST:
        problem = f"It has {len(stored.reference)} scores, and {LEAST} are needed."
    if problem is not None:
        logging.getLogger("demur").warning("evaluation: drift is not watched. %s", problem)
        return None
    return np.array(stored.reference)


def _layers(app: FastAPI, gateway: Gateway) -> None:
    """Put the layers around the application, the innermost first."""
    settings, bounds, rejected = gateway.settings, gateway.settings.limits, _rejected(gateway)
    keys = settings.read_keys()
    limits.Keys(app, keys)  # a key that is too weak is an error now and not with the first request
    # without keys a page of another site could reach the server through a name that points at loopback
    hosts = LOOPBACK if not keys and not settings.no_auth else None
    app.add_middleware(_Unhandled, gateway=gateway)
    app.add_middleware(limits.Timeouts, seconds=bounds.timeout_s + GRACE_S, rejected=rejected)
    app.add_middleware(
        limits.Concurrency,
        running=bounds.concurrency,
        queue=bounds.queue,
        wait_s=bounds.timeout_s,
        rejected=rejected,
    )
    app.add_middleware(
        limits.BodyLimit,
        limit=bounds.body_bytes,
        seconds=bounds.header_s,
        rejected=rejected,
    )
    app.add_middleware(limits.Keys, keys=keys, rejected=rejected)
    app.add_middleware(limits.SameOrigin, hosts=hosts, rejected=rejected)


def _rejected(gateway: Gateway) -> Callable[[str], None]:
    def count(reason: str) -> None:
        gateway.metrics.failed("timeout" if reason == "timeout" else "rejected")

    return count


# --- routes ---------------------------------------------------------------------------------------------------


def _routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions", openapi_extra=BODY, responses=responses())
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation under the operating point."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _error(
                415, "the body must be JSON: Content-Type: application/json", "unsupported_media_type"
            )
        parsed = api.read_request(await request.body())
        if parsed.model != gateway.upstream.name:
            return _error(404, f"this server has one model, {gateway.upstream.name!r}", "model_not_found")
        given = request.headers.get("x-request-id", "")
        asked = api.asked(
            parsed,
            given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16),
            most=gateway.settings.limits.max_tokens,
            seconds=gateway.settings.limits.timeout_s,
            passes=getattr(gateway.upstream, "passes", frozenset()),
        )
        begun = time.monotonic()
        if asked.stream:
            return await _streamed(request, gateway, asked, begun)
        body = await _unless_gone(request, _whole(gateway, asked, begun))
        return JSONResponse(body, headers={"x-request-id": asked.request_id})

    @app.get("/v1/models", responses=responses(401))
    async def models() -> JSONResponse:
        """The model that is served."""
        return JSONResponse(api.listed([gateway.upstream.name], gateway.started))

    @app.get("/health", responses={503: {"description": "The engine cannot answer."}})
    async def health() -> JSONResponse:
        """Whether requests can be answered; needs no key."""
        told = await gateway.health()
        return JSONResponse(told, status_code=503 if told["status"] == "down" else 200)

    @app.get("/metrics", response_class=Response, responses=responses(401))
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(gateway.metrics.text(), media_type=metrics_room.CONTENT_TYPE)

    @app.get("/demur/about", responses=responses(401))
    async def about() -> JSONResponse:
        """The dial, what is promised, and what this server cannot do."""
        return JSONResponse(gateway.about())


async def _whole(gateway: Gateway, asked: api.Asked, begun: float) -> dict[str, Any]:
    """The answer in one piece."""
    decision = await gateway.decide(asked)
    written = api.Written()
    async with aclosing(gateway.answer(asked, decision)) as pieces:
        async for piece in pieces:
            written.take(piece)
    gateway.note(asked, decision, written, time.monotonic() - begun)
    return api.completion(asked, decision, written, _source(gateway, decision, written))


async def _streamed(request: Request, gateway: Gateway, asked: api.Asked, begun: float) -> Response:
    """A stream. It begins when the first piece is there, so that whatever fails before it is an HTTP error."""

    async def begin() -> tuple[Decision, Any, Piece]:
        decision = await gateway.decide(asked)
        pieces = gateway.answer(asked, decision)
        try:
            return decision, pieces, await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise

    decision, pieces, first = await _unless_gone(request, begin())
    return EventSourceResponse(
        _events(gateway, asked, decision, pieces, first, begun),
        headers={"x-request-id": asked.request_id},
        sep="\n",
        shutdown_grace_period=gateway.settings.limits.shutdown_s,
    )


async def _events(
    gateway: Gateway, asked: api.Asked, decision: Decision, pieces: Any, first: Piece, begun: float
) -> AsyncIterator[dict[str, str]]:
    """Chunks of a stream as server-sent events; an error inside it is an event too."""
    written = api.Written()
    piece: Piece | None = first
    shown = False
    async with aclosing(pieces):
        try:
            written.take(first)
            yield _event(api.first_chunk(asked, decision, written, _source(gateway, decision, written)))
            while piece is not None:
                if (chunk := api.chunk(asked, piece, shown=shown)) is not None:
                    shown = True
                    yield _event(chunk)
                piece = await anext(pieces, None)
                if piece is not None:
                    written.take(piece)
        except DemurError as e:
            gateway.metrics.failed(_kind(e))
            yield {"data": limits.error_bytes(502, str(e), "upstream_error").decode()}
            return
        except (GeneratorExit, asyncio.CancelledError):
            gateway.metrics.failed("cancelled")
            raise
    gateway.note(asked, decision, written, time.monotonic() - begun)
    yield _event(api.last_chunk(asked, decision, written, _source(gateway, decision, written)))
    assert written.last is not None
    if asked.include_usage:
        yield _event(api.usage_chunk(asked, written.last))
    yield {"data": "[DONE]"}


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result, unless the client leaves before it is there; then the work is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Gone(Exception):
    """The client has left."""


def _source(gateway: Gateway, decision: Decision, written: api.Written) -> str:
    stopped = written.last is not None and written.last.stop is not None
    return OPERATOR if stopped or gateway.refuses(decision) is not None else MODEL


def _event(chunk: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(chunk, ensure_ascii=False)}


# --- what every request meets -----------------------------------------------------------------------------------


class _Unhandled:
    """A bug becomes an HTTP 500 and a log line that says where; the exception's text may quote a prompt."""

    def __init__(self, app: limits.App, gateway: Gateway) -> None:
        self.app, self.gateway = app, gateway

    async def __call__(self, scope: limits.Scope, receive: limits.Receive, send: limits.Send) -> None:
        started = False

        async def watched(event: limits.Event) -> None:
            nonlocal started
            started = True
            await send(event)

        try:
            await self.app(scope, receive, watched)
        except TimeoutError:
            raise  # of the layer around this one
        except Exception as e:
            if scope["type"] != "http":
                raise
            self.gateway.metrics.failed("internal")
            where = "".join(traceback.format_tb(e.__traceback__)[-4:])
            logging.getLogger("demur.serve").error("%s in a request\n%s", type(e).__name__, where)
            if not started:
                await limits.reject(
                    send, 500, "an error in the gateway; its log says where", "internal_error"
                )


def _errors(app: FastAPI, gateway: Gateway) -> None:
    async def ours(_request: Request, e: Exception) -> Response:
        assert isinstance(e, DemurError)
        gateway.metrics.failed(_kind(e))
        status, code = _STATUS.get(_kind(e), (500, "internal_error"))
        return _error(status, str(e), code)

    async def invalid(_request: Request, e: Exception) -> Response:
        assert isinstance(e, RequestValidationError)
        first = e.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "invalid_request")

    async def plain(_request: Request, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        response = _error(e.status_code, str(e.detail), "not_found" if e.status_code == 404 else None)
        response.headers.update(e.headers or {})
        return response

    async def gone(_request: Request, _e: Exception) -> Response:
        gateway.metrics.failed("cancelled")
        return Response(status_code=499)

    app.add_exception_handler(DemurError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(_Gone, gone)


_STATUS = {
    "input": (400, "invalid_request"),
    "rejected": (403, "forbidden"),
    "upstream": (502, "upstream_error"),
}


def _kind(error: DemurError) -> str:
    """The name under which a failed request is counted."""
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, UpstreamError):
        return "upstream"
    return "rejected" if isinstance(error, Forbidden) else "internal"


def _error(status: int, message: str, code: str | None) -> Response:
    return Response(limits.error_bytes(status, message, code), status, media_type="application/json")


@asynccontextmanager
async def _watching(dial: Dial) -> AsyncIterator[None]:
    """Look at the operating-point files every second, and at once on SIGHUP."""
    now = asyncio.Event()

    async def watch() -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_S):
                    await now.wait()
            now.clear()
            await asyncio.to_thread(dial.refresh)

    loop = asyncio.get_running_loop()
    before: Any = None
    with suppress(
        ValueError, RuntimeError, NotImplementedError, AttributeError
    ):  # no main thread, no such signal
        theirs = signal.getsignal(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, now.set)
        before = theirs
    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if before is not None:
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, before)
