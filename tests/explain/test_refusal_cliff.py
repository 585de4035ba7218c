"""The refusal cliff: spans by hand, statistics on drawn curves, planted directions and heads in random models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError, MismatchError
from demur.explain.refusal_cliff import (
    KeptNorm,
    Markup,
    Thought,
    Trace,
    cliff,
    contributions,
    curve,
    encode,
    fit_probes,
    head_table,
    load_thoughts,
    rises,
    shuffled_drops,
    shuffled_traces,
    similar_heads,
    states,
    summarise,
    trace,
)
from demur.runtime.layers import HeadEdit
from demur.types import Prompt, Site
from tests.runtime.tiny import tiny_runtime

MARKUP = Markup(open="please", close="? .")
WORDS = ("boil egg", "letter cat dog", "story poem sum", "fjord norway", "capital france weather")


def thoughts(n: int = 40, seed: int = 0) -> list[Thought]:
    """Prompts about bombs are refused, the others answered."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        harm = i % 2 == 0
        text = f"{'bomb' if harm else 'egg'} {WORDS[rng.integers(5)]} {WORDS[rng.integers(5)]}"
        said = " ".join(WORDS[k] for k in rng.integers(0, 5, rng.integers(1, 4)))
        prompt = Prompt.of(f"tell me about {text}", id=f"t{seed}-{i}")
        out.append(Thought(prompt=prompt, thinking=said, refused=harm, harmful=harm))
    return out


def drawn(*scores: float, close: int = 1, id: str = "a") -> Trace:
    spans = ("template", *["thinking"] * (len(scores) - 1 - close), *["close"] * close)
    return Trace(id=id, tokens=("x",) * len(scores), spans=spans, scores=np.array(scores))


# --- tokens -----------------------------------------------------------------------------------------------------


def test_spans_by_hand() -> None:
    runtime = tiny_runtime()
    t = Thought(prompt=Prompt.of("boil egg", id="p"), thinking=" one two three ", answer="no sorry")
    row = encode(runtime, t, MARKUP)
    words = [runtime.tokenizer.decode([i]) for i in row.ids]
    named = list(zip(words, row.spans, strict=True))
    assert named[-9:] == [
        ("<|assistant|>", "template"),
        ("please", "template"),
        ("one", "thinking"),
        ("two", "thinking"),
        ("three", "thinking"),
        ("?", "close"),
        (".", "close"),
        ("no", "answer"),
        ("sorry", "answer"),
    ]
    assert ("egg", "prompt") in named and ("<|end|>", "template") in named
    assert words[row.final] == "."


def test_special_tokens_in_thinking_stay_text() -> None:
    runtime = tiny_runtime()
    end = runtime.tokenizer.convert_tokens_to_ids("<|end|>")
    row = encode(runtime, Thought(prompt=Prompt.of("egg", id="p"), thinking="one <|end|> two"), MARKUP)
    thinking = [i for i, s in zip(row.ids, row.spans, strict=True) if s == "thinking"]
    assert end not in thinking and len(thinking) >= 2


@pytest.mark.parametrize(
    ("change", "markup", "words"),
    [
        ({"thinking": "  "}, MARKUP, "no thinking"),
        ({}, Markup(open="", close=" "), "no tokens"),
        ({"thinking": "egg " * 400}, MARKUP, "context"),
    ],
)
def test_what_cannot_be_written_is_explained(change: dict[str, Any], markup: Markup, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(tiny_runtime(), dataclasses.replace(thoughts(1)[0], **change), markup)


def test_a_runtime_without_thinking_is_refused() -> None:
    with pytest.raises(CapabilityError, match="thinking=False"):
        encode(tiny_runtime(thinking=False), thoughts(1)[0], MARKUP)


@pytest.mark.parametrize("part", ["block", "heads"])
def test_states_at_all_tokens_equal_those_of_the_runtime(part: Any) -> None:
    runtime = tiny_runtime("qwen3")
    prompts = [Prompt.of("how boil egg", id="a"), Prompt.of("tell me a story about the fjord", id="b")]
    rows = [encode(runtime, Thought(prompt=p, thinking="one two"), MARKUP) for p in prompts]
    for row, p, H in zip(rows, prompts, states(runtime, rows, [0, 2], part=part), strict=True):
        bare = runtime.chat.render(p).ids  # what stands before the opening of the thinking
        assert row.ids[: len(bare)] == bare and H.shape[:2] == (2, len(row.ids))
        sites = [Site(layer=layer, position=i, part=part) for layer in (0, 2) for i in range(len(bare))]
        want = next(iter(runtime.states([p], sites))).vectors.reshape(2, len(bare), -1)
        np.testing.assert_allclose(H[:, : len(bare)], want, atol=1e-5)


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "p", "thinking": "t", "refused": "yes"}\n{"id": 7, "prompt": "q", "thinking": "u"}\n'
    )
    a, b = load_thoughts(file)
    assert (a.refused, a.harmful, b.id, b.refused) == (True, None, "7", None)
    for bad, words in (
        ('{"prompt": "p"}', "thinking"),
        ('{"prompt": "p", "thinking": "t", "refused": "perhaps"}', "true or false"),
        ('{"id": 1, "prompt": "p", "thinking": "t"}\n{"id": 1, "prompt": "p", "thinking": "t"}', "twice"),
    ):
        file.write_text(bad + "\n")
        with pytest.raises(InputError, match=words):
            load_thoughts(file)


# --- statistics on drawn curves ---------------------------------------------------------------------------------


def test_plateau_final_and_drop_by_hand() -> None:
    found = cliff(drawn(0.0, 0.1, 0.2, 0.6, 0.8, 0.9, 0.3, close=2))
    assert found.plateau == pytest.approx((0.6 + 0.8) / 2)  # the last ceil(4 / 2) thoughts, no template token
    assert found.final == 0.3 and found.drop == pytest.approx(0.4)
    with pytest.raises(InputError, match="no thinking"):
        cliff(Trace(id="a", tokens=("x",), spans=("close",), scores=np.array([1.0])))


def published(traces: list[Trace]) -> np.ndarray:
    """Tail-aligned, zero-padded mean."""
    longest = max(len(t.scores) for t in traces)
    return np.mean([np.r_[np.zeros(longest - len(t.scores)), t.scores] for t in traces], axis=0)


def test_flat_curves_stay_flat_where_zero_padding_makes_them_rise() -> None:
    traces = [drawn(*[0.8] * n, id=str(n)) for n in range(4, 30)]
    padded = published(traces)
    assert padded[0] < 0.1 and padded[-1] == pytest.approx(0.8)  # the artefact
    points = curve(traces)
    assert {round(p.median, 9) for p in points} == {0.8}
    assert max(p.n for p in points) == len(traces)
    rows = {row[0]: row for row in summarise([cliff(t) for t in traces]).rows}
    assert rows["drop"][1:4] == pytest.approx((0, 0, 0)) and rows["plateau"][1] == pytest.approx(0.8)


def test_a_step_is_found_without_overshoot_and_short_traces_leave_parts_out() -> None:
    step = [drawn(*[0.5], *[0.9] * n, 0.1, id=str(n)) for n in (2, 40)]
    points = {(p.span, p.place): p for p in curve(step, bins=10)}
    assert max(p.median for p in points.values()) <= 0.9 + 1e-12
    assert points["close", -1].median == pytest.approx(0.1) and points["close", -1].n == 2
    assert {p.n for key, p in points.items() if key[0] == "thinking"} == {1, 2}
    assert all(p.median == pytest.approx(0.9) for key, p in points.items() if key[0] == "thinking")


def test_the_median_does_not_follow_one_wild_trace() -> None:
    cliffs = [cliff(drawn(0, 0.5, 0.5, id=str(i))) for i in range(20)] + [
        cliff(drawn(0, 1.0, 0.0, id="wild"))
    ]
    name, median, low, high, n = summarise(cliffs).rows[2]
    assert (name, median, n) == ("drop", 0.0, 21) and low == high == 0.0


# --- probes -----------------------------------------------------------------------------------------------------


def test_probes_read_a_planted_refusal_and_its_loss_before_the_answer() -> None:
    runtime = tiny_runtime()
    bomb, last = (runtime.tokenizer.convert_tokens_to_ids(w) for w in ("bomb", "."))
    v = 5 * torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    fit = thoughts(60)
    probes = fit_probes(_told(runtime, v, bomb, last, lose=False), fit, markup=MARKUP)
    assert probes.held_out["final"] > 0.95 and probes.held_out["thinking"] > 0.95
    assert 0.2 < probes.held_out["random_labels"] < 0.8
    assert probes.held_out["bag_of_words"] > 0.95  # "bomb" is in the text
    assert any("harm" in note for note in probes.notes)
    fresh = [t for t in thoughts(40, seed=1) if t.harmful]
    steady = [cliff(t) for t in trace(_told(runtime, v, bomb, last, lose=False), probes, fresh)]
    fallen = [cliff(t) for t in trace(_told(runtime, v, bomb, last, lose=True), probes, fresh)]
    assert abs(np.median([c.drop for c in steady])) < 0.1
    assert np.median([c.drop for c in fallen]) > 0.5
    changed = _told(runtime, v, bomb, last, lose=True)
    flat = shuffled_drops(shuffled_traces(changed, fit, fresh, probes, draws=30))
    assert flat.shape == (30,) and abs(flat.mean()) < 0.2
    one = trace(runtime, probes, fresh[:1], by="final")[0]
    X = next(states(runtime, [encode(runtime, fresh[0], MARKUP)], [2]))[0]
    np.testing.assert_allclose(one.scores, 1 / (1 + np.exp(-probes.final.score(X))), atol=1e-9)


def _told(runtime: Any, v: torch.Tensor, bomb: int, last: int, *, lose: bool) -> Any:
    """The runtime with +v behind the word bomb, -v elsewhere, in the last layer; `lose`: -v at the last token."""
    from contextlib import contextmanager

    from demur.runtime.layers import BlockEdit, hooked

    class Planted:
        @contextmanager
        def install(self, model: Any) -> Any:
            seen: dict[str, Any] = {}

            def look(_m: Any, _a: Any, kwargs: dict[str, Any]) -> None:
                seen["ids"] = kwargs["input_ids"]

            def push(h: torch.Tensor, _p: torch.Tensor) -> torch.Tensor:
                on = (seen["ids"] == bomb).cumsum(1) > 0
                if lose:
                    on = on & (seen["ids"] != last)
                return h + v * (2.0 * on[..., None] - 1)

            with (
                hooked(model.register_forward_pre_hook(look, with_kwargs=True)),
                BlockEdit(2, push).install(model),
            ):
                yield

    return runtime.with_edits(Planted())


def test_bad_data_is_explained() -> None:
    runtime, rows = tiny_runtime(), thoughts(40)
    with pytest.raises(InputError, match="at least 20"):
        fit_probes(runtime, rows[:10], markup=MARKUP)
    with pytest.raises(InputError, match="of each kind"):
        fit_probes(runtime, [dataclasses.replace(t, refused=True) for t in rows], markup=MARKUP)
    with pytest.raises(InputError, match="do not say"):
        fit_probes(runtime, [*rows, dataclasses.replace(rows[0], refused=None)], markup=MARKUP)
    with pytest.raises(InputError, match="layers 0 to 2"):
        fit_probes(runtime, rows, layer=3, markup=MARKUP)
    probes = fit_probes(runtime, rows, markup=MARKUP)
    with pytest.raises(MismatchError, match="fit them anew"):
        trace(tiny_runtime(seed=1), probes, rows)


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> Any:
    runtime = tiny_runtime("qwen2")
    return runtime, fit_probes(runtime, thoughts(40), markup=MARKUP)


def test_contributions_are_what_attention_adds_along_the_probe(fitted: Any) -> None:
    """The heads of the last layer, with the projection's bias, sum to what the attention module returns."""
    runtime, probes = fitted
    some = thoughts(3, seed=5)
    a, size = contributions(runtime, probes, some)
    assert a.shape == size.shape == (3, 3, 4) and (size > 0).all()
    w = probes.final.direction
    unit = w / np.linalg.norm(w)
    for k, t in enumerate(some):
        row = encode(runtime, t, MARKUP)
        seen: list[Any] = []
        handle = runtime.model.model.layers[2].self_attn.register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out[0])
        )
        with torch.no_grad():
            runtime.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        handle.remove()
        whole = float(seen[0][0, -1].double().numpy() @ unit)
        assert a[k, 2].sum() == pytest.approx(whole, abs=1e-5)


def test_a_head_taken_out_changes_the_residual_by_its_contribution(fitted: Any) -> None:
    """In the last block the MLP reads the sum too, so it is held at what it wrote before."""
    runtime, probes = fitted
    row = encode(runtime, thoughts(1, seed=6)[0], MARKUP)
    a, _ = contributions(runtime, probes, thoughts(1, seed=6))
    w = probes.final.direction
    outs = []
    for edits in ((), (HeadEdit({(2, 1): 0.0}),)):
        with runtime.with_edits(*edits).edited():
            seen: list[Any] = []
            h = runtime.model.model.layers[2].self_attn.register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(out[0])
            )
            runtime.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            h.remove()
        outs.append(seen[0][0, -1].double().numpy() @ w / np.linalg.norm(w))
    assert outs[0] - outs[1] == pytest.approx(a[0, 2, 1], abs=1e-5)


def test_a_planted_head_comes_first_and_its_loss_raises_the_probe(fitted: Any) -> None:
    import copy

    from demur.runtime.local import LocalRuntime

    runtime, probes = fitted
    model = copy.deepcopy(runtime.model)
    w = torch.from_numpy(probes.final.direction).float()
    size = model.config.hidden_size // model.config.num_attention_heads
    o = model.model.layers[2].self_attn.o_proj.weight
    some = thoughts(8, seed=7)
    rows = [encode(runtime, t, MARKUP) for t in some]
    head = np.mean([H[0, -1, 2 * size : 3 * size] for H in states(runtime, rows, [2], part="heads")], axis=0)
    with torch.no_grad():  # whatever head 2 carries here, it writes far against the probe
        carried = torch.from_numpy(head)
        o[:, 2 * size : 3 * size] = -20 * torch.outer(w / w.norm(), carried / carried.square().sum())
    planted = LocalRuntime(model, runtime.tokenizer, name="planted")
    table = head_table(planted, probes, some)
    assert table[0].place == (2, 2) and table[0].contribution < -10
    assert table[0].low <= table[0].contribution <= table[0].high < 0
    risen = rises(planted, probes, some, [r.place for r in table])
    assert max(risen, key=lambda p: risen[p]) == (2, 2) and risen[2, 2] > 0
    assert len(table) == 12 and similar_heads(table, [(2, 2)])[0] != (2, 2)


def test_rises_with_the_norm_kept(fitted: Any) -> None:
    """Of the last layer's heads the rise is that of the rescaled rest; and no table is read off scaled heads."""
    runtime, probes = fitted
    some = thoughts(4, seed=8)
    free, kept = (rises(runtime, probes, some, [(2, 1)], keep_norm=k)[2, 1] for k in (False, True))
    edited = runtime.with_edits(KeptNorm(HeadEdit({(2, 1): 0.0})))
    rows = [encode(runtime, t, MARKUP) for t in some]
    before, after = (
        np.mean([probes.final.score(H[:, -1])[0] for H in states(r, rows, [2])]) for r in (runtime, edited)
    )
    assert kept == pytest.approx(after - before, abs=1e-6) and abs(kept - free) > 1e-3
    for changed in (edited, runtime.with_edits(HeadEdit({(2, 1): 0.5}))):
        with pytest.raises(InputError, match="without them"):
            head_table(changed, probes, some)


@pytest.mark.parametrize("arch", ["gemma3", "olmo2"])
def test_models_that_norm_what_attention_writes_are_refused(arch: str) -> None:
    runtime = tiny_runtime(arch)
    probes = fit_probes(runtime, thoughts(24), markup=MARKUP)
    with pytest.raises(CapabilityError, match="causal variant"):
        contributions(runtime, probes, thoughts(2, seed=3))
    assert math.isfinite(rises(runtime, probes, thoughts(2, seed=3), [(0, 0)])[0, 0])


@pytest.mark.parametrize("arch", ["gpt_neox", "phi3", "deepseek_v3", "mixtral"])
def test_other_families_have_contributions(arch: str) -> None:
    runtime = tiny_runtime(arch)
    a, _ = contributions(runtime, fit_probes(runtime, thoughts(24), markup=MARKUP), thoughts(2, seed=3))
    assert a.shape == (2, 3, 4) and np.isfinite(a).all() and np.ptp(a) > 0


def test_similar_heads_are_few() -> None:
    with pytest.raises(InputError, match="too few others"):
        similar_heads([], [(0, 0)])
