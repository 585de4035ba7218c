"""Every command end to end on scripted models and small files, and what it does with bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import demur.flows.load
from demur.files import dump_jsonl, dump_operating_point, dumps_row, load_operating_point, prompt_row
from demur.runtime.scripted import ScriptedRuntime
from demur.types import OperatingPoint, Prompt, Threshold, expand_expected
from tests.cli.conftest import Cli


def scripted(n: int = 0) -> ScriptedRuntime:
    """A model with one refuse category: prompts with "bad" in them score high and are refused."""

    def p(prompt: Prompt) -> dict[str, float]:
        x = 0.9 if "bad" in prompt.text else 0.1
        return {"safety": x, "respond": 0.95 - x}

    def answer(prompt: Prompt, *_: object) -> str:
        return (
            "I'm sorry, but I can't help with that."
            if "bad" in prompt.text
            else "Sure, here is how it works."
        )

    return ScriptedRuntime(answer, scores=p, control=["safety"], forced={"safety": "I'm sorry, I can't."})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedRuntime:
    runtime = scripted()
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    return runtime


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """80 should-refuse and 80 look-alike prompts."""
    rows = [
        Prompt.of(
            f"{'bad' if refuse else 'fine'} request {i}",
            id=f"{'r' if refuse else 'b'}{i}",
            category="safety",
            expected=expand_expected("refuse" if refuse else "comply"),
        )
        for refuse in (True, False)
        for i in range(80)
    ]
    path = tmp_path / "prompts.jsonl"
    dump_jsonl(map(prompt_row, rows), path)
    return path


# --- what the commands do --------------------------------------------------------------------------------


def test_score_writes_one_row_a_prompt(cli: Cli, model: ScriptedRuntime, prompts: Path) -> None:
    done = cli("score", prompts)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0 and len(rows) == 160
    assert rows[0] == {
        "schema_version": 1,
        "id": "r0",
        "p_refuse": 0.9,
        "probabilities": {"safety": 0.9, "respond": pytest.approx(0.05)},
        "off_control_mass": pytest.approx(0.05),
        "token": "safety",
        "model": model.name,
        "fingerprint": model.fingerprint,
    }


def test_stdin_csv_and_out_file(cli: Cli, model: ScriptedRuntime, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scores.jsonl"
    done = cli("score", "-", "--out", out, stdin="id,prompt\na,a bad thing\nb,a fine thing\n")
    assert (done.code, done.out) == (0, "")
    assert [json.loads(x)["p_refuse"] for x in out.read_text().splitlines()] == [0.9, 0.1]


def test_generate_one_prompt_prints_its_text(cli: Cli, model: ScriptedRuntime) -> None:
    assert cli("generate", "a fine question?").out == "Sure, here is how it works.\n"
    row = json.loads(cli("generate", "a bad question?", "--json").out)
    assert row["content"].startswith("I'm sorry") and row["prompt_id"] == "prompt"


def test_generate_a_file_then_judge_it(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.jsonl"
    assert cli("generate", prompts, "-o", replies, "--samples", "2", "--temperature", "1").code == 0
    done = cli("judge", replies, "--prompts", prompts)
    labels = [json.loads(x)["label"] for x in done.out.splitlines()]
    assert labels == ["full_refusal"] * 160 + ["compliance"] * 160
    assert "320 answers: 160 full_refusal, 160 compliance" in done.err
    assert "against people" in done.err


def test_generate_follows_the_point_that_came_with_the_model(
    cli: Cli, model: ScriptedRuntime, tmp_path: Path
) -> None:
    asked = ("generate", "a fine request", "--json")  # p_refuse is 0.1
    assert json.loads(cli(*asked).out)["control_token"] == "respond"
    model.shipped_point = OperatingPoint(id="strict", thresholds={"safety": Threshold(tau=0.05)})
    reply = json.loads(cli(*asked).out)
    assert (reply["control_token"], reply["control_forced"], reply["condition"]) == ("safety", True, "strict")
    dump_operating_point(
        replace(model.shipped_point, id="loose", thresholds={"safety": Threshold(tau=0.95)}),
        tmp_path / "p.yaml",
    )
    done = cli(*asked, "--operating-point", tmp_path / "p.yaml")
    assert done.code == 2 and "--allow-refusal-lowering" in done.err


def test_system_file_reaches_the_model(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = ScriptedRuntime(lambda p, c, s: f"{c.name}: {p.messages[0].content}")
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    (tmp_path / "s.txt").write_text("Be brief.\n")
    assert cli("generate", "hello", "--system", tmp_path / "s.txt").out == "system: Be brief.\n"


@pytest.mark.parametrize("source", ["scores", "model"])
def test_calibrate_our_scores(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path, source: str
) -> None:
    point_file = tmp_path / "point.yaml"
    if source == "scores":
        cli("score", prompts, "-o", tmp_path / "scores.jsonl")
        done = cli("calibrate", tmp_path / "scores.jsonl", "--prompts", prompts, "-o", point_file)
    else:
        done = cli("calibrate", prompts, "-m", "any", "-o", point_file)
    assert done.code == 0, done.err
    point = load_operating_point(point_file)
    assert 0.1 < point.thresholds["safety"].tau <= 0.9
    assert point.thresholds["safety"].refusal_rate == 1.0
    assert point.guarantee and point.guarantee[:20] in done.err
    assert point.model_fingerprint == model.fingerprint is not None
    if source == "scores":
        rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
        mixed = [{**r, "fingerprint": "other"} if i else r for i, r in enumerate(rows)]
        (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mixed))
        done = cli("calibrate", tmp_path / "mixed.jsonl", "--prompts", prompts)
        assert done.code == 2 and "several models" in done.err
        done = cli("calibrate", tmp_path / "scores.jsonl", "--prompts", prompts, "--dtype", "float32")
        assert done.code == 2 and "--dtype belong" in done.err


def test_calibrate_with_a_budget_for_ordinary_prompts(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    ordinary = [Prompt.of(f"hello {i}", id=f"o{i}", expected=expand_expected("comply")) for i in range(80)]
    few = prompts.read_text() + "".join(dumps_row(prompt_row(p)) + "\n" for p in ordinary)
    (tmp_path / "all.jsonl").write_text(few)
    args = ("calibrate", tmp_path / "all.jsonl", "-m", "any", "--ordinary-alpha")
    done = cli(*args, "0.05", "-o", tmp_path / "p.yaml")
    assert done.code == 0, done.err
    assert "ordinary<=0.05" in load_operating_point(tmp_path / "p.yaml").goal
    done = cli(*args, "0.01")
    assert done.code == 2 and "at least 299" in done.err and "found 80" in done.err
    done = cli(*args, "0.05", "--goal", "best-f1")
    assert done.code == 2 and "max-tpr" in done.err


def test_calibrate_says_who_answers(cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path) -> None:
    done = cli("calibrate", prompts, "-m", "any", "--answers", "base", "-o", tmp_path / "p.yaml")
    assert done.code == 0 and "answered by the base" in done.err
    assert load_operating_point(tmp_path / "p.yaml").answers == "base"
    done = cli("calibrate", tmp_path / "t.csv", "--score", "p", "--answers", "base")
    assert done.code == 2 and "not with --score" in done.err


def test_calibrate_counts_a_group_of_prompts_once(cli: Cli, tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "prompt": f"q{i}", "expected": "comply", "group": f"g{i // 30}"} for i in range(120)
    ]
    rows += [{"id": f"r{i}", "prompt": f"r{i}", "expected": "refuse"} for i in range(40)]
    scores = [{"id": r["id"], "p_refuse": 0.1 if r["expected"] == "comply" else 0.9} for r in rows]
    for name, some in (("prompts", rows), ("scores", scores)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    args = (
        "calibrate",
        tmp_path / "scores.jsonl",
        "--prompts",
        tmp_path / "prompts.jsonl",
        "-o",
        tmp_path / "p.yaml",
    )
    done = cli(*args)
    assert done.code != 0 and "independent" in done.err  # four groups, not 120 prompts


def test_calibrate_any_table(cli: Cli, tmp_path: Path) -> None:
    rows = [f"{i / 400},{int(i >= 200)},{'ab'[i % 2]}" for i in range(400)]
    (tmp_path / "s.csv").write_text("p,truth,kind\n" + "\n".join(rows) + "\n")
    args = ("calibrate", tmp_path / "s.csv", "--score", "p", "--label", "truth", "--group", "kind")
    point = yaml.safe_load(cli(*args).out)
    assert sorted(point["thresholds"]) == ["a", "b"] and point["alpha"] == 0.05
    rate = yaml.safe_load(cli(*args, "--goal", "target-rate", "--rate", "0.5").out)
    assert rate["thresholds"]["a"]["refusal_rate"] == pytest.approx(0.5, abs=0.02)
    assert "guarantee" not in rate


def test_card_of_a_model_and_its_gates(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    args = ("card", "--prompts", prompts, "--calibrate", prompts, "--out", tmp_path / "out")
    done = cli(*args, "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["headline"]["rows"]["all"]["refuse"]["k"] == 80
    assert (tmp_path / "out" / "card.html").exists()
    assert cli(*args, "--max-false-refusal", "0.1", "--min-refusal", "0.9").code == 0
    failed = cli(*args, "--max-false-refusal", "0.01")
    assert failed.code == 1 and "gate failed: false refusals may be as high as 5%" in failed.err


def test_a_house_taxonomy_goes_through_the_card(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    house = tmp_path / "house.jsonl"
    house.write_text(prompts.read_text().replace('"safety"', '"weapons"'))
    (tmp_path / "t.yaml").write_text("categories: {weapons: safety}")
    args = ("card", "--prompts", house, "--calibrate", "core:test", "--out", tmp_path / "out", "--json")
    done = cli(*args, "--taxonomy", tmp_path / "t.yaml")
    assert done.code == 0, done.err
    text = json.loads(done.out)["sections"]["text"]["values"]
    assert set(text["categories"]) == {"safety", "all"}
    assert set(text["house_categories"]) == {"weapons", "all"}
    assert text["house_categories"]["weapons"] == text["categories"]["safety"]
    assert "weapons" in (tmp_path / "out" / "card.html").read_text(encoding="utf-8")
    point = cli("calibrate", house, "-m", "x", "--taxonomy", tmp_path / "t.yaml")
    assert list(yaml.safe_load(point.out)["thresholds"]) == ["safety"], point.err
    (tmp_path / "t.yaml").write_text("categories: {drugs: safety}")
    assert "has no category 'weapons'" in cli(*args, "--taxonomy", tmp_path / "t.yaml").err
    assert "neither is given" in cli("card", "--taxonomy", tmp_path / "t.yaml").err


def test_card_of_answers(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "prompt,response,category,expected\n"
        "How do I kill a process?,You can use the kill command for this.,safety,comply\n"
    )
    done = cli("card", "--replies", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "card.json").exists() and "card.html" in done.err


def test_listings(cli: Cli) -> None:
    names = {m["name"] for m in json.loads(cli("models", "--json").out)}
    assert {"smollm2", "demur-smollm2"} <= names
    assert "xstest" in {d["slug"] for d in json.loads(cli("data", "--json").out)}
    listed = json.loads(cli("methods", "--json").out)
    assert len(listed) >= 31 and {"slug", "room", "tier", "paper"} <= set(listed[0])
    assert "2412.06748" in cli("methods", "refusal-tokens").out
    assert "refusal-cliff" in cli("methods").out
    assert cli("--version").out.startswith("demur 0.")


# --- what people see -------------------------------------------------------------------------------------


def test_terminal_gets_no_escape_sequences_and_a_pipe_gets_the_text(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "\x1b[31mred\x1b]0;title\x07 \u202eevil\x9b2J"
    runtime = ScriptedRuntime({"*": nasty})
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    assert cli("generate", "x").out == nasty + "\n"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert cli("generate", "x").out == "red evil\n"
    assert "\x9b" not in cli("generate", "x", "--json").out


def test_ctrl_c_says_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demur.flows.load, "load_runtime", stop)
    done = cli("generate", "x")
    assert done.code == 130 and "same command" in done.err and "Traceback" not in done.err


def test_a_bug_keeps_its_traceback_and_is_no_failed_gate(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(demur.flows.load, "load_runtime", broken)
    assert cli("generate", "x").code == 2


# --- bad input: exit 2, one clear message, no traceback --------------------------------------------------


BAD_PROMPTS = {
    "latin1.csv": (b"id,prompt\na,caf\xe9\n", "not UTF-8"),
    "twice.jsonl": (b'{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "ids must be unique"),
    "empty.jsonl": (b"\n\n", "holds no rows"),
    "header.csv": (b"id,prompt\n", "holds no rows"),
    "sheet.xlsx": (b"PK", "unknown file type"),
    "broken.jsonl": (b'{"id": "a", "prompt": \n', "line 1"),
    "list.jsonl": (b"[1, 2]\n", "one JSON object per line"),
    "silent.jsonl": (b'{"id": "a"}\n', "needs `prompt`"),
    "wish.jsonl": (b'{"prompt": "x", "expected": "perhaps"}\n', "perhaps"),
    "missing.jsonl": (None, "no such file"),
}


@pytest.mark.parametrize("command", ["score", "generate"])
@pytest.mark.parametrize("name", sorted(BAD_PROMPTS))
def test_bad_prompt_files(cli: Cli, model: ScriptedRuntime, tmp_path: Path, command: str, name: str) -> None:
    raw, message = BAD_PROMPTS[name]
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    done = cli(command, tmp_path / name)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and name in done.err and "Traceback" not in done.err


def test_a_folder_for_a_file(cli: Cli, model: ScriptedRuntime, tmp_path: Path) -> None:
    done = cli("score", tmp_path)
    assert done.code == 2 and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "x", "--samples", "3"), "--temperature"),
        (("judge", "answers.csv", "--judge", "nobody"), "rules/demur-v1"),
        (("methods", "nothing"), "refusal-tokens"),
        (("models", "pull", "no such"), "no such"),
        (("data", "get", "nothing"), "xstest"),
        (("calibrate", "x.csv", "--goal", "target-rate"), "--rate"),
        (("card", "some-model", "--replies", "a.csv"), "leave MODEL"),
        (("score", "core:exam"), "exam"),
        (("score", "x.jsonl", "--no-such-option"), "--no-such-option"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_arguments(cli: Cli, args: tuple[str, ...], message: str) -> None:
    done = cli(*args)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_fingerprint": "another"}, "another"),
        ({"thresholds": {"politics": Threshold(tau=0.5)}}, "politics"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "card"])
def test_operating_point_of_another_model(
    cli: Cli,
    model: ScriptedRuntime,
    prompts: Path,
    tmp_path: Path,
    command: str,
    changes: dict[str, object],
    message: str,
) -> None:
    good = OperatingPoint(id="op", thresholds={"safety": Threshold(tau=0.5)})
    dump_operating_point(replace(good, **changes), tmp_path / "p.yaml")  # type: ignore[arg-type]
    files = ("--prompts", prompts, "-o", tmp_path / "out") if command == "card" else (prompts,)
    done = cli(command, *files, "--operating-point", tmp_path / "p.yaml")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_unknown_category_in_calibration(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    text = prompts.read_text().replace('"category": "safety"', '"category": "house_rules"')
    (tmp_path / "house.jsonl").write_text(text)
    done = cli("calibrate", tmp_path / "house.jsonl", "-m", "any")
    assert done.code == 2 and "house_rules" in done.err and "safety" in done.err


def test_too_few_prompts_for_the_claim(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path
) -> None:
    lines = prompts.read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:80] + lines[80:100]))
    done = cli("calibrate", tmp_path / "few.jsonl", "-m", "any")
    assert done.code == 2 and "45" in done.err


def test_scores_without_their_prompts(cli: Cli, tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": "zz", "p_refuse": 0.5}\n')
    done = cli("calibrate", tmp_path / "s.jsonl", "--prompts", prompts)
    assert done.code == 2 and "'zz'" in done.err and "--prompts" in done.err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rate: 1\n", "names are mode"),
        ("epochs: many\n", "epochs"),
        ("epochs: 0\n", "recipe: epochs=0: it must be at least 1\n"),
        ("mode: loud\n", "category"),
        ("[1, 2]\n", "names are mode"),
        ("a: [\n", "not YAML"),
    ],
)
def test_bad_recipes(cli: Cli, tmp_path: Path, recipe: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    done = cli("train", "refusal-tokens", "--recipe", tmp_path / "r.yaml")
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_train_passes_files_recipe_and_folder_on(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fit(
        self: Any, runtime: Any, train: Any, select: Any, out: Path, *, start: Any, progress: Any
    ) -> None:
        progress("training", 1, 2)
        seen.update(recipe=self.recipe, runtime=runtime, n=(len(train), len(select)), out=out, start=start)

    monkeypatch.setattr("demur.train.refusal_tokens.RefusalTokens.fit", fit)
    (tmp_path / "r.yaml").write_text("rank: 4\nepochs: 9\n")
    options = ("--recipe", tmp_path / "r.yaml", "--epochs", "1", "--no-contrast", "--out", tmp_path / "a")
    done = cli("train", "refusal-tokens", prompts, "--select", prompts, *options)
    assert done.code == 0, done.err
    assert (seen["recipe"].rank, seen["recipe"].epochs, seen["recipe"].contrast) == (4, 1, False)
    assert (seen["runtime"], seen["n"], seen["out"]) == (model, (160, 160), tmp_path / "a")
    assert seen["start"] is None
    done = cli("train", "refusal-tokens", prompts, "--select", prompts, *options, "--from", tmp_path / "none")
    assert done.code == 2 and str(tmp_path / "none") in done.err
    monkeypatch.setattr("demur.train.adapter.Adapter.load", lambda folder: f"adapter of {folder.name}")
    done = cli(
        "train", "refusal-tokens", prompts, "--select", prompts, *options, "--from", tmp_path / "first"
    )
    assert done.code == 0 and seen["start"] == "adapter of first"


def test_stopped_training_says_what_it_left(
    cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(self: Any, runtime: Any, train: Any, select: Any, out: Path, **_: Any) -> None:
        if out.name == "left":
            (out / "demur.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("demur.train.refusal_tokens.RefusalTokens.fit", fit)
    for name in ("left", "nothing"):
        (tmp_path / name).mkdir()
        done = cli("train", "refusal-tokens", prompts, "--select", prompts, "--out", tmp_path / name)
        assert done.code == 130 and (f"--from {tmp_path / name}" in done.err) == (name == "left")


def test_unwritable_output(cli: Cli, model: ScriptedRuntime, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = cli("score", prompts, "-o", tmp_path / "file" / "s.jsonl")
    assert done.code == 2 and "Traceback" not in done.err
