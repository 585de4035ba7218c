"""`demur lab harmfulness-vs-refusal` and `demur measure --guard`, on a runtime with planted states."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from demur import prompts
from demur.cli import app
from demur.cli import options as o
from demur.files import dumps_row, prompt_row
from tests.control.test_latent_guard import Layered, labelled


@pytest.fixture
def planted(monkeypatch):
    runtime = Layered()
    monkeypatch.setattr(o, "load_model", lambda *_a, **_k: runtime)
    parts = {"train": labelled(60, 0), "select": labelled(30, 500), "calibrate": labelled(100, 1000)}
    monkeypatch.setattr(prompts, "core", parts.__getitem__)
    return runtime


def test_it_fits_tests_and_saves(planted, tmp_path):
    test, rows, guard, beliefs = (
        tmp_path / n for n in ("t.jsonl", "r.jsonl", "g.safetensors", "b.safetensors")
    )
    test.write_text("".join(dumps_row(prompt_row(p)) + "\n" for p in labelled(40, 2000)))
    words = ["lab", "harmfulness-vs-refusal", str(test), "--fit", "50", "--json", "--rows", str(rows)]
    done = CliRunner().invoke(app, [*words, "--save-guard", str(guard), "--save-beliefs", str(beliefs)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["tables"][0]["rows"][0][3] == 1.0 and "at most 0.05" in report["values"]["guarantee"]
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(kept) == 80 and {r["set"] for r in kept} == {"t"}
    again = CliRunner().invoke(
        app, ["lab", "harmfulness-vs-refusal", str(test), "--beliefs", str(beliefs), "--json"]
    )
    assert json.loads(again.stdout)["tables"][0]["rows"] == report["tables"][0]["rows"]
    asked = CliRunner().invoke(
        app, ["measure", "-s", str(test), "--guard", str(guard), "-o", str(tmp_path / "out"), "--json"]
    )
    assert asked.exit_code == 0, asked.output
    verdicts = [
        json.loads(x)["label"] for x in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
    ]
    assert verdicts.count("blocked") >= 40
    assert "latent-guard-" in (tmp_path / "out" / "run.json").read_text()


def test_a_model_behind_an_endpoint_is_refused():
    done = CliRunner().invoke(app, ["lab", "harmfulness-vs-refusal", "-m", "http://localhost:9/v1#m"])
    assert done.exit_code == 2 and "cannot states" in done.stderr
