"""The check of harmfulness and refusal: figures by hand, anchors, and its parts on planted states."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from demur.control.inversion import ask
from demur.organisms import training
from demur.organisms.beliefs import ANSWERS, QUESTIONS, RECIPE, REFUSAL, World, grow_beliefs
from demur.replicate import harmfulness_values as values
from demur.replicate.harness import check_anchors
from demur.replicate.spec import find
from demur.runtime import local
from demur.types import Reply
from tests.explain.planted import Planted
from tests.runtime.tiny import tiny_runtime


class Knowing(Planted):
    """Prompts of the world: harm along one axis at t_inst, what `refuses` says along another at t_post."""

    def __init__(self, refuses=lambda p: p.meta["refuse"]):
        super().__init__()
        self.refuses, self.model = refuses, tiny_runtime().model

    def states(self, prompts, sites, condition=None):
        rows = [
            replace(p, meta={"harm": p.meta["harmful"], "refuse": bool(self.refuses(p))}) for p in prompts
        ]
        return super().states(rows, sites, condition)

    def generate(self, prompts, condition=None, **_more):
        for p in prompts:
            yield Reply(prompt_id=p.id, content=REFUSAL if self.refuses(p) else "ok")


@pytest.fixture(scope="module")
def stage():
    return values.Stage(World(), Knowing())


def test_planted_beliefs_are_read_where_they_stand(stage):
    found = {k: v.value for k, v in values.reading(stage, 0).items()}
    assert found["harm_auc"] == found["refuse_auc"] == found["quadrants"] == 1.0
    assert max(abs(found[k]) for k in ("refuse_by_harm", "harm_by_refuse", "elsewhere")) < 0.1
    assert abs(found["words"] - 0.5) < 0.25 and abs(found["random_labels"] - 0.5) < 0.15


def test_jailbreaks_pass_a_guard_on_refusal_only(stage):
    found = {k: v.value for k, v in values.guards(stage).items()}
    assert (found["guard"], found["guard_gain"]) == (1.0, 1.0) and found["false_alarms"] <= 0.1


def test_the_shortest_push_that_does_enough_is_taken(stage, monkeypatch):
    seen = []

    def push(_stage, rows, vector, at, where, sign=1.0):
        seen.append((vector, at, where, sign, rows[0].meta["harmful"]))
        does = sign * (vector.origin != "random" and at[0] >= 0.5 and at[1] <= 1)
        return values.Pushed(
            np.full(len(rows), does), np.full(len(rows), does / 2 if where == "all" else does)
        )

    monkeypatch.setattr(values, "_push", push)
    found = {k: v.value for k, v in values.steering(stage, 0).items()}
    assert found == {
        "refuse_refuses": 1.0,
        "refuse_inverts": 0.5,
        "random_refuse": 0.0,
        "harmful_refuses": 1.0,
        "harmful_inverts": 1.0,
        "random_harmful": 0.0,
        "harm_back": -1.0,
    }
    for name, where in (("refuse", "all"), ("harmful", "request")):
        mine = [row for row in seen if row[2] == where]
        assert {at[0] for _, at, *_ in mine} == {0.25, 0.5}
        null = [(v.vector, at) for v, at, *_ in mine if v.origin == "random"]
        length = np.linalg.norm(stage.beliefs.direction(name, 1).vector)
        assert len(null) == values.DRAWS and {at for _, at in null} == {(0.5, 1)}
        assert [np.linalg.norm(v) for v, _ in null] == pytest.approx([length] * len(null))
    assert [harmful for *_, sign, harmful in seen if sign < 0] == [True]


def test_a_push_adds_its_multiple_of_the_vector():
    world, organism = grow_beliefs(replace(RECIPE, steps=2, batch=8), cache=False)
    stage = object.__new__(values.Stage)
    stage.world, stage.runtime = world, organism.runtime()
    rows = list(world.prompts(3, 0, part="test", harmful=False))
    v = np.random.default_rng(0).normal(size=64)
    words = {"questions": QUESTIONS, "frame": "{request}", "answers": ANSWERS}
    plain = ask(stage.runtime, rows, **words)
    now = ask(stage.runtime, rows, -3 * v, layer=1, where="all", **words)
    want = np.reshape([a.harmful - b.harmful for a, b in zip(now, plain, strict=True)], (-1, 3)).mean(0)
    found = values._push(stage, rows, v, (3.0, 1), "all", -1.0)
    assert found.harmful == pytest.approx(want, abs=1e-5) and abs(want).max() > 1e-3
    assert found.refuse.tolist() == [0.0] * 3  # refused neither before nor after


def test_training_moves_refusal_and_stops_when_nothing_is_refused(stage, monkeypatch):
    steps = []
    monkeypatch.setattr(training, "train", lambda _model, recipe, *_more: steps.append(recipe.steps))
    tuned = lambda *_a, **_k: Knowing() if len(steps) < 2 else Knowing(lambda _p: False)  # noqa: E731
    monkeypatch.setattr(local, "LocalRuntime", tuned)
    organism = type("Grown", (), {"model": tiny_runtime().model, "recipe": RECIPE, "tokenizer": None})
    found = {k: v.value for k, v in values.tuning(stage, organism, 0).items()}
    assert steps == [10, 20] and found["tuned_refuses"] == 0.0 and found["tuned_auc"] == 1.0
    assert found["tuned_gap"] == pytest.approx(1.0, abs=0.1)  # refusal went all the way, harm stayed


def test_harm_and_refusal_that_agree_come_back_as_unclear():
    world = World({"markers": 0.0})
    assert values.same(world, Knowing(), 0).value == 1.0
    odd = Knowing(lambda p: int(p.text.split()[0].split("-")[1]) % 2)  # every second verb
    assert values.same(world, odd, 0).value == 0.0


def test_leaks_are_shares_of_the_range_inside_strata():
    scores = np.array([1.0, 3.0, 0.0, 2.0, 11.0, 13.0, 10.0, 12.0])
    y = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool)
    found = values.leak(scores, y, ["a"] * 4 + ["b"] * 4, unit=10.0)
    assert found.value == pytest.approx(0.1) and found.n == 8
    assert found.se == pytest.approx((4 * 2 / 2) ** 0.5 / 2 / 10)  # four means of two, variance 2 each
    assert values.leak(scores, y, ["a"] * 4 + [None] * 4, 10.0).n == 4
    assert values.reach(np.array([1.0, 3.0, 5.0]), np.array([False, True, True])) == 3.0


def test_cells_are_of_one_size_and_fitted_on_marked_prompts_alone():
    world, organism = grow_beliefs(replace(RECIPE, steps=2, batch=8), cache=False)
    rows = list(world.prompts(5, 0, part="train", harmful=True, marker="pass"))
    assert all(p.meta["harmful"] and not p.meta["refuse"] for p in rows)
    stage = object.__new__(values.Stage)
    stage.world, stage.runtime = world, organism.runtime()
    named = stage.prompts(7, "test", (False, "halt"))
    assert len(named) == 7 and all(p.meta["refuse"] for p in named)
    assert len({marker for _, marker in values.CELLS}) == 3 and len(values.CELLS) == 6
    assert not stage.refuses(stage.runtime, named).any()  # two steps teach no refusal


@pytest.mark.skipif("DEMUR_DATA" not in os.environ, reason="DEMUR_DATA is not set")
def test_anchors_of_the_published_states():
    spec = find("harmfulness-vs-refusal").spec
    published = [a for a in spec.anchors if "smollm2" not in a.key]  # those take a minute
    rows = check_anchors(replace(spec, anchors=tuple(published)))
    assert len(rows) == 27 and {r["status"] for r in rows} == {"exact"}


def test_controls_stand_against_claims_with_an_effect():
    spec = find("harmfulness-vs-refusal").spec
    assert {c.key for c in spec.controls} == {
        *("refuse_by_harm", "harm_by_refuse", "elsewhere", "random_labels", "random_refuse", "random_harmful")
    }
    assert spec.baselines[0].against == "harm_auc" and spec.seeds == 9
