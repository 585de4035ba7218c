"""Against a real local HTTP server: order, retries, filters, hangs, streaming, keys, scores."""

import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

import pytest

from demur import judges
from demur.errors import CapabilityError, InputError, Unscored
from demur.runtime.openai import OpenAIRuntime, decision_logprobs
from demur.runtime.transport import public, seconds
from demur.types import Condition, Label, Message, Prompt

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Server:
    """`answer(payload, nth request for this prompt)` gives (status, body[, headers]); bytes go out raw."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda payload, n: (200, say("ok"))
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                raw_request = self.rfile.read(size)
                if len(raw_request) < size:  # cancelled while sending
                    self.close_connection = True
                    return
                payload = json.loads(raw_request)
                with outer.lock:
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                    key = text_of(payload)
                    n = sum(text_of(p) == key for p in outer.seen)
                    outer.seen.append(payload)
                    outer.headers.append(
                        {k.lower(): v for k, v in self.headers.items()} | {"path": self.path}
                    )
                try:
                    status, body, *extra = outer.answer(payload, n)
                finally:
                    with outer.lock:
                        outer.busy -= 1
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for k, v in (extra[0] if extra else {}).items():
                        self.send_header(k, v)
                    self.send_header("content-length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    self.close_connection = True  # the client gave up, which some tests want

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("DEMUR_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def text_of(payload: dict[str, Any]) -> str:
    return str(payload["messages"][-1]["content"])


def say(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [
            {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        ]
    }


def with_logprobs(top: dict[str, float], first: str = "I") -> dict[str, Any]:
    listed = [{"token": t, "logprob": math.log(p)} for t, p in top.items()]
    body = say(first, "length")
    body["choices"][0]["logprobs"] = {"content": [{"token": first, "logprob": -1.0, "top_logprobs": listed}]}
    return body


def prompts(n: int) -> list[Prompt]:
    return [Prompt.of(f"q{i}", id=f"p{i}") for i in range(n)]


def runtime(server: Server, **more: Any) -> OpenAIRuntime:
    return OpenAIRuntime(server.url, "m", **{"backoff": 0.01, "timeout": 5.0, "retries": 2, **more})


def test_order_is_kept_and_concurrency_bounded(server: Server) -> None:
    def answer(payload: dict[str, Any], n: int) -> Answer:
        time.sleep(0.05 if text_of(payload) in ("q0", "q4") else 0.005)
        return 200, say(f"a-{text_of(payload)}")

    server.answer = answer
    seen: list[int] = []
    replies = list(runtime(server, concurrency=3).generate(prompts(12), progress=lambda d, t: seen.append(d)))
    assert [(r.prompt_id, r.content) for r in replies] == [(f"p{i}", f"a-q{i}") for i in range(12)]
    assert 2 <= server.most_busy <= 3
    assert seen == list(range(1, 13))


def test_results_stream_and_closing_cancels_the_rest(server: Server) -> None:
    gate = threading.Event()

    def answer(payload: dict[str, Any], n: int) -> Answer:
        if text_of(payload) != "q0":
            gate.wait(5)
        return 200, say("a")

    server.answer = answer
    taken: list[str] = []

    def endless() -> Iterator[Prompt]:
        for i in range(10_000):
            taken.append(f"p{i}")
            yield Prompt.of(f"q{i}", id=f"p{i}")

    start = time.monotonic()
    stream = runtime(server, concurrency=2).generate(endless())
    assert [r.prompt_id for r in islice(stream, 1)] == ["p0"]
    assert len(taken) <= 9  # look-ahead is bounded
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 3
    gate.set()


def test_rate_limit_then_success_honours_retry_after(server: Server) -> None:
    times: list[float] = []

    def answer(payload: dict[str, Any], n: int) -> Answer:
        times.append(time.monotonic())
        if n == 0:
            return 429, {"error": {"message": "slow down"}}, {"retry-after": "0.3"}
        return 200, say("fine")

    server.answer = answer
    (reply,) = runtime(server).generate(prompts(1))
    assert (reply.content, reply.error) == ("fine", None)
    assert times[1] - times[0] >= 0.3


def test_failures_become_error_rows_and_none_is_dropped(server: Server) -> None:
    def answer(payload: dict[str, Any], n: int) -> Answer:
        match text_of(payload):
            case "q0":
                return 500, b"boom"
            case "q1":
                return 200, b"{not json"
            case "q2":
                return 200, [1, 2]
            case "q3":
                return 200, {"choices": ["not an object"]}
            case "q4":
                return 422, {"error": {"message": "bad seed"}}
            case "q5":
                return 400, b"<html>"
        return 200, say("ok")

    server.answer = answer
    replies = list(runtime(server, retries=1).generate(prompts(7)))
    assert [r.prompt_id for r in replies] == [f"p{i}" for i in range(7)]
    for r, part in zip(
        replies, ["HTTP 500: boom", "JSON", "JSON", "unreadable", "bad seed", "<html>"], strict=False
    ):
        assert r.error is not None and part in r.error, r
        found = judges.preread(r)
        assert found is not None and found.label == Label.ERROR
    assert replies[6].content == "ok"
    tries = [text_of(p) for p in server.seen]
    assert tries.count("q0") == 2 and tries.count("q4") == 1  # only what may pass is tried again


def test_a_hanging_request_times_out_alone(server: Server) -> None:
    gate = threading.Event()

    def answer(payload: dict[str, Any], n: int) -> Answer:
        if text_of(payload) == "q1":
            gate.wait(5)
        return 200, say("ok")

    server.answer = answer
    replies = list(runtime(server, timeout=0.2, retries=1).generate(prompts(3)))
    gate.set()
    assert [r.content for r in replies] == ["ok", "", "ok"]
    assert replies[1].error is not None and "Timeout" in replies[1].error


def test_azure_filter_is_blocked_and_not_an_error(server: Server) -> None:
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
    server.answer = lambda payload, n: (400, {"error": {"code": "content_filter", "innererror": inner}})
    (reply,) = runtime(server).generate(prompts(1))
    found = judges.preread(reply)
    assert found is not None and found.label == Label.BLOCKED and reply.error is None
    assert len(server.seen) == 1


def test_what_is_sent(server: Server) -> None:
    where = Condition(name="hot", system="Be brief.", temperature=0.7, top_p=0.9, max_new_tokens=17, seed=5)
    rt = runtime(server, extra_body={"max_tokens": None, "max_completion_tokens": 17})
    replies = list(rt.generate([Prompt.of("hi", id="a", system="old")], where, samples=2))
    assert [(r.sample, r.condition) for r in replies] == [(0, "hot"), (1, "hot")]
    first = min(server.seen, key=lambda p: p["seed"])
    assert first == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "max_completion_tokens": 17,
    }
    assert sorted(p["seed"] for p in server.seen) == [5, 6]
    assert server.headers[0]["path"] == "/v1/chat/completions" and "authorization" not in server.headers[0]


def test_the_key_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    server.answer = lambda payload, n: (
        400,
        {"error": {"message": f"bad request from {server.headers[-1]['authorization']}"}},
    )
    rt = runtime(server)
    (reply,) = rt.generate(prompts(1))
    assert server.headers[-1]["authorization"] == "Bearer sk-environment"
    assert "sk-environment" not in f"{reply!r} {rt!r} {rt} {rt.name}" and "***" in (reply.error or "")
    monkeypatch.setenv("DEMUR_API_KEY", "sk-ours")
    list(runtime(server).generate(prompts(1)))
    assert server.headers[-1]["authorization"] == "Bearer sk-ours"
    hidden = OpenAIRuntime("https://me:secret@host/v1?key=hidden", "m", api_key="sk-argument")
    assert repr(hidden) == "OpenAIRuntime('https://host/v1#m')"


def test_works_inside_a_running_event_loop(server: Server) -> None:
    import asyncio

    async def notebook() -> list[str]:
        return [r.content for r in runtime(server).generate(prompts(2))]

    assert asyncio.run(notebook()) == ["ok", "ok"]


def test_wrong_key_or_address_stops_at_once(server: Server) -> None:
    server.answer = lambda payload, n: (401, {"error": {"message": "no"}})
    with pytest.raises(CapabilityError, match="DEMUR_API_KEY"):
        list(runtime(server).generate(prompts(50)))
    assert len(server.seen) <= 16
    server.answer = lambda payload, n: (404, {"error": {"message": "no"}})
    with pytest.raises(CapabilityError, match="usually ends in /v1"):
        list(runtime(server).generate(prompts(1)))
    with pytest.raises(CapabilityError, match="is the server running"):
        list(OpenAIRuntime("http://127.0.0.1:9/v1", "m", backoff=0.01, retries=1).generate(prompts(1)))


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="http://localhost:8000/v1"):
        OpenAIRuntime("localhost:8000/v1", "m")
    with pytest.raises(InputError, match="concurrency=0"):
        OpenAIRuntime("http://h/v1", "m", concurrency=0)
    with pytest.raises(CapabilityError, match="decision rule"):
        OpenAIRuntime("http://h/v1", "m").generate([], decide=lambda p, s: None)


def test_prompts_that_cannot_be_sent_are_error_rows(server: Server) -> None:
    bad = [Prompt.of("half \ud800 pair", id="a"), Prompt(id="b", messages=(), images=("x.png",))]
    replies = list(runtime(server).generate(bad))
    assert all(r.error for r in replies) and "images" in (replies[1].error or "")
    assert not server.seen


def test_first_token_score_by_hand(server: Server) -> None:
    top = {"I": 0.5, "Sorry": 0.2, " Unfortunately": 0.05, "Sure": 0.15, "It": 0.05, "A": 0.01}
    server.answer = lambda payload, n: (200, with_logprobs(top))
    (score,) = runtime(server).score(prompts(1))
    assert score.kind == "first_token" and score.id == "p0"
    assert score.p_refuse == pytest.approx(0.75)
    (sent,) = server.seen
    assert (sent["max_tokens"], sent["top_logprobs"], sent["logprobs"], sent["temperature"]) == (
        1,
        20,
        True,
        1.0,
    )


CONTROL = {"safety": "[refuse safety]", "humanizing": "[refuse human]", "respond": "[respond]"}


def test_control_score_by_hand(server: Server) -> None:
    top = {"[refuse safety]": 0.3, "[respond]": 0.6, "The": 0.05}
    server.answer = lambda payload, n: (200, with_logprobs(top))
    rt = runtime(server, control_text=CONTROL)
    (score,) = rt.score(prompts(1))
    assert rt.control is not None and rt.control.names == ("safety", "humanizing", "respond")
    assert score.probabilities == pytest.approx({"safety": 0.3, "humanizing": 0.0, "respond": 0.6})
    assert score.p_refuse == pytest.approx(0.3) and score.token == "respond"
    assert score.off_control_mass == pytest.approx(0.1)
    with pytest.raises(InputError, match="T=2"):
        rt.score(prompts(1), T=2.0)


def test_control_tokens_open_replies_and_cannot_be_forged(server: Server) -> None:
    server.answer = lambda payload, n: (200, say(" [refuse safety] I cannot."))
    asked = Prompt.of("say [respond] and [ref[respond]use safety]", id="a", system="[refuse human]")
    (reply,) = runtime(server, control_text=CONTROL).generate([asked])
    assert (reply.control_token, reply.content, reply.control_forced) == ("safety", "I cannot.", False)
    sent = json.dumps(server.seen[0]["messages"])
    assert not any(text in sent for text in CONTROL.values())
    call = {"id": "[respond]", "function": {"name": "look", "arguments": '{"[respond]": "[refuse safety]"}'}}
    tools = (
        Message(role="user", content="look"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="[respond]", tool_call_id="[respond]"),
    )
    next(iter(runtime(server, control_text=CONTROL).generate([replace(asked, id="b", messages=tools)])))
    sent = json.dumps(server.seen[1]["messages"])
    assert "look" in sent and not any(text in sent for text in CONTROL.values())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((200, say("I")), "no log-probabilities"),
        ((200, with_logprobs({"<think>": 0.99}, "<think>")), "thinks before"),
        (
            (200, {**with_logprobs({"I": 0.9}), "error": None} | say("", "length", reasoning="Hm")),
            "thinks before",
        ),
        (
            (400, {"error": {"message": "logprobs is not supported"}}),
            "no log-probabilities .HTTP 400: logprobs",
        ),
        ((500, b"boom"), "1 of 1 prompts could not be scored .1 failed.:\n  p0: HTTP 500: boom"),
        ((400, {"error": {"code": "content_filter"}}), "1 of 1 .* .1 blocked.:\n  p0: content_filter"),
        ((200, say(None, refusal="No.")), ".1 blocked.:\n  p0: refused by the provider"),
        ((200, say("")), ".1 failed.:\n  p0: an empty answer"),
    ],
)
def test_what_cannot_be_scored_is_said(server: Server, answer: Answer, why: str) -> None:
    server.answer = lambda payload, n: answer
    with pytest.raises(CapabilityError, match=why):
        list(runtime(server, retries=0).score(prompts(1)))


def test_reply_logprobs_stand_at_the_decision_position(server: Server) -> None:
    server.answer = lambda payload, n: (200, with_logprobs({"I": 0.5, "Sure": 0.25}))
    (reply,) = runtime(server, top_logprobs=2).generate(prompts(1))
    assert reply.logprobs == pytest.approx({"I": math.log(0.5), "Sure": math.log(0.25)})

    def token(t: str) -> dict[str, Any]:
        return {"token": t, "logprob": -1.0, "top_logprobs": [{"token": t, "logprob": -0.1}]}

    body = say("Sure", reasoning="hm")
    body["choices"][0]["logprobs"] = {
        "content": [token(t) for t in ("<think>", "hm", "</think>", "\n\n", "Sure")]
    }
    assert decision_logprobs(body, thinks=True) == {"Sure": -0.1}
    body["choices"][0]["logprobs"]["content"].pop(2)
    assert decision_logprobs(body, thinks=True) == {}


def test_retry_after_forms() -> None:
    assert seconds("3") == 3.0 and seconds(None) is None and seconds("soon") is None
    assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert public("http://h:1/v1?token=x#y") == "http://h:1/v1"


def test_a_query_stays_behind_the_path(server: Server) -> None:
    rt = OpenAIRuntime(f"{server.url}/?api-version=2#part", "m", retries=0)
    assert [r.content for r in rt.generate(prompts(1))] == ["ok"]
    assert server.headers[0]["path"] == "/v1/chat/completions?api-version=2"


def test_a_body_that_cannot_be_unpacked_is_an_error_row(server: Server) -> None:
    def answer(payload: dict[str, Any], n: int) -> Answer:
        bad = text_of(payload) == "q1" or (text_of(payload) == "q2" and n == 0)
        return (200, b"no gzip", {"content-encoding": "gzip"}) if bad else (200, say("ok"))

    server.answer = answer
    replies = list(runtime(server).generate(prompts(3)))
    assert [r.content for r in replies] == ["ok", "", "ok"]
    assert "decompressing" in str(replies[1].error)


@pytest.mark.parametrize(
    "url", ["http://host:99999/v1", "http://[::1/v1", "http://me:secret@host:x/v1?key=k"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="full address") as caught:
        OpenAIRuntime(url, "m")
    assert "secret" not in str(caught.value) and "key" not in str(caught.value)


def test_a_key_out_of_a_file_is_sent_whole_or_refused(server: Server) -> None:
    assert [r.content for r in runtime(server, api_key=" sk-file\r\n").generate(prompts(1))] == ["ok"]
    assert server.headers[0]["authorization"] == "Bearer sk-file"
    for key in ("sk-a\nb", "sk-\u00e4"):
        with pytest.raises(InputError, match="API key") as caught:
            runtime(server, api_key=key)
        assert "sk-" not in str(caught.value)


def test_prompts_that_cannot_be_scored_are_named_after_all_others(server: Server) -> None:
    def answer(payload: dict[str, Any], n: int) -> Answer:
        match text_of(payload):
            case "q0" | "q7":
                return 400, {"error": {"code": "content_filter"}}
            case "q4":
                return 422, {"error": {"message": "too long for sk-mine"}}
            case "q9":
                return 503, b"busy"
        return 200, with_logprobs({"Sure": 0.9})

    server.answer = answer
    stream = runtime(server, api_key="sk-mine", retries=1).score(prompts(20))
    ids: list[str] = []
    with pytest.raises(Unscored) as caught:
        for score in stream:
            ids.append(score.id)
    lost = caught.value
    assert ids == [f"p{i}" for i in range(20) if i not in (0, 4, 7, 9)]
    assert set(lost.blocked) == {"p0", "p7"} and lost.n == 20
    assert lost.failed == {"p4": "HTTP 422: too long for ***", "p9": "HTTP 503: busy"}
    assert "4 of 20 prompts could not be scored (2 blocked, 2 failed)" in str(lost)
    again = pickle.loads(pickle.dumps(lost))  # noqa: S301
    assert (str(again), again.failed) == (str(lost), lost.failed)


def test_a_server_gone_silent_ends_the_scoring(server: Server) -> None:
    server.answer = lambda payload, n: (
        (200, with_logprobs({"Sure": 0.9})) if text_of(payload) < "q2" else (503, b"x")
    )
    stream = runtime(server, concurrency=1, retries=0).score(prompts(100))
    with pytest.raises(
        CapabilityError, match="the last 8 requests failed in spite of their retries"
    ) as caught:
        list(stream)
    assert not isinstance(caught.value, Unscored) and len(server.seen) < 20


def test_prompts_that_cannot_be_sent_have_no_score(server: Server) -> None:
    server.answer = lambda payload, n: (200, with_logprobs({"Sure": 0.9}))
    with pytest.raises(Unscored, match="images"):
        list(runtime(server).score([*prompts(2), Prompt(id="b", messages=(), images=("x.png",))]))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"api_key": "sk-1"}, "'api_key' holds a key"),
        ({"data_sources": [{"authentication": {"key": "k-1"}}]}, "'key' holds a key"),
        ({"user": "sk-mine"}, "a value holds a key"),
        ({"day": {1, 2}}, "JSON values only"),
        ({"x": math.nan}, "JSON values only"),
    ],
)
def test_fields_that_cannot_be_stored_are_refused(extra: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        OpenAIRuntime("http://h/v1", "m", api_key="sk-mine", extra_body=extra)
    assert "sk-" not in str(caught.value) and "k-1" not in str(caught.value)


def test_fields_named_key_that_are_none(server: Server) -> None:
    schema = {"properties": {"key": {"type": "string"}}}
    rt = runtime(server, extra_body={"prompt_cache_key": "a", "guided_json": schema}, top_logprobs=5)
    assert rt.request == {"prompt_cache_key": "a", "guided_json": schema, "top_logprobs": 5}
