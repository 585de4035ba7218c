"""`demur judge` with --sample-for-labels, --labels and --validate."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from demur.files import read_rows
from demur.judges import agreement
from tests.cli.conftest import Cli

NO, YES, ODD = "I'm sorry, I can't help with that.", "Take two eggs and stir them.", "I will not do that."


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    texts = [NO, YES, YES, ODD] * 50
    rows = [{"id": f"p{i}", "prompt": f"Request {i}", "response": t} for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_draw_label_and_read_back(cli: Cli, answers: Path, tmp_path: Path) -> None:
    two = ("--judge", "rules/demur-v1", "--judge", "rules/xstest-v1")
    done = cli("judge", answers, *two, "--sample-for-labels", "60", "--out", tmp_path / "labels")
    assert done.code == 0 and not done.out and "60 of 200 answers drawn" in done.err
    sheet = tmp_path / "labels" / "sheet.csv"
    rows = [row for _, row in read_rows(sheet)]
    for row in rows:
        row["label"] = "compliance" if row["answer"] == YES else "full_refusal"
    saved = tmp_path / "saved.csv"
    with saved.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["row", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    key = tmp_path / "labels" / "key.json"
    done = cli("judge", answers, *two, "--labels", saved, "--key", key, "--width", "0.2", "--json")
    found = json.loads(done.out)["values"]["judges"]
    # people: half are refusals; the string match misses the odd ones
    assert found["rules/xstest-v1"]["rate"]["value"] == 0.25
    assert found["rules/xstest-v1"]["rate"]["corrected"] == pytest.approx(0.5)
    assert found["rules/xstest-v1"]["sensitivity"]["value"] == pytest.approx(0.5)
    assert found["rules/demur-v1"]["sensitivity"]["value"] == 1
    assert found["rules/demur-v1"]["needed"]["labels"] > 0
    shown = cli("judge", answers, *two, "--labels", saved, "--key", key)
    assert "Judges against your labels" in shown.out and "60 labels from a sheet" in shown.out
    assert cli("judge", answers, *two, "--labels", saved).code == 2


def test_labels_correct_measure_card_and_gate(cli: Cli, tmp_path: Path) -> None:
    texts = [NO, YES, "Ask me about something else, friend.", YES]
    rows = [
        {"id": f"p{i}", "prompt": f"Request {i}", "response": texts[i % 4], "expected": "comply"}
        for i in range(120)
    ]
    answers, key = tmp_path / "answers.jsonl", tmp_path / "labels" / "key.json"
    answers.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = tmp_path / "run"
    assert cli("measure", "--replies", answers, "--out", run).code == 0
    # drawn from the run folder, whose answers are all to be kept
    done = cli("judge", run, "--judge", "rules/gcg-v1", "--sample-for-labels", "60", "--out", key.parent)
    assert done.code == 0 and "or give both to demur measure or demur card" in done.err
    drawn = [row for _, row in read_rows(key.parent / "sheet.csv")]
    lines = [f"{r['row']},{'compliance' if r['answer'] == YES else 'full_refusal'}" for r in drawn]
    saved = tmp_path / "saved.csv"
    saved.write_text("\n".join(["row,label", *lines]) + "\n")
    given = ("--labels", saved, "--key", key)
    done = cli("measure", "--replies", answers, "--out", run, *given, "--json")
    assert done.code == 0, done.err
    rate = json.loads(done.out)["values"]["conditions"]["as given"]["rates"]["all"]["lookalike"]
    assert (
        rate["value"] == 0.25 and rate["labels"] == 60 and rate["corrected"] == pytest.approx(0.5, abs=0.15)
    )
    gated = cli("gate", run, "--fail-if", "over_refusal > 0.8")
    assert "with 60 labels by people" in gated.out and "60 labels by people correct these rates" in gated.err
    carded = cli("card", "--replies", answers, "--out", tmp_path / "card", *given, "--json")
    assert json.loads(carded.out)["sections"]["text"]["values"]["categories"]["all"][
        "lookalike"
    ] == pytest.approx(rate)
    for command in ("measure", "card"):
        done = cli(command, "--replies", answers, "--key", key)
        assert done.code == 2 and "belongs to a filled sheet: add --labels" in done.err
    done = cli("measure", "--suite", answers, "--dry-run", *given)
    assert done.code == 2 and "leave --labels out" in done.err
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(json.dumps(r) + "\n" for r in rows[1:]))
    done = cli("measure", "--replies", fewer, "--out", tmp_path / "r", *given)
    assert done.code == 2 and "1 are missing (first: 'p0')" in done.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--sample-for-labels", "60"), "--out"),
        (("--validate",), "takes no file"),
        (("--labels", "x.csv", "--sample-for-labels", "60", "--out", "x"), "different jobs"),
        (("--width", "0.1"), "belong to --labels"),
        (("--json",), "--json belongs"),
    ],
)
def test_options_that_do_not_fit(cli: Cli, answers: Path, more: tuple[str, ...], says: str) -> None:
    done = cli("judge", answers, *more)
    assert done.code == 2 and says in done.err


def test_nothing_to_judge(cli: Cli) -> None:
    done = cli("judge")
    assert done.code == 2 and "needs a FILE" in done.err


@pytest.mark.skipif(
    not (Path(os.environ.get("DEMUR_DATA", "/nonexistent")) / "pyrit_refusal").is_dir(),
    reason="human-labelled sets not at hand: set DEMUR_DATA",
)
def test_validate(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pyrit_refusal").symlink_to(Path(os.environ["DEMUR_DATA"]) / "pyrit_refusal")
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path / "data"))
    out = tmp_path / "table.json"
    done = cli("judge", "--validate", "--judge", "rules/gcg-v1", "--judge", "rules/xstest-v1", "--out", out)
    assert done.code == 0 and "Agreement with people" in done.out and "xstest is skipped" in done.err
    stored = json.loads(out.read_text())
    assert [r["judge"] for r in stored["rows"]] == ["rules/gcg-v1", "rules/xstest-v1"]
    assert set(stored["sets"]) == {"pyrit_refusal"}
    packaged = agreement.measured_error("rules/gcg-v1", "pyrit_refusal")[0]
    assert stored["rows"][0]["sensitivity"] == packaged.sensitivity
