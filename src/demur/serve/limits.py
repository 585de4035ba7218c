"""What stands before the gateway: keys, origins, body size and time, concurrency, time-outs.

Pure ASGI, so streams pass through unbuffered. Put around the application from the outside in:

    SameOrigin(Keys(BodyLimit(Concurrency(Timeouts(app, ...), ...), ...), ...), ...)

A request without a key costs nothing but its head; a slow body holds no place among the running requests. uvicorn
itself has no time limit on request heads: pass `http=head_timed(seconds)` to `uvicorn.Config`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from demur.errors import InputError, MissingExtra

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Rejected = Callable[[str], None]
"""Told why a request is turned away: "key", "origin", "body", "late_body", "busy" or "timeout"."""

_STATUS_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "server_error",
    504: "server_error",
}


def error_bytes(status: int, message: str, code: str | None = None, kind: str | None = None) -> bytes:
    """An error in OpenAI's form as ASCII JSON; half characters in `message` do no harm.

    >>> error_bytes(404, "no model x", "no_model")
    b'{"error": {"message": "no model x", "type": "invalid_request_error", "param": null, "code": "no_model"}}'
    """
    kind = kind or _STATUS_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


async def reject(
    send: Send, status: int, message: str, code: str, headers: Collection[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error and close the connection: what is left of the request is not read."""
    body = error_bytes(status, message, code)
    fixed = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


class _Layer:
    """One layer around an application; everything but HTTP requests passes."""

    def __init__(self, app: App, rejected: Rejected | None = None) -> None:
        self.app, self.rejected = app, rejected or (lambda _reason: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:  # no route speaks websocket
            await send({"type": "websocket.close", "code": 1008})

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        raise NotImplementedError


class Keys(_Layer):
    """Requests need one of the keys, as `Authorization: Bearer KEY` or as the password of Basic.

    Basic is for browsers, which ask for it when a page is opened. Without keys everything passes.

    Args:
        keys: at least 16 characters each. open_paths: exact paths that need no key.
    """

    def __init__(
        self,
        app: App,
        keys: Collection[str],
        *,
        open_paths: Collection[str] = ("/health",),
        rejected: Rejected | None = None,
    ) -> None:
        super().__init__(app, rejected)
        if any(len(k) < 16 or k != k.strip() or not k.isascii() for k in keys):
            raise InputError(
                "an API key is shorter than 16 characters, or holds blanks at its ends or characters "
                "outside ASCII; make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        self._digests = [hashlib.sha256(k.encode()).digest() for k in keys]
        self._open = frozenset(open_paths)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with a key, or to an open path."""
        if not self._digests or scope["path"] in self._open or self._known(_header(scope, b"authorization")):
            await self.app(scope, receive, send)
            return
        self.rejected("key")
        await reject(
            send,
            401,
            "this server needs an API key: Authorization: Bearer KEY",
            "invalid_api_key",
            [(b"www-authenticate", b'Basic realm="demur: any name, the key as password"')],
        )

    def _known(self, header: bytes | None) -> bool:
        scheme, _, value = (header or b"").partition(b" ")
        value = value.strip()
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(value).digest()
        # all are compared, each in constant time
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class SameOrigin(_Layer):
    """Turns away what other sites' pages make a browser send: the browser would add its keys.

    Args:
        hosts: accepted names in the Host header, any port; None accepts all. A server without keys names the
            loopback hosts here, otherwise any site could reach it by pointing its own name at 127.0.0.1.
    """

    def __init__(
        self, app: App, hosts: Collection[str] | None = None, *, rejected: Rejected | None = None
    ) -> None:
        super().__init__(app, rejected)
        self._hosts = None if hosts is None else frozenset(h.lower().strip("[]") for h in hosts)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request that no foreign page made."""
        host = (_header(scope, b"host") or b"").decode("latin-1").lower()
        origin = (_header(scope, b"origin") or b"").decode("latin-1").lower()
        site = _header(scope, b"sec-fetch-site") or b"none"
        if self._hosts is not None and _name(host) not in self._hosts:
            why = f"host {host!r} is not one this server answers to"
        elif site not in (b"none", b"same-origin") and scope["method"] not in ("GET", "HEAD"):
            why = "a page of another site sent this request"
        elif site != b"same-origin" and origin and origin.partition("://")[2] != host:
            why = f"a page of {origin!r} sent this request"
        else:
            await self.app(scope, receive, send)
            return
        self.rejected("origin")
        await reject(send, 403, why, "foreign_origin")


class BodyLimit(_Layer):
    """Reads the body before anything else sees the request: at most `limit` bytes within `seconds`."""

    def __init__(self, app: App, limit: int, seconds: float, *, rejected: Rejected | None = None) -> None:
        super().__init__(app, rejected)
        self.limit, self.seconds = limit, seconds

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request with its whole body, or answer 413 or 408."""
        claimed = _header(scope, b"content-length")
        try:
            if claimed is not None and (not claimed.isdigit() or int(claimed[:20]) > self.limit):
                raise OverflowError
            async with asyncio.timeout(self.seconds):
                body = await self._read(receive)
        except OverflowError:
            self.rejected("body")
            await reject(send, 413, f"the body is larger than {self.limit} bytes", "request_too_large")
        except TimeoutError:
            self.rejected("late_body")
            await reject(send, 408, f"the body took longer than {self.seconds:g} s", "request_timeout")
        else:
            if body is not None:
                first = {"type": "http.request", "body": body, "more_body": False}
                await self.app(scope, _first(first, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None when the client left before its end."""
        parts, size, more = [], 0, True
        while more:
            event = await receive()
            if event["type"] != "http.request":
                return None
            part, more = event.get("body", b""), event.get("more_body", False)
            size += len(part)
            if size > self.limit:
                raise OverflowError
            parts.append(part)
        return b"".join(parts)


class Concurrency(_Layer):
    """At most `running` requests at a time under `prefix`; `queue` more wait their turn, first come first served.

    Others, and those that waited `wait_s` seconds, get 429 with Retry-After. Whoever leaves gives up the place.
    """

    def __init__(
        self,
        app: App,
        running: int,
        queue: int,
        *,
        wait_s: float = 30.0,
        prefix: str = "/v1/chat",
        rejected: Rejected | None = None,
    ) -> None:
        super().__init__(app, rejected)
        if running < 1 or queue < 0:
            raise InputError(f"concurrency {running} with a queue of {queue}: at least 1 and 0 are needed")
        self.running, self.queue, self.wait_s, self.prefix = running, queue, wait_s, prefix
        self.running_now = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting_now(self) -> int:
        """Requests that wait for a place."""
        return sum(not place.done() for place in self._waiting)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request when it is its turn."""
        if not scope["path"].startswith(self.prefix):
            await self.app(scope, receive, send)
            return
        if self.running_now >= self.running:
            if self.waiting_now >= self.queue:
                await self._busy(send)
                return
            first = await receive()  # the body, whole and there already
            turn = await self._turn(receive)
            if turn is not True:
                if turn is False:
                    await self._busy(send)
                return
            receive = _first(first, receive)
        else:
            self.running_now += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._leave()

    async def _turn(self, receive: Receive) -> bool | None:
        """Wait for a place: True with one, False after too long, None when the client has left."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((place, gone), timeout=self.wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and place.done():
                self._leave()
                return None
            return True if place.done() else (None if gone.done() else False)
        except asyncio.CancelledError:
            if place.done():
                self._leave()
            raise
        finally:
            gone.cancel()
            place.cancel()
            if place in self._waiting:
                self._waiting.remove(place)

    def _leave(self) -> None:
        """Hand the place to the next in line, or free it."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running_now -= 1

    async def _busy(self, send: Send) -> None:
        self.rejected("busy")
        await reject(
            send,
            429,
            f"{self.running} requests are running and {self.queue} may wait; try again",
            "server_busy",
            [(b"retry-after", b"1")],
        )


class Timeouts(_Layer):
    """A request ends within `seconds`: 504 if nothing was sent yet, otherwise the connection is closed.

    The application is cancelled, so an answer under way frees what it holds. `stall_s` ends a request whose
    client takes no data for so long.
    """

    def __init__(
        self, app: App, seconds: float, *, stall_s: float = 30.0, rejected: Rejected | None = None
    ) -> None:
        super().__init__(app, rejected)
        self.seconds, self.stall_s = seconds, stall_s

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request under a clock."""
        started = False

        async def watched(event: Event) -> None:
            nonlocal started
            started = True
            async with asyncio.timeout(self.stall_s):
                await send(event)

        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, receive, watched)
        except TimeoutError:
            self.rejected("timeout")
            if not started:
                await reject(send, 504, f"no answer within {self.seconds:g} s", "timeout")


def head_timed(seconds: float, connections: int = 1000) -> Any:
    """uvicorn's HTTP protocol with a limit on the time of a request head, and on open connections.

    Without it a client that sends a header a minute holds its connection for ever. Pass it as `http=` to
    `uvicorn.Config`.
    """
    try:
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        raise MissingExtra("Serving", "serve") from None

    class HeadTimed(H11Protocol):
        """Closes a connection whose request head is not complete in time."""

        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Start the clock of the first request."""
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.abort()
            self._head = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            """Stop the clock when a head is complete, start it when another one begins."""
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._stop()
            elif self._head is None and (before is None or before.response_complete):
                self._head = self.loop.call_later(seconds, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the clock."""
            self._stop()
            super().connection_lost(exc)

        def _stop(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return HeadTimed


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


def _first(event: Event, receive: Receive) -> Receive:
    """`receive` with an event put back in front."""
    queue = [event]

    async def again() -> Event:
        return queue.pop() if queue else await receive()

    return again
