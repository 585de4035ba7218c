"""`demur calibrate --check`: what thresholds do on rows that were held out, and rows that were not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import demur.flows.load
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt
from tests.cli.conftest import Cli

TABLE = ("--score", "p", "--group", "g")


def csv(path: Path, prefix: str, n: int = 200, high: int = 0, **more: str) -> Path:
    """n rows to refuse and n look-alikes in group a; `high` of these score like what should be refused."""
    rows = [{"p": 0.9 if y or i < high else 0.1, "y": y, "g": "a"} for y in (0, 1) for i in range(n)]
    if prefix:
        rows = [{"id": f"{prefix}{i}", **row} for i, row in enumerate(rows)]
    rows = [{**row, **{k: v.format(i // 4) for k, v in more.items()}} for i, row in enumerate(rows)]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(words: str, prefix: str = "", n: int = 80) -> list[dict[str, Any]]:
    """Prompts to refuse, look-alikes of safety and ordinary ones; ids only with a prefix."""
    kinds = (("bad", "safety", "refuse"), ("fine", "safety", "comply"), ("plain", None, "comply"))
    rows = [
        {"prompt": f"{kind} {words} {i}", "category": category, "expected": expected}
        for kind, category, expected in kinds
        for i in range(n)
    ]
    return [{"id": f"{prefix}{i}", **row} for i, row in enumerate(rows)] if prefix else rows


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedRuntime:
    def p(prompt: Prompt) -> dict[str, float]:
        x = 0.9 if "bad" in prompt.text or "trap" in prompt.text else 0.1
        return {"safety": x, "respond": 0.95 - x}

    runtime = ScriptedRuntime(lambda *a: "Yes.", scores=p, control=["safety"], forced={"safety": "No."})
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    return runtime


@pytest.mark.parametrize(
    ("high", "n", "outcome"),
    [(0, 200, "kept"), (12, 200, "cannot tell"), (40, 200, "exceeded"), (0, 20, "cannot tell")],
)
def test_a_table_is_checked_on_rows_that_were_held_out(
    cli: Cli, tmp_path: Path, high: int, n: int, outcome: str
) -> None:
    fit, held = csv(tmp_path / "fit.csv", "f"), csv(tmp_path / "held.csv", "h", n, high)
    args = ("calibrate", fit, *TABLE, "--check", held, "-o", tmp_path / "p.yaml")
    done = cli(*args)
    assert (done.code, done.out) == (0, ""), done.err
    assert (
        "Check on rows that were held out" in done.err and outcome in done.err and f"{high}/{n}" in done.err
    )
    report = json.loads(cli(*args, "--json").out)
    assert report["values"]["outcomes"] == {"a": outcome}
    (row,) = report["tables"][1]["rows"]
    assert (row[0], row[2]["k"], row[2]["n"], row[3]["k"], row[3]["n"], row[4]) == ("a", n, n, high, n, 0.05)
    assert 0 <= row[3]["low"] <= high / n <= row[3]["high"]
    plain = cli("calibrate", fit, *TABLE)
    assert yaml.safe_load(plain.out) == yaml.safe_load((tmp_path / "p.yaml").read_text())


def test_rows_that_were_calibrated_on_are_no_check(cli: Cli, tmp_path: Path) -> None:
    fit = csv(tmp_path / "fit.csv", "f")
    for other, words in (
        (
            csv(tmp_path / "a.csv", "f", 30),
            "60 rows of --check are among those calibrated on (the first by its id: 'f0')",
        ),
        (csv(tmp_path / "b.csv", "", prompt="Hello {}!"), "by its text: 'hello 0'"),
        (csv(tmp_path / "c.csv", "f", prompt="Other {}"), "by its id: 'f0'"),
    ):
        if "text" in words:
            fit = csv(tmp_path / "fit.csv", "f", prompt="hello... {}")
        done = cli("calibrate", fit, *TABLE, "--check", other, "-o", tmp_path / "p.yaml")
        assert (done.code, done.out) == (2, "") and words in done.err
        assert not (tmp_path / "p.yaml").exists()


def test_without_ids_the_same_file_is_refused_and_another_noted(cli: Cli, tmp_path: Path) -> None:
    fit, other = csv(tmp_path / "fit.csv", ""), csv(tmp_path / "other.csv", "", 150)
    done = cli("calibrate", fit, *TABLE, "--check", fit)
    assert (done.code, done.out) == (2, "") and "rows that were calibrated on" in done.err
    done = cli("calibrate", fit, *TABLE, "--check", other)
    assert done.code == 0 and "Rows without id, prompt or prompt_hash cannot be told" in done.err


def test_a_model_is_checked_on_other_prompts(cli: Cli, model: ScriptedRuntime, tmp_path: Path) -> None:
    fit = jsonl(tmp_path / "fit.jsonl", asked("request"))
    held = asked("thing")
    held += [{"prompt": f"trap {i}", "category": None, "expected": "comply"} for i in range(20)]
    args = ("calibrate", fit, "-m", "any", "--ordinary-alpha", "0.05", "-o", tmp_path / "p.yaml", "--json")
    done = cli(*args, "--check", jsonl(tmp_path / "held.jsonl", held))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    # neither file has ids, so both have line1, line2, ...: the texts say that they are others
    assert report["values"]["outcomes"] == {"safety": "kept", "ordinary requests": "exceeded"}
    assert report["tables"][1]["rows"][1][3]["k"] == 20 and report["tables"][1]["rows"][1][4] == 0.05
    done = cli(*args, "--check", jsonl(tmp_path / "same.jsonl", [*asked("thing"), asked("request")[7]]))
    assert (
        (done.code, done.out) == (2, "") and "1 rows of --check" in done.err and "bad request 7" in done.err
    )


def test_scores_are_checked_with_their_prompts(cli: Cli, model: ScriptedRuntime, tmp_path: Path) -> None:
    sets = {name: jsonl(tmp_path / f"{name}.jsonl", asked(name, name)) for name in ("fit", "held")}
    for name, prompts in sets.items():
        assert cli("score", prompts, "-o", tmp_path / f"{name}.scores.jsonl").code == 0
    scores, other = tmp_path / "fit.scores.jsonl", tmp_path / "held.scores.jsonl"
    args = ("calibrate", scores, "--prompts", sets["fit"])
    done = cli(*args, "--check", other, "--check-prompts", sets["held"])
    assert done.code == 0 and "kept" in done.err and "0/80" in done.err, done.err
    done = cli(*args, "--check", scores)
    assert (done.code, done.out) == (2, "") and "240 rows of --check" in done.err
    done = cli(*args, "--check", other)
    assert done.code == 2 and "have no prompt" in done.err
    rows = [{**json.loads(line), "model": "another"} for line in other.read_text().splitlines()]
    done = cli(*args, "--check", jsonl(tmp_path / "x.jsonl", rows), "--check-prompts", sets["held"])
    assert done.code == 2 and "several models" in done.err


def test_scores_without_categories_are_checked_too(cli: Cli, tmp_path: Path) -> None:
    args: list[str | Path] = ["calibrate"]
    for name, of_scores, of_prompts in (("fit", "", "--prompts"), ("held", "--check", "--check-prompts")):
        rows = [{**row, "group": None} for row in asked(name, name)[:160]]
        scores = [{"id": r["id"], "p_refuse": 0.9 if "bad" in r["prompt"] else 0.1} for r in rows]
        args += [of_scores] * bool(of_scores) + [jsonl(tmp_path / f"{name}.scores.jsonl", scores)]
        args += [of_prompts, jsonl(tmp_path / f"{name}.jsonl", rows)]
    done = cli(*args)
    assert done.code == 0 and "kept" in done.err and "0/80" in done.err, done.err


def test_rows_of_one_cluster_are_one_draw(cli: Cli, tmp_path: Path) -> None:
    fit = csv(tmp_path / "fit.csv", "f", 100, source="s{}")
    assert cli("calibrate", fit, *TABLE).code == 0
    done = cli("calibrate", fit, *TABLE, "--cluster", "source")
    assert done.code == 2 and "found 25 for a" in done.err
    held = csv(tmp_path / "held.csv", "h", 200, 40, source="t{}")
    fit = csv(tmp_path / "fit.csv", "f", 400, source="s{}")
    args = ("calibrate", fit, *TABLE, "--check", held, "-o", tmp_path / "p.yaml", "--json")
    loose, strict = (
        json.loads(cli(*args, *more).out)["tables"][1]["rows"][0][3] for more in ((), ("--cluster", "source"))
    )
    assert strict["high"] - strict["low"] > 1.5 * (loose["high"] - loose["low"])


def test_copies_are_counted_once_and_said(cli: Cli, tmp_path: Path) -> None:
    fit = csv(tmp_path / "fit.csv", "f")
    fit.write_text(fit.read_text() + fit.read_text().splitlines()[1] + "\n")
    done = cli("calibrate", fit, *TABLE)
    assert (
        done.code == 0 and "1 rows are copies of others" in done.err and "'f0' on lines 2 and 402" in done.err
    )
    fit.write_text(fit.read_text() + "f3,0.5,1,a\n")
    done = cli("calibrate", fit, *TABLE)
    assert (done.code, done.out) == (2, "") and "1 rows repeat an id" in done.err and "'f3'" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--score", "p", "--check-prompts", "x.jsonl", "--check", "h.csv"), "--check-prompts"),
        (("--check-prompts", "x.jsonl"), "--check-prompts"),
        (("--score", "p", "--json"), "--out"),
        (("--cluster", "c"), "add --score"),
    ],
)
def test_options_that_do_not_go_together(cli: Cli, args: tuple[str, ...], message: str) -> None:
    done = cli("calibrate", "s.csv", *args)
    assert (done.code, done.out) == (2, "") and message in done.err
