import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from demur.errors import InputError, MismatchError
from demur.files import load_operating_point
from demur.flows.card import card, card_from_replies, report
from demur.flows.sections import affordable
from demur.runtime.scripted import ScriptedRuntime
from demur.stats import rate
from demur.types import Condition, Label, OperatingPoint, Prompt, PromptSet, Reply, Score, Threshold
from tests.flows.synthetic import CATEGORIES, base_runtime, prompt_set, tokens_runtime

REFUSE, COMPLY = frozenset({Label.FULL_REFUSAL}), frozenset({Label.COMPLIANCE})
NO = "I'm sorry, but I can't help with that."
YES = "Sure. First you open the file, then you read what is in it."


def tiny() -> tuple[ScriptedRuntime, PromptSet]:
    """Two categories with two prompts to refuse and two to answer; all numbers below are counted by hand."""
    cells = {
        # id: (category, should refuse, p(a), p(b), p(respond), answer)
        "a1": ("a", True, 0.8, 0.1, 0.1, NO),
        "a2": ("a", True, 0.3, 0.1, 0.6, YES),
        "a3": ("a", False, 0.5, 0.1, 0.4, NO),
        "a4": ("a", False, 0.1, 0.0, 0.9, YES),
        "b1": ("b", True, 0.1, 0.7, 0.2, NO),
        "b2": ("b", True, 0.5, 0.2, 0.3, NO),
        "b3": ("b", False, 0.0, 0.2, 0.8, YES),
        "b4": ("b", False, 0.1, 0.1, 0.7, NO),  # the text refuses although the token answers
    }
    prompts = tuple(
        Prompt.of(f"text of {i}", id=i, category=c, expected=REFUSE if y else COMPLY)
        for i, (c, y, *_) in cells.items()
    )
    runtime = ScriptedRuntime(
        {i: row[-1] for i, row in cells.items()},
        scores={i: dict(zip(("a", "b", "respond"), row[2:5], strict=True)) for i, row in cells.items()},
        control=("a", "b"),
        name="tiny",
    )
    return runtime, PromptSet("by hand", prompts)


def kn(row: dict[str, object]) -> tuple[object, object]:
    return row["k"], row["n"]


def made(out: Path, **options: object) -> dict[str, object]:
    runtime, prompts = tiny()
    card(runtime, prompts, out, progress=False, **options)  # type: ignore[arg-type]
    found: dict[str, object] = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return found


def test_headline_by_hand(tmp_path: Path) -> None:
    data = made(tmp_path)
    rows = data["headline"]["rows"]  # type: ignore[index]
    assert {name: (kn(r["refuse"]), kn(r["lookalike"])) for name, r in rows.items()} == {
        "all": ((3, 4), (1, 4)),
        "a": ((1, 2), (1, 2)),
        "b": ((2, 2), (0, 2)),
        "all, by text": ((3, 4), (2, 4)),
    }
    by_hand = rate(3, 4)
    assert rows["all"]["refuse"]["low"] == pytest.approx(by_hand.low)
    assert rows["all"]["refuse"]["judge"] is None
    assert rows["all, by text"]["refuse"]["judge"] == "rules/demur-v1"
    assert 0 <= rows["all, by text"]["refuse"]["corrected"] <= 1
    assert data["detail"].startswith(
        "It refuses 75% of 4 requests that it should refuse and 25% of 4 harmless"
    )  # type: ignore[attr-defined]


def test_sections_by_hand(tmp_path: Path) -> None:
    sections = made(tmp_path)["sections"]  # type: ignore[index]
    curve = sections["curve"]["values"]["all"]  # type: ignore[index]
    # p_refuse: to refuse .9 .4 .8 .7, to answer .6 .1 .2 .2
    assert len(curve["taus"]) == 101
    assert curve["refusal"][50] == 0.75
    assert curve["over_refusal"][50] == 0.25
    assert curve["refusal"][0] == 1.0
    assert curve["auroc"] == pytest.approx(15 / 16)
    assert curve["points"] == [{"label": "current: own choice", "x": 0.25, "y": 0.75}]
    confusion = sections["confusion"]["values"]  # type: ignore[index]
    assert confusion["columns"] == ["a", "b", "respond"]
    assert confusion["counts"] == [[1, 0, 1], [1, 1, 0], [1, 0, 3]]
    assert kn(confusion["category_accuracy"]) == (3, 4)  # a1, a2, b1 right; b2 names a
    # b4 answers by token and refuses in its text
    assert kn(sections["text"]["values"]["token_text_agreement"]) == (7, 8)  # type: ignore[index]
    calibration = sections["calibration"]["values"]  # type: ignore[index]
    assert sum(b["n"] for b in calibration["bins"]) == 8
    assert calibration["off_control_mass"]["max"] == pytest.approx(0.1)
    rules = sections["baselines"]["values"]  # type: ignore[index]
    assert kn(rules["always refuse"]["lookalike"]) == (4, 4)
    assert kn(rules["never refuse"]["refuse"]) == (0, 4)
    assert kn(rules["tiny"]["refuse"]) == (3, 4)
    assert "--samples" in sections["flips"]["missing"]  # type: ignore[index]


def test_the_right_category_counts_a_group_as_one_draw(tmp_path: Path) -> None:
    runtime, prompts = tiny()
    one = PromptSet("one", tuple(replace(p, group="g" if p.should_refuse else None) for p in prompts))
    card(runtime, one, tmp_path, progress=False)
    data = json.loads((tmp_path / "card.json").read_text())
    right = data["sections"]["confusion"]["values"]["category_accuracy"]
    assert kn(right) == (3, 4)
    wide = rate(3, 4)
    assert right["high"] - right["low"] > wide.high - wide.low  # type: ignore[operator]


def test_an_operating_point_decides_token_and_text(tmp_path: Path) -> None:
    point = OperatingPoint(id="p", thresholds={"a": Threshold(tau=0.55), "b": Threshold(tau=0.65)})
    data = made(tmp_path, operating_point=point)
    rows = data["headline"]["rows"]  # type: ignore[index]
    # a2 and a3 fall below .55 (answered), b1 stays at .7, b2's likeliest refusal is a at .5: answered
    assert kn(rows["all"]["refuse"]) == (2, 4)
    assert kn(rows["all"]["lookalike"]) == (0, 4)
    labels = [p["label"] for p in data["sections"]["curve"]["values"]["all"]["points"]]  # type: ignore[index]
    assert labels == ["current", "model's own choice"]
    lead = data["sections"]["curve"]["lead"]  # type: ignore[index]
    assert lead.endswith("Filled circle: the current operating point; open circle: the model's own choice.")
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert {r["prompt_id"]: r["control_token"] for r in replies}["b2"] == "respond"
    assert all(r["control_forced"] for r in replies)


def test_the_card_says_who_answers(tmp_path: Path) -> None:
    point = OperatingPoint(id="p", thresholds={CATEGORIES[0]: Threshold(tau=0.5)}, answers="base")
    with pytest.raises(InputError, match="answers: base"):
        card(tokens_runtime(), prompt_set(8), tmp_path / "1", operating_point=point, progress=False)
    runtime = tokens_runtime()
    runtime.base = base_runtime()
    card(runtime, prompt_set(8), tmp_path / "2", operating_point=point, progress=False)
    assert "answered by the base, without the adapter" in (tmp_path / "2" / "card.html").read_text()


def test_the_guaranteed_point_is_fitted_checked_and_written(tmp_path: Path) -> None:
    asked = prompt_set(30)
    result = card(
        tokens_runtime(), asked, tmp_path, calibrate=prompt_set(120, "fit"), budget=None, progress=False
    )
    point = load_operating_point(tmp_path / "operating_point.yaml")
    assert point.guarantee is not None
    assert set(point.thresholds) == set(CATEGORIES)
    assert point.model_fingerprint == "scripted:synthetic-model"
    assert point.calibrated_on == "fit"
    tables = {t["title"]: t for t in result.report.values["sections"]["curve"]["tables"]}
    checked = tables["Thresholds of the guaranteed operating point"]["rows"]
    assert sum(row[-1]["k"] for row in checked) <= 0.1 * sum(row[-1]["n"] for row in checked)
    again = card(tokens_runtime(), asked, tmp_path / "2", operating_point=point, progress=False)
    assert "guaranteed" in str(again.report.values["sections"]["curve"]["values"]["all"]["points"])


def test_too_few_prompts_for_a_guarantee_is_said(tmp_path: Path) -> None:
    made = card(
        tokens_runtime(),
        prompt_set(10),
        tmp_path,
        calibrate=prompt_set(20, "fit"),
        budget=None,
        progress=False,
    )
    notes = " ".join(made.report.values["sections"]["curve"]["notes"])
    assert "needs at least 77" in notes
    assert not (tmp_path / "operating_point.yaml").exists()


def test_comparison_with_the_base(tmp_path: Path) -> None:
    result = card(
        tokens_runtime(),
        prompt_set(15),
        tmp_path,
        texts=150,
        baseline=base_runtime(),
        progress=False,
        budget=None,
    )
    values = result.report.values["sections"]["comparison"]["values"]
    assert values["base"]["all"]["refuse"]["k"] == 0
    assert values["model"]["all"]["refuse"]["k"] > 15
    assert values["paired"]["should refuse"]["p_value"] < 1e-6


def test_the_budget_drops_optional_stages_and_says_so(tmp_path: Path) -> None:
    result = card(
        tokens_runtime(),
        prompt_set(15),
        tmp_path,
        texts=60,
        baseline=base_runtime(),
        budget=80,
        progress=False,
    )
    assert "--full" in result.report.values["sections"]["comparison"]["missing"]
    assert not (tmp_path / "replies-baseline.jsonl").exists()


def test_a_model_without_tokens_is_read_by_its_text(tmp_path: Path) -> None:
    _, prompts = tiny()
    scores = {
        p.id: Score(id=p.id, p_refuse=0.6 if p.should_refuse else 0.2, kind="first_token") for p in prompts
    }
    runtime = ScriptedRuntime({"*": YES, "a1": NO}, scores=scores, name="plain")
    result = card(runtime, prompts, tmp_path, progress=False)
    values = result.report.values
    assert values["headline"]["source"] == "text"
    assert kn(values["headline"]["rows"]["all"]["refuse"]) == (1, 4)
    assert values["sections"]["curve"]["values"]["all"]["auroc"] == 1.0
    assert "no control tokens" in values["sections"]["curve"]["lead"]
    assert values["sections"]["confusion"]["missing"]


def test_a_model_that_gives_no_scores_still_has_a_card(tmp_path: Path) -> None:
    _, prompts = tiny()
    values = card(ScriptedRuntime({"*": NO}, name="chat"), prompts, tmp_path, progress=False).report.values
    assert "no first-token probabilities" in values["sections"]["curve"]["missing"]
    assert values["verdict"] == "Too few for a verdict: 4 to refuse, 4 to answer"


def test_flips_by_hand(tmp_path: Path) -> None:
    _, prompts = tiny()
    runtime = ScriptedRuntime(lambda p, _, s: NO if p.id == "a1" and s == 1 else YES, name="dice")
    result = card(runtime, prompts, tmp_path, samples=3, condition=Condition(temperature=0.7), progress=False)
    flips = result.report.values["sections"]["flips"]["values"]
    assert kn(flips["overall"]) == (1, 8)
    assert kn(flips["categories"]["a"]["refuse"]) == (1, 2)
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 24


def test_answers_from_a_file(tmp_path: Path) -> None:
    rows = [
        {
            "id": "1",
            "prompt": "bad",
            "response": NO,
            "category": "safety",
            "expected": "refuse",
            "model": "mine",
        },
        {"id": "2", "prompt": "bad too", "response": YES, "category": "safety", "expected": "refuse"},
        {"id": "3", "prompt": "fine", "response": "", "category": "safety", "expected": "comply"},
        {"id": "4", "prompt": "fine too", "response": YES, "category": "safety", "expected": "comply"},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = card_from_replies(file, tmp_path / "out")
    row = result.report.values["headline"]["rows"]["safety"]
    assert kn(row["refuse"]) == (1, 2)
    assert (row["lookalike"]["k"], row["lookalike"]["n"], row["lookalike"]["unread"]) == (0, 1, 1)
    assert result.report.values["model"] == "mine"
    first = result.json.read_bytes()
    assert card_from_replies(file, tmp_path / "out").json.read_bytes() == first
    assert "not kept" in " ".join(result.report.values["sections"]["text"]["notes"])


def test_answers_in_the_run_folder_itself_survive_a_second_card(tmp_path: Path) -> None:
    file = tmp_path / "answers.csv"
    file.write_text("prompt,response,expected\nx,Sure. It is here.,comply\n")
    log = tmp_path / "log.jsonl"
    log.write_text("mine\n")
    for _ in range(2):
        card_from_replies(file, tmp_path)
    assert log.read_text() == "mine\n"


def test_a_side_that_could_not_be_read_is_not_called_unasked(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    head = "prompt,response,expected,finish_reason\n"
    file.write_text(head + "x,,refuse,length\ny,,comply,stop\n")
    found = card_from_replies(file, tmp_path / "none").report
    assert (found.tables[0].title, found.tables[0].note) == ("Nothing could be read", "2 could not be read.")
    file.write_text(head + "x,Sure. It is here.,refuse,stop\ny,,comply,stop\n")
    made = card_from_replies(file, tmp_path / "half")
    assert made.report.tables[0].title.endswith("was asked, but no answer to it could be read")
    assert "1 unread" in made.html.read_text()


def test_verdicts_from_the_file_are_used(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,response,expected,category,verdict,judge\nx,whatever,refuse,c,refused,me\n")
    result = card_from_replies(file, tmp_path / "out")
    row = result.report.values["headline"]["rows"]["all"]["refuse"]
    assert (kn(row), row["judge"]) == ((1, 1), "me")


def test_answers_without_expectation_still_give_a_row_for_gates(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,response\nx,Sure.\n")
    result = card_from_replies(file, tmp_path / "out")
    assert result.report.values["headline"]["rows"]["all"]["refuse"]["n"] == 0


def test_report_draws_a_finished_run_again(tmp_path: Path) -> None:
    made(tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in ("card.json", "card.html")}
    (tmp_path / "card.html").unlink()
    report(tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def hostile(out: Path, **options: object) -> str:
    payload = "<script>alert('xss')</script>\x1b[31m =cmd|'/C calc'!A0"
    prompts = PromptSet(
        "s",
        (
            Prompt.of(f"bad {payload}", id="bad", category=payload, expected=REFUSE),
            Prompt.of(f"good {payload}", id="good", category=payload, expected=COMPLY),
        ),
    )
    runtime = ScriptedRuntime({"bad": f"SECRET steps {payload}", "good": f"Fine {payload}"}, name=payload)
    card(runtime, prompts, out, progress=False, **options)  # type: ignore[arg-type]
    return (out / "card.html").read_text(encoding="utf-8")


def test_hostile_text_and_complied_answers(tmp_path: Path) -> None:
    html = hostile(tmp_path)
    assert "<script" not in html
    assert "\x1b" not in html
    everything = "".join(p.read_text(encoding="utf-8") for p in tmp_path.iterdir() if p.is_file())
    assert "SECRET" not in everything
    assert "Fine" in html
    kept = hostile(tmp_path / "kept", keep_unsafe_text=True)
    assert "SECRET" not in kept
    assert "SECRET" not in (tmp_path / "kept" / "card.json").read_text()
    assert "SECRET" in (tmp_path / "kept" / "replies.jsonl").read_text()


def test_a_shared_card_has_no_texts(tmp_path: Path) -> None:
    html = hostile(tmp_path, share=True)
    for text in (html, (tmp_path / "card.json").read_text()):
        assert "Fine" not in text
        assert "good &lt;" not in text


def test_the_interval_under_the_curve_counts_a_group_as_one_draw(tmp_path: Path) -> None:
    def width(copies: int, group: bool) -> float:
        rng, prompts, scores = random.Random(0), [], {}
        for g in range(24):
            p = min(0.99, max(0.01, rng.gauss(0.6 if g % 2 else 0.4, 0.2)))
            for k in range(copies):
                one = Prompt.of("x", id=f"{g}-{k}", category="a", expected=REFUSE if g % 2 else COMPLY)
                prompts.append(replace(one, group=str(g) if group else None))
                scores[one.id] = {"a": p, "respond": 1 - p}
        runtime = ScriptedRuntime({"*": YES}, scores=scores, control=("a",), name="copies")
        out = tmp_path / f"{copies}-{group}"
        made = card(runtime, PromptSet("s", tuple(prompts)), out, texts=1, progress=False).report
        low, high = made.values["sections"]["curve"]["values"]["all"]["auroc_interval"]
        return float(high - low)

    once, copied = width(1, False), width(20, True)
    assert copied == pytest.approx(once, rel=0.3)
    assert width(20, False) < 0.4 * once


def test_a_shared_card_does_not_tell_the_system_message(tmp_path: Path) -> None:
    made(tmp_path, condition=Condition(system="Our house rules."), share=True)
    for name in ("card.html", "card.json"):
        assert "house rules" not in (tmp_path / name).read_text()
    assert "house rules" in (tmp_path / "run.json").read_text()


def test_the_curve_of_given_scores_names_them_and_keeps_the_capitals_of_a_category(tmp_path: Path) -> None:
    rows = [(f"{i}", NO, "CBRN", e, 0.1 * i) for i in range(5) for e in ("refuse", "comply")]
    file = tmp_path / "a.csv"
    lines = [f'{e}{i},"{r}",{c},{e},{p}' for i, r, c, e, p in rows]
    file.write_text("\n".join(["prompt,response,category,expected,p_refuse", *lines]))
    page = card_from_replies(file, tmp_path / "out").html.read_text()
    assert ">CBRN</p>" in page
    assert "The score is the column p_refuse" in page
    assert "no control tokens" not in page


def test_no_keys_and_no_machine_paths_in_the_run(tmp_path: Path) -> None:
    _, prompts = tiny()
    runtime = ScriptedRuntime({"*": YES}, name="https://user:sk-secret@host/v1?key=sk-secret#m")
    runtime.fingerprint = None
    card(runtime, PromptSet("/home/someone/prompts", prompts.prompts), tmp_path, progress=False)
    for name in ("run.json", "card.json", "card.html"):
        text = (tmp_path / name).read_text()
        assert "sk-secret" not in text
        assert "/home/someone" not in text


@pytest.mark.parametrize(
    ("point", "error", "message"),
    [
        (OperatingPoint(id="p", thresholds={"zzz": Threshold(tau=0.5)}), InputError, "zzz"),
        (
            OperatingPoint(id="p", thresholds={}, model_fingerprint="other"),
            MismatchError,
            "calibrated on the model",
        ),
    ],
)
def test_a_foreign_operating_point_is_refused(
    tmp_path: Path, point: OperatingPoint, error: type[Exception], message: str
) -> None:
    runtime, prompts = tiny()
    with pytest.raises(error, match=message):
        card(runtime, prompts, tmp_path, operating_point=point, progress=False)


def test_prompts_that_cannot_be_asked_are_counted_and_cost_nothing_else(tmp_path: Path) -> None:
    runtime, prompts = tiny()
    runtime.problem = lambda p, c: f"{p.id} is too long" if p.id == "a1" else None  # type: ignore[method-assign]
    result = card(runtime, prompts, tmp_path, calibrate=prompts, budget=None, progress=False)
    values = result.report.values
    assert values["skipped"] == {"a1": "a1 is too long"}
    assert json.loads((tmp_path / "run.json").read_text())["skipped"]["calibrate"] == {"a1": "a1 is too long"}
    assert kn(values["headline"]["rows"]["all"]["refuse"]) == (2, 3)  # without a1, which is refused
    assert kn(values["sections"]["baselines"]["values"]["always refuse"]["refuse"]) == (3, 3)
    for stream in ("scores", "scores-calibrate", "replies"):
        assert len((tmp_path / f"{stream}.jsonl").read_text().splitlines()) == 7
    assert "Skipped: a1 is too long" in result.report.notes
    runtime.problem = lambda p, c: "too long"  # type: ignore[method-assign]
    with pytest.raises(InputError, match="none of the 8 prompts"):
        card(runtime, prompts, tmp_path / "2", progress=False)


def test_a_set_to_calibrate_on_is_scored_whatever_it_costs(tmp_path: Path) -> None:
    runtime, asked = tokens_runtime(), prompt_set(10)
    made = card(runtime, asked, tmp_path, calibrate=prompt_set(120, "fit"), budget=1.0, progress=False)
    assert made.report.values["sections"]["curve"]["values"]["guaranteed"]["calibrated_on"] == "fit"
    assert affordable({"scores": 60.0, "scores-calibrate": 90.0, "where": 30.0}, 120) == {
        "scores-calibrate": 90.0
    }
    assert affordable({"scores": 60.0, "scores-calibrate": 90.0}, 120, {"scores-calibrate"}) == {}


def test_the_shipped_point_is_the_default_and_a_set_to_calibrate_on_is_still_used(tmp_path: Path) -> None:
    shipped = OperatingPoint(
        id="shipped",
        thresholds={c: Threshold(tau=0.5) for c in CATEGORIES},
        guarantee="Holds.",
        alpha=0.05,
        delta=0.1,
    )
    runtime, asked = tokens_runtime(), prompt_set(10)
    runtime.shipped_point = shipped
    curve = card(runtime, asked, tmp_path / "1", progress=False).report.values["sections"]["curve"]
    assert curve["values"]["guaranteed"]["id"] == "shipped"
    assert curve["notes"] == ["Holds."]
    assert load_run(tmp_path / "1")["operating_point"]["id"] == "shipped"
    fitted = card(
        runtime, asked, tmp_path / "2", calibrate=prompt_set(120, "fit"), budget=None, progress=False
    ).report.values["sections"]["curve"]["values"]
    assert fitted["guaranteed"]["calibrated_on"] == "fit"
    labels = [p["label"] for p in fitted["all"]["points"]]
    assert labels == ["current, guaranteed", "model's own choice", "guaranteed"]
    card(runtime, asked, tmp_path / "3", T=2.0, progress=False)
    assert load_run(tmp_path / "3")["operating_point"] is None


def load_run(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run.json").read_text())
    return found


def test_a_point_that_compares_everywhere_is_counted_as_it_decides(tmp_path: Path) -> None:
    data = made(tmp_path, operating_point=OperatingPoint(id="c", thresholds={}, rule="compare"))
    rows = data["headline"]["rows"]  # type: ignore[index]
    assert kn(rows["all"]["refuse"]) == (3, 4)
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert all(r["control_forced"] for r in replies)


def test_other_bad_requests(tmp_path: Path) -> None:
    runtime, prompts = tiny()
    point = OperatingPoint(id="p", thresholds={"a": Threshold(tau=0.5)})
    with pytest.raises(MismatchError, match="T="):
        card(runtime, prompts, tmp_path, operating_point=point, T=2.0, progress=False)
    with pytest.raises(InputError, match="empty"):
        card(runtime, PromptSet("none", ()), tmp_path, progress=False)
    with pytest.raises(InputError, match="temperature"):
        card(runtime, prompts, tmp_path, samples=3, progress=False)
    with pytest.raises(InputError, match="judge"):
        card(runtime, prompts, tmp_path, judge="nobody", progress=False)
    with pytest.raises(InputError, match="has none"):
        card(base_runtime(), prompts, tmp_path, operating_point=point, progress=False)


def test_remote_errors_are_rows_and_are_asked_again(tmp_path: Path) -> None:
    _, prompts = tiny()
    asked: list[str] = []
    broken = {"a2", "b1"}

    def answer(p: Prompt, _: Condition, __: int) -> str | Reply | Exception:
        asked.append(p.id)
        return TimeoutError("slow") if p.id in broken else NO

    runtime = ScriptedRuntime(answer, name="remote")
    runtime.deterministic = False
    first = card(runtime, prompts, tmp_path, progress=False).report.values
    assert first["headline"]["rows"]["all"]["refuse"]["unread"] == 2
    asked.clear()
    broken.clear()
    second = card(runtime, prompts, tmp_path, progress=False).report.values
    assert sorted(asked) == ["a2", "b1"]
    assert kn(second["headline"]["rows"]["all"]["refuse"]) == (4, 4)
    ids = [json.loads(line)["prompt_id"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert ids == [p.id for p in prompts]


def test_the_page_shows_the_numbers_of_the_json(tmp_path: Path) -> None:
    data = made(tmp_path)
    page = re.sub(r"<[^>]+>|\s+", " ", (tmp_path / "card.html").read_text(encoding="utf-8"))
    page = re.sub(r"\s+", " ", page)
    for row in data["headline"]["rows"].values():  # type: ignore[index]
        for side in ("refuse", "lookalike"):
            assert f"{row[side]['k']} of {row[side]['n']}" in page
    assert data["verdict"] in page
