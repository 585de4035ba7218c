"""The check of harmfulness and refusal: figures by hand, anchors, and an untrained organism that shows nothing."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from demur.organisms.beliefs import RECIPE, grow_beliefs
from demur.replicate import harmfulness_values as values
from demur.replicate.harness import check_anchors
from demur.replicate.spec import find


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
    assert spec.baselines[0].against == "harm_auc" and spec.seeds == 5
