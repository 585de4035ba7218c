"""Thinking cut short: which tokens are left, what the tiny model really says behind them, and the paired counts."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError, MismatchError
from demur.explain.refusal_cliff import Markup, Thought, cut, encode, fit_probes, states
from demur.measure import truncation
from demur.measure.truncation import Cut, Truncation, places_of
from demur.report.render import to_json, to_text
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Label, Prompt, Reply, Verdict
from tests.explain.test_refusal_cliff import MARKUP, thoughts
from tests.runtime.tiny import TEMPLATE, tiny_runtime

NEW = 3


class Reader:
    """Declines is what holds a word of `words`; nothing said is unread."""

    id, definition = "reader", "a word"

    def __init__(self, *words: str) -> None:
        self.words, self.read = words, list[Reply]()

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
        self.read.append(reply)
        hit = any(w in reply.content.split() for w in self.words)
        label = Label.FULL_REFUSAL if hit else Label.COMPLIANCE if reply.content.strip() else Label.EMPTY
        return Verdict(prompt_id=prompt.id, label=label, judge=self.id)


@pytest.fixture(scope="module")
def fitted() -> Any:
    runtime = tiny_runtime("qwen2")
    return runtime, fit_probes(runtime, thoughts(40), markup=MARKUP)


def some(n: int = 6) -> list[Thought]:
    """Fresh thoughts of several lengths, every other one harmless."""
    return [
        dataclasses.replace(
            t, thinking=" ".join(["one two three four five"] * (1 + k % 3)), answer="never read"
        )
        for k, t in enumerate(thoughts(n, seed=9))
    ]


# --- tokens -----------------------------------------------------------------------------------------------------


def words(runtime: Any, row: Any) -> list[str]:
    return [runtime.tokenizer.decode([i]) for i in row.ids]


def test_shares_by_hand_and_no_mark_is_lost() -> None:
    runtime = tiny_runtime()
    t = Thought(prompt=Prompt.of("boil egg", id="p"), thinking="one two three four five", answer="no sorry")
    row = encode(runtime, t, MARKUP)
    head = words(runtime, row)[: row.spans.index("thinking")]
    assert head[-2:] == ["<|assistant|>", "please"]
    for share, kept in (
        (1.0, ["one", "two", "three", "four", "five"]),
        (0.5, ["one", "two", "three"]),  # 2.5 tokens: the nearest number, halves go up
        (0.49, ["one", "two"]),
        (0.05, []),
        (0.0, []),
    ):
        short = cut(row, share)
        assert words(runtime, short) == [*head, *kept, "?", "."]
        assert short.final == len(short.ids) - 1 and short.spans.count("thinking") == len(kept)
    bare = cut(encode(runtime, t, Markup(open="", close=MARKUP.close)), None)
    assert words(runtime, bare) == head[:-1] and bare.final == len(bare.ids) - 1


def test_all_of_the_thinking_is_the_text_that_is_traced(fitted: Any) -> None:
    runtime, _ = fitted
    for t in some():
        bare = dataclasses.replace(t, answer="")
        assert cut(encode(runtime, t, MARKUP), 1.0) == encode(runtime, bare, MARKUP)


# --- what is said and read --------------------------------------------------------------------------------------


def greedy(runtime: Any, ids: list[int], new: int, ends: tuple[int, ...]) -> list[int]:
    """One row alone, without a cache."""
    out = list(ids)
    for _ in range(new):
        with torch.no_grad():
            token = int(runtime.model(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        out.append(token)
    return out[len(ids) :]


def test_scores_and_answers_are_those_of_each_row_alone(fitted: Any) -> None:
    from demur.runtime.decode import end_ids

    runtime, probes = fitted
    asked, shares = some(), (1.0, 0.5, 0.0, None)
    everything = Reader()
    found = Truncation(shares, judge=everything, max_new_tokens=NEW).collect(runtime, probes, asked)
    assert [(c.share, c.id) for c in found] == [(s, t.id) for s in shares for t in asked]
    unopened = dataclasses.replace(MARKUP, open="")
    texts = []
    for c, reply, t in zip(found, everything.read, asked * len(shares), strict=True):
        row = cut(encode(runtime, t, unopened if c.share is None else MARKUP), c.share)
        said = greedy(runtime, row.ids, NEW, tuple(end_ids(runtime)))
        texts.append(runtime.tokenizer.decode(said, skip_special_tokens=True))
        assert reply.content == texts[-1]
        H = next(states(runtime, [row], [probes.layer]))[0, -1]
        assert c.score == pytest.approx(1 / (1 + np.exp(-probes.final.score([H])[0])), abs=1e-6)
        assert c.group == ("harmful" if t.harmful else "harmless")
        assert c.kept == row.spans.count("thinking")
    assert len(set(texts)) > 3  # the rows do not all say the same
    word = texts[0].split()[0]
    flags = Truncation(shares, judge=Reader(word), max_new_tokens=NEW).collect(runtime, probes, asked)
    want = [word in text.split() if text.strip() else None for text in texts]
    assert [c.refused for c in flags] == want and True in want and False in want


def test_the_full_thinking_is_always_measured_and_shares_are_ordered() -> None:
    assert Truncation([0.25, None, 0, 0.25]).shares == (1.0, 0.25, 0.0, None)


def test_edits_are_in_force(fitted: Any) -> None:
    from demur.runtime.layers import HeadEdit

    runtime, probes = fitted
    measure = Truncation([0.0], judge=Reader(), max_new_tokens=NEW)
    changed = runtime.with_edits(HeadEdit({(2, h): 0.0 for h in range(4)}))
    plain, without = (measure.collect(r, probes, some(2)) for r in (runtime, changed))
    assert [c.score for c in plain] != [c.score for c in without]


def test_thinking_anew_is_no_answer() -> None:
    said = {"1": "<think> sorry", "2": "<think> hm </think> yes", "3": "yes"}
    runtime: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: said[str(ids[0])]))
    replies = [truncation._reply(runtime, "a", 0.0, [k], False) for k in (1, 2, 3)]
    assert [r.content for r in replies] == ["", "yes", "yes"] and replies[0].reasoning == "sorry"
    assert replies[0].finish_reason == "length"


# --- statistics -------------------------------------------------------------------------------------------------


def drawn(
    share: float | None, scores: list[float], refused: list[bool | None], group: str = "harmful"
) -> list[Cut]:
    return [
        Cut(id=f"{group}{i}", group=group, cluster=f"{i}", share=share, kept=2 * i, score=s, refused=r)
        for i, (s, r) in enumerate(zip(scores, refused, strict=True))
    ]


def test_places_by_hand() -> None:
    found = [
        *drawn(1.0, [0.9, 0.8, 0.7, 0.6], [True, True, False, None]),
        *drawn(0.5, [0.5, 0.6, 0.7, 0.2], [False, True, False, True]),
        *drawn(1.0, [0.1, 0.1], [False, False], "harmless"),
        *drawn(0.5, [0.3, 0.1], [True, True], "harmless"),
    ]
    full, half, calm, upset = places_of(found, "j")
    assert (full.refused.k, full.refused.n, full.refused.unread, full.refused.judge) == (2, 3, 1, "j")
    assert full.score_change is full.refused_change is None and full.score[0] == pytest.approx(0.75)
    assert (half.refused.k, half.refused.n, half.pairs, half.kept, half.n) == (2, 4, 3, 3.0, 4)
    assert half.score[0] == pytest.approx(0.5) and half.score_change is not None
    assert half.score_change[0] == pytest.approx((-0.4 - 0.2 + 0 - 0.4) / 4)
    assert half.refused_change is not None and half.refused_change[0] == pytest.approx(-1 / 3)
    low, high = half.refused_change[1:]
    assert low is not None and high is not None and -1 <= low < -1 / 3 < high
    assert calm.refused.k == 0 and upset.refused_change is not None and upset.refused_change[0] == 1.0
    with pytest.raises(InputError, match="full thinking"):
        places_of(found[4:8])


def test_several_thoughts_of_one_prompt_do_not_narrow_an_interval() -> None:
    flags = [True, False, True, False] * 4
    apart = drawn(1.0, [0.5] * 16, flags)
    together = [dataclasses.replace(c, cluster=str(i % 4)) for i, c in enumerate(apart)]
    wide, narrow = (places_of(some)[0].refused for some in (together, apart))
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)  # type: ignore[operator]


def test_the_report(fitted: Any) -> None:
    runtime, probes = fitted
    report = Truncation([0.5, None], judge=Reader("sorry"), max_new_tokens=NEW).run(runtime, probes, some())
    text = to_text(report)
    for said in ("harmful (3)", "harmless (3)", "no marks", "bare header", "thought by thought"):
        assert said in text, text
    values = json.loads(to_json(report))["values"]
    assert len(values["places"]) == 6 and len(values["cuts"]) == 18
    assert values["places"][1]["refused"]["judge"] == "reader"
    assert "tell me" not in to_json(report)  # neither prompts nor answers


# --- wrong input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_outside_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="from 0"):
        Truncation([1.0, share])


def test_what_cannot_be_cut_is_explained(fitted: Any) -> None:
    runtime, probes = fitted
    measure, asked = Truncation(judge=Reader(), max_new_tokens=NEW), some(2)
    with pytest.raises(InputError, match="no thinking"):
        measure.collect(runtime, probes, [asked[0], dataclasses.replace(asked[1], thinking=" ")])
    with pytest.raises(InputError, match="id of its own"):
        measure.collect(runtime, probes, [asked[0], asked[0]])
    long = dataclasses.replace(asked[0], thinking="egg " * 235)  # fits by itself, but not with an answer
    encode(runtime, long, MARKUP)
    with pytest.raises(InputError, match="context"):
        Truncation(judge=Reader(), max_new_tokens=20).collect(runtime, probes, [long])
    with pytest.raises(CapabilityError, match="runs elsewhere"):
        measure.collect(ScriptedRuntime({}), probes, asked)
    with pytest.raises(MismatchError, match="fit them anew"):
        measure.collect(tiny_runtime("qwen2", seed=1), probes, asked)
    with pytest.raises(InputError, match="at least one token"):
        Truncation(max_new_tokens=0)


def test_a_header_that_opens_the_thinking_has_no_bare_form() -> None:
    runtime = tiny_runtime(template=TEMPLATE.replace("<|assistant|>{%", "<|assistant|> <think>{%"))
    assert runtime.chat.opens_thinking
    with pytest.raises(CapabilityError, match="share 0"):
        Truncation([None], judge=Reader()).encoded(runtime, some(2), MARKUP)
    rows = Truncation([0.0], judge=Reader()).encoded(runtime, some(2), MARKUP)
    assert "please" not in words(runtime, rows[0.0, 0])


def test_judges_that_cannot_read_these_answers_are_refused() -> None:
    harm = Reader()
    harm.scale = "harm"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="reads harm"):
        Truncation(judge=harm)
    people = Reader()
    people.id = "human:labels.jsonl"
    with pytest.raises(InputError, match="one label for each prompt"):
        Truncation(judge=people)


def test_a_change_without_interval_is_shown_without_one() -> None:
    assert truncation._shown(None) is None
    assert truncation._shown((0.5, None, None)) == "0.50 [no interval]"
    assert truncation._shown((0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"
