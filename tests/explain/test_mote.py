"""Maps counted by hand, scores on planted arrays, and a topic detector that must not pass for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError
from demur.explain import mote
from demur.explain.mote import Maps, permuted, resonance_maps, score_experts, topic_check
from demur.runtime.layers import ExpertEdit, find_routers
from demur.runtime.local import LocalRuntime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt
from tests.runtime.moe import moe_model
from tests.runtime.tiny import tiny_runtime, tiny_tokenizer

TEXTS = ("how boil egg", "tell me a story about the fjord please", "where is norway", "cat", "one two three")
PROMPTS = [Prompt.of(t, id=str(i)) for i, t in enumerate(TEXTS)]


def runtime(kind: str, **more: Any) -> LocalRuntime:
    return LocalRuntime(moe_model(kind, **more), tiny_tokenizer(), name=kind)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_maps_count_each_choice_of_each_prompt_token(kind: str) -> None:
    at = runtime(kind)
    routers = find_routers(at.model)
    count, gate = (resonance_maps(at, PROMPTS, weighting=w) for w in ("count", "gate"))  # type: ignore[arg-type]
    assert count.layers == tuple(r.layer for r in routers) and count.chosen == 2
    for i, prompt in enumerate(PROMPTS):  # one by one, without padding, by a loop over tokens
        ids = at.chat.render(prompt).ids
        for k, router in enumerate(routers):
            seen: list[Any] = []
            hook = router.module.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            with torch.inference_mode():
                at.model(input_ids=torch.tensor([ids]))
            hook.remove()
            ones, weights = np.zeros(router.experts), np.zeros(router.experts)
            for row, w in zip(seen[0][2].tolist(), seen[0][1].tolist(), strict=True):
                for e, x in zip(row, w, strict=True):
                    ones[e] += 1
                    weights[e] += x
            np.testing.assert_allclose(count.values[i, k], ones / len(ids), atol=1e-12)
            np.testing.assert_allclose(gate.values[i, k], weights / len(ids), atol=1e-5)
        assert count.tokens[i] == len(ids)
    np.testing.assert_allclose(count.values.sum(2), 2)


def test_maps_see_edits_and_leave_nothing_behind() -> None:
    at = runtime("mixtral")
    before = resonance_maps(at, PROMPTS).values
    barred = resonance_maps(at.with_edits(ExpertEdit([(1, 2)], "pre_topk")), PROMPTS).values
    assert not barred[:, 1, 2].any() and before[:, 1, 2].any()
    np.testing.assert_array_equal(resonance_maps(at, PROMPTS).values, before)


def test_maps_need_a_local_mixture_and_prompts() -> None:
    with pytest.raises(CapabilityError, match="no router"):
        resonance_maps(tiny_runtime(), PROMPTS)
    with pytest.raises(CapabilityError, match="cannot states"):
        resonance_maps(ScriptedRuntime({}), PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 prompts"):
        resonance_maps(runtime("mixtral"), [])


# --- scores -------------------------------------------------------------------------------------------------------


def maps(values: Any, layers: tuple[int, ...] = (3, 5)) -> Maps:
    v = np.asarray(values, float)
    ids = tuple(map(str, range(len(v))))
    return Maps(
        values=v,
        layers=layers,
        tokens=np.full(len(v), 9),
        ids=ids,
        chosen=2,
        weighting="count",
    )


def test_scores_by_hand() -> None:
    values = np.zeros((4, 2, 3))
    values[:, 0, 1] = [0.5, 0.7, 0.1, 0.9]  # refused 0.6, other known 0.1; the last row has no label
    values[:, 1, 2] = [0.4, 0.4, 0.3, 0.0]
    values[:, 1, 0] = [0.0, 0.0, 0.2, 0.0]
    scores = score_experts(maps(values), ["refused", "refused", "answered", None])
    np.testing.assert_allclose(scores.values, [[0, 0.5, 0], [-0.2, 0, 0.1]], atol=1e-12)
    assert scores.top(2) == [(3, 1), (5, 2)] and scores.rank((5, 2)) == 2 and scores.of((5, 0)) < 0
    assert (scores.n_target, scores.n_other) == (2, 1)
    assert "3" not in repr(scores) and "[" not in repr(scores)  # names no expert
    with pytest.raises(InputError, match="2 of 6 experts"):
        scores.top(3)
    own = score_experts(maps(values), ["a", "b", "c", "b"], "c")
    assert own.top(1) == [(5, 0)]
    np.testing.assert_allclose(maps(values).resonance([(3, 1), (5, 2)]), [0.9, 1.1, 0.4, 0.9])
    with pytest.raises(InputError, match="0 of 4"):
        score_experts(maps(values), ["answered"] * 4)
    with pytest.raises(InputError, match="3 labels for 4"):
        score_experts(maps(values), ["refused"] * 3)


def world(rng: np.random.Generator, n: int = 240, by: str = "nothing") -> tuple[Maps, list[str], list[str]]:
    """Topics 0-3 are refused; one expert follows the refusal, or all prompts' use is noise of their topics."""
    topics = np.arange(n) % 8
    values = 0.02 * rng.standard_normal((n, 2, 20)) + 0.1 * rng.standard_normal((8, 2, 20))[topics]
    labels = ["refused" if t < 4 else "answered" for t in topics]
    if by == "response":
        values[topics < 4, 1, 7] += 0.5
    return maps(values), labels, [str(t) for t in topics]


def test_permuted_labels_move_with_their_topic() -> None:
    fits = {
        by: [permuted(m, y, k=3, topics=t, draws=100, seed=s).p_value for s in range(20)]
        for by in ("nothing", "response")
        for m, y, t in [world(np.random.default_rng(0), by=by)]
    }
    assert max(fits["response"]) < 0.06
    null = []
    for seed in range(40):
        m, y, t = world(np.random.default_rng(seed))
        null.append(permuted(m, y, k=3, topics=t, draws=40).p_value < 0.05)
    assert np.mean(null) <= 0.15
    m, y, t = world(np.random.default_rng(0))
    assert permuted(m, y, k=3, draws=100).p_value < 0.02  # singly moved labels take topics for an effect


def test_unrelated_labels_are_half_of_each_class() -> None:
    rng = np.random.default_rng(0)
    made = [mote.unrelated_labels(["refused"] * 6 + ["answered"] * 4, rng) for _ in range(3)]
    assert all(x[:6].count("refused") == 3 and x[6:].count("refused") == 2 for x in made)
    assert len({tuple(x) for x in made}) > 1


def test_top_used_ignores_the_other_class() -> None:
    values = np.zeros((2, 2, 3))
    values[0, 0], values[1, 0] = [0.5, 0.2, 0.0], [0.9, 0.0, 0.0]
    assert mote.top_used(maps(values), ["refused", "answered"], 2) == [(3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("follows", "verdict"), [("response", "response"), ("topic", "topic"), ("half", "unclear")]
)
def test_topic_check(follows: str, verdict: str) -> None:
    rng = np.random.default_rng(1)
    topics = [str(i % 12) for i in range(120)]
    closed = np.array([int(t) < 6 for t in topics])

    def use(refused: np.ndarray) -> Maps:
        v = 0.02 * rng.standard_normal((120, 2, 4)) + 1
        strength = 0.5 + 0.6 * rng.standard_normal(12)[[int(t) for t in topics]]
        part = {"response": 0.0, "topic": 1.0, "half": strength}[follows]
        v[:, 1, 2] += 0.5 * (part * closed + (1 - part) * refused)
        return maps(v)

    refused = ["refused" if c else "answered" for c in closed]
    first = (use(closed), refused, topics)
    second = (use(np.zeros(120, bool)), ["answered"] * 120, topics)
    found = topic_check([(5, 2)], first, second)
    assert found.verdict == verdict and found.n == (60, 60, 60, 60)
    if follows != "half":
        assert found.share == pytest.approx(float(follows == "topic"), abs=0.05)
        assert found.low <= found.share <= found.high
    with pytest.raises(InputError, match="60, 60, 0 and 0"):
        topic_check([(5, 2)], first, (second[0], ["refused"] * 120, topics))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("id,prompt,label,topic\na,how,REFUSED,x\nb,why,,y\n", encoding="utf-8")
    rows = mote.load_rows(file)
    assert [(r.prompt.id, r.label, r.topic, r.template) for r in rows] == [
        ("a", "REFUSED", "x", None),
        ("b", None, "y", None),
    ]
    file.write_text("id,prompt\na,how\na,why\n", encoding="utf-8")
    with pytest.raises(InputError, match="a"):
        mote.load_rows(file)
    said = {
        "how": "I'm sorry, I can't help with that.",
        "why": "Because water boils at 100 degrees.",
        "hm": "",
    }
    prompts = [Prompt.of(t, id=t) for t in said]
    labels, replies = mote.label_by_response(ScriptedRuntime(said), prompts)
    assert labels == ["refused", "answered", None] and replies[0].content == said["how"]
