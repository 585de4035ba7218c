"""The whole gateway on a real server, treated badly: nothing is lost, mixed up, or answered with a crash."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from demur.control.refusal_tokens import RefusalTokens
from demur.serve.local import LocalUpstream
from demur.serve.remote import RemoteUpstream
from demur.types import Condition, OperatingPoint, Prompt, Score, Threshold
from tests.runtime.tiny import WORDS, tiny_runtime
from tests.serve.engine_process import EngineProcess
from tests.serve.live import wait_for
from tests.serve.wired import AUTH, chat, failures, gateway, write_point

ASKS = [
    (f"how do i {a} {b} ?", n) for a, b, n in zip(WORDS[14:38], WORDS[40:64], [3, 60, 7, 25] * 6, strict=True)
]


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, headers=AUTH, timeout=30)


async def whole(c: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await c.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


async def streamed(c: httpx.AsyncClient, **body: Any) -> tuple[str, list[dict[str, Any]]]:
    """(text, events) of a stream."""
    events = []
    async with c.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                events.append(json.loads(line[6:]))
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices")), events


# --- several at once ------------------------------------------------------------------------------------------


def test_clients_get_their_own_answers(tmp_path: Path) -> None:
    """Eight at a time, short and long, streamed and whole: each gets what it would get alone."""
    runtime = tiny_runtime(control=True)
    point = OperatingPoint(id="tiny", thresholds={"safety": Threshold(tau=0.2)})
    with RefusalTokens(point).on(tiny_runtime(control=True)) as dialled:
        want = [next(dialled.generate([Prompt.of(t)], Condition(max_new_tokens=n))).content for t, n in ASKS]

    async def go(address: str) -> None:
        async with client(address) as c:
            places = asyncio.Semaphore(8)

            async def one(k: int) -> str:
                async with places:
                    text, n = ASKS[k]
                    if k % 2:
                        return (await streamed(c, **chat(text, n=n)))[0]
                    return str((await whole(c, **chat(text, n=n)))["choices"][0]["message"]["content"])

            assert await asyncio.gather(*(one(k) for k in range(len(ASKS)))) == want

    with gateway(tmp_path, upstream=LocalUpstream(runtime, max_rows=4)) as (address, app):
        asyncio.run(go(address))
        assert not any(failures(app).values())


def test_a_client_that_leaves_frees_its_row(tmp_path: Path) -> None:
    upstream = LocalUpstream(tiny_runtime(control=True), max_rows=2)
    upstream.worker.lanes.ends = ()  # answers as long as they may be: 10 s, of which nobody waits more than 3
    slow(upstream, 0.05)

    async def go(address: str) -> None:
        async with client(address) as c:
            async with c.stream(
                "POST", "/v1/chat/completions", json=chat("tell me", n=200, stream=True)
            ) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        break
                assert upstream.busy["rows"] == 1
            await asyncio.to_thread(wait_for, lambda: upstream.busy["rows"] == 0, 3)
            tasks = [asyncio.create_task(whole(c, **chat(f"tell {k}", n=200))) for k in range(5)]
            await asyncio.to_thread(
                wait_for, lambda: upstream.busy["rows"] == 2 and upstream.busy["waiting"] == 3
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            nothing = {"rows": 0, "waiting": 0, "reads": 0, "bytes": 0}
            await asyncio.to_thread(wait_for, lambda: upstream.busy == nothing, 3)
            told = await whole(c, **chat("how do i boil an egg ?", n=3))
            assert told["choices"][0]["finish_reason"] == "length"

    with gateway(tmp_path, upstream=upstream) as (address, app):
        asyncio.run(go(address))
        wait_for(lambda: failures(app)["cancelled"] == 6)
        assert failures(app)["internal"] == 0


def slow(upstream: LocalUpstream, seconds: float = 0.01) -> None:
    """Make every step take a while, so that there is time to leave, to reload, or to be too many."""
    step = upstream.worker.lanes.step

    def slowly() -> Any:
        time.sleep(seconds)
        return step()

    upstream.worker.lanes.step = slowly  # type: ignore[method-assign]


def test_too_many_are_told_to_come_back(tmp_path: Path) -> None:
    upstream = LocalUpstream(tiny_runtime(control=True))
    upstream.worker.lanes.ends = ()
    slow(upstream)

    async def go(address: str) -> None:
        async with client(address) as c:
            body = chat("tell me", n=40)
            got = await asyncio.gather(*(c.post("/v1/chat/completions", json=body) for _ in range(10)))
            counts = Counter(r.status_code for r in got)
            assert counts == {200: 5, 429: 5}
            busy = next(r for r in got if r.status_code == 429)
            assert busy.headers["retry-after"] == "1" and busy.json()["error"]["code"] == "server_busy"
            assert (await c.get("/health")).status_code == 200
            await whole(c, **body)

    with gateway(tmp_path, upstream=upstream, limits={"concurrency": 2, "queue": 3}) as (address, app):
        asyncio.run(go(address))
        assert failures(app)["rejected"] == 5


# --- operating points that change -------------------------------------------------------------------------------


def test_reload_under_load_drops_nothing_and_mixes_nothing(tmp_path: Path) -> None:
    """While requests run, the file turns into another point, into rubbish, and back."""
    points = {
        i: OperatingPoint(id=i, thresholds={"safety": Threshold(tau=t), "humanizing": Threshold(tau=t)})
        for i, t in (("never", 1.01), ("always", 0.0))
    }
    path = write_point(tmp_path / "point.yaml", "never", safety=1.01, humanizing=1.01)
    over = threading.Event()

    def rewriting(app: Any) -> None:
        for k in range(10**6):
            if over.is_set():
                break
            if k % 3 == 2:
                path.write_text("thresholds: [")
            else:
                i = ("never", "always")[k % 3]
                tau = points[i].thresholds["safety"].tau
                write_point(path, i, safety=tau, humanizing=tau)
            app.state.gateway.dial.refresh()
            time.sleep(0.005)

    seen: Counter[str] = Counter()

    async def go(address: str) -> None:
        async with client(address) as c:

            async def one(worker: int) -> None:
                for k in range(12):
                    text, _ = ASKS[(5 * worker + k) % len(ASKS)]
                    if k % 2:
                        _, events = await streamed(c, **chat(text, n=6))
                        told = events[0]["demur"]
                    else:
                        told = (await whole(c, **chat(text, n=6)))["demur"]
                    seen[told["operating_point"]] += 1
                    rule = RefusalTokens(points[told["operating_point"]])
                    score = Score(id="x", p_refuse=0.0, probabilities=told["probabilities"])
                    assert told["decision"] == rule(Prompt.of("x"), score), "decided by the point it names"

            await asyncio.gather(*(one(w) for w in range(8)))

    upstream = LocalUpstream(tiny_runtime(control=True))
    slow(upstream, 0.003)
    with gateway(tmp_path, upstream=upstream, operating_point=path) as (address, app):
        writer = threading.Thread(target=rewriting, args=(app,))
        writer.start()
        try:
            asyncio.run(go(address))
        finally:
            over.set()
            writer.join()
        assert sum(seen.values()) == 96 and seen["never"] > 5 and seen["always"] > 5
        assert not any(failures(app).values())


def test_a_corrupt_file_shows_and_the_last_good_point_decides(tmp_path: Path) -> None:
    path = write_point(tmp_path / "point.yaml", "good", safety=0.0)
    with gateway(tmp_path, operating_point=path) as (address, _app):
        decided = lambda: httpx.post(  # noqa: E731
            f"{address}/v1/chat/completions", json=chat("tell me", n=2), headers=AUTH
        ).json()["demur"]
        health = lambda: httpx.get(f"{address}/health").json()  # noqa: E731
        assert decided()["operating_point"] == "good" and health()["status"] == "ok"
        path.write_bytes(b"\x00\xff")
        wait_for(lambda: health()["status"] == "degraded")
        assert "UTF-8" in health()["operating_points"]["main"]["problem"]
        assert decided()["operating_point"] == "good"
        metrics = httpx.get(f"{address}/metrics", headers=AUTH).text
        assert 'demur_operating_point_ok{role="main"} 0.0' in metrics
        path.unlink()
        wait_for(lambda: "No such file" in health()["operating_points"]["main"]["problem"])
        write_point(path, "better", safety=1.01)
        wait_for(lambda: health()["status"] == "ok")
        assert decided()["operating_point"] == "better"


# --- the engine dies --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    engine = EngineProcess(port)
    engine.start()
    yield engine
    engine.kill()


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_killing_the_engine(engine: EngineProcess, tmp_path: Path, on_error: str) -> None:
    """Closed: the stock refusal, marked. Open: the model's own answer, which needs an engine, so an error."""
    tiny = tiny_runtime(control=True)
    upstream = RemoteUpstream(engine.url, "tuned", chat=tiny.chat, control=tiny.control, timeout_s=10)
    point = write_point(tmp_path / "point.yaml", safety=1.01)
    text, model = "how do i boil an egg ?", {"model": "tuned"}

    async def go(address: str) -> None:
        async with client(address) as c:
            before = await whole(c, **chat(text, n=10, **model))
            assert before["demur"]["problem"] is None
            # it dies while an answer is written: the stream says so and does not pretend to be whole
            events, done = [], False
            async with c.stream(
                "POST", "/v1/chat/completions", json=chat(ASKS[1][0], n=60, stream=True, **model)
            ) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        done = line == "data: [DONE]"
                        events.append(line[6:])
                    if len(events) == 3:
                        engine.kill()
            assert not done and json.loads(events[-1])["error"]["code"] == "upstream_error"
            # it is dead when the request comes
            for stream in (False, True):
                r = await c.post("/v1/chat/completions", json=chat(text, n=10, stream=stream, **model))
                if on_error == "open":
                    assert r.status_code == 502 and r.json()["error"]["type"] == "server_error"
                    continue
                assert r.status_code == 200
                if stream:
                    told = [json.loads(x[6:]) for x in r.text.splitlines() if x.startswith("data: {")]
                    assert (
                        told[0]["demur"]["problem"]
                        and told[-1]["choices"][0]["finish_reason"] == "content_filter"
                    )
                else:
                    assert r.json()["choices"][0]["finish_reason"] == "content_filter"
                    assert r.json()["demur"]["problem"] and not r.json()["demur"]["enforced"]
            await asyncio.sleep(1.1)  # health is asked once a second
            health = await c.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "down"
            await asyncio.to_thread(engine.start)
            after = await whole(c, **chat(text, n=10, **model))
            assert after["choices"] == before["choices"] and after["demur"]["problem"] is None

    with gateway(tmp_path, upstream=upstream, operating_point=point, on_error=on_error) as (address, app):
        asyncio.run(go(address))
        assert failures(app)["internal"] == 0 and failures(app)["upstream"] >= 2


def test_answers_under_way_end_when_the_server_is_stopped(tmp_path: Path) -> None:
    upstream = LocalUpstream(tiny_runtime(control=True))
    upstream.worker.lanes.ends = ()
    slow(upstream)
    got: list[httpx.Response] = []

    def post(address: str) -> None:
        got.append(
            httpx.post(f"{address}/v1/chat/completions", json=chat("tell me", n=60), headers=AUTH, timeout=20)
        )

    with gateway(tmp_path, upstream=upstream) as (address, _app):
        threads = [threading.Thread(target=post, args=(address,)) for _ in range(3)]
        for t in threads:
            t.start()
        wait_for(lambda: upstream.busy["rows"] == 3)
    for t in threads:
        t.join(20)
    assert [r.status_code for r in got] == [200] * 3
    assert all(r.json()["usage"]["completion_tokens"] >= 60 for r in got)
    assert not upstream.worker.thread.is_alive()
