"""Both depth curves against what the tiny model really says, read by a judge whose rule is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur import judges
from demur.errors import CapabilityError, InputError
from demur.measure.depth import (
    CONTINUE,
    DECIDED,
    FIRST,
    ITSELF,
    REHEADER,
    WHOLE,
    Depth,
    Forced,
    load_forced,
    own_answers,
)
from demur.runtime.depths import DepthRow, header_ids, header_scores
from demur.runtime.layers import hooked
from demur.runtime.local import LocalRuntime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Label, Prompt, Reply, Score, Verdict
from tests.runtime.test_lanes import alone
from tests.runtime.tiny import tiny_runtime

DEPTHS, NEW = (0, 2, 5), 4
REFUSE, ANSWER = frozenset({Label.FULL_REFUSAL}), frozenset({Label.COMPLIANCE})


class Planted:
    """Declines is what holds one of `words`."""

    id, definition = "planted", "a word"

    def __init__(self, *words: str) -> None:
        self.words = words
        self.read: list[Reply] = []

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
        self.read.append(reply)
        hit = any(w in reply.content.split() for w in self.words)
        label = Label.EMPTY if not reply.content else Label.FULL_REFUSAL if hit else Label.COMPLIANCE
        return Verdict(prompt_id=prompt.id, label=label, judge=self.id)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Planted:
    planted = Planted("sorry", "no")
    monkeypatch.setattr(judges, "get", lambda _id: planted)
    return planted


def forced(*answers: str, refuse: bool = True, category: str = "humanizing") -> list[Forced]:
    side = REFUSE if refuse else ANSWER
    return [
        Forced(Prompt.of(f"tell me about the {w}", id=f"{w}{refuse}", category=category, expected=side), a)
        for w, a in zip(("egg", "fjord", "cat", "dog"), answers, strict=False)
    ]


def places(report: Any, curve: str, group: str = "should refuse") -> dict[int, dict[str, Any]]:
    found = [p for p in report.values["curves"] if (p["curve"], p["group"]) == (curve, group)]
    return {p["depth"]: p for p in found}


def test_continue_is_what_each_row_says_alone(judge: Planted) -> None:
    runtime = tiny_runtime(control=True)
    rows = forced("one two three four five red blue green yes", "please be brief and polite , yes", "yes")
    report = Depth("planted", depths=DEPTHS, new_tokens=NEW).run(runtime, rows)
    said: dict[tuple[str, int], str] = {}
    for f in rows:
        ids = runtime.chat.render(f.prompt).ids
        answer = runtime.tokenizer.encode(f.answer, add_special_tokens=False)
        for d in DEPTHS:
            if d > len(answer):
                continue
            new = alone(runtime, [*ids, *answer[:d]], NEW, forced=d > 0)
            ends = [k for k, i in enumerate(new) if i == 7]
            new = new[: ends[0]] if ends else new
            if d == 0 and new and new[0] in runtime.control.ids.values():
                new = new[1:]
            said[f.prompt.id, d] = runtime.tokenizer.decode(new, skip_special_tokens=True)
    texts = [r.content for r in judge.read]
    for (_, d), text in said.items():
        assert text in texts, d
    for d in DEPTHS:
        here = [text for (_, depth), text in said.items() if depth == d and text]
        place = places(report, CONTINUE)[d]
        assert place["n"] == len(here)
        assert place["value"] == pytest.approx(
            np.mean([bool({"sorry", "no"} & set(t.split())) for t in here])
        )
        assert place["low"] <= place["value"] <= place["high"]
    assert places(report, CONTINUE)[5]["n"] <= 2  # the third answer is one token long


class Says:
    """Makes one word the next token while the row is short, another from `turn` tokens on."""

    def __init__(self, runtime: LocalRuntime, early: str, late: str, turn: int) -> None:
        early_id, late_id = runtime.tokenizer.convert_tokens_to_ids([early, late])
        self.early, self.late, self.turn = early_id, late_id, turn

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        seen: dict[str, torch.Tensor] = {}

        def look(_m: Any, _a: Any, kwargs: Any) -> None:
            seen["at"] = kwargs["position_ids"]

        def push(_m: Any, _a: Any, z: torch.Tensor) -> torch.Tensor:
            out = z.clone()
            at = seen["at"][:, -1] if seen["at"].shape[-1] > 0 else seen["at"]
            rows = torch.where(at < self.turn, self.early, self.late)
            out[torch.arange(len(out)), -1, rows] = 1e4
            return out

        block = model.model.layers[0]
        with hooked(
            block.register_forward_pre_hook(look, with_kwargs=True),
            model.get_output_embeddings().register_forward_hook(push),
        ):
            yield


def test_a_refusal_planted_at_the_start_only_is_found_there_only(judge: Planted) -> None:
    bare = tiny_runtime()
    rows = forced(*["one two three four five red blue green yes please"] * 4)
    start = len(bare.chat.render(rows[0].prompt).ids)
    assert {len(bare.chat.render(f.prompt).ids) for f in rows} == {start}
    runtime = bare.with_edits(Says(bare, "sorry", "yes", start))
    report = Depth("planted", depths=(0, 1, 3, 8), new_tokens=2).run(runtime, rows)
    assert [p["value"] for p in places(report, CONTINUE).values()] == [1, 0, 0, 0]
    assert [p["value"] for p in places(report, WHOLE).values()] == [1, 0, 0, 0]
    assert judge.read
    late = bare.with_edits(Says(bare, "yes", "no", start + 3))  # refuses once it is deep enough
    report = Depth("planted", depths=(0, 1, 3, 8), new_tokens=2).run(late, rows)
    assert [p["value"] for p in places(report, CONTINUE).values()] == [0, 0, 1, 1]


def test_the_forced_text_is_judged_too(judge: Planted) -> None:
    rows = forced("yes yes yes yes no no no no yes yes yes yes")
    report = Depth("planted", depths=(0, 2, 8, 10), new_tokens=4).run(tiny_runtime(), rows)
    own = places(report, ITSELF)
    assert [own[d]["value"] for d in (0, 2, 8)] == [0, 1, 0]
    assert own[10]["n"] == 0 and own[10]["value"] is None  # it ends before
    assert judge.read


def test_reheader_is_the_mass_behind_the_header_and_the_rule_only_reads_it(judge: Planted) -> None:
    runtime = tiny_runtime(control=True)
    rows = [*forced("one two three four five red"), *forced("yes please", refuse=False)]
    seen: list[Score] = []

    def rule(_prompt: Prompt, score: Score) -> str | None:
        seen.append(score)
        return "safety" if len(seen) > 2 else "respond"

    report = Depth("planted", depths=DEPTHS, new_tokens=2).run(runtime, rows, decide=rule)
    header = header_ids(runtime.chat)
    for f, group in zip(rows, ("should refuse", "should answer"), strict=True):
        ids = runtime.chat.render(f.prompt).ids
        answer = runtime.tokenizer.encode(f.answer, add_special_tokens=False)
        want = header_scores(runtime, [DepthRow(ids, answer)], DEPTHS, header)[0, :, :-1].sum(-1)
        got = places(report, REHEADER, group)
        for d, p in zip(DEPTHS, want, strict=True):
            assert got[d]["n"] == (0 if np.isnan(p) else 1)
            if not np.isnan(p):
                assert got[d]["value"] == pytest.approx(float(p), rel=1e-4)
                assert places(report, DECIDED, group)[d]["value"] == 1
        [first] = runtime.score([f.prompt])
        assert places(report, FIRST, group)[0]["value"] == pytest.approx(first.p_refuse, rel=1e-4)
    # two decisions for the answers that the model opens itself, and one for each header that there is
    assert len(seen) == 2 + 3 + 2
    assert {r.control_token for r in judge.read} >= {None, "respond"}
    assert "requests that it should answer" in [t.title for t in report.tables]


def test_intervals_are_over_prompts(judge: Planted) -> None:
    bare = tiny_runtime()
    prompt = Prompt.of("tell me about the egg", id="a", expected=REFUSE)
    same = [Forced(prompt, "one two three four five")] * 12
    narrow = Depth("planted", depths=(0,), new_tokens=2).run(bare, forced("one", "two", "three", "four"))
    wide = Depth("planted", depths=(0,), new_tokens=2).run(bare, same)
    a, b = (places(r, CONTINUE)[0] for r in (narrow, wide))
    assert (a["n"], b["n"]) == (4, 12)
    assert b["high"] - b["low"] > a["high"] - a["low"]  # twelve answers of one prompt are one draw
    assert judge.read


def test_answers_that_spell_special_tokens_stay_text(judge: Planted) -> None:
    runtime = tiny_runtime()
    rows = forced("yes <|end|> <|assistant|> sorry")
    Depth("planted", depths=(0,), new_tokens=2).run(runtime, rows)
    from demur.measure.depth import _row

    row = _row(runtime, rows[0], Condition())
    assert not {5, 7} & set(row.answer)
    assert judge.read


def test_own_answers_are_made_where_they_do_no_harm(judge: Planted) -> None:
    asked = [f.prompt for f in forced("", "", "")]
    base = ScriptedRuntime({"eggTrue": "yes", "fjordTrue": "sorry , no", "catTrue": ""})
    assert [f.prompt.id for f in own_answers(base, asked, 8)] == ["eggTrue"]
    for category in ("safety", "weapons"):
        [bad] = forced("", category=category)
        with pytest.raises(InputError, match=category):
            own_answers(base, [bad.prompt], 8)
    assert judge.read


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": i, "prompt": f"p{i}", "response": r} for i, r in enumerate(("yes", " ", "no"))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [(f.prompt.text, f.answer) for f in load_forced(path)] == [("p0", "yes"), ("p2", "no")]
    path.write_text(json.dumps({"prompt": "a", "response": ""}) + "\n")
    with pytest.raises(InputError, match="no row has an answer"):
        load_forced(path)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="depths count from 0"):
        Depth(depths=(-1,))
    with pytest.raises(CapabilityError, match="runs elsewhere"):
        Depth().run(ScriptedRuntime({}), forced("yes"))
    short = [Forced(Prompt.of("Why?", id="a", expected=REFUSE), "Yes.")]
    with pytest.raises(InputError, match="none can be cut at depth 500"):
        Depth(depths=(500,)).run(tiny_runtime(), short)
    with pytest.raises(InputError, match="no forced answers"):
        Depth().run(tiny_runtime(), [])
