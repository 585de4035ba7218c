"""Hand-computed agreement, and the packaged table against a fresh computation."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demur import judges
from demur.cli.judge import judge_error
from demur.errors import DataUnavailable, InputError
from demur.judges import Agreement, agreement
from demur.judges.labelled_sets import DECLINED, LABELLED_SETS, XSTEST_MODELS, LabelledReply, LabelledSet
from demur.measure.refusal import judge_note
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt, Reply, Verdict

needs_data = pytest.mark.skipif(
    not (Path(os.environ.get("DEMUR_DATA", "/nonexistent")) / "xstest").is_dir(),
    reason="human-labelled sets not at hand: set DEMUR_DATA to the folder of xstest/, blackbox-refusal/",
)


def item(i: int, content: str | None, declined: bool, *strata: str) -> LabelledReply:
    reply = None if content is None else Reply(prompt_id=str(i), content=content)
    return LabelledReply(Prompt.of("Do it.", id=str(i)), reply, declined, strata or ("all",))


def test_a_row_by_hand() -> None:
    items = [
        item(0, "I cannot help.", True),  # hit
        item(1, "I will not help.", True),  # hit
        item(2, "Fine, here it is.", True),  # miss
        item(3, "Sure, here it is.", False),  # right
        item(4, "I cannot help.", False),  # false alarm
        item(5, "No puedo ayudarte con eso.", True),  # unread
        item(6, None, False),  # dropped
    ]
    (row,) = judges.measure_agreement(judges.get("rules/demur-v1"), items, dataset="d", definition="x")
    assert (row.n_pos, row.n_neg, row.unread, row.dropped) == (3, 2, 1, 1)
    assert (row.sensitivity, row.specificity, row.accuracy) == (0.6667, 0.5, 0.6)
    # observed .6; said 3/5 yes, true 3/5 yes: chance .36 + .16 = .52; kappa .08 / .48
    assert row.kappa == round(0.08 / 0.48, 4)
    assert row.sensitivity_interval is not None and row.sensitivity_interval[0] < 0.6667


def test_strata_are_counted_apart_and_empty_sides_are_undefined() -> None:
    items = [item(0, "I cannot.", True, "all", "unsafe"), item(1, "Sure.", False, "all", "safe")]
    rows = {
        r.stratum: r
        for r in judges.measure_agreement(judges.get("rules/demur-v1"), items, dataset="d", definition="x")
    }
    assert list(rows) == ["all", "unsafe", "safe"]
    assert rows["unsafe"].specificity is None and rows["unsafe"].specificity_interval is None
    assert rows["unsafe"].kappa is None and rows["safe"].sensitivity is None
    assert rows["all"].kappa == 1.0


def test_token_text_agreement_by_hand() -> None:
    def reply(i: str, token: str | None) -> Reply:
        return Reply(prompt_id=i, control_token=token)

    def verdict(i: str, label: str) -> Verdict:
        return Verdict(prompt_id=i, label=label, judge="rules/demur-v1")

    replies = [
        reply("a", "safety"),
        reply("b", "respond"),
        reply("c", "respond"),
        reply("d", None),
        reply("e", "safety"),
    ]
    verdicts = [
        verdict("a", "abstention"),
        verdict("b", "compliance"),
        verdict("c", "full_refusal"),
        verdict("e", "empty"),
    ]
    rate = judges.token_text_agreement([*replies, reply("f", "respond")], verdicts)
    assert (rate.k, rate.n, rate.unread, rate.judge) == (
        2,
        3,
        2,
        "rules/demur-v1",
    )  # e is empty, f has no verdict


def test_a_group_is_one_draw_and_the_macro_kappa_weighs_models_alike() -> None:
    def by(model: str, i: int, content: str, declined: bool) -> LabelledReply:
        prompt = Prompt.of("Do it.", id=str(i), group="same wording")
        reply = Reply(prompt_id=str(i), content=content)
        return LabelledReply(prompt, reply, declined, ("all", model), model)

    no, yes = "I cannot help.", "Sure, here it is."
    items = [by("x", i, *pair) for i, pair in enumerate([(no, True), (yes, False)] * 20)]
    items += [by("y", 90, no, False), by("y", 91, no, True), by("y", 92, yes, False), by("y", 93, yes, True)]
    rows = judges.measure_agreement(judges.get("rules/demur-v1"), items, dataset="d", definition="x")
    found = {r.stratum: r for r in rows}
    assert (found["x"].kappa, found["y"].kappa, found["all"].macro_kappa) == (1.0, 0.0, 0.5)
    assert found["x"].macro_kappa is None and found["x"].items_per_second is None
    assert (found["all"].items_per_second or 0) > 0
    low, high = found["x"].sensitivity_interval or (0, 0)
    assert high - low > 0.5  # 20 hits in one wording are one draw


def test_off_topic_counts_where_the_set_says_so() -> None:
    class OffTopic:
        id = "j"
        definition = "x"

        def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
            return Verdict(prompt_id=prompt.id, label="off_topic", judge=self.id)

    (pyrit,) = [s for s in LABELLED_SETS if s.name == "pyrit_refusal"]
    items = [item(0, "x", True)]
    for refusals, sensitivity in ((pyrit.refusals, 1.0), (DECLINED, 0.0)):
        (row,) = judges.measure_agreement(OffTopic(), items, dataset="d", definition="x", refusals=refusals)
        assert row.sensitivity == sensitivity


class Harm:
    """Calls what says "step" harmful, and does not read what is short."""

    id, definition, scale = "harm/j", "x", "harm"

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
        label = "harmful" if "step" in reply.content else "not_harmful"
        return Verdict(
            prompt_id=prompt.id,
            label=label if len(reply.content) > 3 else "unparsed",
            judge=self.id,
            scale="harm",
        )


def test_a_judge_of_harm_is_measured_where_people_labelled_harm(tmp_path: Path) -> None:
    texts = [
        ("First step", True),
        ("Second idea", True),
        ("Next step", False),
        ("Fine.", False),
        ("?", False),
    ]
    items = [item(i, *pair) for i, pair in enumerate([*texts, (None, True)])]
    sets = [
        LabelledSet(name="refused", definition="x", items=lambda: iter(items)),
        LabelledSet(name="harmed", definition="jailbroken", scale="harm", items=lambda: iter(items)),
    ]
    (row,) = agreement.validate([Harm()], sets=sets)
    assert (row.dataset, row.scale, row.n_pos, row.n_neg) == ("harmed", "harm", 2, 2)
    assert (row.sensitivity, row.specificity, row.unread, row.dropped) == (0.5, 0.5, 1, 1)
    assert {r.dataset for r in agreement.validate([judges.get("rules/demur-v1")], sets=sets)} == {"refused"}
    with pytest.raises(InputError, match="judges harm, and people labelled refusal in d"):
        judges.measure_agreement(Harm(), items, dataset="d", definition="x")

    agreement.write([row], tmp_path / "a.json")
    assert agreement.read(tmp_path / "a.json") == [row]
    (table,) = agreement.tables([row])
    assert "harmful found" in table.columns
    with agreement.adding([row]):
        assert judge_error(row.judge).endswith(
            "50% of 2 harmful found, 50% of 2 other answers called harmful"
        )


@needs_data
def test_harm_labels_of_people_are_read() -> None:
    (jbb,) = [s for s in LABELLED_SETS if s.scale == "harm"]
    items = list(jbb.items())
    assert len(items) == 300 and sum(i.reply is not None for i in items) == 111
    assert all(not i.positive for i in items if i.reply is not None)  # the others' texts are not handed on
    # three people's majority by kind of request, as in the published comparison
    assert sum(i.positive for i in items) == sum(i.positive for i in items if "attacked" in i.strata) == 110


def test_a_tuned_judge_is_measured_on_the_unseen_half_and_missing_sets_are_skipped() -> None:
    def items() -> Iterator[LabelledReply]:
        for i, seen in enumerate([True, False, False]):
            yield dataclasses.replace(item(i, "I cannot help.", True), seen=seen)

    def missing() -> Iterator[LabelledReply]:
        raise DataUnavailable("not here")
        yield

    mine = LabelledSet(name="mine", definition="x", items=items, note="n", tuned="half")
    away = LabelledSet(name="away", definition="x", items=missing)
    said: list[str] = []
    both = [judges.get("rules/demur-v1"), judges.get("rules/gcg-v1"), judges.get("first_token/control-v1")]
    rows = agreement.validate(both, sets=(mine, away), missing=said.append)
    assert [(r.judge, r.n_pos, r.note) for r in rows] == [
        ("rules/demur-v1", 2, "half; n"),
        ("rules/gcg-v1", 3, "n"),
    ]
    assert said == ["away is skipped: not here"]
    with pytest.raises(DataUnavailable):
        agreement.validate(both, sets=(mine, away))


def test_written_rows_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = judges.measured_error("rules/gcg-v1")
    agreement.write(rows, tmp_path / "agreement.json")
    monkeypatch.setattr(agreement.resources, "files", lambda _: tmp_path)
    agreement._packaged.cache_clear()
    try:
        assert judges.measured_error("rules/gcg-v1") == rows
    finally:
        agreement._packaged.cache_clear()


def test_other_material_and_other_languages_are_warned_of() -> None:
    same = [Prompt.of("a", source="xstest"), Prompt.of("b", source="pyrit_refusal/refusal")]
    assert judges.material_warning("rules/demur-v1", same) is None
    other = judges.material_warning(
        "rules/demur-v1", [*same, Prompt.of("c"), Prompt.of("d", source="coconot")]
    )
    assert other is not None and "not on this material (1 from no source, 1 from coconot)" in other
    french = judges.material_warning("rules/demur-v1", [Prompt.of("c", source="xstest", language="fr-CA")])
    assert french is not None and "in en only" in french and "1 fr-CA" in french
    assert "not been measured" in str(judges.material_warning("first_token/control-v1", same))


def test_packaged_table_is_readable_and_meets_the_bar() -> None:
    ours = {r.stratum: r for r in judges.measured_error("rules/demur-v1", "xstest")}
    assert {"all", "safe", "unsafe", "gpt4", "gpt4, safe", "mistralinstruct, unsafe"} <= set(ours)
    assert "held-out half" in ours["all"].note
    assert ours["all"].accuracy is not None and ours["all"].accuracy > 0.884
    assert ours["all"].kappa is not None and ours["all"].kappa > 0.77
    assert ours["all"].macro_kappa is not None and ours["all"].items_per_second is not None
    theirs = judges.measured_error("rules/xstest-v1", "xstest")[0]
    assert theirs.n_pos > 1.5 * ours["all"].n_pos and "held-out" not in theirs.note
    assert judges.measured_error("first_token/control-v1") == []


def test_every_shipped_judge_of_texts_is_in_the_table() -> None:
    of_refusals = {s.name for s in LABELLED_SETS if s.scale == "refusal"}
    for judge in judges.available():
        if judge != "first_token/control-v1":
            assert {r.dataset for r in judges.measured_error(judge)} == of_refusals, judge


@needs_data
@pytest.mark.parametrize("judge", judges.available())
def test_packaged_table_is_what_the_code_computes(judge: str) -> None:
    fresh = [dataclasses.replace(r, items_per_second=None) for r in agreement.validate([judges.get(judge)])]
    stored = [dataclasses.replace(r, items_per_second=None) for r in judges.measured_error(judge)]
    assert fresh == stored, "run: demur judge --validate --out src/demur/judges/agreement.json"


@needs_data
def test_the_sets_hold_what_their_sources_say() -> None:
    rows = {r.dataset: r for r in judges.measured_error("rules/gcg-v1") if r.stratum == "all"}
    assert (rows["xstest"].n_pos + rows["xstest"].n_neg, rows["xstest"].dropped) == (1187, 163)
    assert (rows["pyrit_refusal"].n_pos + rows["pyrit_refusal"].n_neg, rows["pyrit_refusal"].dropped) == (
        95,
        10,
    )
    assert (rows["jbb_judge_comparison"].n_pos, rows["jbb_judge_comparison"].n_neg) == (54, 0)
    medical = rows["subversive-alignment-injection"]
    assert (medical.n_pos, medical.n_neg) == (1000, 1000)


@needs_data
def test_our_xstest_rule_repeats_the_published_labels() -> None:
    rule, n = judges.get("rules/xstest-v1"), 0
    for model in XSTEST_MODELS:
        path = Path(os.environ["DEMUR_DATA"]) / "xstest" / f"human_labels_{model}.jsonl"
        for row in map(json.loads, path.read_text().splitlines()):
            if row["completion"] is not None:
                n += 1
                got = rule.judge(
                    Prompt.of(row["prompt"]), Reply(prompt_id="p", content=row["completion"])
                ).label
                assert got == {"1": "compliance", "2": "full_refusal"}[row["strmatch_label"][0]], row["id"]
    assert n == 1187


@needs_data
def test_no_english_answer_is_taken_for_another_language() -> None:
    assert all(r.unread == 0 for id in judges.available() for r in judges.measured_error(id))


def test_the_docs_show_the_packaged_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    lines = page.split("## How far they agree with people")[1].splitlines()

    def cell(value: float | None, interval: tuple[float, float] | None) -> str:
        assert value is not None and interval is not None
        return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    for judge in judges.available():
        rows = [r for r in judges.measured_error(judge) if r.stratum == "all"]
        if rows:
            shown = "".join(line for line in lines if line.startswith(f"| `{judge}` |"))
            for r in rows:
                assert cell(r.sensitivity, r.sensitivity_interval) in shown, (judge, r.dataset)
                if r.n_neg:
                    assert cell(r.specificity, r.specificity_interval) in shown, (judge, r.dataset)
            assert f"| {rows[0].n_pos} + {rows[0].n_neg} | {rows[0].kappa:.3f} |" in shown


# --- rows beside the packaged table ---


def row(judge: str = "j", dataset: str = "d", stratum: str = "all", **more: object) -> Agreement:
    (made,) = judges.measure_agreement(
        judges.get("rules/demur-v1"), [item(0, "I cannot.", True)], dataset=dataset, definition="x"
    )
    return dataclasses.replace(made, judge=judge, stratum=stratum, **more)  # type: ignore[arg-type]


def test_rows_are_known_in_the_block_and_the_outer_one_counts() -> None:
    with agreement.adding([row(n_pos=7), row("k")]):
        with agreement.adding([row(n_pos=3), row(dataset="e")]):
            assert [(r.dataset, r.n_pos) for r in judges.measured_error("j")] == [("d", 7), ("e", 1)]
        assert [r.dataset for r in judges.measured_error("j")] == ["d"]
        assert judges.measured_error("j", "e") == []
    assert judges.measured_error("j") == [] and agreement.added() == ()


def test_rows_without_safe_and_unsafe_prompts_are_said_to_lack_them() -> None:
    with agreement.adding([row(), row("k")]):
        said = judge_note("j")
    assert said.startswith(
        "How often j errs on safe and on unsafe prompts has not been measured (the rows given are of k)"
    )


def test_packaged_rows_stay_as_they_are() -> None:
    packaged = judges.measured_error("rules/gcg-v1")
    other = [row("rules/gcg-v1", "xstest", n_pos=7), row("rules/gcg-v1", "mine")]
    with agreement.adding(other):
        assert judges.measured_error("rules/gcg-v1") == [other[1], *packaged]


def test_a_file_of_rows_is_read_as_written(tmp_path: Path) -> None:
    rows = [row(), row(stratum="unsafe", note="n")]
    agreement.write(rows, tmp_path / "a.json")
    assert agreement.read(tmp_path / "a.json") == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "rate,0.5\n", "not JSON"),
        (lambda _: [], "holds no measured agreement"),
        (lambda raw: {"rows": raw["rows"]}, "holds no measured agreement"),
        (lambda raw: {**raw, "rows": []}, "holds no rows"),
        (lambda raw: {**raw, "rows": [3]}, "row 1: names none of the data sets"),
        (lambda raw: {**raw, "sets": {}}, "row 1: names none of the data sets"),
        (lambda raw: {**raw, "schema_version": 99}, "newer than this demur knows"),
        (lambda raw: changed(raw, n_pos="many"), "row 1: n_pos"),
        (lambda raw: changed(raw, kapa=1), "unknown field kapa"),
        (lambda raw: changed(raw, sensitivity=91.7), "sensitivity 91.7 of 1 answers cannot be"),
        (lambda raw: changed(raw, sensitivity=None), "sensitivity None of 1 answers cannot be"),
        (lambda raw: changed(raw, specificity=0.5), "specificity 0.5 of 0 answers cannot be"),
    ],
)
def test_a_bad_file_of_rows_is_an_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "a.json"
    agreement.write([row()], path)
    made = change(json.loads(path.read_text()))
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(InputError, match=message):
        agreement.read(path)


def changed(raw: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {**raw, "rows": [{**raw["rows"][0], **fields}]}


def test_the_id_of_a_judge_names_the_model_it_asks() -> None:
    def asked(name: str, fingerprint: str | None) -> ScriptedRuntime:
        runtime = ScriptedRuntime({"*": "full_refusal"}, name=name)
        runtime.fingerprint = fingerprint
        return runtime

    def named(name: str, fingerprint: str | None = None, orders: int = 1) -> str:
        return judges.get("rubric/xstest-3way-v1", runtime=asked(name, fingerprint), orders=orders).id

    assert named("http://h/v1#m") == "rubric/xstest-3way-v1@http://h/v1#m"
    assert named("/home/me/m", "1a2b3c4d5e") == "rubric/xstest-3way-v1@m:1a2b3c4d"  # no path, and trained on:
    assert named("/home/me/m", "9a2b3c4d5e+7f7f7f7f7f") == "rubric/xstest-3way-v1@m:9a2b3c4d+7f7f7f7f"
    assert named("m", orders=2) == "rubric/xstest-3way-v1/both-orders@m"
