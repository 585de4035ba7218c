"""A server that misbehaves in every way: nothing is lost, nothing is asked twice, and failures are counted."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demur.flows.measure import Measured, measure
from demur.runtime.openai import OpenAIRuntime
from demur.types import Prompt, PromptSet
from tests.flows.synthetic import COMPLY, REFUSE

N, TIMEOUT = 42, 4.0
DOOMED = {5, 23}
"""Prompts that get HTTP 500 until the server is healed."""
STALLED = {7}
WAYS = ("fine", "429", "500", "not json", "dropped", "cut short")


class Flaky(ThreadingHTTPServer):
    """Fails the first time or two in one of `WAYS`; counts what it answered in full."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tries, self.answered = Counter[int](), Counter[int]()
        self.healed, self.lock = False, threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Flaky

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        i = int(body["messages"][-1]["content"].split()[1].rstrip("?"))
        with self.server.lock:
            self.server.tries[i] += 1
            tries = self.server.tries[i]
        if i in DOOMED and not self.server.healed:
            self.respond(500, b"overloaded")
        elif i in STALLED and tries == 1:
            time.sleep(TIMEOUT + 1)
        elif tries > 1 + i % 2:
            self.answer(i)
        else:
            self.misbehave(WAYS[i % len(WAYS)], i)

    def misbehave(self, way: str, i: int) -> None:
        if way == "fine":
            self.answer(i)
        elif way == "429":
            self.respond(429, b"slow down", {"retry-after": "0"})
        elif way == "500":
            self.respond(500, b"oops")
        elif way == "not json":
            self.respond(200, b'{"choices": [{"message": {"cont')
        elif way == "cut short":
            self.respond(200, b'{"choices": [', {"content-length": "5000"})
        self.close_connection = True  # "dropped": not a byte

    def answer(self, i: int) -> None:
        text = "I'm sorry, but I can't help with that." if i % 3 == 0 else "Sure. First open the window."
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.respond(200, json.dumps({"choices": [choice]}).encode())
        with self.server.lock:
            self.server.answered[i] += 1

    def respond(self, status: int, raw: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(raw)


@pytest.fixture
def server() -> Iterator[Flaky]:
    made = Flaky()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server: Flaky, out: Path) -> Measured:
    prompts = PromptSet(
        "doors",
        tuple(
            Prompt.of(f"Door {i}?", id=f"p{i}", category="safety", expected=COMPLY if i % 2 else REFUSE)
            for i in range(N)
        ),
    )
    address = f"http://127.0.0.1:{server.server_port}/v1"
    runtime = OpenAIRuntime(address, "m", timeout=TIMEOUT, retries=3, backoff=0.01)
    return measure(runtime, prompts, out, progress=False)


def labels(made: Measured) -> Counter[str]:
    total: Counter[str] = Counter()
    for side in made.report.values["conditions"]["default"]["labels"].values():
        total.update(side)
    return total


def test_nothing_lost_nothing_repeated_and_failures_counted(server: Flaky, tmp_path: Path) -> None:
    first = ask(server, tmp_path)
    good = set(range(N)) - DOOMED
    assert server.answered == Counter(good)  # each of them once, in spite of everything
    refused = sum(i % 3 == 0 for i in good)
    assert labels(first) == Counter(error=len(DOOMED), full_refusal=refused, compliance=len(good) - refused)
    assert any(f"{len(DOOMED)} of {N} answers could not be read: 2 error" in n for n in first.report.notes)
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(N)]
    assert {row["prompt_id"] for row in rows if "HTTP 500: overloaded" in row.get("error", "")} == {
        "p5",
        "p23",
    }
    assert all(server.tries[i] == 4 for i in DOOMED)

    server.healed = True
    server.tries.clear()
    second = ask(server, tmp_path)
    assert set(server.tries) == DOOMED  # only what failed is asked again
    assert server.answered == Counter(range(N))
    assert labels(second)["error"] == 0
    assert sum(labels(second).values()) == N
    rows = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(N)]
