"""Beliefs: leanings by hand, planted bits, windows, cuts, what cannot be told apart, files, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from demur.errors import InputError, MismatchError
from demur.explain.harmfulness import NOT_IDENTIFIABLE, Belief, Beliefs, by_behaviour, leaning
from demur.explain.harmfulness.fitting import best_cut, best_window, cosine
from demur.runtime.scripted import ScriptedRuntime
from demur.types import OperatingPoint, Prompt, Threshold
from tests.explain.planted import Planted, ask, cells
from tests.runtime.tiny import WORDS, tiny_runtime

LAYERS = range(4)


def fitted(**more):
    return Beliefs.fit(Planted(), cells(20, 0), LAYERS, **more)


def test_leaning_by_hand():
    h = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert leaning(h, [1.0, 0.0], [0.0, 2.0]) == pytest.approx([0.6 - 0.8, 0.0])
    # states (n, L, d) against centres (L, d): each layer has its own
    three = np.stack([h, h], axis=1)
    assert leaning(three, np.eye(2), np.eye(2)[::-1])[0] == pytest.approx([-0.2, 0.2])
    assert cosine(np.array([1.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(0.5**0.5)


def test_centres_are_means_and_every_prompt_is_read_once():
    runtime, sets = Planted(), cells(20, 0)
    beliefs = Beliefs.fit(runtime, sets, LAYERS)
    assert len(runtime.read) == len(set(runtime.read)) == 80  # each prompt carries two labels
    sites = [type("S", (), {"layer": 1, "position": -3})()]
    want = np.mean([next(runtime.states([p], sites)).vectors[0] for p in sets["harmful"]], axis=0)
    assert beliefs.harmful.toward[1] == pytest.approx(want, abs=1e-6)
    assert beliefs.harmful.n == beliefs.refuse.n == (40, 40)


def test_each_bit_is_read_at_its_own_place_and_quadrants_are_named():
    beliefs = fitted()
    runtime = Planted()
    for harm in (True, False):
        for refuse in (True, False):
            said = {
                beliefs.quadrant(b)
                for b in beliefs.score(runtime, ask(10, 500 + 20 * harm + 10 * refuse, harm, refuse))
            }
            want = f"believed {'harmful' if harm else 'harmless'}, will {'refuse' if refuse else 'answer'}"
            assert said == {want}
    assert abs(beliefs.cosines[1:3]).max() < 0.3  # planted at right angles


def test_directions_are_differences_of_centres():
    beliefs = fitted()
    d = beliefs.direction("refuse", 2)
    assert d.site == (2, "t_post") and d.fingerprint == "planted-1" and d.n == 80
    assert d.vector[1] == pytest.approx(4, abs=0.3) and abs(d.vector[[0, 2, 3, 4, 5]]).max() < 0.3
    with pytest.raises(InputError, match="harmful and refuse, layers 0 to 3"):
        beliefs.direction("truth", 0)


def test_the_window_leaves_out_layers_that_only_add_noise():
    beliefs = fitted(select=cells(20, 1000))
    assert set(beliefs.harmful.window) & {1, 2} and beliefs.harmful.select_auroc == 1.0
    rng = np.random.default_rng(0)
    y = np.arange(200) < 100
    scores = np.c_[
        rng.normal(0, 5, 200), y + rng.normal(0, 1, 200), y + rng.normal(0, 1, 200), rng.normal(0, 5, 200)
    ]
    window, area = best_window(scores, y, [3, 4, 5, 6])
    assert window == (4, 5) and area > 0.8
    alike = np.repeat(y[:, None].astype(float), 3, axis=1)
    assert best_window(alike, y, [0, 1, 2])[0] == (0, 1, 2)  # the longest of equals


def test_cuts_part_the_calibration_prompts():
    y = np.array([0, 0, 0, 1, 1, 1], bool)
    assert best_cut(np.array([-1.0, 0.1, 0.3, 0.5, 0.8, 0.9]), y) == pytest.approx(0.4)
    assert best_cut(np.array([0.0, 0.2, 0.6, 0.5, 0.8, 0.9]), y) == pytest.approx(
        0.35
    )  # 3/3 less 1/3, the first
    with pytest.raises(InputError, match="same score"):
        best_cut(np.zeros(6), y)
    assert fitted().with_cuts(Planted(), cells(20, 2000)).harmful.cut != 0.0


def test_a_belief_is_the_mean_over_its_window_and_stands_against_its_cut():
    beliefs, sets = fitted(), cells(20, 2000)
    narrow = replace(
        beliefs,
        harmful=replace(beliefs.harmful, window=(1, 2), cut=0.3),
        refuse=replace(beliefs.refuse, window=(2,), cut=-0.3),
    )
    rows = [*sets["harmful"], *sets["harmless"]]
    per_layer, said = beliefs.per_layer(Planted(), rows), narrow.score(Planted(), rows)
    inside = per_layer.harmful[:, 1:3].mean(1)
    assert [b.harmful for b in said] == pytest.approx(inside)
    assert [b.refuse for b in said] == pytest.approx(per_layer.refuse[:, 2])
    assert narrow.with_cuts(Planted(), sets).harmful.cut == pytest.approx(
        best_cut(inside, np.arange(80) < 40)
    )
    assert [narrow.quadrant(Belief(id="x", harmful=h, refuse=r)) for h, r in ((0.2, -0.2), (0.3, -0.4))] == [
        "believed harmless, will refuse",
        "believed harmful, will answer",
    ]


def test_labels_that_agree_are_not_identifiable():
    harm, fine = ask(60, 0, True, True), ask(60, 100, False, False)
    same = {"harmful": harm, "harmless": fine, "refused": harm, "accepted": fine}
    beliefs = Beliefs.fit(Planted(), same, LAYERS)
    assert "agree on 120 of 120" in beliefs.unclear
    assert {beliefs.quadrant(b) for b in beliefs.score(Planted(), harm)} == {NOT_IDENTIFIABLE}
    few = {**same, "refused": [*harm][4:], "accepted": [*fine, *[*harm][:4]]}
    assert "agree on 116 of 120" in Beliefs.fit(Planted(), few, LAYERS).unclear
    apart = {**same, "refused": ask(30, 700, True, True), "accepted": ask(30, 800, False, False)}
    assert "no prompt carries both labels" in Beliefs.fit(Planted(), apart, LAYERS).unclear
    assert fitted().unclear is None


def test_harmfulness_alone():
    sets = {k: v for k, v in cells(20, 0).items() if k in ("harmful", "harmless")}
    beliefs = Beliefs.fit(Planted(), sets, LAYERS)
    assert beliefs.refuse is None and beliefs.per_layer(Planted(), sets["harmful"]).refuse is None
    [belief] = beliefs.score(Planted(), sets["harmful"][:1])
    assert belief.refuse is None and beliefs.quadrant(belief) == NOT_IDENTIFIABLE
    with pytest.raises(InputError, match="refused and accepted"):
        _ = beliefs.cosines


def test_narrowed_beliefs_say_the_same_about_harm():
    beliefs = fitted(select=cells(20, 1000))
    small = beliefs.narrowed()
    assert small.layers == beliefs.harmful.window and small.refuse is None
    asked = ask(5, 3000, True, False)
    assert [b.harmful for b in small.score(Planted(), asked)] == pytest.approx(
        [b.harmful for b in beliefs.score(Planted(), asked)]
    )


def test_saved_beliefs_come_back_and_belong_to_one_model(tmp_path):
    beliefs = fitted(select=cells(20, 1000)).with_cuts(Planted(), cells(20, 2000))
    file = tmp_path / "b.safetensors"
    beliefs.save(file)
    back = Beliefs.load(file, fingerprint="planted-1")
    asked = ask(5, 3000, True, False)
    assert back.score(Planted(), asked) == beliefs.score(Planted(), asked)
    assert (back.harmful.window, back.refuse.cut, back.unclear) == (
        beliefs.harmful.window,
        beliefs.refuse.cut,
        None,
    )
    with pytest.raises(MismatchError, match="planted-1"):
        Beliefs.load(file, fingerprint="other")
    other = Planted()
    other.fingerprint = "other"
    with pytest.raises(MismatchError, match="fit them anew"):
        back.score(other, asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harmful": ask(19, 0, True, True)}, "19 prompts; a centre needs at least 20"),
        ({"refused": ask(3, 0, True, True)}, "harmfulness alone is fitted"),
        ({"refused": None}, "needs both its sides"),
        ({"harmful": None, "harmless": None}, "needs both its sides"),
        ({"lies": ask(20, 0, True, True)}, "sets lies"),
        ({"harmless": ask(80, 0, False, False)}, "are in 'harmful' and in 'harmless'"),
    ],
)
def test_sets_that_cannot_be_fitted_on(change, message):
    sets = {**cells(20, 0), **change}
    with pytest.raises(InputError, match=message):
        Beliefs.fit(Planted(), {k: v for k, v in sets.items() if v is not None}, LAYERS)


def test_select_prompts_that_were_fitted_on_and_runtimes_without_layers():
    with pytest.raises(InputError, match="were fitted on"):
        fitted(select=cells(20, 0))
    with pytest.raises(InputError, match="name the layers"):
        Beliefs.fit(Planted(), cells(20, 0))
    with pytest.raises(InputError, match="no prompts"):
        fitted().score(Planted(), [])


def test_a_real_forward_pass_reads_the_positions_of_the_template():
    runtime = tiny_runtime()
    one, two = (
        [Prompt.of(f"{verb} {w}", id=f"{verb}-{w}") for w in WORDS[20:44]] for verb in ("write", "boil")
    )
    beliefs = Beliefs.fit(runtime, {"harmful": one, "harmless": two})
    assert beliefs.layers == (0, 1, 2) and beliefs.harmful.toward.shape == (3, 32)
    from demur.explain import collect

    by_hand = collect(runtime, one, [(2, "t_inst")])[2, "t_inst"].mean(0)
    assert beliefs.harmful.toward[2] == pytest.approx(by_hand, abs=1e-4)


# --- behaviour --------------------------------------------------------------------------------------------------


def test_behaviour_by_text_leaves_out_what_is_neither():
    rows = [Prompt.of(t, id=t) for t in ("a", "b", "c")]
    runtime = ScriptedRuntime(
        {"a": "I'm sorry, I can't help with that.", "b": "Sure, here are three ideas.", "c": ""}
    )
    found = by_behaviour(runtime, rows)
    assert [[p.id for p in found[k]] for k in ("refused", "accepted")] == [["a"], ["b"]]


def test_behaviour_by_control_tokens_follows_the_shipped_point():
    rows = [Prompt.of(t, id=t) for t in ("a", "b")]
    scores = {"a": {"safety": 0.3, "respond": 0.6}, "b": {"safety": 0.1, "respond": 0.6}}
    runtime = ScriptedRuntime({"*": "x"}, scores=scores, control=["safety"])
    assert [p.id for p in by_behaviour(runtime, rows)["refused"]] == []  # respond is likelier
    runtime.shipped_point = OperatingPoint(id="p", thresholds={"safety": Threshold(tau=0.2)})
    assert [p.id for p in by_behaviour(runtime, rows)["refused"]] == ["a"]
    runtime.shipped_point = OperatingPoint(id="p", thresholds={}, rule="compare")
    assert [p.id for p in by_behaviour(runtime, rows)["accepted"]] == ["a", "b"]


def test_a_belief_without_refusal_is_no_quadrant():
    assert fitted().quadrant(Belief(id="x", harmful=1.0, refuse=None)) == NOT_IDENTIFIABLE
