"""The check of math-false-positives: its world has the effects and the silence it needs, and the labels recount."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest

from demur import data
from demur.errors import DataUnavailable, InputError
from demur.replicate import math_false_positives as mfp
from demur.replicate.math_labels import LINES
from demur.replicate.spec import Anchor, find


@pytest.fixture(scope="module")
def drawn() -> mfp.World:
    return mfp.world(np.random.default_rng(0), problems=400)


def test_the_spec_is_found_and_complete() -> None:
    found = find("math-false-positives")
    assert found.spec is mfp.SPEC
    assert {"measure/math_false_positives/scaling.py", "measure/math_false_positives/detectors.py"} <= set(
        found.sources
    )
    assert set(mfp.recount()) == {a.key for a in mfp.SPEC.anchors}


def test_answers_outrun_reasoning_as_samples_grow(drawn: mfp.World) -> None:
    few, many = (mfp.gaps(drawn, n) for n in (4, 64))
    assert (few >= 0).all() and (many >= 0).all()
    assert many.mean() - few.mean() > 0.06


def test_no_gap_where_right_means_valid() -> None:
    honest = mfp.world(np.random.default_rng(1), luck=False, problems=100)
    assert (honest.correct == honest.valid).all() and honest.correct.any()
    assert mfp.gaps(honest, 64).max() == 0


def test_a_verifier_that_sees_validity_removes_false_positives_and_a_dealt_one_does_not(
    drawn: mfp.World,
) -> None:
    rng = np.random.default_rng(2)
    usual, seeing = mfp.chosen(drawn, mfp.WEAK, 64), mfp.chosen(drawn, mfp.SEEING, 64)
    fall = mfp.fp_difference(usual, seeing)
    assert fall.value is not None and fall.se is not None and fall.value > 0.08 > 4 * fall.se
    within = mfp.fp_difference(mfp.random_right(drawn, seeing), seeing)
    anew = mfp._dealt_anew(drawn, rng)
    assert (anew.sum(axis=1) == drawn.valid.sum(axis=1)).all() and not (anew & ~drawn.correct).any()
    blind = mfp.chosen(drawn, mfp.SEEING, 64, anew)
    silent = mfp.fp_difference(mfp.random_right(drawn, blind), blind)
    assert silent.value is not None and within.value is not None
    assert abs(silent.value) < 0.03 < within.value


def test_fp_difference_by_hand() -> None:
    a = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    b = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert mfp.fp_difference(a, b).value == pytest.approx(1 / 3)
    again = mfp.fp_difference(a, a)
    assert again.value == 0 and again.se == 0


def test_coverage_of_both_intervals() -> None:
    ours, naive = mfp.coverage(np.random.default_rng(0), 300)
    assert 0.9 < np.mean(ours) < 0.99
    assert np.mean(naive) < 0.4


def needed(anchor: Anchor) -> None:
    for need in anchor.needs:
        try:
            data.get(*need.split("/"))
        except (DataUnavailable, InputError) as e:
            pytest.skip(f"{need} is not here: {e}")


@pytest.mark.parametrize("line", [x for x in LINES if x[0].key != "graded_right"], ids=lambda x: x[0].key)
def test_the_released_labels_give_the_published_numbers(line: tuple[Anchor, Callable[[], float]]) -> None:
    anchor, value = line
    needed(anchor)
    assert value() == pytest.approx(anchor.expected, abs=1e-12)


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (extra math)"
)
def test_our_grader_accepts_what_upstream_accepted() -> None:
    anchor, value = next(x for x in LINES if x[0].key == "graded_right")
    needed(anchor)
    assert value() == anchor.expected
