"""The whole gateway over HTTP: a real server on loopback, the official client, curl."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from demur.errors import InputError, UpstreamError
from demur.files import dump_operating_point
from demur.serve import app as app_module
from demur.serve.app import create_app
from demur.serve.base import Ask, Piece, Stop
from demur.serve.local import LocalUpstream, base_view
from demur.serve.remote import RemoteUpstream
from demur.serve.settings import REFUSALS, Limits, Settings
from demur.types import RESPOND, OperatingPoint, Prompt, Score, Threshold
from tests.runtime.tiny import tiny_runtime
from tests.serve.double import Engine
from tests.serve.live import served, wait_for

NAMES = ("safety", "humanizing", "respond")
KEY = "a-key-of-sixteen-or-more"
POINT = OperatingPoint(id="main", thresholds={c: Threshold(tau=0.5) for c in NAMES[:-1]})


class Upstream:
    """Refuses bombs; other words in a prompt make it misbehave in known ways."""

    name = "made-up"
    names: tuple[str, ...] = NAMES
    fingerprint: str | None = None
    dtype: str | None = None
    losses: tuple[str, ...] = ("Everything is made up.",)
    has_base = False
    passes = frozenset({"top_k"})

    def __init__(self) -> None:
        self.asked: list[tuple[Ask, str | None]] = []
        self.bare: list[bool] = []
        self.freed = self.closed = 0
        self.down: str | None = None

    async def read(self, ask: Ask, T: float = 1.0) -> Score:
        text = ask.prompt.text
        if "unreadable" in text:
            raise UpstreamError("the engine is away")
        if "too long" in text:
            raise InputError("the prompt is too long")
        if "hangs" in text:
            await asyncio.sleep(60)
        safety = 0.9 if "bomb" in text else 0.1
        p = {"safety": safety, "humanizing": 0.01, RESPOND: 0.98 - safety}
        return Score(
            id=ask.prompt.id, p_refuse=safety + 0.01, probabilities=p, T=T, token=max(p, key=lambda c: p[c])
        )

    async def answer(self, ask: Ask, category: str | None, *, bare: bool = False) -> AsyncIterator[Piece]:
        self.asked.append((ask, category))
        self.bare.append(bare)
        text = ask.prompt.text
        try:
            if "silent" in text:
                raise UpstreamError("the engine is away")
            yield Piece(control_token=category)
            if "bug" in text:
                raise KeyError(text)
            for word in ("Sorry, ", "no.") if category == "safety" else ("Gladly: ", "here ", "\u2603."):
                yield Piece(text=word)
                if "slowly" in text:
                    await asyncio.sleep(0.2)
            if "breaks" in text:
                raise UpstreamError("the engine broke off")
            if "endless" in text:
                await asyncio.sleep(60)
            if "halts" in text:
                stop = Stop(by="probe", at=3, p=0.9, threshold=0.7)
                yield Piece(finish="content_filter", stop=stop, prompt_tokens=4, completion_tokens=3)
            else:
                yield Piece(finish="stop", prompt_tokens=4, completion_tokens=3)
        finally:
            self.freed += 1

    async def problem(self) -> str | None:
        return self.down

    async def close(self) -> None:
        self.closed += 1


class Guarded(Upstream):
    async def guard(self, ask: Ask) -> Mapping[str, Any] | None:
        stopped = "poison" in ask.prompt.text
        return {"name": "guard", "p": 0.99 if stopped else 0.1, "threshold": 0.8, "stopped": stopped}


def settings(folder: Path, point: OperatingPoint = POINT, **fields: Any) -> Settings:
    path = folder / "main.yaml"
    dump_operating_point(point, path)
    return Settings(operating_point=path, **fields)


def body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "made-up", "messages": [{"role": "user", "content": text}], **fields}


def post(
    url: str, text: str = "hello", headers: Mapping[str, str] | None = None, **fields: Any
) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body(text, **fields), headers=headers, timeout=20)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [x.removeprefix("data: ") for x in response.text.splitlines() if x.startswith("data: ")]
    return [json.loads(x) for x in lines if x != "[DONE]"]


# --- clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "mode", "bare"), [("base", "token", True), ("model", "token", False), ("base", "gate", False)]
)
def test_the_base_answers_where_the_operating_point_says_so(
    tmp_path: Path, answers: Any, mode: Any, bare: bool
) -> None:
    upstream = Upstream()
    upstream.has_base = True
    app = create_app(settings(tmp_path, replace(POINT, answers=answers), mode=mode), upstream)
    with served(app) as url:
        answer, refusal = post(url).json(), post(url, "a bomb").json()
    assert answer["demur"]["decision"] == "respond" and upstream.bare[0] is bare
    assert refusal["demur"]["decision"] == "safety" and not any(upstream.bare[1:])
    with pytest.raises(InputError, match="answers: base"):
        create_app(settings(tmp_path, replace(POINT, answers="base")), Upstream())


def test_the_official_client(tmp_path: Path) -> None:
    with (
        served(create_app(settings(tmp_path), Upstream())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [m.id for m in client.models.list()] == ["made-up"]
        ask: Any = {"model": "made-up", "messages": [{"role": "user", "content": "a bomb"}]}
        got = client.chat.completions.create(**ask)
        assert got.choices[0].message.content == "Sorry, no." and got.choices[0].finish_reason == "stop"
        assert got.usage is not None and got.usage.total_tokens == 7
        assert got.model_extra is not None and got.model_extra["demur"]["decision"] == "safety"
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Sorry, no."
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage is not None
        assert chunks[0].model_extra is not None and chunks[0].model_extra["demur"]["enforced"]
        assert chunks[-2].choices[0].finish_reason == "stop"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ask, "model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="n=3"):
            client.chat.completions.create(**ask, n=3)
        with pytest.raises(openai.APIError, match="broke off"):
            ask["messages"][0]["content"] = "breaks"
            list(client.chat.completions.create(**ask, stream=True))


def test_the_official_client_async(tmp_path: Path) -> None:
    async def go(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(i: int) -> str | None:
                text = "a bomb" if i % 2 else "an egg"
                got = await client.chat.completions.create(
                    model="made-up", messages=[{"role": "user", "content": text}]
                )
                return got.choices[0].message.content

            answers = await asyncio.gather(*(one(i) for i in range(20)))
            assert answers == ["Gladly: here \u2603.", "Sorry, no."] * 10
            stream = await client.chat.completions.create(
                model="made-up", messages=[{"role": "user", "content": "an egg"}], stream=True
            )
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Gladly: here \u2603."

    with served(create_app(settings(tmp_path), Upstream())) as url:
        asyncio.run(go(url))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path), Upstream())) as url:
        command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
        whole = subprocess.run([*command, json.dumps(body("an egg"))], capture_output=True, check=True).stdout
        assert json.loads(whole)["choices"][0]["message"]["content"] == "Gladly: here \u2603."
        stream = subprocess.run(
            [*command, json.dumps(body(stream=True))], capture_output=True, check=True
        ).stdout
        assert stream.startswith(b"data: {") and stream.rstrip().endswith(b"data: [DONE]")


# --- decisions --------------------------------------------------------------------------------------------------


def test_the_decided_token_is_forced_and_told(tmp_path: Path) -> None:
    upstream = Upstream()
    with served(create_app(settings(tmp_path), upstream)) as url:
        got = post(url, "a bomb", top_k=3, user="jo").json()["demur"]
        assert (got["decision"], got["enforced"], got["control_token"]) == ("safety", True, "safety")
        assert got["probabilities"]["safety"] == 0.9 and got["operating_point"] == "main"
        assert got["source"] == "model" and got["ignored"] == ["user"]
        assert post(url, "an egg").json()["demur"]["decision"] == "respond"
    assert [c for _, c in upstream.asked] == ["safety", "respond"]
    assert upstream.asked[0][0].passed == {"top_k": 3}
    assert upstream.closed == 1


def test_shadow_mode_leaves_the_answer_alone(tmp_path: Path) -> None:
    shadow = OperatingPoint(id="s", thresholds={"safety": Threshold(tau=0.5, mode="shadow")})
    upstream = Upstream()
    with served(create_app(settings(tmp_path, shadow), upstream)) as url:
        got = post(url, "a bomb").json()
    assert got["choices"][0]["message"]["content"] == "Gladly: here \u2603."
    assert (got["demur"]["shadow"], got["demur"]["enforced"]) == ("safety", False)
    assert upstream.asked[0][1] is None


def test_gate_mode(tmp_path: Path) -> None:
    upstream = Upstream()
    app = create_app(settings(tmp_path, mode="gate", refusals={"safety": "Not here."}), upstream)
    with served(app) as url:
        refused, passed = post(url, "a bomb").json(), post(url, "an egg").json()
        streamed = events(post(url, "a bomb", stream=True))
    choice = refused["choices"][0]
    assert choice["message"]["content"] == "Not here." and choice["finish_reason"] == "content_filter"
    assert refused["demur"]["source"] == "operator" and passed["demur"]["source"] == "model"
    assert [c for _, c in upstream.asked] == [None]  # nothing is forced, refused prompts are not asked
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == "Not here."
    with pytest.raises(InputError, match="nothing decides"):
        create_app(Settings(mode="gate"), upstream)


def test_what_cannot_be_read_is_refused_or_answered_as_declared(tmp_path: Path) -> None:
    for on_error, text, finish, source in (
        ("closed", REFUSALS["error"], "content_filter", "operator"),
        ("open", "Gladly: here \u2603.", "stop", "model"),
    ):
        with served(create_app(settings(tmp_path, on_error=on_error), Upstream())) as url:
            got = post(url, "unreadable").json()
            assert got["choices"][0]["message"]["content"] == text
            assert got["choices"][0]["finish_reason"] == finish
            assert got["demur"]["problem"] == "the engine is away" and got["demur"]["source"] == source
            assert got["demur"]["decision"] is None and got["demur"]["p_refuse"] is None
            metrics = httpx.get(f"{url}/metrics").text
            assert "demur_undecided_total 1.0" in metrics
            assert 'demur_failures_total{kind="upstream"} 1.0' in metrics


def test_a_guard_stops_before_the_model(tmp_path: Path) -> None:
    upstream = Guarded()
    with served(create_app(settings(tmp_path), upstream)) as url:
        got = post(url, "poison").json()
        assert got["choices"][0]["finish_reason"] == "content_filter" and got["demur"]["guard"]["stopped"]
        assert got["choices"][0]["message"]["content"] == REFUSALS["safety"]
        assert not post(url, "hello").json()["demur"]["guard"]["stopped"]
    assert len(upstream.asked) == 1


def test_a_stop_inside_an_answer(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path), Upstream())) as url:
        whole, stream = post(url, "halts").json(), events(post(url, "halts", stream=True))
    assert whole["choices"][0]["message"]["content"] == REFUSALS["safety"]
    assert whole["demur"]["stopped"] == {"by": "probe", "at": 3, "p": 0.9, "threshold": 0.7}
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in stream)
    assert text == f"Gladly: here \u2603.\n\n{REFUSALS['safety']}"
    assert stream[0]["demur"]["stopped"] is None and stream[-1]["demur"]["stopped"]["at"] == 3
    assert stream[-1]["choices"][0]["finish_reason"] == "content_filter"


def test_overrides(tmp_path: Path) -> None:
    dump_operating_point(
        OperatingPoint(id="strict", thresholds={"safety": Threshold(tau=0.05)}), tmp_path / "strict.yaml"
    )
    with served(create_app(settings(tmp_path, overrides=("strict",)), Upstream())) as url:
        got = post(url, "an egg", demur={"operating_point": "strict"}).json()["demur"]
        assert (got["decision"], got["operating_point"]) == ("safety", "strict")
        refused = post(url, "an egg", demur={"operating_point": "main"})
        assert refused.status_code == 403 and "overrides" in refused.json()["error"]["message"]


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path), Upstream())) as url:
        assert post(url, "an egg").json()["demur"]["decision"] == "respond"
        dump_operating_point(
            OperatingPoint(id="strict", thresholds={"safety": Threshold(tau=0.05)}), tmp_path / "main.yaml"
        )
        wait_for(lambda: httpx.get(f"{url}/health").json()["operating_points"]["main"]["id"] == "strict")
        assert post(url, "an egg").json()["demur"]["decision"] == "safety"
        (tmp_path / "main.yaml").write_text("broken: [")
        wait_for(lambda: httpx.get(f"{url}/health").json()["status"] == "degraded")
        assert post(url, "an egg").json()["demur"]["operating_point"] == "strict"


def test_a_hangup_signal_looks_at_the_files_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[float] = []

    class Watched:
        def refresh(self) -> bool:
            looked.append(time.monotonic())
            return False

    async def go() -> None:
        async with app_module._watching(Watched()):  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGHUP)
            while not looked:
                await asyncio.sleep(0.01)

    monkeypatch.setattr(app_module, "RELOAD_S", 1000.0)
    before = signal.getsignal(signal.SIGHUP)
    asyncio.run(asyncio.wait_for(go(), 10))
    assert signal.getsignal(signal.SIGHUP) == before


# --- errors -----------------------------------------------------------------------------------------------------


def test_errors_have_openais_form(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path, limits=Limits(body_bytes=2000)), Upstream())) as url:
        chat = f"{url}/v1/chat/completions"
        cases = [
            (post(url, "hello", temperature=9), 400),
            (post(url, "too long"), 400),
            (post(url, "too long", stream=True), 400),
            (post(url, "silent"), 502),
            (post(url, "silent", stream=True), 502),
            (post(url, "breaks"), 502),
            (post(url, "bug"), 500),
            (post(url, "x" * 3000), 413),
            (httpx.post(chat, content=b"{", headers={"content-type": "application/json"}), 400),
            (httpx.post(chat, content=json.dumps(body())), 415),
            (httpx.post(chat, content=json.dumps(body()), headers={"content-type": "text/plain"}), 415),
            (httpx.get(chat), 405),
            (httpx.get(f"{url}/v1/completions"), 404),
            (httpx.post(chat, json={**body(), "model": "other"}), 404),
        ]
    for response, status in cases:
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["message"] and set(error) >= {"message", "type", "code"}


def test_a_break_inside_a_stream_is_an_event(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path), Upstream())) as url:
        got = events(post(url, "breaks", stream=True))
    assert got[-1]["error"]["message"] == "the engine broke off"


def test_time_is_limited(tmp_path: Path) -> None:
    upstream = Upstream()
    with served(create_app(settings(tmp_path, limits=Limits(timeout_s=0.3)), upstream)) as url:
        assert post(url, "hangs").json()["demur"]["problem"].startswith("the engine took longer")
        assert post(url, "endless").status_code == 502
        assert "took longer" in events(post(url, "endless", stream=True))[-1]["error"]["message"]
    assert upstream.freed == 2


# --- clients that leave, servers that stop ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(tmp_path: Path, stream: bool) -> None:
    upstream = Upstream()
    with served(create_app(settings(tmp_path), upstream)) as url:
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps(body("endless", stream=stream)).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", f"host: {host}", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(content)}", "", ""])
        with socket.create_connection((host, int(port))) as s:
            s.sendall(head.encode() + content)
            wait_for(lambda: upstream.asked)
            if stream:
                assert s.recv(100)
        wait_for(lambda: upstream.freed == 1)
        wait_for(lambda: 'demur_failures_total{kind="cancelled"} 1.0' in httpx.get(f"{url}/metrics").text)


SERVER = """
import sys
from pathlib import Path
from demur.serve import app as app_module
from demur.serve.app import create_app
from demur.serve.settings import Settings
from demur.serve.start import server
from tests.serve.pages import Scripted

settings = Settings.load(sys.argv[1])
server(create_app(settings, Scripted()), settings).run()
"""


def test_answers_under_way_end_before_the_server_does(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "serve.yaml").write_text(f"port: {port}")
    command = [sys.executable, "-c", SERVER, str(tmp_path / "serve.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(url) or process.poll() is not None, 60)
            ask = {**body("hello", stream=True), "model": "scripted"}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask, timeout=20) as r:
                lines = r.iter_lines()
                assert next(lines).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and '"finish_reason": "stop"' in rest[-2]
            process.wait(20)
            assert not answers(url)
            assert process.stderr is not None and b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


# --- what is told -----------------------------------------------------------------------------------------------


def test_health_about_and_metrics(tmp_path: Path) -> None:
    upstream = Upstream()
    with served(create_app(settings(tmp_path), upstream)) as url:
        assert httpx.get(f"{url}/health").json() == {
            "status": "ok",
            "upstream": None,
            "operating_points": {"main": {"id": "main", "problem": None}},
            "drift_alarm": False,
        }
        post(url, "a bomb")
        assert 'demur_answers_total{finish="stop",opened="safety"} 1.0' in httpx.get(f"{url}/metrics").text
        about = httpx.get(f"{url}/demur/about").json()
        assert about["losses"] == ["Everything is made up."] and about["operating_point"]["id"] == "main"
        assert about["passed_on"] == ["top_k"] and any("no API keys" in c for c in about["cautions"])
        upstream.down = "away"
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)


def test_without_a_key_only_health_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEYS", KEY)
    app = create_app(settings(tmp_path, keys={"env": "SERVE_KEYS"}), Upstream())
    routes = {(r.path, m) for r in app.routes for m in getattr(r, "methods", ())}  # type: ignore[attr-defined]
    with served(app) as url:
        for path, method in sorted(routes):
            response = httpx.request(method, url + path)
            assert response.status_code == (200 if path == "/health" else 401), path
        ok = {"authorization": f"Bearer {KEY}"}
        assert post(url, headers=ok).status_code == 200
        assert post(url, headers={"authorization": f"Bearer {KEY}x"}).status_code == 401


def test_a_page_of_another_site_gets_nothing(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path), Upstream())) as url:
        for headers in (
            {"host": "evil.example"},
            {"origin": "https://evil.example"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert post(url, headers=headers).status_code == 403


def test_a_file_for_texts_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="texts"):
        create_app(settings(tmp_path, texts=tmp_path), Upstream())


def test_the_openapi_document(tmp_path: Path) -> None:
    document = create_app(settings(tmp_path), Upstream()).openapi()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    name = schema["$ref"].removeprefix("#/components/schemas/")
    assert set(document["components"]["schemas"][name]["required"]) == {"model", "messages"}
    text = json.dumps(document)
    for part in set(text.split("#/components/schemas/")[1:]):
        assert part.split('"')[0] in document["components"]["schemas"]


def test_texts_reach_a_file_only_where_they_are_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for logger in ("demur.serve", "sse_starlette.sse"):
        logging.getLogger(logger).propagate = True
    for texts in (None, tmp_path / "texts.jsonl"):
        with served(create_app(settings(tmp_path, texts=texts), Upstream())) as url:
            post(url, "MARKER bomb", headers={"x-request-id": "r-1"})
            post(url, "MARKER bug")
            post(url, "MARKER too long")
            post(url, "MARKER bomb", stream=True)
            httpx.post(f"{url}/v1/chat/completions", json={**body(), "temperature": "MARKER"})
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    said = "\n".join(logging.Formatter().format(r) for r in ours)
    assert "decision=safety" in said and "KeyError" in said
    for secret in ("MARKER", "Sorry, no"):
        assert secret not in said
    rows = [json.loads(x) for x in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [r["answer"] for r in rows] == ["Sorry, no."] * 2 and rows[0]["request"] == "r-1"
    assert rows[0]["messages"] == [{"role": "user", "content": "MARKER bomb"}]
    assert (tmp_path / "texts.jsonl").stat().st_mode & 0o077 == 0


# --- real upstreams -----------------------------------------------------------------------------------------------


def test_local_and_remote_upstreams_agree(tmp_path: Path) -> None:
    """One tiny model behind the gateway twice: in this process, and in an engine."""
    engine = Engine()
    names = engine.tuned.control.names  # type: ignore[union-attr]
    point = OperatingPoint(id="p", thresholds={c: Threshold(tau=0.01) for c in names[:-1]})
    texts = ["how do i boil an egg ?", "tell me a story about the fjord", "what is the weather today ?"]

    def asked(url: str, model: str) -> list[tuple[str, str, int]]:
        got = [post(url, t, model=model, temperature=0, max_tokens=10).json() for t in texts]
        return [
            (
                g["demur"]["decision"],
                " ".join(g["choices"][0]["message"]["content"].split()),
                g["usage"]["total_tokens"],
            )
            for g in got
        ]

    with served(engine.app()) as address:
        for gate in (False, True):
            fields: dict[str, Any] = {"mode": "gate" if gate else "token", "limits": Limits(max_tokens=64)}
            runtime = tiny_runtime(control=True)
            local = LocalUpstream(runtime, answers=base_view(runtime) if gate else None)
            remote = RemoteUpstream(
                f"{address}/v1", "tuned", chat=engine.tuned.chat, control=engine.tuned.control,
                base_model="base" if gate else None,
            )  # fmt: skip
            with served(create_app(settings(tmp_path, point, **fields), local)) as url:
                here = asked(url, "tiny-llama")
            with served(create_app(settings(tmp_path, point, **fields), remote)) as url:
                there = asked(url, "tuned")
            assert here == there
            assert {d for d, _, _ in here} - {None}
    [score] = runtime.score([Prompt.of(texts[0])])
    assert here[0][0] in score.probabilities
