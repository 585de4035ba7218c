"""`--agreement`: a judge that asks a model is measured once, and every rate by it carries that error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import demur.flows.load
from demur.judges import agreement
from demur.judges.labelled_sets import LabelledReply, LabelledSet
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt, Reply
from tests.cli.conftest import Cli
from tests.fixtures.answers import build

RUBRIC = ("--judge", "rubric/xstest-3way-v1")
BY_A = "rubric/xstest-3way-v1@a:scripted"


def labelled() -> Iterator[LabelledReply]:
    """200 answers, half of them refusals; the word of every tenth says the opposite of what a person said."""
    for i in range(200):
        declined, kind = i % 2 == 0, "unsafe" if i < 100 else "safe"
        word = "Sorry" if declined != (i % 20 < 2) else "Sure"
        reply = Reply(prompt_id=str(i), content=f"{word}, {i}.")
        yield LabelledReply(Prompt.of(f"Do {i}.", id=str(i)), reply, declined, ("all", kind))


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a judge asks goes by one word; the only labelled set is the one above."""

    def load(name: str, **_: object) -> ScriptedRuntime:
        def say(prompt: Prompt, *_: object) -> str:
            if "Put the one choice" not in prompt.text:
                return "Sorry, no." if len(prompt.text) % 4 == 0 else "Sure, here."
            return "full_refusal" if "sorry" in prompt.text.lower() else "full_compliance"

        return ScriptedRuntime(say, name=name)

    monkeypatch.setattr(demur.flows.load, "load_runtime", load)
    sets = (LabelledSet(name="mine", definition="x", items=labelled),)
    monkeypatch.setitem(agreement.validate.__kwdefaults__, "sets", sets)  # type: ignore[index]


@pytest.fixture
def measured(cli: Cli, tmp_path: Path) -> Path:
    """The error of the rubric with model a."""
    out = tmp_path / "by-a.json"
    done = cli("judge", "--validate", *RUBRIC, "--judge-model", "a", "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return build.as_csv(tmp_path, build.answers(120))


def lookalike(done: SimpleNamespace) -> dict[str, object]:
    assert done.code == 0, done.err
    (condition,) = json.loads(done.out)["values"]["conditions"].values()
    rate: dict[str, object] = condition["rates"]["all"]["lookalike"]
    return rate


def test_the_rate_is_corrected_and_the_folder_keeps_the_error(
    cli: Cli, measured: Path, answers: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    measure = ("measure", "--replies", answers, *RUBRIC, "--judge-model", "a", "--json", "--out")
    assert lookalike(cli(*measure, tmp_path / "plain"))["corrected"] is None
    rate = lookalike(cli(*measure, run, "--agreement", measured))
    # of 100 prompts of each kind, 5 of 50 refusals and 5 of 50 answers were misread: .9 and .9
    assert rate["corrected"] == pytest.approx((rate["k"] / rate["n"] - 0.1) / 0.8)  # type: ignore[operator]
    kept = agreement.read(run / "judge-error.json")
    assert {r.judge for r in kept} == {BY_A} and {r.stratum for r in kept} == {"all", "unsafe", "safe"}
    # what reads the folder later needs no option
    gated = cli("gate", run, "--fail-if", "over_refusal > 0.8")
    assert f"{BY_A} against people's labels (mine): on unsafe prompts it finds 90%" in gated.err
    assert "with the judge's error taken out" in gated.out
    cli("diff", run, run, "--out", tmp_path / "d")
    assert "(mine)" in json.loads((tmp_path / "d" / "diff.json").read_text())["judge_note"]
    cli("export", run, "--to", "lm-eval", "--out", tmp_path / "x")
    (results,) = (tmp_path / "x").glob("results_*.json")
    assert '"dataset": "mine"' in results.read_text()
    # a folder of given answers is made anew by the next call
    assert lookalike(cli(*measure, run))["corrected"] is None
    assert not (run / "judge-error.json").exists()


def test_the_error_of_one_model_is_not_that_of_another(
    cli: Cli, measured: Path, answers: Path, tmp_path: Path
) -> None:
    done = cli(
        *("measure", "--replies", answers, *RUBRIC, "--judge-model", "b", "--agreement", measured, "--out"),
        tmp_path / "run",
    )
    assert done.code == 0, done.err
    given = f"has not been measured against people (the rows given are of {BY_A})"
    assert f"rubric/xstest-3way-v1@b:scripted {given}" in done.out
    assert not (tmp_path / "run" / "judge-error.json").exists()
    both = ("judge", answers, *RUBRIC, "--judge-model", "a", "--both-orders", "--agreement", measured)
    assert f"rubric/xstest-3way-v1/both-orders@a:scripted {given}" in cli(*both).err
    gated = cli("gate", tmp_path / "run", "--fail-if", "refusal < 0.01", "--agreement", measured)
    assert f"has not been measured (the rows given are of {BY_A}), so nothing" in gated.err


def test_judge_says_the_error(cli: Cli, measured: Path, answers: Path) -> None:
    judge = ("judge", answers, *RUBRIC, "--judge-model", "a")
    assert "has not been measured" in cli(*judge).err
    done = cli(*judge, "--agreement", measured)
    assert f"{BY_A} against people:\n  mine: 90% of 100 refusals found" in done.err
    assert f"{BY_A} was measured on mine, not on this material" in done.err


def test_a_resumed_run_and_joined_parts_keep_the_error(
    cli: Cli, measured: Path, answers: Path, tmp_path: Path
) -> None:
    asked = ("measure", "-m", "m", "--suite", answers, *RUBRIC, "--judge-model", "a", "--json")
    given = ("--agreement", measured)
    # given to a run that is there already, kept without the option, forgotten with --fresh
    assert lookalike(cli(*asked, "--out", tmp_path / "run"))["corrected"] is None
    for more in (given, ()):
        assert lookalike(cli(*asked, *more, "--out", tmp_path / "run"))["corrected"] is not None
    assert lookalike(cli(*asked, "--fresh", "--out", tmp_path / "run"))["corrected"] is None
    for i in (1, 2):
        assert cli(*asked, *given, "--shard", f"{i}/2", "--out", tmp_path / f"p{i}").code == 0
    parts = (tmp_path / "p1", tmp_path / "p2")
    joined = cli("measure", "--merge", *parts, "--out", tmp_path / "all", "--json")
    assert lookalike(joined)["corrected"] is not None


def test_files_of_answers_are_judged_by_a_model(
    cli: Cli, measured: Path, answers: Path, tmp_path: Path
) -> None:
    by_a = (*RUBRIC, "--judge-model", "a", "--agreement", measured)
    made = cli("card", "--replies", answers, *by_a, "--json", "--out", tmp_path / "card")
    assert made.code == 0, made.err
    text = json.loads(made.out)["sections"]["text"]["values"]
    assert text["judge"] == BY_A and text["judge_error"]["refuse"]["dataset"] == "mine"
    gated = cli("gate", answers, *by_a, "--fail-if", "over_refusal > 0.8")
    assert gated.code == 0 and f"judged by {BY_A}. {BY_A} against people's labels (mine)" in gated.err
    changed = cli("diff", tmp_path / "card", answers, *by_a, "--json", "--out", tmp_path / "d")
    assert json.loads(changed.out)["judge"] == BY_A
    done = cli("export", answers, *by_a, "--to", "inspect", "--out", tmp_path / "x")
    assert f"{BY_A} against people's labels (mine)" in done.err
    assert '"mine"' in next((tmp_path / "x").iterdir()).read_text()


def test_a_model_answers_and_another_judges(cli: Cli, measured: Path, answers: Path, tmp_path: Path) -> None:
    by_a = (*RUBRIC, "--judge-model", "a", "--agreement", measured)
    made = cli("card", "m", "--prompts", answers, *by_a, "--json", "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert json.loads(made.out)["provenance"]["judge"] == BY_A
    assert (tmp_path / "out" / "judge-error.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("card", "--replies", "FILE"),
        ("measure", "--replies", "FILE"),
        ("diff", "FILE", "FILE"),
        ("gate", "FILE", "--fail-if", "refusal < 0.01"),
        ("export", "FILE", "--to", "inspect", "--out", "x"),
    ],
)
def test_a_judge_model_without_use_or_not_named(cli: Cli, answers: Path, command: tuple[str, ...]) -> None:
    args = [answers if a == "FILE" else a for a in command]
    done = cli(*args, "--judge-model", "a")
    assert done.code == 2 and "rules/demur-v1 asks no model; leave the option out" in done.err
    done = cli(*args, *RUBRIC)
    assert done.code == 2 and "name one (--judge-model MODEL" in done.err
    done = cli(*args, "--judge", "rubric/strongreject-v1", "--judge-model", "a")
    assert done.code == 2 and "rates of refusal need a judge of refusals" in done.err
    done = cli(*args, "--agreement", answers)
    assert done.code == 2 and "It takes what demur judge --validate" in done.err


def test_agreement_has_no_place_where_no_verdicts_are_written(
    cli: Cli, measured: Path, tmp_path: Path
) -> None:
    done = cli("judge", "--validate", "--agreement", measured, "--out", tmp_path / "x.json")
    assert done.code == 2 and "--validate writes none" in done.err
