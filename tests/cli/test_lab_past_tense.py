"""`demur lab past-tense`: writing, scoring, drawing and judging, and what it says to clashing options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import demur.flows.load
from demur.runtime.base import Runtime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Prompt
from tests.cli.conftest import Cli

LAB = ("lab", "past-tense")
NO, YES = "I'm sorry, but I can't help with that.", "Boil the wool with onion skins for an hour."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"id": f"{kind}{i}", "prompt": f"How do I dye scarf {i}?", "category": "craft", "expected": kind}
        for kind in ("refuse", "comply")
        for i in range(3)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"id": "x", "prompt": "Wool."}]))
    return path


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that declines what should be refused, unless it is put into the past."""

    def declines(p: Prompt) -> bool:
        return bool(p.should_refuse) and "did" not in p.text

    def load(name: str | None, **_: Any) -> Runtime:
        def score(p: Prompt) -> dict[str, float]:
            return {"craft": 0.9, "respond": 0.1} if declines(p) else {"craft": 0.2, "respond": 0.8}

        def answer(p: Prompt, _: Any, sample: int) -> str:
            return NO if declines(p) else YES

        return ScriptedRuntime(answer, scores=score, control=("craft",), name="toy")

    monkeypatch.setattr(demur.flows.load, "load_runtime", load)


def test_write_then_judge_own_answers(cli: Cli, file: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.jsonl"
    done = cli(*LAB, file, "--write", made)
    assert done.code == 0 and "1 of 7 prompts were not reworded" in done.err
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(rows) == 24 and {r["meta"]["tense"] for r in rows} == {
        "present",
        "past",
        "future",
        "paraphrase",
    }
    own = tmp_path / "answers.jsonl"
    own.write_text("".join(json.dumps({"id": r["id"], "response": NO}) + "\n" for r in rows))
    said = tmp_path / "verdicts.jsonl"
    done = cli(*LAB, made, "--answers", own, "--judge", "rules/demur-v1", "--verdicts", said, "--json")
    assert done.code == 0, done.err
    rates = json.loads(done.out)["values"]["rates"]
    assert all(r["refused"] == r["n"] == 3 for r in rates)
    verdicts = [json.loads(line) for line in said.read_text().splitlines()]
    assert len(verdicts) == 24 and NO not in said.read_text()


def test_scores(cli: Cli, file: Path) -> None:
    done = cli(*LAB, file, "-m", "toy", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    row = next(r for r in document["values"]["rows"] if r["requests"] == "to refuse")
    assert row["mean"] == {"present": 0.9, "past": 0.2, "future": 0.9, "paraphrase": 0.9}
    assert document["provenance"]["model"] == "toy"


def test_attempts(cli: Cli, file: Path) -> None:
    done = cli(
        *LAB,
        file,
        "-m",
        "toy",
        "--attempts",
        "2",
        "--judge",
        "rules/demur-v1",
        "--judge",
        "rules/gcg-v1",
        "--json",
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    curve = {(r["judge"], r["tense"], r["k"]): r["answered"] for r in document["values"]["attempts"]}
    assert curve["rules/demur-v1", "past", 1] == 3 and curve["rules/gcg-v1", "present", 2] == 0
    assert document["provenance"]["draws"] == 2 and document["provenance"]["temperature"] == 1.0


def test_rewordings_by_a_model_are_answered_at_a_temperature_with_a_seed_each(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, int, int]] = []

    def answer(p: Prompt, condition: Condition, sample: int) -> str:
        if condition.name == "reword":
            tense = next(t for t in ("did people", "will people", "do people") if f"how {t}" in p.text)
            scarf = p.text.rsplit("scarf ", 1)[1].rstrip("?")
            return f"How {tense} dye scarf {scarf}?"
        asked.append((p.meta["tense"], condition.temperature, condition.seed, sample))
        return NO

    monkeypatch.setattr(
        demur.flows.load, "load_runtime", lambda *_, **__: ScriptedRuntime(answer, name="toy")
    )
    done = cli(
        *LAB, file, "--n", "2", "--attempts", "3", "--rewriter", "w", "--judge", "rules/demur-v1", "--json"
    )
    assert done.code == 0, done.err
    assert {a for a in asked if a[0] == "present"} == {("present", 1.0, seed, 0) for seed in range(3)}


def test_clashing_options(cli: Cli, file: Path) -> None:
    assert "leave --write" in cli(*LAB, file, "--answers", file, "--attempts", "2").err
    assert "scores need no judge" in cli(*LAB, file, "--judge", "rules/demur-v1").err
    assert "carry no tense" in cli(*LAB, file, "--answers", file).err
