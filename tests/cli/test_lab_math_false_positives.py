"""`demur lab math-false-positives`: a report, an audit, a checker, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import demur.flows.load
from demur.runtime.scripted import ScriptedRuntime
from tests.cli.conftest import Cli

LAB = ("lab", "math-false-positives")


def rows(n: int = 12) -> list[dict[str, Any]]:
    """Two samples a problem; every third answer is wrong, every fourth right one flawed."""
    return [
        {
            "problem_id": i // 2,
            "problem": f"What is {i // 2}?",
            "solution": f"Sample {i}. The answer is {i // 2 if i % 3 else 99}.",
            "gold": i // 2,
            "reward": i,
            **({"false_positive": i % 4 == 0} if i % 3 else {}),
        }
        for i in range(n)
    ]


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    return path


def test_report(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", rows())
    done = cli(*LAB, file)
    assert done.code == 0, done.err
    for words in ("One answer chosen from N", "best-of-N", "weighted vote", "Pass@N", "reasoning valid"):
        assert words in done.out
    shown = json.loads(cli(*LAB, file, "--json", "--n", "2").out)
    assert {r["N"] for r in shown["values"]["selection"]} == {2}
    assert shown["provenance"]["labelled"] == 8
    assert cli(*LAB, file, "-o", tmp_path / "r.txt").out == ""
    assert "Pass@N" in (tmp_path / "r.txt").read_text()


def test_audit_and_labels(cli: Cli, tmp_path: Path) -> None:
    bare = [{k: v for k, v in r.items() if k != "false_positive"} for r in rows()]
    file = write(tmp_path / "s.jsonl", bare)
    drawn = cli(*LAB, file, "--audit", "4")
    sheet = [json.loads(line) for line in drawn.out.splitlines()]
    assert len(sheet) == 4 and all(r["false_positive"] is None for r in sheet) and "--labels" in drawn.err
    labels = write(tmp_path / "l.jsonl", [{**r, "false_positive": i == 0} for i, r in enumerate(sheet)])
    shown = json.loads(cli(*LAB, file, "--labels", labels, "--json", "--n", "1").out)
    assert shown["values"]["selection"][0]["labels"] == 4
    empty = write(tmp_path / "e.jsonl", sheet)
    assert "no row has false_positive" in cli(*LAB, file, "--labels", empty).err


def test_a_checker_is_asked_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def script(prompt: Any, condition: Any, sample: int) -> str:
        seen.append(prompt.id)
        assert condition.temperature == 0 and condition.max_new_tokens == 4096
        return "False" if "Sample 4" in prompt.text else "True"

    runtime = ScriptedRuntime(script, name="checker")
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    file, out = write(tmp_path / "s.jsonl", rows()), tmp_path / "v.jsonl"
    prices = ("--price-in", "1", "--price-out", "2")
    done = cli(*LAB, file, "--judge", "x", "--verdicts", out, *prices, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["values"]["detectors"]["checkers"]["checker"]
    assert (found["tp"], found["fp"], found["fn"]) == (1, 0, 1)
    for words in ("8 solutions to check", "characters of prompts", "8 calls", "price"):
        assert words in done.err, done.err
    lines = out.read_text().splitlines()
    assert len(lines) == len(seen) == 8 and json.loads(lines[0])["scale"] == "validity"
    out.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])  # killed while writing
    again = cli(*LAB, file, "--judge", "x", "--verdicts", out, "--json")
    assert json.loads(again.out)["values"] == json.loads(done.out)["values"]
    assert len(seen) == 11 and len(out.read_text().splitlines()) == 8


def test_checks_that_were_cut_off_are_asked_again_with_a_larger_budget(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def script(prompt: Any, condition: Any, sample: int) -> str:
        asked.append(condition.max_new_tokens)
        return "True" if "Sample 4" in prompt.text or condition.max_new_tokens > 8 else "Let me see"

    runtime = ScriptedRuntime(script, name="checker")
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    file, out = write(tmp_path / "s.jsonl", rows()), tmp_path / "v.jsonl"
    for budget, calls in ((8, 8), (8, 8), (4096, 15), (4096, 15)):
        done = cli(*LAB, file, "--judge", "x", "--verdicts", out, "--max-new-tokens", budget)
        assert done.code == 0 and len(asked) == calls, (budget, done.err)
    assert len(out.read_text().splitlines()) == 8


def test_a_checker_that_never_answers(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = ScriptedRuntime({"*": RuntimeError("no route")}, name="checker")
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    file = write(tmp_path / "s.jsonl", rows())
    done = cli(*LAB, file, "--judge", "x", "--verdicts", tmp_path / "v.jsonl")
    assert done.code == 2 and "no route" in done.err and "answered none of 8" in done.err


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        ({"gold": None}, (), "needs `gold`"),
        ({"problem_id": None, "problem": None}, (), "problem_id"),
        ({"reward": "x"}, (), "reward is 'x'"),
        ({"false_positive": "perhaps"}, (), "false_positive is 'perhaps'"),
        ({}, ("--n", "3"), "fewest samples has 2"),
        ({}, ("--audit", "2", "--judge", "m"), "one after the other"),
        ({}, ("--price-in", "2"), "go together"),
        (
            {"solution": "I give up", "gold": "7", "false_positive": None},
            ("--audit", "2"),
            "nothing to audit",
        ),
        ({"problem": None}, ("--judge", "m"), "`problem` and `solution`"),
    ],
)
def test_wrong_input(
    cli: Cli, tmp_path: Path, change: dict[str, Any], args: tuple[str, ...], words: str
) -> None:
    done = cli(*LAB, write(tmp_path / "s.jsonl", [{**r, **change} for r in rows()]), *args)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ") and words in done.err and "Traceback" not in done.err


def test_a_file_that_is_no_file_of_verdicts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: ScriptedRuntime({"*": "True"}))
    file = write(tmp_path / "s.jsonl", rows())
    before = file.read_text()
    done = cli(*LAB, file, "--judge", "m", "--verdicts", file)
    assert done.code == 2 and "no file of verdicts" in done.err and file.read_text() == before


def test_limit_cases_are_stated(cli: Cli, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", rows()[2:3])
    done = cli(*LAB, one)
    assert done.code == 0 and "one problem only" in done.out and "Every answer here is right" in done.out
