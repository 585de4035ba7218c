"""`demur lab refusal-cliff` on a tiny model: what it prints and writes, and what it says to wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from demur.cli import options
from tests.cli.conftest import Cli

LAB = ("lab", "refusal-cliff")
MARKS = ("--open", "please", "--close", "? .")
WORDS = ("boil egg", "letter cat dog", "story poem sum", "fjord norway", "capital france weather")


def write(path: Path, n: int, shift: int = 0, **more: Any) -> Path:
    rows = [
        {
            "id": i,
            "prompt": f"tell me about {'bomb' if i % 2 else 'egg'} {WORDS[(i + shift) % 5]} {WORDS[i % 3]}",
            "thinking": " ".join(WORDS[(i + k) % 5] for k in range(1 + i % 3)),
            "refused": bool(i % 2),
            "harmful": bool(i % 2),
            **more,
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from tests.runtime.tiny import tiny_runtime

    monkeypatch.setattr(options, "load_model", lambda *_a, **_k: tiny_runtime())


@pytest.mark.usefixtures("tiny")
def test_report_traces_and_training_rows(cli: Cli, tmp_path: Path) -> None:
    fit, file = (
        write(tmp_path / "fit.jsonl", 40),
        write(tmp_path / "rows.jsonl", 10, shift=2, thinking="one two"),
    )
    names = {k: tmp_path / f"{k}.json" for k in ("out", "traces", "select", "page")}
    files = [str(x) for k, path in names.items() for x in (f"--{k}", path)]
    done = cli(*LAB, file, "--fit", fit, *MARKS, "--heads", "2", "--causal", "--share", "0.2", *files)
    assert done.code == 0, done.err
    for words in ("plateau", "drop", "shuffled labels", "bag_of_words", "heads, 4 of 12", "may read harm"):
        assert words in done.out, done.out
    report = json.loads(names["out"].read_text())["values"]
    assert len(report["cliffs"]) == 10 and len(report["heads"]) == 4
    assert report["heads"][0]["contribution"] <= report["heads"][-1]["contribution"]
    assert all(isinstance(h["rise"], float) for h in report["heads"])
    traced = [json.loads(line) for line in names["traces"].read_text().splitlines()]
    assert traced[3]["tokens"][-2:] == ["?", "."] and traced[3]["spans"][-1] == "close"
    assert all(0 <= s <= 1 for s in traced[0]["scores"]) and len(traced) == 10
    picked = [json.loads(line) for line in names["select"].read_text().splitlines()]
    drops = {c["id"]: c["drop"] for c in report["cliffs"]}
    assert [p["id"] for p in picked] == sorted(drops, key=lambda i: -drops[i])[:2]
    web = names["page"].read_text()
    assert len(report["shuffled_curve"]) == len(report["curve"]) and "<script" not in web
    assert web.count("<article>") == 6 and "6 of 10" in web and "one two" in re.sub("<[^>]+>", "", web)
    assert picked[0]["completion"][0]["content"].startswith("pleaseone two? .")


@pytest.mark.usefixtures("tiny")
def test_thinking_cut_short_and_heads_taken_out_at_the_same_norm(cli: Cli, tmp_path: Path) -> None:
    fit = write(tmp_path / "fit.jsonl", 40)
    file = write(tmp_path / "rows.jsonl", 10, shift=2, thinking="one two")
    out = tmp_path / "out.json"
    args = ("--truncate", "0.5,0,none", "--max-new-tokens", "4", "--causal", "--keep-norm", "--heads", "1")
    done = cli(*LAB, file, "--fit", fit, *MARKS, *args, "-o", out, "--page", tmp_path / "page.html")
    assert done.code == 0, done.err
    for words in ("cut short, harmful (5)", "cut short, harmless (5)", "no marks", "without it, norm kept"):
        assert words in done.out, done.out
    report = json.loads(out.read_text())
    places = report["values"]["truncation"]["places"]
    assert [p["share"] for p in places] == 2 * [1.0, 0.5, 0.0, None]
    assert [p["kept"] for p in places] == 2 * [2.0, 1.0, 0.0, 0.0]
    assert report["provenance"]["judge"] == "rules/demur-v1"
    assert len(report["values"]["cliffs"]) == 5  # harmless rows are cut, not traced
    assert "cut short" not in (tmp_path / "page.html").read_text()
    rises = [h["rise"] for h in report["values"]["heads"]]
    free = cli(*LAB, file, "--fit", fit, *MARKS, "--truncate", "1", "--causal", "--heads", "1", "-o", out)
    assert free.code == 0 and "norm kept" not in free.out
    assert rises != [h["rise"] for h in json.loads(out.read_text())["values"]["heads"]]


@pytest.mark.usefixtures("tiny")
def test_wrong_options_are_explained(cli: Cli, tmp_path: Path) -> None:
    fit = write(tmp_path / "fit.jsonl", 40)
    file = write(tmp_path / "rows.jsonl", 4, thinking="one two")
    for args, words in (
        (("--truncate", "half"), "shares from 0 to 1"),
        (("--truncate", "1,2"), "share 2.0 of the thinking"),
        (("--truncate", "1", "--max-new-tokens", "300"), "context"),
        (("--truncate", "1", "--judge", "nobody"), "nobody"),
        (("--keep-norm",), "--causal"),
        (("--judge", "rules/demur-v1"), "--truncate"),
        (("--max-new-tokens", "9"), "--truncate"),
        (("--keep-norm", "--causal", "--heads", "0"), "--heads above 0"),
    ):
        done = cli(*LAB, file, "--fit", fit, *MARKS, *args)
        assert done.code == 2 and words in done.err, (args, done.err)


@pytest.mark.usefixtures("tiny")
def test_wrong_input_is_explained(cli: Cli, tmp_path: Path) -> None:
    fit, other = write(tmp_path / "fit.jsonl", 40), write(tmp_path / "few.jsonl", 8)
    for args, words in (
        ((fit, "--fit", fit), "must not see"),
        ((fit, "--fit", other), "8 rows stand"),
        ((write(tmp_path / "new.jsonl", 4, thinking="one"), "--fit", other), "at least 20"),
        ((write(tmp_path / "none.jsonl", 4, thinking=""), "--fit", fit), "thinking"),
    ):
        done = cli(*LAB, *args, *MARKS)
        assert done.code == 2 and words in done.err, done.err
