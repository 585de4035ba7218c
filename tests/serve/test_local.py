from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from demur.control.any_depth import AnyDepth, RefuseMass
from demur.control.latent_guard import LatentGuard
from demur.errors import CapabilityError, DemurError, InputError, MismatchError, UpstreamError
from demur.explain.harmfulness import Beliefs
from demur.flows.load import load_runtime
from demur.runtime.local import LocalRuntime
from demur.serve.base import Ask, Piece
from demur.serve.local import LocalUpstream, base_view
from demur.serve.worker import Answer, Read
from demur.types import Condition, Message, Prompt
from tests.runtime.tiny import WORDS, tiny_model, tiny_runtime, tiny_tokenizer

Body = Callable[[LocalUpstream], Coroutine[Any, Any, None]]


def ask(text: str, n: int = 12, *, stop: Sequence[str] = (), **condition: Any) -> Ask:
    return Ask(
        prompt=Prompt.of(text, id=text), condition=Condition(max_new_tokens=n, **condition), stop=tuple(stop)
    )


ASKS = [
    ask(f"how do i {a} {b} ?", n)
    for a, b, n in zip(WORDS[14:38], WORDS[40:64], [3, 40, 7, 25] * 6, strict=True)
]


def with_upstream(body: Body, runtime: LocalRuntime | None = None, **options: Any) -> None:
    async def main() -> None:
        upstream = LocalUpstream(runtime or tiny_runtime(control=True), **options)
        try:
            await body(upstream)
        finally:
            await upstream.close()

    asyncio.run(main())


async def written(
    upstream: LocalUpstream, asked: Ask, category: str | None = None, bare: bool = False
) -> tuple[str, Piece]:
    pieces = [p async for p in upstream.answer(asked, category, bare=bare)]
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(p.text for p in pieces), pieces[-1]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.002)


def test_reads_that_arrive_together_are_scored_together(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tiny_runtime(control=True)
    want = list(runtime.score([a.prompt for a in ASKS], T=1.5))
    batches: list[int] = []
    original = runtime.score_rows
    monkeypatch.setattr(
        runtime, "score_rows", lambda rows, *rest: batches.append(len(rows)) or original(rows, *rest)
    )

    async def body(upstream: LocalUpstream) -> None:
        got = await asyncio.gather(*(upstream.read(a, 1.5) for a in ASKS))
        for mine, theirs in zip(got, want, strict=True):
            assert mine.id == theirs.id and mine.T == 1.5
            assert mine.probabilities == pytest.approx(dict(theirs.probabilities), abs=1e-6)

    with_upstream(body, runtime, max_wait_ms=50)
    assert sum(batches) == len(ASKS) and max(batches) > 4


def test_reads_at_different_temperatures_are_kept_apart() -> None:
    runtime = tiny_runtime(control=True)

    async def body(upstream: LocalUpstream) -> None:
        got = await asyncio.gather(*(upstream.read(ASKS[0], T) for T in (1.0, 2.0, 1.0)))
        want = [next(runtime.score([ASKS[0].prompt], T=T)) for T in (1.0, 2.0, 1.0)]
        assert [s.p_refuse for s in got] == pytest.approx([s.p_refuse for s in want], abs=1e-6)

    with_upstream(body, runtime)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_answers_side_by_side_are_what_each_is_alone(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    categories = [None, "safety", "respond"]
    want = []
    for k, a in enumerate(ASKS):
        forced = categories[k % 3]
        decide = None if forced is None else (lambda _p, _s, c=forced: c)
        want.append(next(runtime.generate([a.prompt], a.condition, decide=decide)))

    async def body(upstream: LocalUpstream) -> None:
        got = await asyncio.gather(*(written(upstream, a, categories[k % 3]) for k, a in enumerate(ASKS)))
        for (text, last), reply in zip(got, want, strict=True):
            assert text == reply.content and last.finish == reply.finish_reason
            assert last.control_token == reply.control_token
            counts = last.prompt_tokens, last.completion_tokens
            assert counts == (reply.prompt_tokens, reply.completion_tokens)
        assert upstream.busy == {"rows": 0, "waiting": 0, "reads": 0, "bytes": 0}

    with_upstream(body, runtime, max_rows=4)


def test_bare_answers_are_the_bases_own_beside_others() -> None:
    runtime, base = tiny_runtime(control=True), tiny_runtime()
    runtime.base = base
    bare = [k % 3 == 2 for k in range(len(ASKS))]
    want = []
    for a, by_base in zip(ASKS, bare, strict=True):
        decide = None if by_base else (lambda _p, _s: "safety")
        want.append(next((base if by_base else runtime).generate([a.prompt], a.condition, decide=decide)))

    async def body(upstream: LocalUpstream) -> None:
        assert upstream.has_base
        categories = ["respond" if b else "safety" for b in bare]
        got = await asyncio.gather(
            *(written(upstream, a, c, b) for a, c, b in zip(ASKS, categories, bare, strict=True))
        )
        for (text, last), reply, category in zip(got, want, categories, strict=True):
            assert text == reply.content and last.finish == reply.finish_reason
            assert last.control_token == category  # told, although it stands in front of refusals only
        assert upstream.busy == {"rows": 0, "waiting": 0, "reads": 0, "bytes": 0}

    with_upstream(body, runtime, max_rows=4)


def test_with_checks_inside_answers_the_model_that_they_read_writes() -> None:
    runtime = tiny_runtime(control=True)
    runtime.base = tiny_runtime()
    [own] = runtime.generate([ASKS[0].prompt], ASKS[0].condition, decide=lambda _p, _s: "respond")

    async def body(upstream: LocalUpstream) -> None:
        assert (await written(upstream, ASKS[0], "respond", bare=True))[0] == own.content

    with_upstream(body, runtime, any_depth=AnyDepth(RefuseMass(threshold=1.0), every=5))


def test_what_is_sampled_depends_on_the_seed_and_not_on_the_company() -> None:
    drawn = [ask("tell me a story", 12, temperature=1.0, seed=s) for s in (1, 2, 1)]

    async def body(upstream: LocalUpstream) -> None:
        alone = [await written(upstream, a) for a in drawn]
        together = await asyncio.gather(*(written(upstream, a) for a in [*drawn, *ASKS[:5]]))
        assert [t for t, _ in alone] == [t for t, _ in together[:3]]
        assert alone[0][0] == alone[2][0] != alone[1][0]

    with_upstream(body)


def test_stop_texts_end_the_answer() -> None:
    runtime = tiny_runtime(control=True)
    whole = next(runtime.generate([ASKS[1].prompt], ASKS[1].condition)).content
    word = whole.split()[3]
    assert word in whole

    async def body(upstream: LocalUpstream) -> None:
        text, last = await written(upstream, ask(ASKS[1].prompt.text, 40, stop=(word,)))
        assert text == whole[: whole.find(word)] and last.finish == "stop"
        assert last.completion_tokens is not None and last.completion_tokens < 40
        await until(lambda: upstream.busy["rows"] == 0)

    with_upstream(body, runtime)


def test_closing_the_iterator_frees_the_row_and_nobody_else_notices() -> None:
    runtime = tiny_runtime(control=True)
    want = next(runtime.generate([ASKS[3].prompt], ASKS[3].condition)).content

    async def body(upstream: LocalUpstream) -> None:
        other = asyncio.create_task(written(upstream, ASKS[3]))
        async with aclosing(upstream.answer(ask("tell me a long story", 200), "respond")) as pieces:
            await anext(pieces)
            assert upstream.busy["rows"] >= 1
        await until(lambda: upstream.busy["rows"] <= 1)
        assert (await other)[0] == want
        # cancelled while it waits: it never joins
        long = [asyncio.create_task(written(upstream, ask(f"story {k}", 100))) for k in range(6)]
        await until(lambda: upstream.busy["waiting"] >= 2)
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        await until(lambda: upstream.busy == {"rows": 0, "waiting": 0, "reads": 0, "bytes": 0})
        assert (await written(upstream, ASKS[3]))[0] == want

    with_upstream(body, runtime, max_rows=2)


def test_a_cancelled_read_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tiny_runtime(control=True)
    hold, seen = threading.Event(), []
    original = runtime.score_rows

    def slow(rows: Any, *rest: Any) -> Any:
        hold.wait(5)
        seen.extend(p.id for p, _ in rows)
        return original(rows, *rest)

    monkeypatch.setattr(runtime, "score_rows", slow)

    async def body(upstream: LocalUpstream) -> None:
        first = asyncio.create_task(upstream.read(ASKS[0]))
        await until(lambda: upstream.worker.pass_began is not None)
        second = asyncio.create_task(upstream.read(ASKS[1]))
        await until(lambda: upstream.busy["reads"] == 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        hold.set()
        await first
        await upstream.read(ASKS[2])
        assert seen == [ASKS[0].prompt.id, ASKS[2].prompt.id]

    with_upstream(body, runtime, max_wait_ms=0)


def test_first_come_first_served_and_short_ones_overtake_their_neighbours() -> None:
    async def body(upstream: LocalUpstream) -> None:
        order: list[str] = []

        async def named(name: str, n: int) -> None:
            await written(upstream, ask(f"tell me about {name} ?", n), "respond")
            order.append(name)

        long = asyncio.create_task(named("cat", 150))
        await until(lambda: upstream.busy["rows"] == 1)
        await asyncio.gather(*(named(f"dog {k}", 4) for k in range(5)))
        assert not long.done(), "one row is free of the long answer, and short ones go through it in turn"
        await long
        assert order[:-1] == [f"dog {k}" for k in range(5)]
        # reads need no row
        block = [asyncio.create_task(named(f"fjord {k}", 150)) for k in range(2)]
        await until(lambda: upstream.busy["rows"] == 2)
        await upstream.read(ASKS[0])
        assert not any(t.done() for t in block)
        await asyncio.gather(*block)

    # ends are ignored, so that lengths are what they are asked to be
    runtime = tiny_runtime(control=True)
    with_upstream(lambda u: (setattr(u.worker.lanes, "ends", ()), body(u))[1], runtime, max_rows=2)


def test_a_failed_step_fails_what_was_in_it_and_nothing_after() -> None:
    runtime = tiny_runtime(control=True)
    want = next(runtime.generate([ASKS[0].prompt], ASKS[0].condition)).content

    async def body(upstream: LocalUpstream) -> None:
        def broken() -> Any:
            raise RuntimeError("the accelerator fell over")

        upstream.worker.lanes.step = broken  # type: ignore[method-assign]
        with pytest.raises(UpstreamError, match="fell over"):
            await written(upstream, ASKS[0])
        assert "fell over" in (await upstream.problem() or "")
        assert (await written(upstream, ASKS[0]))[0] == want
        assert await upstream.problem() is None and upstream.worker.thread.is_alive()

    with_upstream(body, runtime)


def test_one_bad_read_does_not_fail_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tiny_runtime(control=True)
    original = runtime.score_rows

    def picky(rows: Any, *rest: Any) -> Any:
        if any(p.id == ASKS[2].prompt.id for p, _ in rows):
            raise RuntimeError("poison")
        return original(rows, *rest)

    monkeypatch.setattr(runtime, "score_rows", picky)

    async def body(upstream: LocalUpstream) -> None:
        got = await asyncio.gather(*(upstream.read(a) for a in ASKS[:5]), return_exceptions=True)
        assert [isinstance(g, UpstreamError) for g in got] == [False, False, True, False, False]

    with_upstream(body, runtime, max_wait_ms=50)


def test_closing_ends_everything_and_says_so() -> None:
    async def main() -> None:
        upstream = LocalUpstream(tiny_runtime(control=True), max_rows=1)
        upstream.worker.lanes.ends = ()
        tasks = [asyncio.create_task(written(upstream, ask(f"story {k}", 200), "respond")) for k in range(3)]
        await until(lambda: upstream.busy["rows"] == 1)
        await upstream.close()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(g, UpstreamError) and "shutting down" in str(g) for g in got)
        assert not upstream.worker.thread.is_alive() and await upstream.problem() == "shutting down"
        with pytest.raises(UpstreamError, match="shutting down"):
            await upstream.read(ASKS[0])

    asyncio.run(main())


def test_a_bounded_number_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(upstream: LocalUpstream) -> None:
        tasks = [asyncio.create_task(written(upstream, ask(f"story {k}", 150), "respond")) for k in range(4)]
        got = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [g for g in got if isinstance(g, UpstreamError)]
        assert refused and "2 calls wait" in str(refused[0]) and len(refused) < 4

    with_upstream(body, max_rows=1, max_waiting=2)


def test_the_context_is_kept() -> None:
    long = " ".join(["egg"] * 240)

    async def body(upstream: LocalUpstream) -> None:
        _, last = await written(upstream, ask(long, 500), "respond")
        assert last.finish in ("length", "stop")
        assert (last.prompt_tokens or 0) + (last.completion_tokens or 0) <= 256
        for call in (upstream.read(ask(long + long)), written(upstream, ask(long + long))):
            with pytest.raises(InputError, match="context"):
                await call
        with pytest.raises(InputError, match="half a character"):
            await upstream.read(ask("\ud800"))
        with pytest.raises(InputError, match="category 'unheard'"):
            await written(upstream, ASKS[0], "unheard")
        with pytest.raises(InputError, match="T=0"):
            await upstream.read(ASKS[0], 0.0)

    with_upstream(body)


def test_gate_mode_writes_with_the_untouched_base() -> None:
    runtime = tiny_runtime(control=True)
    base = base_view(runtime)
    plain = LocalRuntime(tiny_model(), tiny_tokenizer(), name="plain")
    want = next(plain.generate([ASKS[1].prompt], ASKS[1].condition)).content
    tuned = next(
        runtime.generate([ASKS[1].prompt], ASKS[1].condition, decide=lambda _p, _s: "respond")
    ).content
    assert base.control is None and base.edits == () and runtime.control is not None
    assert tuned != want

    async def body(upstream: LocalUpstream) -> None:
        assert upstream.names == runtime.control.names  # type: ignore[union-attr]
        score = await upstream.read(ASKS[1])
        assert score.probabilities
        text, last = await written(upstream, ASKS[1], "respond")
        assert text == want and last.control_token is None

    with_upstream(body, runtime, answers=base)


def test_a_model_without_control_tokens() -> None:
    async def body(upstream: LocalUpstream) -> None:
        assert upstream.names == ()
        assert (await upstream.read(ASKS[0])).kind == "first_token"
        assert (await written(upstream, ASKS[0]))[1].control_token is None

    with_upstream(body, tiny_runtime())


def test_a_model_that_thinks_first_cannot_be_dialled() -> None:
    runtime = tiny_runtime(
        control=True,
        template="{{ messages[0]['content'] }}{% if add_generation_prompt %}<think>\n{% endif %}",
    )
    with pytest.raises(CapabilityError, match="think"):
        LocalUpstream(runtime)


def test_the_guard_reads_before_the_model_answers() -> None:
    runtime = tiny_runtime(control=True)
    bad = [Prompt.of(f"bomb {w} bomb", id=f"b{k}") for k, w in enumerate(WORDS[:25])]
    fine = [Prompt.of(f"egg {w} egg", id=f"f{k}") for k, w in enumerate(WORDS[:25])]
    guard = LatentGuard(Beliefs.fit(runtime, {"harmful": bad, "harmless": fine}))

    async def body(upstream: LocalUpstream) -> None:
        got = await asyncio.gather(
            *(upstream.guard(Ask(prompt=p, condition=Condition())) for p in (*bad, *fine))
        )
        flags = guard.flags(runtime, [*bad, *fine])
        assert [g["stopped"] for g in got if g] == flags.tolist()
        assert flags[:25].sum() > 20 and flags[25:].sum() < 5
        assert got[0] and got[0]["name"] == f"latent-guard-{guard.id}" and got[0]["threshold"] == guard.at

    with_upstream(body, runtime, guard=guard)

    async def none(upstream: LocalUpstream) -> None:
        assert await upstream.guard(ASKS[0]) is None

    with_upstream(none, runtime)
    with pytest.raises(MismatchError):
        LocalUpstream(tiny_runtime(seed=1), guard=guard)


class Planted:
    """A reading that is high for the rows it is told of."""

    name, threshold = "planted", 0.5

    def __init__(self, keys: set[int]) -> None:
        self.keys, self.seen = keys, 0

    def fits(self, runtime: LocalRuntime) -> None:
        if runtime.control is None:
            raise MismatchError("made for the tuned model")

    def read(self, lanes: Any, keys: Sequence[int]) -> list[float]:
        assert set(keys) <= set(lanes.keys)
        self.seen += 1
        return [0.9 if k in self.keys else 0.1 for k in keys]


def test_a_check_inside_the_answer_ends_it() -> None:
    runtime = tiny_runtime(control=True)
    whole = next(runtime.generate([ASKS[1].prompt], ASKS[1].condition, decide=lambda _p, _s: "respond"))
    check: Any = Planted({0})

    async def body(upstream: LocalUpstream) -> None:
        text, last = await written(upstream, ASKS[1], "respond")
        assert last.finish == "content_filter" and last.stop is not None
        assert (last.stop.by, last.stop.at, last.stop.p, last.stop.threshold) == ("planted", 5, 0.9, 0.5)
        assert text and whole.content.startswith(text) and len(text.split()) <= 4, "the fifth is not shown"
        # others are looked at and go on as they would
        assert (await written(upstream, ASKS[1], "respond"))[0] == whole.content
        assert upstream.busy["rows"] == 0 and check.seen > 5

    with_upstream(body, runtime, any_depth=AnyDepth(check, every=5))
    with pytest.raises(MismatchError, match="tuned"):
        LocalUpstream(runtime, answers=base_view(runtime), any_depth=AnyDepth(check))


def test_tool_and_system_messages_reach_the_template() -> None:
    messages = (
        Message(role="system", content="be brief"),
        Message(role="user", content="how do i boil egg ?"),
        Message(role="assistant", content="yes"),
        Message(role="tool", content="three", tool_call_id="x"),
        Message(role="user", content="thanks"),
    )
    asked = Ask(prompt=Prompt(id="m", messages=messages), condition=Condition(max_new_tokens=5))
    runtime = tiny_runtime(control=True)

    async def body(upstream: LocalUpstream) -> None:
        assert (await written(upstream, asked))[0] == next(
            runtime.generate([asked.prompt], asked.condition)
        ).content

    with_upstream(body, runtime)


def test_nothing_is_kept_of_finished_requests() -> None:
    def jobs() -> int:
        gc.collect()
        return sum(type(o) in (Read, Answer) for o in gc.get_objects())

    async def body(upstream: LocalUpstream) -> None:
        for k in range(20):
            asked = ask(f"tell me about {k}", 3)
            await upstream.read(asked)
            await written(upstream, asked)
        # what the last turn of the worker still holds in its variables
        assert jobs() <= 3

    with_upstream(body)


@pytest.mark.model
def test_the_embedded_model_answers_as_it_does_alone() -> None:
    try:
        runtime: Any = load_runtime()
    except DemurError as e:
        pytest.skip(f"no SmolLM2 weights here: {e}")
    texts = [
        "Write three emoji.",
        "Say hello in Chinese.",
        "How do I boil an egg?",
        "<|im_end|> what is this?",
    ]
    asks = [ask(t, 24) for t in texts]
    want = list(runtime.generate([a.prompt for a in asks], asks[0].condition))

    async def body(upstream: LocalUpstream) -> None:
        async def pieces(a: Ask) -> list[Piece]:
            return [p async for p in upstream.answer(a, None)]

        for got, reply in zip(await asyncio.gather(*map(pieces, asks)), want, strict=True):
            assert "".join(p.text for p in got) == reply.content
            assert not any("\ufffd" in p.text for p in got[:-1])
            assert got[-1].control_token == reply.control_token and len(got) > 5

    with_upstream(body, runtime)
