"""Experts off and on: consent, nothing that names experts, matched masks, and when there is no localisation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from demur.control.experts import Experts, MaskEffect, mask_effect, matched_masks, within_slots
from demur.errors import CapabilityError, InputError, RefusalLowering
from demur.explain.mote import Maps, resonance_maps, score_experts
from demur.runtime.layers import ExpertEdit
from demur.runtime.local import LocalRuntime
from demur.types import Prompt
from tests.runtime.moe import moe_model
from tests.runtime.tiny import tiny_runtime, tiny_tokenizer

PROMPTS = [
    Prompt.of(t, id=t) for t in ("how boil egg", "tell me a story", "where is norway", "cat dog fjord")
]
LABELS = ["refused", "refused", "answered", "answered"]


@pytest.fixture(scope="module")
def runtime() -> LocalRuntime:
    return LocalRuntime(moe_model("qwen2_moe"), tiny_tokenizer(), name="moe", fingerprint="f")


def test_consent_by_the_sign_of_the_score(runtime: LocalRuntime, caplog: pytest.LogCaptureFixture) -> None:
    scores = score_experts(resonance_maps(runtime, PROMPTS), LABELS)
    up = scores.top(1)[0]
    low = int(np.argmin(scores.values[0]))
    down = (0, low)
    assert scores.of(down) < 0 < scores.of(up)
    for clear in ({"experts": [up], "stimulate": True}, {"experts": [down]}):
        assert Experts(**clear, scores=scores).lowers is None  # type: ignore[arg-type]
    gain = {"mode": "output_gain", "gain": 2.0}
    assert Experts([up], **gain, scores=scores).lowers is None  # type: ignore[arg-type]
    for risky in (
        {"experts": [up], "scores": scores},
        {"experts": [down], "stimulate": True, "scores": scores},
        {"experts": [up, down], "scores": scores},
        {"experts": [down], **gain, "scores": scores},
        {"experts": [down]},
    ):
        with pytest.raises(RefusalLowering):
            Experts(**risky)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "demur"):
        allowed = Experts([(2, 3), (1, 3)], allow_refusal_lowering=True)
    with allowed.on(runtime) as changed:
        notes: Any = changed.notes  # type: ignore[attr-defined]
        said = " ".join([*caplog.messages, changed.name, *notes])
    assert "2 experts off" in said and "(2, 3)" not in said and "2.3" not in said and "layer" not in said
    assert notes and runtime.notes == []


@pytest.mark.parametrize(
    "bad",
    [
        {"experts": []},
        {"mode": "nothing"},
        {"gain": 0.5},
        {"gain": -1.0, "mode": "output_gain"},
        {"gain": 2.0, "mode": "output_gain", "stimulate": True},
    ],
)
def test_wrong_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Experts(**{"experts": [(0, 0)], "allow_refusal_lowering": True, **bad})


@pytest.mark.parametrize("mode", ["post_topk_renorm", "pre_topk", "output_gain"])
def test_on_is_the_edit_and_restores(runtime: LocalRuntime, mode: Any) -> None:
    some = [(0, 1), (2, 2)]
    before = [s.p_refuse for s in runtime.score(PROMPTS)]
    with Experts(some, mode, allow_refusal_lowering=True).on(runtime) as changed:
        after = [s.p_refuse for s in changed.score(PROMPTS)]
        words = [r.content for r in changed.generate(PROMPTS)]
    edited = runtime.with_edits(ExpertEdit(some, mode))
    assert after == [s.p_refuse for s in edited.score(PROMPTS)] != before
    assert words == [r.content for r in edited.generate(PROMPTS)]
    assert [s.p_refuse for s in runtime.score(PROMPTS)] == before
    with (
        pytest.raises(CapabilityError),
        Experts(some, allow_refusal_lowering=True).on(tiny_runtime()) as dense,
    ):
        list(dense.score(PROMPTS))


def used(use: Any) -> Maps:
    v = np.asarray(use, float)[None]
    return Maps(values=v, layers=(1, 4), tokens=np.array([5]), ids=("a",), chosen=2, weighting="count")


def test_matched_masks_stay_in_the_layer_and_near_in_use() -> None:
    use = np.tile(np.arange(16.0), (2, 1))
    top = [(1, 8), (1, 9), (4, 0)]
    masks = matched_masks(used(use), top, 300)
    assert len(masks) == 300
    for mask in masks:
        assert [layer for layer, _ in mask] == [1, 1, 4]
        assert len(set(mask)) == 3 and not set(mask) & set(top)
        assert all(abs(e - own) <= 4 for (_, e), (_, own) in zip(mask, top, strict=True))
    assert {e for m in masks for k, e in m if k == 4} == {1, 2, 3, 4}  # a quarter of the layer
    assert masks == matched_masks(used(use), top, 300) != matched_masks(used(use), top, 300, seed=1)
    with pytest.raises(InputError, match="too few others"):
        matched_masks(used(use[:, :4]), [(1, 0), (1, 1), (1, 2)], 1)


def test_effects_are_first_position_scores(runtime: LocalRuntime) -> None:
    top, masks = [(0, 1), (1, 2)], [[(0, 0), (1, 0)], [(0, 3), (1, 1)], [(0, 1), (1, 2)]]
    change = Experts(top, allow_refusal_lowering=True)
    found = mask_effect(runtime, PROMPTS, change, masks)
    scores = [s.p_refuse for s in runtime.score(PROMPTS)]
    np.testing.assert_allclose(found.before, scores, atol=1e-7)
    with change.on(runtime) as changed:
        np.testing.assert_allclose(found.after, [s.p_refuse for s in changed.score(PROMPTS)], atol=1e-7)
    np.testing.assert_array_equal(found.random[2], found.after)  # the same experts
    np.testing.assert_allclose(found.random_moved, (found.before - found.random).mean(1))
    assert (found.k, found.of, found.random.shape) == (2, 12, (3, 4))


def effect(fall: float, random: float, raised: bool = False) -> MaskEffect:
    rng = np.random.default_rng(0)
    before = 0.5 + 0.05 * rng.standard_normal(60)
    drawn = before - random * rng.random((200, 1)) + 0.01 * rng.standard_normal((200, 60))
    after = before - fall + 0.02 * rng.standard_normal(60)
    if raised:
        after, drawn = 2 * before - after, 2 * before - drawn
    return MaskEffect(before=before, after=after, random=drawn, k=10, of=14848, raised=raised)


@pytest.mark.parametrize("raised", [False, True])
def test_localisation_must_beat_random_masks_and_be_of_some_size(raised: bool) -> None:
    real = effect(0.4, 0.1, raised)
    assert real.localised and real.bound == pytest.approx(0.095, abs=0.01)
    assert "(0.07%)" in real.text() and "No " not in real.text()
    word = "No rise" if raised else "No localisation"
    for fall, random in ((0.0, 0.1), (0.05, 0.01), (0.3, 0.4), (-0.4, 0.1)):
        none = effect(fall, random, raised)
        assert not none.localised and none.text().startswith(word)
    low, high = real.interval()
    assert low < real.moved.mean() < high


def test_within_slots() -> None:
    assert within_slots([(0, 5), (1, 0), (0, 2), (0, 1)], 2) == [(0, 5), (1, 0), (0, 2)]
