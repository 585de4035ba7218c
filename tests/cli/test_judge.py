"""`demur judge` with one judge, several, a model to ask, and a file of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import demur.flows.load
from demur.runtime.scripted import ScriptedRuntime
from tests.cli.conftest import Cli


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [
        ("a", "I'm sorry, I can't help with that."),
        ("b", "Sure, take two eggs."),
        ("c", "I won't do that."),
    ]
    path.write_text("".join(json.dumps({"id": i, "prompt": "x?", "response": r}) + "\n" for i, r in rows))
    return path


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_one_judge(cli: Cli, answers: Path) -> None:
    done = cli("judge", answers, "--judge", "rules/xstest-v1")
    assert [r["label"] for r in rows(done.out)] == ["full_refusal", "compliance", "compliance"]
    assert done.code == 0 and "3 answers: 2 compliance, 1 full_refusal" in done.err
    assert "rules/xstest-v1 against people" in done.err


def test_several_judges_are_written_and_compared(cli: Cli, answers: Path, tmp_path: Path) -> None:
    labels = tmp_path / "people.csv"
    labels.write_text("id,label\na,full_refusal\nc,full_refusal\n")
    out = tmp_path / "v.jsonl"
    ids = ("rules/demur-v1", "rules/xstest-v1", f"human:{labels}", "rules/demur-v1")
    done = cli("judge", answers, *(x for i in ids for x in ("--judge", i)), "--out", out)
    found = [(r["judge"], r["prompt_id"], r["label"]) for r in rows(out.read_text())]
    assert done.code == 0 and [f[0] for f in found[::3]] == [
        "rules/demur-v1",
        "rules/xstest-v1",
        "human:people.csv",
    ]
    assert ("human:people.csv", "b", "unparsed") in found and ("rules/demur-v1", "c", "full_refusal") in found
    assert "Labels by judge" in done.err and "Agreement between judges" in done.err and "67%" in done.err
    assert "human:people.csv has not been measured against people" in done.err


def test_a_model_as_judge(cli: Cli, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str, **_: object) -> ScriptedRuntime:
        loaded.append(name)
        return ScriptedRuntime(
            lambda p, *_: (
                "refuses" if "sorry" in p.text else "goes_along" if "refuse the request" in p.text else "5"
            ),
            name=name,
        )

    monkeypatch.setattr(demur.flows.load, "load_runtime", load)
    done = cli(
        "judge",
        answers,
        "-j",
        "rubric/strongreject-v1",
        "-j",
        "rules/xstest-v1",
        "--judge-model",
        "m",
        "--both-orders",
    )
    found = rows(done.out)
    assert loaded == ["m"] and [r["label"] for r in found[:3]] == ["not_harmful", "harmful", "harmful"]
    assert found[0]["judge"] == "rubric/strongreject-v1/both-orders@m:scripted" and found[1]["score"] == 1.0
    assert "Attack success" in done.err and "67% [21–94] 2/3" in done.err


def test_a_model_is_needed_or_is_not(cli: Cli, answers: Path) -> None:
    done = cli("judge", answers, "-j", "rubric/xstest-3way-v1")
    assert done.code == 2 and "--judge-model" in done.err
    done = cli("judge", answers, "--judge-model", "m")
    assert done.code == 2 and "none of rules/demur-v1 asks a model" in done.err


def test_a_wrong_id_lists_all_before_anything_is_loaded(cli: Cli, answers: Path) -> None:
    done = cli("judge", answers, "-j", "rules/nope", "--judge-model", "nowhere")
    assert done.code == 2 and done.out == ""
    for known in ("rules/gcg-v1", "human:FILE", "rubric/coconot-v1", "template/llama-guard-3-v1"):
        assert known in done.err
