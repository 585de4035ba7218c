"""Truth and refusal directions on planted states, effects of vectors, refusals under a change, entropy neurons."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from demur.errors import CapabilityError, InputError
from demur.explain.post_training import compare, comparison, refusal, tracing, truth
from demur.explain.post_training.comparison import core_requests
from demur.explain.post_training.entropy import (
    ScaleNeuron,
    _expected,
    candidates,
    compare_confidence,
    last_projection,
    logit_var,
    output_rows,
    unembedding,
)
from demur.explain.post_training.maps import pearson
from demur.explain.post_training.refusal import ablated, added, compare_refusal
from demur.explain.post_training.statements import Statement
from demur.explain.post_training.truth import (
    _nie,
    as_text,
    check_sets,
    compare_effects,
    compare_truth,
    cosines,
    lean,
    text_states,
)
from demur.runtime.chat import ChatFormat
from demur.runtime.layers import BlockEdit
from demur.runtime.openai import OpenAIRuntime
from demur.stats import rate
from demur.types import Prompt
from tests.explain.post_training.test_tracing import BEFORE, PAIRS, narrow, runtime
from tests.runtime.tiny import tiny_runtime

LAYERS, WIDTH, N = 3, 12, 40


def planted(turn: float = 0.0, seed: int = 0) -> tuple[dict[str, Any], dict[str, list[Statement]]]:
    """States whose layer 1 holds the truth along one axis, turned by an angle; each set has its own offset."""
    rng = np.random.default_rng(seed)
    sets = {f"set {k}": [Statement(text=f"w{k}{i} is", true=i % 2 == 0) for i in range(N)] for k in range(4)}
    axis = np.zeros(WIDTH)
    axis[0], axis[1] = np.cos(turn), np.sin(turn)
    states = {}
    for name, rows in sets.items():
        X = rng.normal(size=(N, LAYERS, WIDTH)) + 3 * rng.normal(size=WIDTH)
        X[:, 1] += 4 * np.array([[1 if s.true else -1] for s in rows]) * axis
        states[name] = X
    return states, sets


def test_a_shared_truth_direction_carries_over() -> None:
    (a, sets), (b, _) = planted(), planted(seed=1)
    found = compare_truth({"base": a, "tuned": b}, sets)
    assert found.layer == 1 and all(t.layer == 1 for t in found.transfer)
    assert found.cosines[1] > 0.9 and abs(found.cosines[0] or 0) < 0.7 and found.ceiling[1] > 0.9
    assert abs(found.ceiling[0]) < 0.7  # halves of noise share no direction
    assert found.accuracy("base", "tuned").value > 0.97
    assert found.by_layer["base on tuned"][1] > 0.97 and found.by_layer["base on base"][0] < 0.7
    assert found.random_labels == pytest.approx(0.5, abs=0.12)
    assert {t.held_out for t in found.transfer} == set(sets) and len(found.transfer) == 4 * 8
    assert found.accuracy("base", "base").n == 4 * N
    # the offset of the tested set is unknown without looking at it
    assert found.accuracy("base", "base", "train").value < found.accuracy("base", "base").value


def test_a_turned_direction_does_not() -> None:
    (a, sets), (b, _) = planted(), planted(turn=np.pi / 2, seed=1)
    found = compare_truth({"base": a, "tuned": b}, sets)
    assert abs(found.cosines[1]) < 0.2
    assert found.accuracy("tuned", "tuned").value > 0.97
    assert found.accuracy("base", "tuned").value == pytest.approx(0.5, abs=0.15)
    assert max(r.value for r in found.bag_of_words.values()) < 0.75


def test_sets_that_are_too_few() -> None:
    _, sets = planted()
    with pytest.raises(InputError, match="2 sets"):
        check_sets(dict(list(sets.items())[:2]))
    for rows in (sets["set 0"][:10], [s for s in sets["set 0"] if s.true] * 2):
        with pytest.raises(InputError, match="set 0"):
            check_sets({**sets, "set 0": rows})


def test_cosines_by_hand() -> None:
    assert cosines(np.array([[3.0, 4.0], [0, 0]]), np.array([[4.0, 3.0], [1, 1]])) == (
        pytest.approx(0.96),
        None,
    )


def test_nie_by_hand() -> None:
    plain = [np.array([0.8, 0.6]), np.array([-0.5, -0.5])]
    found = _nie("base", "tuned", plain, np.array([0.1, -0.1]), np.array([0.25, 0.25]), 0)
    assert found.true_false == pytest.approx((0.0 - 0.7) / (-1.7)) and found.false_true == pytest.approx(0.5)
    assert found.mean == pytest.approx((0.7 / 1.7 + 0.5) / 2) and found.low <= found.mean <= found.high
    still = _nie("base", "tuned", [-np.ones(2), np.ones(2)], -np.ones(2), np.ones(2), 0)
    assert still.mean is None and still.low is None


def test_states_of_statements_and_vectors_at_the_full_stop() -> None:
    r = runtime()
    sets = {"a": [Statement(text=p.true, true=True) for p in PAIRS[:6]]}
    found = text_states(r, sets)["a"]
    ids = torch.tensor([r.tokenizer(PAIRS[2].true)["input_ids"]])
    with torch.no_grad():
        expected = copy.deepcopy(r.model)(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1]
    assert found.shape == (6, 3, 32) and found[2, 0] == pytest.approx(expected.numpy(), abs=1e-5)
    assert as_text(r).chat.render(Prompt.of("the Oslo")).ids == r.tokenizer("the Oslo")["input_ids"]
    vector = np.random.default_rng(0).normal(size=32)
    texts = [p.true for p in PAIRS[:5]]
    moved = lean(r, texts, BEFORE, layers=[1], vector=vector)
    rows = torch.tensor(r.tokenizer([BEFORE + t + " This statement is:" for t in texts])["input_ids"])
    stop = rows.shape[1] - 4  # the question has three words

    def add(h: Any, at: Any) -> Any:
        return h + torch.tensor(vector, dtype=torch.float32) * ((at == stop) | (at == stop - 1))[..., None]

    with r.with_edits(BlockEdit(1, add)).edited():
        p = r.model(input_ids=rows).logits[:, -1].softmax(-1)
    yes, no = r.tokenizer.convert_tokens_to_ids(["TRUE", "FALSE"])
    assert moved == pytest.approx((p[:, yes] - p[:, no]).numpy(), abs=1e-5)
    assert np.abs(moved - lean(r, texts, BEFORE)).max() > 1e-4


def test_effects_take_the_direction_of_the_other_sets_in_the_targets_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, sets = planted()
    rng, held, layer = np.random.default_rng(3), "set 0", 9
    axes = {"base": np.eye(WIDTH)[0], "tuned": 3 * (np.eye(WIDTH)[0] + np.eye(WIDTH)[1])}
    states: dict[str, Any] = {m: {} for m in axes}
    for m, axis in axes.items():
        for name, rows in sets.items():
            X = 0.1 * rng.normal(size=(N, 13, WIDTH))
            signs = np.array([[1 if s.true else -1] for s in rows])
            # the held-out set has the truth elsewhere, and so have all other layers
            X[:, layer] += signs * (50 * np.eye(WIDTH)[5] if name == held else axis)
            states[m][name] = X
    calls: list[tuple[Any, bool, Any, Any]] = []

    def note(r: Any, texts: Any, *_: Any) -> Any:
        layers, vector = _[2:] if len(_) > 2 else ((), None)
        calls.append((r, all(s.true for s in sets[held] if s.text in texts), layers, vector))
        return np.zeros(len(texts))

    monkeypatch.setattr(truth, "lean", note)
    runtimes: Any = {"base": "base", "tuned": "tuned"}
    found, band = compare_effects(runtimes, states, sets, held, layer, before="")
    assert band == (8, 9)  # 5 of 32 layers are 2 of 13, up to the one it was read at
    assert [(n.vector, n.model) for n in found] == [(v, m) for m in axes for v in ("base", "tuned", "random")]
    moved = [c for c in calls if c[3] is not None]
    assert all(c[2] == band for c in moved) and len(moved) == 2 * (2 + 2 + 6)
    for m, target in axes.items():
        mine = [c for c in moved if c[0] == m]
        for k, name in enumerate(axes):
            unit = axes[name] / np.linalg.norm(axes[name])
            expected = unit * abs(unit @ (2 * target))  # the gap of the target's class means along it
            for (_, true, _, vector), sign in zip(mine[2 * k : 2 * k + 2], (-1, 1), strict=True):
                assert true is (sign < 0)
                assert vector == pytest.approx(sign * expected, abs=0.15)
        for *_, vector in mine[4:]:
            assert np.linalg.norm(vector) == pytest.approx(2 * np.linalg.norm(target), rel=0.05)


# --- refusal ----------------------------------------------------------------------------------------------------


def requests(word: str, n: int = 20, part: str = "a") -> list[Prompt]:
    words = ["egg", "fjord", "letter", "cat", "dog", "poem", "story", "sum", "number", "capital"]
    return [
        Prompt.of(f"{words[i % 10]} {words[i // 10]} {word} {part}", id=f"{word}{part}{i}") for i in range(n)
    ]


def test_refusal_directions_and_what_they_do() -> None:
    r = tiny_runtime()
    fit = (requests("bomb"), requests("egg"))
    test = (requests("bomb", part="the"), requests("egg", part="the"))
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))
    turned = r.with_edits(BlockEdit(0, lambda h, _at: h.flip(-1)), BlockEdit(2, lambda h, _at: h + push))
    calls: list[str] = []

    def judge(prompt: Prompt, _reply: Any) -> bool:
        calls.append(prompt.id)
        return "bomb" in prompt.text

    found = compare_refusal(
        {"base": r, "tuned": turned}, fit, test, layer=1, steer=4, doses=(1.0,), judge=judge
    )
    assert found.n_fit == 40 and found.n_test == 40 and found.layer == 1 and found.own_cosines is None
    assert found.auroc["base"]["t_inst"][0] is not None and len(found.cosines["t_post"]) == 3
    same = compare_refusal({"base": r, "tuned": r}, fit, test, steer=0)
    assert same.cosines["t_post"] == pytest.approx([1.0] * 3)
    assert all(x < 0.999 for x in found.cosines["t_inst"])
    assert found.bag_of_words == 1.0  # the words alone tell these requests apart, and the result says so
    assert [(s.vector, s.model) for s in found.steered] == [
        (v, m) for m in ("base", "tuned") for v in ("none", "base", "tuned", "random")
    ]
    assert all(
        s.change == "add" and s.refused.k == 0 for s in found.steered
    )  # harmful requests are not touched
    lowered = compare_refusal(
        {"base": r, "tuned": turned},
        fit,
        test,
        layer=1,
        steer=4,
        doses=(1.0,),
        judge=judge,
        allow_refusal_lowering=True,
    )
    assert {s.change for s in lowered.steered} == {"add", "subtract", "ablate"}
    assert all(s.refused.k == (0 if s.change == "add" else 4) for s in lowered.steered)


def test_which_vectors_are_added_and_under_whose_template(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_runtime()
    tuned = base.with_edits(name="tuned")
    tuned.chat = ChatFormat(base.tokenizer, template=base.chat.template + "{# another #}")
    rng = np.random.default_rng(0)
    axis, other, wrong = 30 * np.eye(32)[:3]

    def read(view: Any, prompts: Any, _progress: Any) -> Any:
        X = rng.normal(size=(len(prompts), 3, 2, 32))
        harmful = np.array(["bomb" in p.text for p in prompts])
        X[harmful, 1, 0] += wrong  # at t_inst
        own = view.chat.template == base.chat.template
        X[harmful, 1, 1] += wrong if own else axis if view.name == "tuned" else axis / 2 + other / 6
        return X

    pushed: list[tuple[str, int, Any]] = []
    taken: list[tuple[str, Any]] = []
    monkeypatch.setattr(refusal, "_read", read)
    monkeypatch.setattr(refusal, "added", lambda r, layer, v: pushed.append((r.name, layer, v)) or r)
    monkeypatch.setattr(refusal, "ablated", lambda r, u: taken.append((r.name, u)) or r)
    monkeypatch.setattr(refusal, "refusals", lambda _r, asked, _j: rate(0, len(asked)))
    fit = (requests("bomb"), requests("egg"))
    found = compare_refusal(
        {"base": base, "tuned": tuned}, fit, fit, layer=1, doses=(2.0,), allow_refusal_lowering=True, random=3
    )
    assert found.cosines["t_post"][1] == pytest.approx(3 / np.sqrt(10), abs=0.03)
    assert found.own_cosines is not None and abs(found.own_cosines["t_post"][1]) < 0.2
    assert found.ceiling["t_post"][1] > 0.9 > 0.6 > abs(found.ceiling["t_post"][0])
    assert all(found.auroc[m]["t_post"][1] == 1.0 for m in ("base", "tuned"))
    vectors = {"base": axis / 2 + other / 6, "tuned": axis}
    for m in ("base", "tuned"):
        length = np.linalg.norm(vectors[m])
        mine = [
            v for name, layer, v in pushed if name == (base.name if m == "base" else "tuned") and layer == 1
        ]
        expected = [2 * length * v / np.linalg.norm(v) for v in vectors.values()]
        for start, sign in ((0, 1), (5, -1)):  # added, then subtracted: base's, tuned's, three random ones
            for got, v in zip(mine[start : start + 2], expected, strict=True):
                assert np.linalg.norm(got - sign * v) < 0.15 * np.linalg.norm(v)
            for got in mine[start + 2 : start + 5]:
                assert np.linalg.norm(got) == pytest.approx(2 * length, rel=0.15)
                assert abs(got @ vectors[m]) < 0.7 * np.linalg.norm(got) * length
        assert len(mine) == 10
    assert len(taken) == 10 and all(np.linalg.norm(u) == pytest.approx(1) for _, u in taken)


def test_adding_and_ablating_by_hand() -> None:
    r = tiny_runtime()
    ids, v = torch.tensor([[3, 9, 4]]), np.random.default_rng(0).normal(size=32).astype(np.float32)
    unit = v / np.linalg.norm(v)

    def states(view: Any) -> Any:
        kept: list[Any] = []
        with view.edited():
            handles = [
                b.register_forward_hook(lambda _m, _a, o: kept.append(o)) for b in view.model.model.layers
            ]
            view.model(input_ids=ids)
            for h in handles:
                h.remove()
        return [k.numpy()[0] for k in kept]

    plain, up, gone = states(r), states(added(r, 1, v)), states(ablated(r, unit))
    assert up[0] == pytest.approx(plain[0]) and up[1] == pytest.approx(plain[1] + v, abs=1e-5)
    assert all(np.abs(h @ unit).max() < 1e-5 for h in gone) and np.abs(plain[1] @ unit).max() > 0.1


def test_too_few_requests_and_layers_that_are_not_there() -> None:
    r = tiny_runtime()
    few, enough = requests("bomb", 5), requests("egg")
    with pytest.raises(InputError, match="5 requests"):
        compare_refusal({"base": r, "tuned": r}, (few, enough), (enough, enough))
    with pytest.raises(InputError, match="layers 0 to 2"):
        compare_refusal({"base": r, "tuned": r}, (enough, enough), (enough, enough), layer=3)


def test_core_requests() -> None:
    harmful, harmless = core_requests("train", most=30)
    assert len(harmful) == len(harmless) == 30
    assert all(p.category == "safety" and p.should_refuse for p in harmful)
    assert not any(p.should_refuse for p in harmless)
    assert not {p.id for p in harmful} & {p.id for p in core_requests("test", most=30)[0]}


# --- entropy neurons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gemma3", "phi3"])
def test_output_rows_and_unembedding(arch: str) -> None:
    r = tiny_runtime(arch)
    rows, words = output_rows(r), unembedding(r)
    module, neurons = last_projection(r.model)
    assert rows.shape == (neurons, 32) and rows == pytest.approx(module.weight.detach().numpy().T, abs=1e-5)
    # a step along a row changes the logits by unembedding x row / size of the state, for states of size 1
    norm = next(m for n, m in r.model.named_modules() if n.split(".")[-1] in ("norm", "final_layer_norm"))
    x = (1.0 - 2.0 * (torch.arange(32) % 2))[None]
    with torch.no_grad():
        logits = r.model.get_output_embeddings()(norm(x))[0] - r.model.get_output_embeddings()(norm(-x))[0]
    assert words @ x[0].numpy() * 2 == pytest.approx(logits.numpy(), abs=1e-3)


def test_rows_hold_what_an_adapter_adds() -> None:
    r = tiny_runtime()
    module, _ = last_projection(r.model)

    class Twice:
        def install(self, _model: Any) -> Any:
            from demur.runtime.layers import hooked

            return hooked(module.register_forward_hook(lambda _m, _a, out: 2 * out))

    assert output_rows(r.with_edits(Twice())) == pytest.approx(2 * output_rows(r), abs=1e-5)


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(CapabilityError, match="mixtures of experts"):
        output_rows(tiny_runtime("mixtral"))


def test_candidates_by_hand() -> None:
    words = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]])
    rows = np.array([[0, 0, 9.0], [9.0, 0, 0], [0, 0, 0.1], *[[0.1, 0, 0]] * 5])
    assert logit_var(rows[:2], words) == pytest.approx([0.0, 2 / 3])  # cosines 0 and (1, -1, 0, 0)
    first, second = candidates(rows, words)
    assert (first.index, second.index) == (0, 1) and second.norm == 9
    assert second.ratio == pytest.approx(9 / np.log(2 / 3))
    assert _expected(1, 2) == pytest.approx(0.5) and _expected(2, 2) == 1
    assert _expected(2, 4) == pytest.approx(1 / 6 * 1 + 4 / 6 * (1 / 3))


def test_a_planted_neuron_is_found_and_only_moves_the_entropy() -> None:
    from demur.organisms.base import Recipe
    from demur.organisms.facts import plant_entropy_neuron
    from demur.organisms.training import build
    from demur.organisms.words import vocabulary
    from demur.runtime.local import LocalRuntime
    from tests.explain.post_training.test_tracing import WORDS

    recipe = Recipe(name="bare", world={}, layers=2, width=16, heads=2, mlp=64, steps=1, batch=1)
    model = build(recipe, len(vocabulary(WORDS))).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    rows = np.random.default_rng(0).integers(9, 20, size=(8, 6))
    plain = LocalRuntime(model, runtime().tokenizer, name="bare")
    shift = {}
    for silent in (True, False):
        made, index = plant_entropy_neuron(model, rows, silent=silent)
        r = LocalRuntime(made, runtime().tokenizer, name="planted")
        found = [n.index for n in candidates(output_rows(r), unembedding(r))]
        assert (found[0] == index) is silent
        logits = []
        for factor in (0.0, 3.0):
            with r.with_edits(ScaleNeuron(index, factor)).edited():
                logits.append(r.model(input_ids=torch.tensor(rows)).logits.double().numpy())
        changed = float((logits[0].argmax(-1) != logits[1].argmax(-1)).mean())
        assert changed == 0 if silent else changed > 0.05
        p = [log_softmax(x, axis=-1) for x in logits]
        shift[silent] = float((-(np.exp(p[1]) * p[1]).sum(-1) + (np.exp(p[0]) * p[0]).sum(-1)).mean())
    assert shift[True] > 0.1  # a longer final state makes all logits smaller
    both = compare_confidence(plain, r)
    assert both.of == 64 and 0 <= both.iou < 1 and index not in both.shared
    with pytest.raises(InputError, match="neurons 0 to 63"), plain.with_edits(ScaleNeuron(64, 0)).edited():
        pass


# --- the whole --------------------------------------------------------------------------------------------------


def test_compare_everything_on_a_toy() -> None:
    r = runtime()
    tuned = r.with_edits(BlockEdit(1, lambda h, _at: 1.2 * h), name="tuned")
    sets = {
        f"set {k}": [
            Statement(text=x, true=t)
            for p in PAIRS[k : k + 14]
            for x, t in ((p.true, True), (p.false, False))
        ]
        for k in range(3)
    }
    seen: list[str] = []
    found = compare(
        r,
        tuned,
        parts=("knowledge", "truth", "confidence"),
        pairs=PAIRS,
        before=BEFORE,
        statements=sets,
        cross=True,
        progress=lambda what, done, total: seen.append(what),
    )
    assert found.knowledge is not None and set(found.knowledge.maps) == {
        "base",
        "tuned",
        "base into tuned",
        "tuned into base",
    }
    for name in ("base into tuned", "tuned into base"):
        alike, mine = found.knowledge.likeness[name], found.knowledge.maps[name.rsplit(" ", 1)[-1]]
        assert alike.pearson == pytest.approx(pearson(mine, found.knowledge.maps[name]), abs=1e-9)
    assert found.truth is not None and len(found.truth.nie) == 6 and found.truth.nie_set == "set 0"
    assert found.confidence is not None and found.confidence.iou == 1.0 and found.refusal is None
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["knowledge"]["right"]["base"]["n"] == 2 * found.knowledge.pairs
    assert len(found.report.tables) == 5 and any("facts, base into tuned" in s for s in seen)
    assert (
        compare(r, tuned, parts=("confidence",)).to_dict()
        == compare(r, tuned, parts=("confidence",)).to_dict()
    )


def test_without_the_public_files_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path))
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    monkeypatch.setenv("DEMUR_OFFLINE", "1")
    r = runtime()
    found = compare(r, r, parts=("knowledge", "truth", "confidence"))
    assert found.knowledge is None and found.truth is None and found.confidence is not None
    assert len(found.notes) == 2 and all("left out" in note for note in found.notes)


def test_models_that_give_no_verdicts_complete_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    r = runtime()
    monkeypatch.setattr(comparison, "load_pairs", lambda: PAIRS)
    monkeypatch.setattr(comparison, "completions", lambda _pairs: ["completed"])
    monkeypatch.setattr(tracing, "align", lambda *_, **__: None)
    both = {"base": r, "tuned": r.with_edits(name="tuned")}
    for wrong, asked in ((2, True), (9, False)):  # of 20 statements, in the tuned model only
        found = np.r_[np.ones(wrong), -np.ones(10 - wrong)]
        monkeypatch.setattr(
            tracing, "margins", lambda r, _a, f=found: (np.ones(10), f if r.name == "tuned" else -np.ones(10))
        )
        pairs, _, why = comparison._public_pairs(both, question=True)
        assert (pairs is PAIRS, why is None) == (asked, asked)
    assert why is not None and "base and tuned are right on 100% and 55%" in why


def test_models_that_do_not_belong_together() -> None:
    r = runtime()
    with pytest.raises(InputError, match="part 'facts'"):
        compare(r, r, parts=("facts",))
    with pytest.raises(InputError, match="architecture"):
        compare(r, narrow())
    with pytest.raises(InputError, match="tokenizers"):
        compare(r, tiny_runtime())
    with pytest.raises(CapabilityError, match="runs elsewhere"):
        compare(r, OpenAIRuntime("http://127.0.0.1:1/v1", "m"))
