"""`demur lab depth` on a tiny model: what it prints and writes, and what it says to wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from demur.cli import options
from tests.cli.conftest import Cli

LAB = ("lab", "depth")
GRID = ("--depths", "0,1,3", "--new-tokens", "2")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runtime.tiny import tiny_runtime

    monkeypatch.setattr(
        options, "load_model", lambda *_a, base_only=False, **_k: tiny_runtime(control=not base_only)
    )


def write(path: Path) -> Path:
    rows = [
        {
            "id": n,
            "prompt": f"tell me about the {word} <b>",
            "response": "one two three <script>alert(1)</script>",
            "category": "humanizing",
            "expected": "refuse" if n % 2 else "comply",
        }
        for n, word in enumerate(("egg", "fjord", "cat", "dog"))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.usefixtures("tiny")
def test_report_and_page_of_a_file(cli: Cli, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    done = cli(*LAB, write(tmp_path / "a.jsonl"), *GRID, "--out", out, "--page", page)
    assert done.code == 0, done.err
    for words in ("requests that it should refuse", "reheader", "continue", "judge on the next 2 tokens"):
        assert words in done.out, done.out
    report = json.loads(out.read_text())
    assert report["provenance"]["forced_text"] == "a file of 4 answers"
    reheader = [p for p in report["values"]["curves"] if p["curve"] == "reheader"]
    assert [p["depth"] for p in reheader] == [0, 1, 3] * 2 and all(p["n"] == 2 for p in reheader)
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text and "<script" not in text and "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    again = cli(*LAB, tmp_path / "a.jsonl", *GRID, "--json")
    assert json.loads(again.out)["values"] == report["values"]


@pytest.mark.usefixtures("tiny")
def test_without_a_file_the_base_answers(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = cli(*LAB, "--prompts", "4", *GRID, "--out", out)
    assert done.code == 0, done.err
    assert "of 6 answers read as plain answers" in done.err
    report = json.loads(out.read_text())
    assert "answers of the base model" in report["provenance"]["forced_text"]


@pytest.mark.usefixtures("tiny")
def test_wrong_input(cli: Cli, tmp_path: Path) -> None:
    for args, words in (
        (("--depths", "0,deep"), "whole numbers"),
        (("--depths", "-2,3"), "depths count from 0"),
        (((tmp_path / "none.jsonl"),), "none.jsonl"),
    ):
        done = cli(*LAB, *args)
        assert done.code == 2 and words in done.err, (args, done.err)
