"""The check of inference-scaling-flaws: its anchors to the digit, its claims and controls at full size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from demur.measure.inference_scaling.closed_form import Costs
from demur.measure.inference_scaling.table import sample_verdicts
from demur.replicate import harness
from demur.replicate.inference_scaling_flaws import SPEC, merged, notebook_utility, recount, turn, world

HERE = Path(os.environ.get("DEMUR_DATA", "")) / "inference-scaling-flaws"


@pytest.mark.parametrize("anchor", SPEC.anchors, ids=lambda a: a.key)
def test_anchors(anchor: object) -> None:
    a = next(x for x in SPEC.anchors if x is anchor)
    if a.needs and not ("DEMUR_DATA" in os.environ and HERE.is_dir()):
        pytest.skip("DEMUR_DATA does not hold inference-scaling-flaws")
    found = recount()[a.key]
    assert a.holds(found() if callable(found) else found)


def test_the_published_formula_differs_where_it_should() -> None:
    right, theirs = (notebook_utility(world(), 0.7, 10, notebook=n) for n in (False, True))
    np.testing.assert_allclose(right, world().curve(np.arange(11), Costs(false=0.7)).utility)
    assert theirs[1] == pytest.approx(right[1]) and theirs[3] > right[3] + 0.02


def test_a_turn_is_seen_where_there_is_one() -> None:
    costs, n = Costs(false=0.9), np.full(20_000, 32)
    truth = world().curve([1, 2, 32], costs).utility
    two, one = (
        np.mean(turn(sample_verdicts(types, n, np.random.default_rng(0))[0], costs, np.random.default_rng(1)))
        for types in (world(), merged(world()))
    )
    assert two == pytest.approx(truth[1] - max(truth[0], truth[2]), abs=0.006)
    assert abs(one) < 0.001


def test_the_check_is_reproduced(tmp_path: Path) -> None:
    result = harness.replicate("inference-scaling-flaws", seeds=3, out=tmp_path)
    assert result["outcome"] == "reproduced", result["reason"]
    assert all(b["status"] == "beaten" for b in result["baselines"])
