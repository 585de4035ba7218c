"""Checks come when due, leave the answer alone unless they stop it, and say where they stopped it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from demur.control.any_depth import AnyDepth, Halt, HeaderProbe, Rethink, declines, header_of
from demur.control.any_depth.intervention import REFUSAL
from demur.errors import CapabilityError, InputError
from demur.judges.base import preread
from demur.runtime.lanes import Lanes
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Label, Message, Prompt
from tests.runtime.tiny import tiny_control, tiny_runtime

PROMPTS = [
    Prompt.of(t, id=f"p{k}") for k, t in enumerate(("tell me about egg", "a letter", "how do I boil egg ?"))
]
LONG = Condition(name="long", max_new_tokens=24)


def probe(threshold: float, seed: int = 0) -> HeaderProbe:
    runtime = tiny_runtime()
    return HeaderProbe(
        header=header_of(runtime.chat).probe,
        layer=1,
        weights=np.random.default_rng(seed).standard_normal(32),
        bias=0.0,
        depths=(2,),
        n_harmful=1,
        n_benign=1,
        data_hash="x",
        threshold=threshold,
    )


@dataclasses.dataclass
class Planted:
    """A check that says what it was told to, by the number of tokens in a row."""

    stops: dict[int, float]
    threshold: float = 0.5
    name: str = "planted"
    asked: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def fits(self, _runtime: Any) -> None:
        pass

    def read(self, lanes: Lanes, keys: Sequence[int]) -> list[float]:
        self.asked.append(tuple(keys))
        return [self.stops.get(k, 0.0) for k in keys]


def planted(every: Any = 4, **stops: float) -> AnyDepth:
    check: Any = Planted({int(k[1:]): v for k, v in stops.items()})
    return AnyDepth(check, every)


def test_schedules() -> None:
    def at(every: Any) -> list[int]:
        return [d for d in range(401) if AnyDepth(Rethink(), every).due(d)]

    assert at(100) == [100, 200, 300, 400]
    assert at("adaptive") == [25, 50, 75, 100, 200, 300, 400]
    assert at((3, 7)) == [3, 7]
    for wrong in (0, -3, (), (0, 3), "sometimes", (2.5,)):
        with pytest.raises(InputError, match="every="):
            AnyDepth(Rethink(), wrong)


@pytest.mark.parametrize("check", [probe(2.0), Rethink(look=5)], ids=["probe", "rethink"])
@pytest.mark.parametrize("control", [False, True])
def test_an_answer_that_is_not_stopped_is_the_models_own(check: Any, control: bool) -> None:
    runtime = tiny_runtime(control=control)
    own = list(runtime.generate(PROMPTS, LONG))
    watched = list(AnyDepth(check, 3).watch(runtime, PROMPTS, LONG, stop=False))
    assert [w.reply for w in watched] == own
    for w in watched:
        n = w.reply.completion_tokens or 0
        last = n - 1 if w.reply.finish_reason == "stop" or n == 24 else n
        assert list(w.p) == list(range(3, last + 1, 3)) and w.halt is None


def test_a_stopped_answer_is_the_stock_refusal_and_says_where() -> None:
    runtime = tiny_runtime()
    lengths = [r.completion_tokens for r in runtime.generate(PROMPTS, LONG)]
    assert all(n is not None and n > 8 for n in lengths)
    with planted(k1=0.9).on(runtime) as checked:
        one, two, three = checked.generate(PROMPTS, LONG)
    assert (two.content, two.finish_reason, two.completion_tokens) == (REFUSAL, "content_filter", 4)
    assert two.finish_reason_raw == "planted: 0.9000 >= 0.5000 at token 4"
    verdict = preread(two)
    assert verdict is not None and verdict.label == Label.BLOCKED
    own = list(runtime.generate(PROMPTS, LONG))
    assert (one, three) == (own[0], own[2]) and two.condition == "long"
    assert checked.name == "tiny-llama+planted" and "intervene" not in checked.capabilities


def test_the_probe_reads_the_state_behind_the_header() -> None:
    from demur.control.any_depth import Answer, states_at

    runtime, check = tiny_runtime(), probe(2.0)
    [w] = AnyDepth(check, (5,)).watch(runtime, PROMPTS[:1], LONG, stop=False)
    answer = Answer(prompt=PROMPTS[0], text=w.reply.content, harmful=False)
    state = states_at(runtime, [answer], (5,), check.header, [check.layer])[:, 0, 0]
    assert w.p[5] == pytest.approx(float(check.p(state)[0]), abs=1e-5)


def test_checks_for_a_server_are_run_on_rows_that_are_due() -> None:
    runtime = tiny_runtime()
    lanes = Lanes(runtime)
    keys = lanes.join_all([(runtime.chat.render(p).ids, LONG, False) for p in PROMPTS])
    method = planted(k0=0.7, k1=0.9)
    said = method.checks(lanes, keys, dict(zip(keys, (4, 5, 8), strict=True)))
    check: Any = method.check
    assert check.asked == [(0, 2)]
    assert said == {0: Halt(by="planted", at=4, p=0.7, threshold=0.5), 1: None, 2: None}
    assert method.checks(lanes, keys, dict.fromkeys(keys, 1)) == dict.fromkeys(keys) and len(check.asked) == 1


def test_an_answer_begun_by_the_caller_is_checked_before_its_first_token() -> None:
    runtime = tiny_runtime()
    said = (Message(role="user", content="a letter"), Message(role="assistant", content="one two three"))
    rows = [Prompt(id="begun", messages=said), PROMPTS[0]]
    method = planted(every=(1000,), k0=0.8)
    with method.on(runtime) as checked:
        stopped, free = checked.generate(rows, LONG)
    assert stopped.finish_reason_raw == "planted: 0.8000 >= 0.5000 at token 0"
    assert free.finish_reason != "content_filter"


def test_samples_errors_and_decisions_are_as_without_checks() -> None:
    runtime = tiny_runtime(control=True)
    rows = [PROMPTS[0], Prompt.of("x " * 400, id="long"), PROMPTS[1]]
    with planted(every=1000).on(runtime) as checked:
        seen: list[int] = []
        replies = list(
            checked.generate(
                rows, LONG, samples=2, decide=lambda p, s: "safety", progress=lambda n, _t: seen.append(n)
            )
        )
        assert [(r.prompt_id, r.sample) for r in replies] == [(p.id, k) for p in rows for k in (0, 1)]
        assert seen == [1, 2, 3] and replies[2].error and replies[2].finish_reason == "error"
        assert all(r.control_token == "safety" and r.control_forced for r in (*replies[:2], *replies[4:]))
        own = list(runtime.generate(rows, LONG, samples=2, decide=lambda p, s: "safety"))
        assert replies == own
        with pytest.raises(InputError, match="at least one"):
            list(checked.generate(rows, samples=0))
        warm = Condition(max_new_tokens=12, temperature=1.0)
        a, b = checked.generate(rows[:1], warm, samples=2)
        assert a.content != b.content
        assert [r.content for r in checked.generate(rows[:1], warm, samples=2)] == [a.content, b.content]
    with planted().on(tiny_runtime()) as plain, pytest.raises(InputError, match="no control tokens"):
        list(plain.generate(rows, decide=lambda p, s: None))


def test_rethinking_judges_text_or_a_control_token() -> None:
    runtime = tiny_runtime(control=True)
    assert runtime.control is not None
    words = runtime.tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        return [words[w] for w in text.split()]

    refuse, respond = (runtime.control.ids[c] for c in ("safety", "respond"))
    assert declines(runtime, ids("sorry I cannot help with that ."))
    assert not declines(runtime, ids("boil the egg"))
    assert declines(runtime, [refuse, *ids("boil the egg")]) and not declines(
        runtime, [respond, *ids("the egg")]
    )
    assert not declines(runtime, [runtime.tokenizer.eos_token_id], (runtime.tokenizer.eos_token_id,))
    _, names = tiny_control(runtime.model)
    assert names.ids == runtime.control.ids


def test_only_local_models_are_checked() -> None:
    with (
        pytest.raises(CapabilityError, match="no local model"),
        AnyDepth(Rethink()).on(ScriptedRuntime(lambda p: "x")),
    ):
        pass
