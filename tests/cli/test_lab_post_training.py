"""`demur lab post-training-mechanistic` on two toys: text, JSON, own files, and what it says to bad options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import demur.flows.load
from demur.runtime.layers import BlockEdit
from tests.cli.conftest import Cli
from tests.explain.post_training.test_tracing import BEFORE, PAIRS, runtime

LAB = ("lab", "post-training-mechanistic", "toy", "tuned")


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str | None, **_: Any) -> Any:
        r = runtime()
        return r if name == "toy" else r.with_edits(BlockEdit(1, lambda h, _at: 1.1 * h), name="tuned")

    monkeypatch.setattr(demur.flows.load, "load_runtime", load)


def test_own_pairs_and_statements(cli: Cli, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("true_statement,false_statement\n" + "".join(f"{p.true},{p.false}\n" for p in PAIRS))
    before = tmp_path / "before.txt"
    before.write_text(BEFORE)
    sets = []
    for k in range(3):
        file = tmp_path / f"{k}.csv"
        rows = [f"{p.true},1\n{p.false},0\n" for p in PAIRS[k : k + 12]]
        file.write_text("statement,label\n" + "".join(rows))
        sets += ["--statements", f"set{k}={file}"]
    out = tmp_path / "found.json"
    some = ("--part", "knowledge", "--part", "truth", "--pairs", pairs, "--before", before, *sets)
    done = cli(*LAB, *some, "--out", out)
    assert (
        done.code == 0
        and "likeness of the patch maps" in done.out
        and "one set of statements left out" in done.out
    )
    found = json.loads(out.read_text())
    assert found["knowledge"]["pairs"] == len(PAIRS) and found["truth"]["sets"] == {
        f"set{k}": 24 for k in range(3)
    }
    assert found["refusal"] is None


def test_examples_in_another_encoding_are_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("Zürich".encode("latin-1"))
    done = cli(*LAB, "--part", "truth", "--before", tmp_path / "b.txt")
    assert done.code == 2 and "not UTF-8" in done.err and "Traceback" not in done.err


def test_json(cli: Cli) -> None:
    done = cli(*LAB, "--part", "confidence", "--json")
    assert done.code == 0 and json.loads(done.out)["confidence"]["iou"] == 1.0


def test_noise_and_no_question(cli: Cli, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("true_statement,false_statement\n" + "".join(f"{p.true},{p.false}\n" for p in PAIRS))
    some = (*LAB, "--part", "knowledge", "--pairs", pairs, "--no-question", "--noise", "3", "--draws", "2")
    found = json.loads(cli(*some, "--seed", "5", "--json").out)["knowledge"]
    assert found["noise"] == {"share": 3.0, "draws": 2, "seed": 5} and found["columns"][-1] == "in"
    text = cli(*some).out
    assert "noised run" in text and "Noise on the subject: 3 SD, 2 draws" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--part", "facts"), "parts are"),
        (("--statements", "cities"), "NAME=FILE"),
        (("--noise", "-1"), "at least 0"),
        (("--draws", "2"), "--noise"),
        (("--part", "truth", "--noise", "3"), "add --part knowledge"),
        (("--part", "confidence", "--cross"), "leave --cross out"),
        (("--part", "truth", "--part", "refusal", "--no-question"), "add --part knowledge"),
        (("--part", "truth", "--pairs", "no.csv"), "no.csv"),
    ],
)
def test_bad_options(cli: Cli, options: tuple[str, ...], said: str) -> None:
    done = cli(*LAB, *options)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
