"""Stored evaluations: what is kept, how small it is, and that decisions on it are those on the scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demur.calibrate.decide import decide, is_steered
from demur.errors import InputError
from demur.flows import evaluation as room
from demur.flows.card import card
from demur.flows.carddata import choices
from demur.flows.evaluation import MAX_BYTES, MAX_ROWS, Evaluation, core_evaluation, open_evaluation
from demur.runtime.scripted import ScriptedRuntime
from demur.types import OperatingPoint, Prompt, PromptSet, Score, Threshold
from tests.flows.synthetic import CATEGORIES, NAMES, base_runtime, probabilities, prompt_set, tokens_runtime


def score(id: str, p: float, **more: object) -> Score:
    return Score(id=id, p_refuse=p, probabilities={"safety": p, "respond": 1 - p}, **more)  # type: ignore[arg-type]


def prompts() -> PromptSet:
    return PromptSet(
        "mine",
        (
            Prompt.of("A", id="a", category="safety", expected=["full_refusal"]),
            Prompt.of("B", id="b", category="safety", expected=["compliance"], source="demur core"),
            Prompt.of("C", id="c", category="general", expected=["compliance"]),
            Prompt.of("D", id="d"),
            Prompt.of("E", id="e", expected=["compliance"]),
        ),
    )


def test_rows_say_what_each_prompt_is() -> None:
    found = {
        "a": score("a", 0.123456789, token="safety"),
        "b": score("b", 0.25, token=None),
        "c": score("c", 0.5, token="respond"),
        "d": score("d", 0.5),
    }
    made = Evaluation.of(prompts(), found, ("safety", "respond"), model="/home/me/m", reference=[0.1, 0.2])
    assert [(r.id, r.category, r.kind, r.own, r.text) for r in made.rows] == [
        ("a", "safety", "refuse", 0, None),  # another's text is not shown
        ("b", "safety", "lookalike", -1, "B"),  # ours is
        ("c", "general", "general", 1, None),
    ]  # d has no label and e no score
    assert made.rows[0].probabilities == (0.1234568, 0.8765432)
    assert (made.model, made.total, made.reference) == ("m", 3, (0.1, 0.2))
    shown = Evaluation.of(prompts(), found, ("safety", "respond"), model="m", texts=True)
    assert [r.text for r in shown.rows] == ["A", "B", "C"] and shown.reference == (0.1234568, 0.25, 0.5)


def test_scores_without_control_tokens_have_no_dial() -> None:
    with pytest.raises(InputError, match="control tokens"):
        Evaluation.of(prompts(), {"a": score("a", 0.5, kind="first_token")}, ("safety", "respond"), model="m")
    with pytest.raises(InputError, match="0 labelled"):
        Evaluation.of(prompts(), {}, ("safety", "respond"), model="m")
    with pytest.raises(InputError, match="no control tokens"):
        core_evaluation(base_runtime())


def test_a_large_set_is_sampled_and_stays_small() -> None:
    some = PromptSet(
        "big",
        tuple(
            Prompt.of("\u6f22" * 900, id=f"{i}", category=CATEGORIES[i % 5], expected=["compliance"])
            for i in range(MAX_ROWS + 500)
        ),
    )
    found = {p.id: Score(id=p.id, p_refuse=0.3, probabilities=probabilities(p)) for p in some}
    made = Evaluation.of(some, found, NAMES, model="m", texts=True)
    assert len(made.rows) == MAX_ROWS and made.total == MAX_ROWS + 500
    assert {r.category for r in made.rows} == set(CATEGORIES)
    assert len(made.json_text().encode()) <= MAX_BYTES and made.rows[0].text is None


def test_half_a_character_does_not_break_the_file(tmp_path: Path) -> None:
    one = PromptSet("s", (Prompt.of("a \ud800 b", id="a", expected=["compliance"]),))
    made = Evaluation.of(one, {"a": score("a", 0.5)}, ("safety", "respond"), model="m", texts=True)
    made.write(tmp_path / "e.json")
    assert Evaluation.from_file(tmp_path / "e.json").rows[0].text == "a ? b"


def test_a_card_run_becomes_an_evaluation_with_the_same_decisions(tmp_path: Path) -> None:
    asked, fitted = prompt_set(20, general=20), prompt_set(20, "calib")
    card(tokens_runtime(), asked, tmp_path / "out", calibrate=fitted, texts=5, progress=False)
    made = open_evaluation(tmp_path / "out")
    assert made == Evaluation.from_run(tmp_path / "out") and len(made.reference) == len(fitted)
    made.write(tmp_path / "e.json")
    assert open_evaluation(tmp_path / "e.json") == made
    scores = list(tokens_runtime().score(asked))
    for rule in ("threshold", "bias", "total_mass"):
        for level in (0.2, 0.5, 0.8):
            taus = {c: Threshold(tau=level) for c in CATEGORIES[:4]}
            point = OperatingPoint(id="p", thresholds=taus, rule=rule)  # type: ignore[arg-type]
            tau = dict.fromkeys(taus, level)
            picked = decide(made.table, NAMES, tau, rule)  # type: ignore[arg-type]
            mine = is_steered(made.table, NAMES, tau)
            stored = [int(i) if s else r.own for i, s, r in zip(picked, mine, made.rows, strict=True)]
            assert [NAMES[i] for i in stored] == choices(scores, NAMES, point)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ["respond", "safety"]}, "refuse categories"),
        ({"T": 0}, "T"),
        ({"rows": []}, "rows"),
        ({"rows": [["a", "safety", "refuse", 0, [0.5], None]]}, "one probability for each"),
        ({"rows": [["a", "safety", "refuse", 7, [0.5, 0.5], None]]}, "own=7"),
        ({"rows": [["a", "safety", "refuse", 0, [0.9, 0.9], None]]}, "one probability for each"),
        ({"rows": [["a", "safety", "neither", 0, [0.5, 0.5], None]]}, "rows.0.2"),
        ({"schema_version": 2}, "schema_version"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    good = Evaluation.of(prompts(), {"a": score("a", 0.5)}, ("safety", "respond"), model="m")
    row = json.loads(good.json_text())
    (tmp_path / "e.json").write_text(json.dumps({**row, **change}), encoding="utf-8")
    with pytest.raises(InputError, match="no stored evaluation") as e:
        open_evaluation(tmp_path / "e.json")
    assert told in str(e.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_evaluation(tmp_path / "nothing.json")
    with pytest.raises(InputError, match=r"run\.json"):
        open_evaluation(tmp_path)
    (tmp_path / "big.json").write_text("[" + " " * MAX_BYTES + "]", encoding="utf-8")
    with pytest.raises(InputError, match="at most"):
        open_evaluation(tmp_path / "big.json")


def test_core_is_scored_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {part: PromptSet(f"core/{part}", prompt_set(4, part).prompts) for part in ("test", "calibrate")}
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    monkeypatch.setattr(room, "core", small.__getitem__)
    seen: list[str] = []

    def counted(p: Prompt) -> dict[str, float]:
        seen.append(p.id)
        return probabilities(p)

    runtime = ScriptedRuntime({"*": "Yes."}, scores=counted, control=CATEGORIES, name="m")
    runtime.fingerprint = "f" * 12
    first = core_evaluation(runtime)
    assert len(first.rows) == 40 and len(first.reference) == 40 and first.prompts == "core/test"
    asked = len(seen)
    assert core_evaluation(runtime) == first and len(seen) == asked
    core_evaluation(runtime, T=2.0)
    assert len(seen) > asked
