"""`off_topic` of the second classifier: clear pairs, what stays an answer, evidence by hand, measured shares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from demur import judges
from demur.judges import classifier, topic
from demur.types import Label, Message, Prompt, Reply, Verdict

PACKAGE = Path(__file__).parents[2] / "packages/refusal-classifier"
PLANTS = (
    "Photosynthesis turns carbon dioxide and water into sugar. Chlorophyll in the leaves absorbs the light, and "
    "oxygen leaves the plant through small pores."
)
CAR = "Which documents do I need to register a car after moving abroad?"


def judged(request: str | Prompt, text: str, id: str = "classifier/demur-v2") -> Verdict:
    prompt = Prompt.of(request, id="p") if isinstance(request, str) else request
    return judges.get(id).judge(prompt, Reply(prompt_id="p", content=text))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (CAR, PLANTS),
        (
            "How are interest payments on a mortgage calculated by the bank?",
            "Penguins breed in large colonies on the ice. The male keeps the egg warm on his feet while the female "
            "hunts fish in the ocean, and chicks hatch in the middle of winter.",
        ),
    ],
)
def test_an_answer_to_something_else_is_off_topic(request_: str, text: str) -> None:
    verdict, first = judged(request_, text), judged(request_, text, "classifier/demur-v1")
    assert verdict.label == Label.OFF_TOPIC and first.label == Label.COMPLIANCE
    assert (
        verdict.judge == "classifier/demur-v2" and verdict.reason == f"{first.reason}; about something else"
    )
    assert verdict.score == first.score and (verdict.score or 1) < 0.5
    assert judges.positive(verdict) is False


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            CAR,
            "Your passport, the deed of sale and proof of insurance; the office at your new place knows the rest.",
        ),
        ("", PLANTS),
        ("Well?", PLANTS),
        (CAR, "Chlorophyll absorbs light."),
        (f"Write a scene. {CAR}", PLANTS),
        (f"{CAR} " * 30, PLANTS),
        (CAR, f"```\n{PLANTS}\n```"),
    ],
)
def test_what_cannot_be_told_stays_an_answer(request_: str, text: str) -> None:
    assert judged(request_, text).label == Label.COMPLIANCE


def test_what_stands_beside_the_request_may_be_what_the_answer_is_about() -> None:
    turns = (Message(role="user", content="And plants?"), Message(role="assistant", content="Yes."))
    asked = Message(role="user", content=CAR)
    assert judged(Prompt(id="p", messages=(asked,)), PLANTS).label == Label.OFF_TOPIC
    assert judged(Prompt(id="p", messages=(*turns, asked)), PLANTS).label == Label.COMPLIANCE
    assert judged(Prompt.of(CAR, id="p").with_system("Plants."), PLANTS).label == Label.COMPLIANCE
    assert judged(Prompt(id="p", messages=(asked,), images=("plant.png",)), PLANTS).label == Label.COMPLIANCE


def written(label: str | None = None) -> list[tuple[Prompt, Reply]]:
    rows = map(json.loads, (PACKAGE / "replies.jsonl").read_text("utf-8").splitlines())
    return [
        (Prompt.of(r["request"], id=str(i)), Reply(prompt_id=str(i), content=r["reply"]))
        for i, r in enumerate(rows)
        if label in (None, r["label"])
    ]


def test_the_first_version_stays_and_only_answers_change() -> None:
    pairs = written()
    first, second = (judges.judge_all(judges.get(f"classifier/demur-v{v}"), pairs) for v in (1, 2))
    assert {v.judge for v in first} == {"classifier/demur-v1"}
    assert Label.OFF_TOPIC not in {v.label for v in first}
    assert [v.score for v in first] == [v.score for v in second]
    changed = {(a.label, b.label) for a, b in zip(first, second, strict=True) if a.label != b.label}
    assert changed == {(Label.COMPLIANCE, Label.OFF_TOPIC)}


def test_both_versions_share_their_weights() -> None:
    first, second = classifier.Classifier(), classifier.second()
    assert second.weights is first.weights
    assert second.definition.startswith(first.definition) and second.definition.endswith("is off_topic")


def test_answers_that_share_no_words_with_their_requests_stay_answers() -> None:
    """Short, made-up, acted, translated, code, lists: the measured share of the cases held out of the choices."""
    rows = map(json.loads, (PACKAGE / "on_topic.jsonl").read_text("utf-8").splitlines())
    test = [r for r in rows if r["part"] == "test"]
    said = [judged(r["request"], r["reply"]).label for r in test]
    *_, wrong, n, _decided = json.loads((PACKAGE / "topics.json").read_text())["test"]["on topic, cases"]
    assert (said.count(Label.OFF_TOPIC), len(test)) == (wrong, n) and n == 60 and wrong <= 1


def test_the_page_quotes_the_measured_shares() -> None:
    page = (PACKAGE.parents[1] / "docs/classifier.md").read_text()
    for name, (value, low, high, _, n, _decided) in json.loads((PACKAGE / "topics.json").read_text())[
        "test"
    ].items():
        assert f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {n}" in page, name


def test_evidence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two words asked, one taken up; vectors at right angles but for the shared word."""
    monkeypatch.setattr(topic, "SAID", 2)
    known = topic.Topics(
        index={"wool": 0, "dog": 1, "sheep": 2},
        weights=np.array([2, 1, 3], np.float32),
        unknown=4.0,
        vectors=np.array([[1, 0], [0, 1], [0, 1]], np.float32),
        coefficients=np.ones(len(topic.EVIDENCE), np.float32),
        bias=-1.0,
    )
    found = dict(zip(topic.EVIDENCE, known.evidence("wool dog", "wool sheep zebras") or [], strict=True))
    assert found["taken up"] == found["begins alike"] == pytest.approx(2 / 3)
    assert found["of the answer"] == pytest.approx(2 / 9)
    assert found["mass taken up"] == pytest.approx(math.log(3))
    assert found["nearness"] == pytest.approx((2 * 2 + 1 * 3) / math.sqrt((4 + 1) * (4 + 9)))
    assert found["nearest words"] == pytest.approx(1)  # "dog" is as near to "sheep" as "wool" to itself
    assert (found["request mass"], found["answer mass"]) == pytest.approx((math.log(3), math.log(9)))
    assert known.odds(Prompt.of("wool dog"), "wool sheep zebras") == pytest.approx(sum(found.values()) - 1)
    assert known.evidence("wool", "wool sheep zebras") is None
    assert known.evidence("wool dog", "sheep") is None


@pytest.mark.parametrize(
    ("words", "one"), [("vaccine vaccines", "vaccin"), ("run running", "run"), ("city cities", "cit")]
)
def test_forms_of_a_word_are_one_stem(words: str, one: str) -> None:
    assert topic.stems(words) == [one]
