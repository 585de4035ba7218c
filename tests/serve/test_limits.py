from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from demur.errors import InputError
from demur.serve.limits import (
    BodyLimit,
    Concurrency,
    Keys,
    SameOrigin,
    Timeouts,
    error_bytes,
)
from tests.serve.live import raw, served, wait_for

KEY = "k" * 32
OTHER = "o" * 32


class Echo:
    """Answers with what it was sent; `wait` holds every answer back, `cancelled` counts."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.gate: asyncio.Event | None = None
        self.cancelled = 0
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        self.bodies.append(event["body"])
        assert not event["more_body"]
        self.running += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def scope(path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> dict[str, Any]:
    rows = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": rows}


class Call:
    """One request in pieces, and what came back."""

    def __init__(self, *parts: bytes) -> None:
        n = len(parts)
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for k, part in enumerate(parts or (b"",)):
            self.events.put_nowait({"type": "http.request", "body": part, "more_body": k < n - 1})
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return await self.events.get()

    async def send(self, event: Any) -> None:
        self.sent.append(dict(event))

    def leave(self) -> None:
        self.events.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(b"".join(e.get("body", b"") for e in self.sent[1:]))["error"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def ask(app: Any, sc: dict[str, Any], *parts: bytes) -> Call:
    call = Call(*parts)
    asyncio.run(app(sc, call.receive, call.send))
    return call


# --- keys ------------------------------------------------------------------------------------------


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header", [f"Bearer {KEY}", f"bearer  {OTHER} ", basic(f"any:{KEY}"), basic(f":{OTHER}")]
)
def test_a_key_opens(header: str) -> None:
    assert ask(Keys(Echo(), [KEY, OTHER]), scope(authorization=header)).status == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        KEY,
        f"Token {KEY}",
        "Basic !!",
        basic(KEY),
        basic(f"{KEY}:"),
        "Bearer \xff\xfe",
    ],
)
def test_no_key_no_answer(header: str | None) -> None:
    echo, reasons = Echo(), []
    app = Keys(echo, [KEY], rejected=reasons.append)
    for path in ("/v1/chat/completions", "/", "/metrics", "/health/", "//health", "/HEALTH", "/demur/about"):
        call = ask(app, scope(path, **({} if header is None else {"authorization": header})))
        assert call.status == 401 and call.error["type"] == "authentication_error", path
        assert call.headers[b"www-authenticate"].startswith(b"Basic")
    assert not echo.bodies and set(reasons) == {"key"}
    assert ask(app, scope("/health", "GET")).status == 200


def test_without_keys_all_is_open() -> None:
    assert ask(Keys(Echo(), []), scope()).status == 200


@pytest.mark.parametrize("key", ["short", " " + KEY, KEY + "\n", "ü" * 20])
def test_weak_or_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="API key"):
        Keys(Echo(), [key])


def test_websockets_are_closed_and_lifespan_passes() -> None:
    sent, seen = [], []

    async def app(sc: Any, receive: Any, send: Any) -> None:
        seen.append(sc["type"])

    async def send(event: Any) -> None:
        sent.append(event)

    keys = Keys(app, [KEY])
    asyncio.run(keys({"type": "websocket", "path": "/", "headers": []}, None, send))  # type: ignore[arg-type]
    asyncio.run(keys({"type": "lifespan"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}] and seen == ["lifespan"]


# --- origins ------------------------------------------------------------------------------------------

HOSTS = ("127.0.0.1", "localhost", "::1")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8321"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8321"}, 200),
        ({"host": "evil.example:8321"}, 403),
        ({}, 403),
        ({"host": "localhost:8321", "origin": "http://localhost:8321"}, 200),
        ({"host": "localhost:8321", "origin": "http://localhost:9999"}, 403),
        ({"host": "localhost:8321", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8321", "origin": "null"}, 403),
        ({"host": "localhost:8321", "sec_fetch_site": "cross-site"}, 403),
        ({"host": "localhost:8321", "sec_fetch_site": "same-site"}, 403),
        ({"host": "localhost:8321", "sec_fetch_site": "same-origin"}, 200),
        ({"host": "localhost:8321", "sec_fetch_site": "none"}, 200),
        # behind a proxy that names the host otherwise, the browser's own word counts
        ({"host": "localhost:1", "sec_fetch_site": "same-origin", "origin": "https://demur.example"}, 200),
        ({"host": "localhost:1", "sec_fetch_site": "cross-site", "origin": "http://localhost:1"}, 403),
    ],
)
def test_pages_of_other_sites_are_turned_away(headers: dict[str, str], status: int) -> None:
    call = ask(SameOrigin(Echo(), HOSTS), scope(**headers))
    assert call.status == status


def test_a_link_from_another_site_may_open_the_page() -> None:
    sc = scope("/", "GET", host="demur.example", sec_fetch_site="cross-site")
    assert ask(SameOrigin(Echo()), sc).status == 200


# --- bodies ------------------------------------------------------------------------------------------


def test_bodies_come_whole_or_not_at_all() -> None:
    echo = Echo()
    app = BodyLimit(echo, 10, 5)
    assert ask(app, scope(), b"12345", b"67890").status == 200
    assert echo.bodies == [b"1234567890"]
    for call in (
        ask(app, scope(), b"12345", b"678901"),
        ask(app, scope(content_length="11"), b""),
        ask(app, scope(content_length="9" * 400), b""),
        ask(app, scope(content_length="-1"), b""),
    ):
        assert call.status == 413 and call.error["code"] == "request_too_large"
        assert call.headers[b"connection"] == b"close"
    assert len(echo.bodies) == 1


def test_a_late_body_is_408_and_a_client_that_left_is_nothing() -> None:
    echo = Echo()

    async def late() -> Call:
        call = Call(b"a", b"b")
        call.events.get_nowait(), call.events.get_nowait()
        call.events.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        await BodyLimit(echo, 10, 0.05)(scope(), call.receive, call.send)
        return call

    assert asyncio.run(late()).status == 408

    async def left() -> Call:
        call = Call(b"a", b"b")
        call.events.get_nowait(), call.events.get_nowait()
        call.leave()
        await BodyLimit(echo, 10, 5)(scope(), call.receive, call.send)
        return call

    assert not asyncio.run(left()).sent and not echo.bodies


# --- concurrency ------------------------------------------------------------------------------------------


def run_concurrent(test: Callable[[Echo], Any]) -> None:
    async def main() -> None:
        echo = Echo()
        echo.gate = asyncio.Event()
        await test(echo)

    asyncio.run(main())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_bounded_queue_in_order_and_429_beyond() -> None:
    async def test(echo: Echo) -> None:
        app = Concurrency(echo, 2, 2)
        calls = [Call(str(k).encode()) for k in range(6)]
        tasks = [asyncio.create_task(app(scope(), c.receive, c.send)) for c in calls]
        await settled()
        assert echo.running == 2 and app.waiting_now == 2
        assert [c.status for c in calls[4:]] == [429, 429]
        assert calls[4].headers[b"retry-after"] == b"1" and calls[4].error["type"] == "rate_limit_error"
        extra = Call()
        await app(scope("/health"), extra.receive, _open(echo, extra))
        echo.gate.set()
        await asyncio.gather(*tasks)
        assert [c.status for c in calls[:4]] == [200] * 4
        assert echo.bodies[:2] == [b"0", b"1"] and echo.bodies[-2:] == [b"2", b"3"]
        assert app.running_now == 0 and app.waiting_now == 0

    run_concurrent(test)


def _open(echo: Echo, call: Call) -> Any:
    """Other paths are not counted: the answer comes while all places are taken."""
    gate, echo.gate = echo.gate, None

    async def send(event: Any) -> None:
        echo.gate = gate
        await call.send(event)

    return send


def test_who_leaves_the_queue_gives_up_the_place() -> None:
    async def test(echo: Echo) -> None:
        app = Concurrency(echo, 1, 1)
        one, two, three = Call(b"1"), Call(b"2"), Call(b"3")
        first = asyncio.create_task(app(scope(), one.receive, one.send))
        second = asyncio.create_task(app(scope(), two.receive, two.send))
        await settled()
        assert app.waiting_now == 1
        two.leave()
        await second
        assert not two.sent and app.waiting_now == 0
        third = asyncio.create_task(app(scope(), three.receive, three.send))
        await settled()
        echo.gate.set()
        await asyncio.gather(first, third)
        assert echo.bodies == [b"1", b"3"] and app.running_now == 0

    run_concurrent(test)


def test_cancelled_waiters_and_cancelled_runners_lose_no_place() -> None:
    async def test(echo: Echo) -> None:
        app = Concurrency(echo, 1, 3)
        calls = [Call(str(k).encode()) for k in range(4)]
        tasks = [asyncio.create_task(app(scope(), c.receive, c.send)) for c in calls]
        await settled()
        tasks[1].cancel()
        tasks[0].cancel()  # the place goes to 2, whatever the order of the two
        await settled()
        tasks[2].cancel()
        await settled()
        assert app.running_now == 1 and app.waiting_now == 0
        echo.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert calls[3].status == 200 and app.running_now == 0

    run_concurrent(test)


def test_a_place_given_while_the_waiter_is_cancelled_goes_on() -> None:
    async def test(echo: Echo) -> None:
        app = Concurrency(echo, 1, 2)
        calls = [Call(str(k).encode()) for k in range(3)]
        tasks = [asyncio.create_task(app(scope(), c.receive, c.send)) for c in calls]
        await settled()
        app._leave()  # the first ends: its place is given to the second ...
        tasks[1].cancel()  # ... which is cancelled in the same moment
        await settled()
        assert echo.bodies == [b"0", b"2"]
        echo.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_concurrent(test)


def test_waiting_has_an_end() -> None:
    async def test(echo: Echo) -> None:
        app = Concurrency(echo, 1, 1, wait_s=0.05)
        one, two = Call(b"1"), Call(b"2")
        first = asyncio.create_task(app(scope(), one.receive, one.send))
        await asyncio.create_task(app(scope(), two.receive, two.send))
        assert two.status == 429
        echo.gate.set()
        await first

    run_concurrent(test)


def test_an_error_of_the_application_frees_the_place() -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("x")

    async def main() -> None:
        app = Concurrency(broken, 1, 0)
        for _ in range(3):
            call = Call()
            with pytest.raises(RuntimeError):
                await app(scope(), call.receive, call.send)
        assert app.running_now == 0

    asyncio.run(main())


# --- time-outs ------------------------------------------------------------------------------------------


def test_a_long_answer_is_cut_and_the_application_cancelled() -> None:
    async def test(echo: Echo) -> None:
        call = Call(b"1")
        await Timeouts(echo, 0.05)(scope(), call.receive, call.send)
        assert call.status == 504 and call.error["code"] == "timeout" and echo.cancelled == 1

    run_concurrent(test)


def test_a_client_that_takes_nothing_is_dropped() -> None:
    async def main() -> None:
        call = Call(b"1")
        stuck = asyncio.Event()

        async def send(event: Any) -> None:
            await call.send(event)
            await stuck.wait()

        start = time.monotonic()
        await Timeouts(Echo(), 60, stall_s=0.05)(scope(), call.receive, send)
        assert time.monotonic() - start < 5 and len(call.sent) == 1

    asyncio.run(main())


def test_error_text_is_ascii_whatever_it_quotes() -> None:
    body = error_bytes(400, 'half a \ud800 character, "quotes" and <b>', "c")
    assert body.isascii() and json.loads(body)["error"]["message"].startswith("half a \ud800")


# --- on a real server ------------------------------------------------------------------------------------------


def test_slow_heads_slow_bodies_and_broken_requests_on_the_wire() -> None:
    echo = Echo()
    app = BodyLimit(Timeouts(echo, 5), 1000, 0.4)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n"
    with served(
        app, head_s=0.5, lifespan="off", timeout_keep_alive=1, h11_max_incomplete_event_size=8192
    ) as at:
        assert httpx.post(at, content=b"hello").status_code == 200
        start = time.monotonic()
        assert raw(at) == b""  # connects and says nothing
        assert raw(at, b"POST / HT") == b""
        slow = [b"POST / HTTP/1.1\r\nhost: x\r\n", *[b"x-%d: 1\r\n" % k for k in range(40)]]
        assert raw(at, *slow, pause=0.05) == b""
        assert b" 408 " in raw(at, head + b"\r\n", *[b"x"] * 9, pause=0.1)
        assert b" 413 " in raw(at, head.replace(b"10", b"5000") + b"\r\n")
        chunked = head.replace(b"content-length: 10", b"transfer-encoding: chunked") + b"\r\n"
        assert b" 413 " in raw(at, chunked + b"fff\r\n" + b"x" * 4095 + b"\r\n")
        assert b" 400 " in raw(at, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert b" 400 " in raw(at, b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 20000)
        assert b" 400 " in raw(at, head + b"content-length: 11\r\n\r\n")
        assert time.monotonic() - start < 20
        # a second head on a kept connection is under the clock too
        first = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx"
        got = raw(at, first + b"GET /")
        assert got.count(b"200 OK") == 1
        assert httpx.post(at, content=b"still here").status_code == 200
    assert echo.bodies[0] == b"hello" and echo.bodies[-1] == b"still here"


def test_connections_beyond_the_bound_are_dropped() -> None:
    with served(Echo(), connections=3, lifespan="off") as at, ExitStack() as stack:
        where = at.removeprefix("http://").split(":")
        held = [stack.enter_context(socket.create_connection((where[0], int(where[1])))) for _ in range(3)]
        wait_for(lambda: _dropped(at))
        for s in held:
            s.close()
        wait_for(lambda: not _dropped(at))


def _dropped(at: str) -> bool:
    try:
        return httpx.get(at).status_code != 200
    except httpx.TransportError:
        return True
