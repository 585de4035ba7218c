"""The runtime that other tests lean on."""

import pytest

from demur.errors import CapabilityError, InputError
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Prompt, Reply, Score

A, B = Prompt.of("Say a", id="a"), Prompt.of("Say b", id="b")


def test_id_text_and_star_in_that_order() -> None:
    rt = ScriptedRuntime({"a": "by id", "Say a": "by text", "*": "rest"})
    assert [r.content for r in rt.generate([A, B])] == ["by id", "rest"]
    assert [r.content for r in ScriptedRuntime({"Say a": "by text"}).generate([A])] == ["by text"]
    with pytest.raises(InputError, match=r"'b'.*no '\*'"):
        list(ScriptedRuntime({"a": "x"}).generate([B]))


def test_function_replies_errors_samples_and_progress() -> None:
    def script(prompt: Prompt, condition: Condition, sample: int) -> str | Reply | Exception:
        if prompt.id == "b":
            return TimeoutError("late")
        return Reply(prompt_id="ignored", content=f"{condition.name}{sample}", finish_reason="length")

    seen: list[int] = []
    replies = list(
        ScriptedRuntime(script).generate(
            [A, B], Condition(name="c"), samples=2, progress=lambda d, t: seen.append(d)
        )
    )
    assert [(r.prompt_id, r.sample, r.condition) for r in replies] == [
        ("a", 0, "c"),
        ("a", 1, "c"),
        ("b", 0, "c"),
        ("b", 1, "c"),
    ]
    assert [r.content for r in replies[:2]] == ["c0", "c1"] and replies[0].finish_reason == "length"
    assert replies[2].error == "TimeoutError: late" and replies[2].finish_reason == "error"
    assert seen == [1, 2, 3, 4]


def test_streams_lazily() -> None:
    taken: list[str] = []

    def source() -> object:
        for p in (A, B):
            taken.append(p.id)
            yield p

    next(ScriptedRuntime({"*": "x"}).generate(source()))  # type: ignore[arg-type]
    assert taken == ["a"]


def test_scores_by_hand_and_at_another_temperature() -> None:
    rt = ScriptedRuntime(
        scores={"*": {"safety": 0.16, "humanizing": 0.0, "respond": 0.64}}, control=["safety", "humanizing"]
    )
    assert rt.control is not None and rt.control.names == ("safety", "humanizing", "respond")
    (one,) = rt.score([A])
    assert (one.p_refuse, one.token, one.kind) == (0.16, "respond", "control")
    assert one.off_control_mass == pytest.approx(0.2)
    (two,) = rt.score([A], T=2.0)  # square roots: .4, 0, .8 and .2 ** .5 beside
    total = 0.4 + 0.8 + 0.2**0.5
    assert two.probabilities["safety"] == pytest.approx(0.4 / total) and two.T == 2.0
    assert sum(two.probabilities.values()) + (two.off_control_mass or 0) == pytest.approx(1.0)


def test_score_objects_functions_and_missing_scores() -> None:
    fixed = ScriptedRuntime({"a": Score(id="x", p_refuse=0.25)})
    assert [s.p_refuse for s in fixed.score([A])] == [0.25] and next(fixed.score([A])).id == "a"
    rt = ScriptedRuntime(scores=lambda p: {"safety": 0.9 if p.id == "a" else 0.1, "respond": 0.1})
    assert [s.p_refuse for s in rt.score([A, B])] == [0.9, 0.1]
    with pytest.raises(CapabilityError, match="cannot score"):
        list(ScriptedRuntime({"*": "x"}).score([A]))
    with pytest.raises(InputError, match="more than 1"):
        list(ScriptedRuntime(scores={"*": {"safety": 0.9, "respond": 0.9}}).score([A]))


def test_decide_forces_and_records() -> None:
    rt = ScriptedRuntime(
        {"*": "Sure."},
        scores={"a": {"safety": 0.6, "respond": 0.3}, "b": {"safety": 0.1, "respond": 0.8}},
        control=["safety"],
        forced={"safety": "I cannot."},
    )
    plain = list(rt.generate([A, B]))
    assert [(r.control_token, r.control_forced, r.content) for r in plain] == [
        ("safety", False, "Sure."),
        ("respond", False, "Sure."),
    ]
    steered = list(rt.generate([A, B], decide=lambda p, s: "safety" if s.p_refuse > 0.5 else None))
    assert [(r.control_token, r.control_forced, r.content) for r in steered] == [
        ("safety", True, "I cannot."),
        ("respond", False, "Sure."),
    ]
    with pytest.raises(CapabilityError):
        list(ScriptedRuntime({"*": "x"}).generate([A], decide=lambda p, s: None))


def test_a_decision_rule_sees_its_own_temperature() -> None:
    rt = ScriptedRuntime({"*": "x"}, scores={"*": {"safety": 0.04, "respond": 0.64}}, control=["safety"])

    class Rule:
        T = 2.0

        def __call__(self, _prompt: Prompt, score: Score) -> str | None:
            return "safety" if score.T == 2.0 and score.p_refuse > 0.1 else None

    assert [r.control_token for r in rt.generate([A], decide=Rule())] == ["safety"]


def test_a_rerun_gives_the_same() -> None:
    rt = ScriptedRuntime({"*": "x"}, scores={"*": {"safety": 0.2, "respond": 0.7}})
    assert rt.deterministic and list(rt.generate([A, B])) == list(rt.generate([A, B]))
    assert list(rt.score([A, B])) == list(rt.score([A, B]))
