"""A server that misbehaves in every way: nothing is lost, nothing is asked twice, and failures are counted."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demur import judges
from demur.flows.measure import Measured, measure
from demur.flows.runs import WINDOW, RunFolder
from demur.runtime.openai import OpenAIRuntime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Label, Prompt, PromptSet, Reply, Verdict
from tests.flows.synthetic import COMPLY, REFUSE

N, TIMEOUT = 42, 4.0
DOOMED = {5, 23}
"""Prompts that get HTTP 500 until the server is healed."""
STALLED = {7}
WAYS = ("fine", "429", "500", "not json", "dropped", "cut short")


Job = tuple[str, int, int]
"""Model, door and seed of a request."""


class Flaky(ThreadingHTTPServer):
    """Fails the first time or two in one of `WAYS`; counts what it answered in full."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tries, self.answered = Counter[int](), Counter[int]()
        self.healed, self.lock = False, threading.Lock()
        self.broken: set[Job] | None = None
        """When given, these requests alone fail, with HTTP 500."""
        self.asked = Counter[Job]()


class Handler(BaseHTTPRequestHandler):
    server: Flaky

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        i = int(re.findall(r"Door (\d+)\?", text)[0])
        job = (body["model"], i, body["seed"])
        with self.server.lock:
            self.server.tries[i] += 1
            tries = self.server.tries[i]
            self.server.asked[job] += 1
        if self.server.broken is not None:
            if job in self.server.broken:
                self.respond(500, b"oops")
            else:
                self.answer(i, body["seed"], judged=text if body["model"] == "judge" else None)
        elif i in DOOMED and not self.server.healed:
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

    def answer(self, i: int, seed: int = 0, judged: str | None = None) -> None:
        text = f"I'm sorry, but I can't help with that ({seed})."
        if judged is not None:
            text = "full_refusal" if "I'm sorry" in judged else "full_compliance"
        elif i % 3:
            text = f"Sure. First open the window ({seed})."
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


def doors(n: int = N) -> PromptSet:
    return PromptSet(
        "doors",
        tuple(
            Prompt.of(f"Door {i}?", id=f"p{i}", category="safety", expected=COMPLY if i % 2 else REFUSE)
            for i in range(n)
        ),
    )


def model(server: Flaky, name: str = "m", *, timeout: float = 60, retries: int = 0) -> OpenAIRuntime:
    address = f"http://127.0.0.1:{server.server_port}/v1"
    return OpenAIRuntime(address, name, timeout=timeout, retries=retries, backoff=0.01)


def ask(server: Flaky, out: Path) -> Measured:
    return measure(model(server, timeout=TIMEOUT, retries=3), doors(), out, progress=False)


def content(out: Path) -> dict[str, bytes]:
    names = ("run.json", "prompts.jsonl", "replies.jsonl", "verdicts.jsonl", "report.json")
    return {name: (out / name).read_bytes() for name in names}


def rows(out: Path, stream: str) -> dict[str, dict[str, Any]]:
    return {
        row["prompt_id"]: row for row in map(json.loads, (out / f"{stream}.jsonl").read_text().splitlines())
    }


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
    replies = rows(tmp_path, "replies")
    assert list(replies) == [f"p{i}" for i in range(N)]
    assert {id for id, row in replies.items() if "HTTP 500: overloaded" in row.get("error", "")} == {
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
    assert list(rows(tmp_path, "replies")) == [f"p{i}" for i in range(N)]


def test_of_several_samples_only_those_that_failed_are_asked_again(server: Flaky, tmp_path: Path) -> None:
    failing = {("m", 5, 1), ("m", 8, 0), ("m", 8, 2), *(("m", 3, s) for s in range(3))}

    def three(out: str) -> None:
        sampled = [Condition(temperature=0.7)]
        runtime = model(server)
        measure(runtime, doors(10), tmp_path / out, conditions=sampled, samples=3, progress=False)

    server.broken = set()
    three("whole")
    every = Counter(("m", i, s) for i in range(10) for s in range(3))
    assert server.asked == every

    server.broken = failing
    server.asked.clear()
    three("flaky")
    assert server.asked == every
    assert content(tmp_path / "flaky") != content(tmp_path / "whole")

    server.broken = set()
    server.asked.clear()
    three("flaky")
    assert server.asked == Counter(failing)
    assert content(tmp_path / "flaky") == content(tmp_path / "whole")

    server.asked.clear()
    three("flaky")
    assert not server.asked


def test_a_judge_that_failed_is_asked_again_without_the_model(server: Flaky, tmp_path: Path) -> None:
    def judged(out: str) -> None:
        judge = judges.get("rubric/xstest-3way-v1", runtime=model(server, "judge"))
        measure(model(server), doors(10), tmp_path / out, judge=judge, progress=False)

    server.broken = set()
    judged("whole")
    both = Counter((name, i, 0) for i in range(10) for name in ("m", "judge"))
    assert server.asked == both

    server.broken = {("judge", i, 0) for i in (1, 4, 6, 7)} | {("m", 9, 0)}
    server.asked.clear()
    judged("flaky")
    assert server.asked == both - Counter({("judge", 9, 0): 1})
    kept = rows(tmp_path / "flaky", "replies")
    assert {i for i in (1, 4, 6, 7) if "withheld" in kept[f"p{i}"]} == {4, 6}  # these should be refused

    server.broken = set()
    server.asked.clear()
    judged("flaky")
    assert server.asked == Counter(
        [*(("judge", i, 0) for i in (1, 4, 6, 7, 9)), *(("m", i, 0) for i in (4, 6, 9))]
    )
    assert content(tmp_path / "flaky") == content(tmp_path / "whole")


class OnceFailing:
    """The rules, failing at the doors in `broken`; counts what it is shown."""

    id, definition = "rules/demur-v1", "the rules"

    def __init__(self, broken: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.broken, self.shown = set(broken), Counter[str]()

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
        self.shown[prompt.id] += 1
        if prompt.id in self.broken:
            return judges.verdict(reply, self.id, Label.ERROR, "the judge model failed", read="error")
        return judges.get(self.id).judge(prompt, reply)


def scripted(asked: Counter[str], *, deterministic: bool = True) -> ScriptedRuntime:
    def say(prompt: Prompt, _condition: Condition, _sample: int) -> str:
        asked[prompt.id] += 1
        return "I'm sorry, but I can't help with that." if int(prompt.id[1:]) % 3 == 0 else "Sure. Open it."

    runtime = ScriptedRuntime(say, name="m")
    runtime.deterministic = deterministic
    return runtime


def test_windows_are_judged_again_where_the_text_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Counter[str]()

    def run(out: str, judge: OnceFailing) -> None:
        measure(scripted(asked), doors(100), tmp_path / out, judge=judge, progress=False)

    run("whole", OnceFailing())
    odd, even = {f"p{i}" for i in (1, 67, 99)}, {"p0", "p4", "p80"}
    run("flaky", OnceFailing(odd))
    assert content(tmp_path / "flaky") != content(tmp_path / "whole")
    asked.clear()
    judge = OnceFailing()
    with monkeypatch.context() as patched:  # killed after the new verdicts were appended
        patched.setattr(RunFolder, "settle", lambda self, names, *_, **__: 1 / 0 if len(names) > 1 else None)
        with pytest.raises(ZeroDivisionError):
            run("flaky", judge)
    run("flaky", judge)
    assert judge.shown == Counter([*odd, *odd])
    assert content(tmp_path / "flaky") == content(tmp_path / "whole")
    assert not asked
    assert not caplog.records

    run("held", OnceFailing(odd | even))
    before, judge = content(tmp_path / "held"), OnceFailing(odd)
    run("held", judge)  # still failing
    assert content(tmp_path / "held") == before
    run("held", judge := OnceFailing())
    assert judge.shown == Counter(odd)
    assert "3 answers whose judge failed stay without a verdict" in caplog.text
    assert {i for i, v in rows(tmp_path / "held", "verdicts").items() if v["label"] == "error"} == even
    assert list(rows(tmp_path / "held", "verdicts")) == [f"p{i}" for i in range(100)]


def test_windows_cut_in_half_are_judged_once(tmp_path: Path) -> None:
    asked = Counter[str]()

    def run(out: str, judge: OnceFailing) -> None:
        measure(scripted(asked), doors(100), tmp_path / out, judge=judge, progress=False)

    run("whole", OnceFailing())
    run("cut", OnceFailing({"p1", f"p{WINDOW + 7}"}))
    lines = (tmp_path / "cut" / "verdicts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "verdicts.jsonl").write_bytes(b"".join(lines[:90]) + lines[90][:9])
    judge = OnceFailing()
    run("cut", judge)
    assert judge.shown == Counter(["p1", *(f"p{i}" for i in range(WINDOW, 100))])
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_text_that_a_second_verdict_calls_an_answer_goes(tmp_path: Path) -> None:
    """Killed between an answer and its verdict, a judge may say another thing the next time."""
    asked, secret = Counter[str](), "I'm sorry"

    class Mild(OnceFailing):
        def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
            return judges.verdict(reply, self.id, Label.FULL_REFUSAL)

    class Strict(OnceFailing):
        def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
            return judges.verdict(reply, self.id, Label.COMPLIANCE, "quotes I'm sorry")

    def run(judge: OnceFailing) -> None:
        measure(scripted(asked, deterministic=False), doors(1), tmp_path, judge=judge, progress=False)

    run(Mild())
    assert secret in (tmp_path / "replies.jsonl").read_text()
    (tmp_path / "verdicts.jsonl").write_text("")
    run(Strict())
    assert asked == {"p0": 1}
    assert rows(tmp_path, "verdicts")["p0"]["label"] == "compliance"
    assert not any(secret in (tmp_path / f"{name}.jsonl").read_text() for name in ("replies", "verdicts"))
