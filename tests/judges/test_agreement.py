"""Hand-computed agreement, and the packaged table against a fresh computation."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from demur import judges
from demur.judges import agreement
from demur.judges.agreement import LabelledReply
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


def test_packaged_table_is_readable_and_meets_the_bar() -> None:
    ours = {r.stratum: r for r in judges.measured_error("rules/demur-v1", "xstest")}
    assert {"all", "safe", "unsafe", "gpt4", "gpt4, safe", "mistralinstruct, unsafe"} <= set(ours)
    assert ours["all"].accuracy is not None and ours["all"].accuracy > 0.884
    assert ours["all"].kappa is not None and ours["all"].kappa > 0.77
    theirs = judges.measured_error("rules/xstest-v1", "xstest")[0]
    assert (theirs.n_pos, theirs.n_neg) == (ours["all"].n_pos, ours["all"].n_neg)
    assert theirs.kappa is not None and ours["all"].kappa > theirs.kappa
    assert judges.measured_error("first_token/control-v1") == []


@needs_data
def test_packaged_table_is_what_the_code_computes() -> None:
    stored = [r for id in judges.available() for r in judges.measured_error(id)]
    assert [dataclasses.asdict(r) for r in agreement.validate()] == [dataclasses.asdict(r) for r in stored]


@needs_data
def test_our_xstest_rule_repeats_the_published_labels() -> None:
    rule, n = judges.get("rules/xstest-v1"), 0
    for model in agreement.XSTEST_MODELS:
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
