"""The check of the comparison: measures on untrained organisms, anchors of the shipped files, and the spec."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur.organisms import facts
from demur.organisms.base import grow
from demur.replicate import post_training_anchors as anchors
from demur.replicate import post_training_mechanistic as check
from demur.replicate.harness import check_anchors
from demur.replicate.summary import conclude

SLUG = "post-training-mechanistic"


@pytest.fixture(scope="module")
def untrained() -> dict[str, Any]:
    """Four organisms that have hardly been trained, so there is nothing to be found in them."""
    world = facts.World(seed=5)
    recipe = replace(facts.BASE, name="facts-bare", world={}, width=32, mlp=48, steps=2, batch=8)
    made = {}
    for i, kind in enumerate(facts.KINDS):
        made[kind] = grow(replace(recipe, seed=i), world.batches(kind), world.words, cache=False)
    return made


def test_untrained_organisms_show_nothing(untrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PERMUTED", 4)
    monkeypatch.setattr(check, "BITS", 30)
    world = facts.World(seed=5)
    runtimes = {k: o.runtime() for k, o in untrained.items()}
    out = check.measure_truth(runtimes, world, 0) | check.measure_refusal(runtimes, world, 0)
    assert abs(out["theta_cosine"].value) < 0.5 and out["truth_across"].value < 0.7
    assert out["refusal_add"].value == out["refusing_refuses"].value == 0.0
    out |= check.measure_maps(runtimes, world, 0)
    assert abs(out["map_format"].value) < 0.9 and abs(out["map_shuffled"].value) < 0.05
    assert out["map_drop"].se > 0
    wanted = set(check.SPEC.keys) - {k for k in check.SPEC.keys if k.startswith("neuron")}
    assert wanted <= set(out)


def test_neurons(untrained: dict[str, Any]) -> None:
    out = check.measure_entropy(untrained, facts.World(seed=5), 0)
    assert out["neuron_planted_found"].value == 1.0 and out["neuron_planted_argmax"].value == 0.0
    assert out["neuron_loud_argmax"].value > 0.1


def test_the_spec_fails_without_the_effects() -> None:
    keys = [c.key for c in check.SPEC.entry]
    nothing = {k: check.Value.of([0.0] * 24) for k in check.SPEC.keys} | {
        k: check.Value(value=1.0) for k in keys
    }
    said = conclude(check.SPEC, {0: nothing, 1: nothing, 2: nothing}, [])
    assert said["outcome"] == "not at this scale"
    assert all(row["status"] == "not met" for row in said["claims"])


def test_every_anchor_has_a_recount() -> None:
    assert {a.key for a in check.SPEC.anchors} == set(anchors.recount())


@pytest.mark.skipif(
    not (Path(os.environ.get("DEMUR_DATA", "-")) / SLUG).is_dir(),
    reason=f"DEMUR_DATA holds no {SLUG}",
)
def test_anchors_of_the_shipped_files() -> None:
    found = check_anchors(
        replace(check.SPEC, anchors=tuple(a for a in check.SPEC.anchors if "smollm2" not in a.key))
    )
    assert [row["key"] for row in found if row["status"] != "exact"] == []


def test_correlation_and_its_error() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 4, 5)) + 5 * rng.normal(size=(4, 5))
    same = check._correlation(a, a + 0.1 * rng.normal(size=a.shape))
    assert same.value > 0.99 and same.se < 0.01
    drop = check._correlation(a, a, a, -a)
    assert drop.value == pytest.approx(2.0)
