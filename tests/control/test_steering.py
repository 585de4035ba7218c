"""Steering: what is added where, on prompts and answers; consent; directions that do not fit."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch

from demur.control import Ablate, Add
from demur.control.any_depth import AnyDepth, Rethink
from demur.control.inversion import ask
from demur.control.refusal_tokens import RefusalTokens
from demur.errors import CapabilityError, InputError, MismatchError, RefusalLowering
from demur.explain import Direction, collect
from demur.runtime import depths
from demur.runtime.lanes import Lanes
from demur.runtime.local import BlockEdit
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, OperatingPoint, Prompt, Site, Threshold
from tests.runtime.tiny import tiny_runtime

PROMPTS = [
    Prompt.of(t, id=str(i))
    for i, t in enumerate(
        ["how do I boil an egg", "bomb", "write a letter to my cat about the weather", "why"]
    )
]
V = np.random.default_rng(0).normal(size=32)


def at(runtime, layer, position):
    return collect(runtime, PROMPTS, [(layer, position)])[layer, position]


def test_add_moves_each_prompt_token_by_the_vector_and_restores():
    runtime = tiny_runtime()
    before = at(runtime, 1, "t_inst")
    with Add(Direction(vector=V, origin="v", site=(1, "t_post")), coefficient=0.5).on(runtime) as steered:
        assert at(steered, 1, "t_inst") - before == pytest.approx(np.tile(V / 2, (4, 1)), abs=1e-4)
        assert at(steered, 0, "t_inst") == pytest.approx(at(runtime, 0, "t_inst"), abs=1e-5)
        assert steered.name.endswith("+v*0.5@1") and steered.fingerprint == runtime.fingerprint
    assert at(runtime, 1, "t_inst") == pytest.approx(before, abs=1e-5)


def by_hand(runtime, prompt, where, n=5):
    """Greedy tokens by whole forward passes, the vector added at layer 1 to the prompt's tokens or to all."""
    model = copy.deepcopy(runtime.model)
    ids = runtime.chat.render(prompt).ids
    head = len(ids)

    def push(_m, _a, out):
        h = out[0] if isinstance(out, tuple) else out
        mask = torch.ones(h.shape[1]) if where == "all" else (torch.arange(h.shape[1]) < head).float()
        new = h + mask[None, :, None] * torch.tensor(V, dtype=h.dtype)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.model.layers[1].register_forward_hook(push)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == runtime.tokenizer.eos_token_id:
                break
    out = ids[head:]
    return runtime.chat.split(out[:-1] if out[-1] == runtime.tokenizer.eos_token_id else out)[0]


@pytest.mark.parametrize("where", ["prompt", "all"])
@pytest.mark.parametrize("same", [False, True], ids=["different prompts", "one prompt five times"])
def test_answers_are_steered_at_the_prompt_or_everywhere(where, same):
    runtime = tiny_runtime()
    # five equal prompts share all but their last token, so that the pass over the prompt sees one token
    text = "how do I write a story about the weather in norway today ?"
    rows = [Prompt.of(text, id=f"same-{i}") for i in range(5)] if same else PROMPTS
    with Add(V, layer=1, where=where).on(runtime) as steered:
        said = [r.content for r in steered.generate(rows, Condition(max_new_tokens=5))]
    assert said == [by_hand(runtime, p, where) for p in rows]


def test_the_two_places_differ():
    runtime = tiny_runtime()
    assert any(by_hand(runtime, p, "prompt") != by_hand(runtime, p, "all") for p in PROMPTS)


def test_ablation_leaves_nothing_along_the_direction():
    runtime = tiny_runtime()
    unit = V / np.linalg.norm(V)
    with Ablate(V, allow_refusal_lowering=True).on(runtime) as without:
        for layer in range(3):
            assert abs(at(without, layer, "t_post") @ unit).max() < 1e-4
        assert without.notes == ["refusal lowering allowed: 'vector' taken out of the states"]
    with Ablate(V, layers=[1], allow_refusal_lowering=True).on(runtime) as one:
        assert at(one, 0, "t_post") == pytest.approx(at(runtime, 0, "t_post"), abs=1e-5)
        h = at(runtime, 1, "t_post")
        assert at(one, 1, "t_post") == pytest.approx(h - np.outer(h @ unit, unit), abs=1e-4)


def test_what_may_lower_refusal_needs_consent(caplog):
    for make in (lambda **k: Add(V, layer=1, coefficient=-1, **k), lambda **k: Ablate(V, **k)):
        with pytest.raises(RefusalLowering, match="--allow-refusal-lowering"):
            make()
        with caplog.at_level(logging.WARNING, "demur"):
            make(allow_refusal_lowering=True)
        assert "allowed" in caplog.text
    with pytest.raises(RefusalLowering):
        ask(tiny_runtime(), PROMPTS, V, layer=1, coefficient=-1, questions=["bomb ?"], answers=("yes", "no"))
    Add(V, layer=1)  # pushing towards a direction does not


def test_directions_that_do_not_fit():
    runtime = tiny_runtime()
    with pytest.raises(InputError, match="name the layer"):
        Add(V)
    with pytest.raises(InputError, match="finite"):
        Add([np.nan], layer=0)
    with pytest.raises(InputError, match="width 32"), Add(V[:8], layer=0).on(runtime):
        pass
    with pytest.raises(InputError, match="layers 0 to 2"), Add(V, layer=3).on(runtime):
        pass
    far = Direction(vector=V, origin="v", fingerprint="another")
    own = tiny_runtime().with_edits()
    own.fingerprint = "this"
    with pytest.raises(MismatchError, match="Fit it anew"), Add(far, layer=0).on(own):
        pass
    with pytest.raises(CapabilityError), Add(V, layer=0).on(ScriptedRuntime({"*": "x"})):
        pass


def test_prompts_alone_are_steered_where_rows_come_and_go_too():
    runtime, long = tiny_runtime(control=True), Condition(max_new_tokens=12)
    with Add(V, layer=1, coefficient=3.0).on(runtime) as steered:
        want = [r.content for r in steered.generate(PROMPTS, long)]
        assert want != [r.content for r in runtime.generate(PROMPTS, long)]
        watched = AnyDepth(Rethink(), every=3).watch(steered, PROMPTS, long, stop=False)
        assert [w.reply.content for w in watched] == want
        lanes = Lanes(steered)
        rows = [(steered.chat.render(p).ids, long, False) for p in PROMPTS]
        keys = lanes.join_all(rows[:2])
        said = {key: [] for key in keys}
        for step in range(12):
            if step == 4:  # the others' next step has prompt and answer side by side
                lanes.join_all(rows[2:])
            for key, token in lanes.step().items():
                said.setdefault(key, []).append(token)
            if step == 8:
                lanes.leave(keys[1])
    for row, key in ((0, keys[0]), (2, 2), (3, 3)):
        ids = said[key][: next((k for k, i in enumerate(said[key]) if i in lanes.ends), None)]
        new = ids[int(ids[0] in runtime.control.ids.values()) :]
        text = steered.chat.split(new)[0]
        assert new and want[row].startswith(text) and (row or want[row] == text)


@pytest.mark.parametrize("way", ["packed", "wound", "apart"])
def test_a_header_in_an_answer_is_not_steered_with_the_prompt(way, monkeypatch):
    monkeypatch.setattr(depths, "_way", lambda *_: way)
    runtime = tiny_runtime()
    prompt, answer, header = runtime.chat.render(PROMPTS[0]).ids, [20, 31, 25, 40], [7, 5]
    with Add(V, layer=1).on(runtime) as steered:
        rows = [depths.DepthRow(prompt, answer)]
        [got] = depths.header_states(steered, rows, [1, 4], header, [Site(layer=2)])
    prompt_only = torch.arange(len(prompt) + len(answer) + len(header)) < len(prompt)

    def push(h, positions):
        return h + prompt_only[positions][..., None] * torch.tensor(V, dtype=h.dtype)

    [want] = depths.header_states(
        runtime.with_edits(BlockEdit(1, push)), rows, [1, 4], header, [Site(layer=2)]
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_what_wraps_a_model_takes_no_edits():
    runtime = tiny_runtime(control=True)
    point = OperatingPoint(id="p", thresholds={"safety": Threshold(tau=0.5)})
    with (
        RefusalTokens(point).on(runtime) as dialled,
        pytest.raises(CapabilityError, match="intervene"),
        Add(V, layer=0).on(dialled),
    ):
        pass


# --- reply inversion --------------------------------------------------------------------------------------------

ASKING = {
    "questions": ("is that bomb ?", "bomb ? yes ?"),
    "frame": "user do {request}",
    "answers": ("yes", "no"),
}


def first_words(runtime, text, limit, vector):
    model = copy.deepcopy(runtime.model)
    ids = runtime.chat.render(Prompt.of(text)).ids

    def push(_m, _a, out):
        h = out[0] if isinstance(out, tuple) else out
        new = h.clone()
        new[:, :limit] += torch.tensor(vector, dtype=h.dtype)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    model.model.layers[1].register_forward_hook(push)
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    yes, no = (float(p[runtime.tokenizer.convert_tokens_to_ids(w)]) for w in ("yes", "no"))
    return yes / (yes + no), yes + no


@pytest.mark.parametrize("where", ["request", "all"])
def test_the_vector_ends_where_the_question_begins(where):
    runtime = tiny_runtime()
    said = ask(runtime, PROMPTS, V, layer=1, coefficient=0.5, where=where, **ASKING)
    assert [(a.id, a.question) for a in said] == [(p.id, q) for q in (0, 1) for p in PROMPTS]
    for a in said:
        told = f"user do {PROMPTS[int(a.id)].text}"
        text = f"{told} {ASKING['questions'][a.question]}"
        whole = runtime.chat.render(Prompt.of(text)).ids
        limit = (
            len(whole)
            if where == "all"
            else len(runtime.chat.render(Prompt.of(told)).ids) - len(runtime.chat.tail)
        )
        assert (a.harmful, a.mass) == pytest.approx(first_words(runtime, text, limit, V / 2), abs=1e-5)


def test_without_a_vector_the_model_is_asked_as_it_is():
    runtime = tiny_runtime()
    [first, *_] = ask(runtime, PROMPTS, **ASKING)
    assert (first.harmful, first.mass) == pytest.approx(
        first_words(runtime, f"user do {PROMPTS[0].text} is that bomb ?", 0, V), abs=1e-5
    )


def test_questions_that_cannot_be_asked():
    with pytest.raises(InputError, match="request"):
        ask(tiny_runtime(), PROMPTS, frame="user do")
    with pytest.raises(InputError, match="several messages"):
        ask(tiny_runtime(), [Prompt.of("bomb", system="be brief")])
    with pytest.raises(InputError, match="name the layer"):
        ask(tiny_runtime(), PROMPTS, V, **ASKING)
