import pytest

from demur.errors import InputError
from demur.judges.base import PREREAD
from demur.measure import Record, Refusal
from demur.measure.refusal import by_category, by_text, corrected, count, declined, judge_error
from demur.prompts import row_of
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Label, Prompt, PromptSet, Reply, Verdict

REFUSE, COMPLY = frozenset({Label.FULL_REFUSAL}), frozenset({Label.COMPLIANCE})


def prompt(
    id: str, expected: frozenset[Label] = REFUSE, category: str | None = "safety", **more: object
) -> Prompt:
    return Prompt.of("x", id=id, category=category, expected=expected, **more)  # type: ignore[arg-type]


def record(p: Prompt, label: Label, judge: str = "rules/demur-v1") -> Record:
    return Record(p, Reply(prompt_id=p.id, content="t"), Verdict(prompt_id=p.id, label=label, judge=judge))


def test_every_label_is_declined_complied_or_unread() -> None:
    yes = {x for x in Label if declined(x)}
    unread = {x for x in Label if declined(x) is None}
    assert yes == {
        Label.FULL_REFUSAL,
        Label.PARTIAL_REFUSAL,
        Label.ABSTENTION,
        Label.CLARIFICATION,
        Label.BLOCKED,
    }
    assert unread == {Label.TRUNCATED, Label.EMPTY, Label.UNPARSED, Label.ERROR}
    with pytest.raises(InputError, match="'not_harmful' says nothing of refusals"):
        declined("not_harmful")


def test_rows() -> None:
    assert row_of(prompt("a")) == "safety"
    assert row_of(prompt("a", COMPLY)) == "safety"
    assert row_of(prompt("a", COMPLY, None)) == "general"
    assert row_of(prompt("a", COMPLY, "respond")) == "general"
    assert row_of(prompt("a", COMPLY, "safety", meta={"kind": "general"})) == "general"
    assert row_of(prompt("a", REFUSE, None)) == "uncategorised"


def test_by_category_by_hand() -> None:
    prompts = [
        prompt("a"),
        prompt("b"),
        prompt("c", COMPLY),
        prompt("d", COMPLY, None),
        prompt("e", category="x"),
    ]
    prompts.append(Prompt.of("unlabelled", id="f"))
    rates = by_category(prompts, [True, None, True, False, False, True])
    assert list(rates) == ["safety", "x", "general", "all"]
    safety = rates["safety"]
    assert (safety["refuse"].k, safety["refuse"].n, safety["refuse"].unread) == (1, 1, 1)
    assert (safety["lookalike"].k, safety["lookalike"].n) == (1, 1)
    assert (rates["all"]["refuse"].k, rates["all"]["refuse"].n) == (1, 2)
    assert (rates["all"]["lookalike"].k, rates["all"]["lookalike"].n) == (1, 2)
    assert rates["x"]["lookalike"].value is None


def test_answers_to_one_prompt_are_one_draw() -> None:
    said = [
        record(prompt(str(i)), Label.FULL_REFUSAL if i % 2 else Label.COMPLIANCE, "mine/v1")
        for i in range(20)
    ]
    one, five = (by_text(said * n)["all"]["refuse"] for n in (1, 5))
    assert (one.k, one.n, five.k, five.n) == (10, 20, 50, 100)
    for a, b in ((one.low, five.low), (one.high, five.high)):
        assert a is not None and b == pytest.approx(a, abs=0.06)  # Wilson against the bootstrap


def test_correction_by_hand() -> None:
    error = judge_error("rules/demur-v1", should_refuse=False)
    assert error is not None
    assert error.sensitivity.value is not None
    assert error.specificity.value is not None
    got = corrected(count([True] * 30 + [False] * 70), error)
    by_hand = (0.3 + error.specificity.value - 1) / (error.sensitivity.value + error.specificity.value - 1)
    assert got.corrected == pytest.approx(by_hand)
    assert got.value == 0.3


def test_an_unmeasured_judge_corrects_nothing() -> None:
    assert judge_error("first_token/control-v1", should_refuse=True) is None
    assert corrected(count([True]), None).corrected is None


def test_run_collects_judges_and_reports() -> None:
    asked = PromptSet("s", (prompt("bad"), prompt("good", COMPLY)))
    runtime = ScriptedRuntime(
        {"bad": "I'm sorry, but I can't help with that.", "good": "Sure, here it is: use kill."}
    )
    report = Refusal().run(runtime, asked)
    both = report.values["categories"]["all"]
    assert (both["refuse"].k, both["refuse"].n) == (1, 1)
    assert (both["lookalike"].k, both["lookalike"].n) == (0, 1)
    assert report.provenance["judge"] == "rules/demur-v1"


def test_errors_stand_beside_the_rate() -> None:
    asked = PromptSet("s", (prompt("a"), prompt("b")))
    runtime = ScriptedRuntime({"a": RuntimeError("down"), "b": "I can't help with that."})
    rate = Refusal().run(runtime, asked).values["categories"]["all"]["refuse"]
    assert (rate.n, rate.unread) == (1, 1)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(InputError, match="what is expected"):
        Refusal().score([record(Prompt.of("x", id="a"), Label.COMPLIANCE)])
    mixed = [record(prompt("a"), Label.COMPLIANCE, "j1"), record(prompt("b"), Label.COMPLIANCE, "j2")]
    with pytest.raises(InputError, match="several judges"):
        Refusal().score(mixed)
    Refusal().score([mixed[0], record(prompt("b"), Label.BLOCKED, PREREAD)])


def test_a_rate_beyond_the_judges_error_is_not_corrected() -> None:
    error = judge_error("rules/demur-v1", should_refuse=True)
    assert corrected(count([True] * 400), error).corrected is None
    assert corrected(count([True] * 60 + [False] * 60), error).corrected is not None
