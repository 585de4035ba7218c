"""`demur diff`, `demur gate` and `demur export` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from demur.files import dumps_row
from demur.report.exports.junit import Case, to_junit
from tests.cli.conftest import Cli

NO, YES = "I'm sorry, but I can't help with that.", "Use the kill command."


def answers(path: Path, declined: int, n: int = 100, **more: Any) -> Path:
    rows = [
        {
            "id": str(i),
            "prompt": f"Question {i}?",
            "response": NO if i < declined else YES,
            "category": "safety",
            "expected": "comply",
            **more,
        }
        for i in range(n)
    ]
    path.write_text("".join(dumps_row(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_diff_writes_both_files_and_prints_the_rates(cli: Cli, tmp_path: Path) -> None:
    a, b = answers(tmp_path / "a.jsonl", 2), answers(tmp_path / "b.jsonl", 12)
    done = cli("diff", a, b, "--out", tmp_path / "d")
    assert done.code == 0 and "+10.0" in done.out
    assert (tmp_path / "d" / "diff.html").exists()
    values = json.loads(cli("diff", a, b, "--out", tmp_path / "d", "--json", "--share").out)
    assert len(values["flips"]) == 10 and NO not in json.dumps(values)


def test_gate_codes_pass_fail_and_error(cli: Cli, tmp_path: Path) -> None:
    run = answers(tmp_path / "a.jsonl", 20)
    passed = cli("gate", run, "--fail-if", "over_refusal.safety > 0.30")
    assert passed.code == 0 and passed.out.startswith("PASS")
    failed = cli("gate", run, "--fail-if", "over_refusal > 0.10", "--fail-if", "over_refusal > 0.30")
    assert failed.code == 1 and "FAIL" in failed.out and "PASS" in failed.out
    assert "rules/demur-v1 against people's labels (xstest): on unsafe prompts it finds" in failed.err
    assert "with the judge's error taken out" in failed.out
    assert cli("gate", run, "--fail-if", "over_refusals > 0.10").code == 2
    assert cli("gate", run).code == 2
    assert cli("gate", tmp_path / "none.jsonl", "--fail-if", "over_refusal > 0.1").code == 2


def test_gate_says_that_a_run_was_stopped(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli("measure", "--replies", answers(tmp_path / "a.jsonl", 0), "--out", run)
    rule = ("--fail-if", "over_refusal > 0.10")
    assert "have no answer" not in cli("gate", run, *rule).err
    for name in ("replies", "verdicts"):
        path = run / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    assert "40 of 100 prompts have no answer; the run was stopped" in cli("gate", run, *rule).err
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "shard": {"i": 2, "n": 3, "window": 1}}))
    assert "40 of 100 prompts have no answer; this is part 2 of 3" in cli("gate", run, *rule).err


def test_gate_with_too_few_answers_fails_and_says_how_many(cli: Cli, tmp_path: Path) -> None:
    done = cli("gate", answers(tmp_path / "a.jsonl", 0, n=10), "--fail-if", "over_refusal > 0.10")
    assert done.code == 1 and "TOO FEW" in done.out and "29" in done.out


def test_gate_against_a_baseline(cli: Cli, tmp_path: Path) -> None:
    a, b = answers(tmp_path / "a.jsonl", 2, n=200), answers(tmp_path / "b.jsonl", 30, n=200)
    rule = ("--fail-if", "over_refusal > baseline + 0.03")
    assert cli("gate", b, *rule, "--baseline", a).code == 1
    assert cli("gate", a, *rule, "--baseline", a).code == 0
    assert cli("gate", a, *rule).code == 2


def test_gate_writes_junit_and_json(cli: Cli, tmp_path: Path) -> None:
    run, xml = answers(tmp_path / "a.jsonl", 20), tmp_path / "out" / "junit.xml"
    rules = ("--fail-if", "over_refusal > 0.10", "--fail-if", "over_refusal.point > 0.5")
    done = cli("gate", run, *rules, "--junit", xml, "--json")
    suite = ET.parse(xml).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite] == ["over_refusal > 0.10", "over_refusal.point > 0.5"]
    assert [case.find("failure") is not None for case in suite] == [True, False]
    outcomes = json.loads(done.out)["outcomes"]
    assert [o["status"] for o in outcomes] == ["fail", "pass"] and outcomes[0]["n"] == 100


def test_junit_stays_xml_whatever_it_is_told() -> None:
    bad = 'a < b & "c" ]]> \x00\x1b[31m\ud800'
    root = ET.fromstring(to_junit(bad, [Case(name=bad, status="too few", message=bad)]).encode())
    assert root[0][0].find("failure").get("type") == "TooFewAnswers"  # type: ignore[union-attr]


@pytest.mark.parametrize(("to", "files"), [("inspect", 1), ("lm-eval", 2)])
def test_export_writes_the_files_and_names_them(cli: Cli, tmp_path: Path, to: str, files: int) -> None:
    done = cli("export", answers(tmp_path / "a.jsonl", 20), "--to", to, "--out", tmp_path / "x")
    assert done.code == 0 and done.err.count("wrote ") == files
    assert len(list((tmp_path / "x").iterdir())) == files
