"""Endpoints on the command line: how they are asked (--request), and prompts that they do not score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur.files import dump_jsonl, load_operating_point
from tests.cli.conftest import Cli
from tests.runtime.test_openai import Answer, Server, say, server, text_of, with_logprobs

__all__ = ["server"]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    rows = [{"id": f"p{i}", "prompt": f"q{i}", "expected": "comply"} for i in range(20)]
    dump_jsonl(rows, tmp_path / "asked.jsonl")
    return tmp_path / "asked.jsonl"


def test_score_writes_the_others_and_names_the_rest(
    cli: Cli, server: Server, asked: Path, tmp_path: Path
) -> None:
    inner = {
        "code": "ResponsibleAIPolicyViolation",
        "content_filter_result": {"violence": {"filtered": True}},
    }

    def answer(payload: dict[str, Any], n: int) -> Answer:
        if text_of(payload) in ("q4", "q11"):
            return 400, {"error": {"code": "content_filter", "innererror": inner}}
        return 200, with_logprobs({"Sure": 0.9})

    server.answer = answer
    out = tmp_path / "scores.jsonl"
    done = cli("score", asked, "-m", f"{server.url}#m", "--out", out)
    assert done.code == 0, done.err
    rows = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert rows == [f"p{i}" for i in range(20) if i not in (4, 11)]
    assert "2 of 20 prompts could not be scored (2 blocked)" in done.err
    assert "p4: content_filter: violence" in done.err and "p11: content_filter: violence" in done.err

    server.answer = lambda payload, n: (400, {"error": {"code": "content_filter"}})
    none = cli("score", asked, "-m", f"{server.url}#m", "--out", tmp_path / "none.jsonl")
    assert none.code == 2 and "20 of 20 prompts could not be scored" in none.err
    assert "and 10 more" in none.err and not (tmp_path / "none.jsonl").exists()


def test_calibrate_leaves_out_what_was_not_scored(cli: Cli, server: Server, tmp_path: Path) -> None:
    def rows(name: str) -> Path:
        kinds = (("bad", "refuse"), ("fine", "comply"))
        made = [
            {
                "id": f"{name}-{kind}{i}",
                "prompt": f"{name} {kind} {i}",
                "expected": expected,
                "category": "safety",
            }
            for kind, expected in kinds
            for i in range(50)
        ]
        dump_jsonl(made, tmp_path / f"{name}.jsonl")
        return tmp_path / f"{name}.jsonl"

    def answer(payload: dict[str, Any], n: int) -> Answer:
        text = text_of(payload)
        if text in blocked:
            return 400, {"error": {"code": "content_filter"}}
        if text == "fit bad 7":
            return 500, b"overloaded"
        return 200, with_logprobs({"Sorry": 0.8 if "bad" in text else 0.1, "Sure": 0.1}, "Sure")

    server.answer, blocked = answer, {"fit bad 3", "fit fine 4", "held fine 1"}
    endpoint = ("-m", f"{server.url}?key=secret#m", "--request", "retries=1", "--request", "user=me")
    same = ("calibrate", rows("fit"), *endpoint, "--check", rows("held"), "--json", "-o", tmp_path / "p.yaml")
    done = cli(*same)
    assert done.code == 0, done.err
    assert {p["user"] for p in server.seen} == {"me"}
    assert "3 of 100 prompts could not be scored (2 blocked, 1 failed)" in done.err
    assert "fit-bad7: HTTP 500" in done.err and "1 of 100 prompts could not be scored (1 blocked)" in done.err
    report = json.loads(done.out)
    assert report["provenance"]["unscored"] == {
        "calibrated_on": {"prompts": 100, "skipped": 0, "blocked": 2, "failed": 1},
        "checked_on": {"prompts": 100, "skipped": 0, "blocked": 1, "failed": 0},
    }
    point = load_operating_point(tmp_path / "p.yaml")
    assert point.model == f"{server.url}#m" and "secret" not in (tmp_path / "p.yaml").read_text()
    (threshold,) = point.thresholds.values()
    assert (threshold.n_refuse, threshold.n_benign) == (48, 49)
    assert point.guarantee is not None and "3 of its 100 prompts could not be scored" in point.guarantee
    assert report["tables"][1]["rows"][0][3]["n"] == 49

    blocked |= {f"fit fine {i}" for i in range(20)}
    few = cli(*same)
    assert (
        few.code == 2 and "needs at least 45 independent benign prompts" in few.err and "found 30" in few.err
    )
    server.answer = lambda payload, n: (400, {"error": {"code": "content_filter"}})
    none = cli(*same)
    assert none.code == 2 and "100 of 100 prompts could not be scored" in none.err


def test_request_fields_are_sent_and_part_of_the_run(
    cli: Cli, server: Server, asked: Path, tmp_path: Path
) -> None:
    server.answer = lambda payload, n: (200, say("Sure."))
    out = tmp_path / "run"
    same = ("measure", "-m", f"{server.url}#m", "--suite", asked, "--out", out)
    fields = ("--request", "top_k=40", "--request", "chat_template_kwargs={enable_thinking: false}")
    more = ("--request", "max_tokens=null", "--request", "max_completion_tokens=9")
    done = cli(*same, *fields, *more, "--request", "timeout=7.5", "--request", "concurrency=1")
    assert done.code == 0, done.err
    body = server.seen[0]
    assert (body["top_k"], body["chat_template_kwargs"]) == (40, {"enable_thinking": False})
    assert body["max_completion_tokens"] == 9 and "max_tokens" not in body and "timeout" not in body
    assert server.most_busy == 1
    assert json.loads((out / "run.json").read_text())["model"]["request"] == {
        "top_k": 40,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": None,
        "max_completion_tokens": 9,
    }
    assert cli(*same, *fields, *more, "--request", "timeout=60").code == 0  # the same run
    other = cli(*same, *more, "--request", "top_k=20")
    assert other.code == 2 and "model.request.top_k: 40 there, 20 now" in other.err


def test_generate_and_score_take_request_fields(cli: Cli, server: Server, asked: Path) -> None:
    server.answer = lambda payload, n: (200, with_logprobs({"Sure": 0.9}))
    endpoint = ("-m", f"{server.url}#m", "--request", "user=me")
    assert cli("generate", "Hello?", *endpoint).code == 0
    assert cli("score", asked, *endpoint, "--request", "top_logprobs=5").code == 0
    assert {p["user"] for p in server.seen} == {"me"}
    assert server.seen[-1]["top_logprobs"] == 5


URL = "http://localhost:9/v1#m"


@pytest.mark.parametrize(
    ("model", "given", "why"),
    [
        ("smollm2", "timeout=5", "smollm2 is no endpoint, so timeout cannot be set"),
        (URL, "timeout", "is no KEY=VALUE"),
        (URL, "top_k=", "is no KEY=VALUE"),
        (URL, "x={a", "no YAML"),
        (URL, "timeout=2m", "timeout='2m' must be a number"),
        (URL, "concurrency=0", "concurrency=0"),
        (URL, "concurrency=true", "must be a number"),
        (URL, "temperature=0.7", "set by --temperature"),
        (URL, "stream=true", "answers are read whole"),
        (URL, "day=2024-01-01", "JSON values only"),
        (URL, "api_key=sk-1", "DEMUR_API_KEY"),
    ],
)
def test_request_fields_that_cannot_be(cli: Cli, model: str, given: str, why: str) -> None:
    done = cli("generate", "Hello?", "-m", model, "--request", given)
    assert done.code == 2 and why in done.err, done.err
    assert "sk-1" not in done.err


def test_a_field_twice_and_commands_that_send_nothing(cli: Cli, asked: Path, tmp_path: Path) -> None:
    twice = cli("generate", "Hello?", "-m", URL, "--request", "n_probs=1", "--request", "n_probs=2")
    assert twice.code == 2 and "is given twice" in twice.err
    batch = cli(
        "measure", "-m", URL, "--suite", asked, "--request", "x=1", "--to-batch", tmp_path / "b.jsonl"
    )
    assert batch.code == 2 and "--to-batch sends no request" in batch.err
    for command in ("card", "measure"):
        done = cli(command, "--replies", asked, "--request", "x=1", "--out", tmp_path / command)
        assert done.code == 2 and "--request" in done.err, done.err


def test_a_dry_run_counts_on_the_concurrency(cli: Cli, asked: Path) -> None:
    same = ("measure", "-m", URL, "--suite", asked, "--dry-run")
    assert cli(*same).out != cli(*same, "--request", "concurrency=1").out
    assert "must be a number" in cli(*same, "--request", "concurrency=many").err
