"""Resampling with a verifier: closed forms, exact expectations, limit cases, and the command."""

from __future__ import annotations

import itertools
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demur.cli import main
from demur.errors import InputError
from demur.measure.inference_scaling import Costs, InferenceScaling, TaskTypes, read_verdicts, two_types
from demur.measure.inference_scaling.closed_form import play, sign_changes
from demur.measure.inference_scaling.plot import drawing
from demur.measure.inference_scaling.table import (
    Verdicts,
    budgets,
    choose,
    line,
    mean_over,
    ratio_over,
    resamples,
    sample_verdicts,
)
from demur.report.render import to_json, to_text

DEMO = TaskTypes([0.58, 0.42], [0.87, 0.13], soundness=0.75)


def table(*counts: tuple[int, int, int, int]) -> Verdicts:
    """Verdicts from (n, correct, accepted, both) per task."""
    names = tuple(f"t{i}" for i in range(len(counts)))
    return Verdicts(names, *np.array(counts, np.int64).T)


# --- closed forms ------------------------------------------------------------------------------------------------


def test_the_demonstration_by_hand() -> None:
    np.testing.assert_allclose(DEMO.accept_right, [0.87, 0.13])
    np.testing.assert_allclose(DEMO.accept_wrong, [0.0325, 0.2175])
    np.testing.assert_allclose(DEMO.reject, [0.0975, 0.6525])
    got = DEMO.curve([0, 1, 2, np.inf], Costs(value=2, false=1, sample=0.1))
    right = [0, 0.5592, 0.5592 + 0.58 * 0.0975 * 0.87 + 0.42 * 0.6525 * 0.13]
    wrong = [0, 0.1102, 0.1102 + 0.58 * 0.0975 * 0.0325 + 0.42 * 0.6525 * 0.2175]
    samples = [0, 1, 1 + 0.58 * 0.0975 + 0.42 * 0.6525]
    np.testing.assert_allclose(got.right[:3], right)
    np.testing.assert_allclose(got.wrong[:3], wrong)
    np.testing.assert_allclose(got.samples[:3], samples)
    np.testing.assert_allclose(got.utility[2], 2 * right[2] - wrong[2] - 0.1 * samples[2])
    np.testing.assert_allclose(got.right + got.wrong + got.none, 1)
    assert (
        got.right[3]
        == pytest.approx(DEMO.ceiling)
        == pytest.approx(0.58 * 0.87 / 0.9025 + 0.42 * 0.13 / 0.3475)
    )
    np.testing.assert_allclose(got.samples[3], 0.58 / 0.9025 + 0.42 / 0.3475)


def test_marginal_gains_are_the_steps_of_the_utility() -> None:
    costs = Costs(false=1.3, sample=0.02)
    steps = np.diff(DEMO.curve(np.arange(12), costs).utility)
    np.testing.assert_allclose(DEMO.marginal(np.arange(1, 12), costs), steps)


def test_best_budgets_of_the_demonstration() -> None:
    assert [DEMO.best(Costs(false=x)).K for x in (0.7, 1, 2, 10)] == [3, 2, 1, 0]
    assert DEMO.best(Costs(false=10)).utility == 0


def test_unbounded_below_the_long_run_ratio_and_finite_above() -> None:
    rho = DEMO.long_run_ratio()
    assert rho == pytest.approx(0.13 / 0.2175)
    below, above = DEMO.best(Costs(false=rho * 0.999)), DEMO.best(Costs(false=rho * (1 + 1e-9)))
    assert below.K is None and below.utility == pytest.approx(DEMO.ceiling - rho * 0.999 * (1 - DEMO.ceiling))
    assert above.K is not None
    gain = DEMO.marginal([above.K, above.K + 1], Costs(false=rho * (1 + 1e-9)))
    assert gain[0] > 0 > gain[1], "the turn lies where utilities in floats no longer differ"
    assert DEMO.curve(below.enough, Costs(false=rho * 0.999)).utility[0] >= below.utility - 0.01


def test_best_equals_a_search_over_utilities() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        J = int(rng.integers(1, 6))
        types = TaskTypes(
            rng.dirichlet(np.ones(J)), rng.random(J), soundness=rng.random(J), completeness=rng.random(J)
        )
        costs = Costs(false=float(rng.exponential(2)), sample=float(rng.choice([0, 0.01, 0.1])))
        best, utility = types.best(costs), types.curve(np.arange(3000), costs).utility
        assert utility.max() <= best.utility + 1e-12
        if best.K is not None:
            assert utility[min(best.K, 2999)] == pytest.approx(utility.max(), abs=1e-12)
            assert best.utility == pytest.approx(types.curve(best.K, costs).utility[0])


def test_a_verifier_that_differs_by_type_can_turn_twice() -> None:
    # gains at first (easy tasks), loses (a type that is accepted wrongly), gains in the long run (slow, right)
    types = TaskTypes([0.4, 0.3, 0.3], [0.9, 0.1, 0.02], soundness=[1, 0.6, 1])
    costs = Costs(false=0.8)
    m = types.marginal(np.arange(1, 80), costs)
    assert m[0] > 0 and (m < 0).any() and m[-1] > 0
    best = types.best(costs)
    assert best.K is None and best.utility > types.curve(np.arange(1, 50), costs).utility.max()
    dear = types.best(Costs(false=3))
    assert dear.K == int(types.curve(np.arange(3000), Costs(false=3)).utility.argmax()) == 1


def test_sign_changes_are_all_found() -> None:
    # (z - 0.8)(z - 0.5)(z - 0.2) at z = exp(-x)
    weight, rate = np.array([-0.08, 0.66, -1.5, 1.0]), np.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(sign_changes(weight, rate), -np.log([0.8, 0.5, 0.2]), rtol=1e-9)


def test_limit_cases_of_a_model() -> None:
    perfect = TaskTypes([0.5, 0.3, 0.2], [0.5, 0.01, 0], soundness=1)
    assert perfect.ceiling == pytest.approx(0.8), "tasks that can be solved at all"
    assert perfect.curve(50).wrong[0] == 0
    assert perfect.best(Costs(false=1000)).K is None
    assert perfect.long_run_ratio() == perfect.first_ratio() == float("inf")
    finite = perfect.best(Costs(sample=0.01)).K
    assert finite is not None and finite >= 1, "attempts that cost something end it"
    hopeless = TaskTypes([1], [0], soundness=1)
    assert hopeless.best(Costs()).K == 0 and hopeless.long_run_ratio() is None and hopeless.ceiling == 0
    assert hopeless.curve([3, np.inf]).samples.tolist() == [3, np.inf]
    sure = TaskTypes([1], [1], soundness=0.5)
    assert sure.best(Costs(false=5)).K == 1 and sure.curve([0, 1]).right.tolist() == [0, 1]
    assert DEMO.best(Costs()).K is None, "what costs nothing is never too much"
    assert TaskTypes([1], [0.5], soundness=0).best(Costs(false=2)).K == 0


def test_one_average_type_shows_no_turn() -> None:
    one = TaskTypes([1], [DEMO.single], soundness=0.75)
    for ratio in np.linspace(0, 10, 60):
        assert one.best(Costs(false=float(ratio))).K in (None, 0)
    assert DEMO.best(Costs(false=1)).K == 2


def test_missing_right_answers_lower_the_ceiling_and_take_longer() -> None:
    strict = TaskTypes(DEMO.share, DEMO.correct, soundness=0.75, completeness=0.7)
    assert (strict.precision < DEMO.precision).all() and strict.ceiling < DEMO.ceiling
    assert strict.curve(np.inf).samples[0] > DEMO.curve(np.inf).samples[0]


def test_the_posterior_moves_to_the_hard_type() -> None:
    share = DEMO.posterior([1, 2, 30])
    np.testing.assert_allclose(share.sum(axis=1), 1)
    np.testing.assert_allclose(share[0], DEMO.share)
    np.testing.assert_allclose(share[1, 1], 0.42 * 0.6525 / (0.58 * 0.0975 + 0.42 * 0.6525))
    assert share[2, 1] > 0.999


def test_closed_forms_agree_with_play() -> None:
    types = TaskTypes([0.5, 0.3, 0.2], [0.8, 0.4, 0.05], soundness=0.8, completeness=0.85)
    n = 100_000
    for K in (1, 3, 10):
        got, want = play(types, K, n, np.random.default_rng(K)), types.curve(K)
        for seen, mean in ((got.right, want.right), (got.wrong, want.wrong), (got.attempts, want.samples)):
            assert abs(seen.mean() - mean[0]) <= 4 * seen.std() / np.sqrt(n) + 1e-12
        assert not (got.right & got.wrong).any() and got.attempts.max() == K


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.5, 0.5], [0.2, 1.2], 0.5, 1), "correct holds 1.2"),
        (([0.5, 0.5], [0.2, 0.3], -0.1, 1), "soundness holds -0.1"),
        (([0.5, 0.5], [0.2, 0.3], 0.5, float("nan")), "completeness holds nan"),
        (([0.5, 0.4], [0.2, 0.3], 0.5, 1), "sum to 0.9"),
        (([0.0, 1.0], [0.2, 0.3], 0.5, 1), "above 0"),
        (([1.0], [0.2, 0.3], 0.5, 1), "do not fit"),
        (([0.5, 0.5], [0.2, 0.3], [0.1, 0.2, 0.3], 1), "do not fit"),
    ],
)
def test_types_that_are_none(arguments: tuple[Any, ...], words: str) -> None:
    share, correct, soundness, completeness = arguments
    with pytest.raises(InputError, match=words):
        TaskTypes(share, correct, soundness=soundness, completeness=completeness)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ({"false": -1}, "V_f = 1"),
        ({"value": 0}, "more than 0"),
        ({"sample": -1}, "0 or more"),
        ({"false": float("nan")}, "finite"),
    ],
)
def test_costs_that_are_none(costs: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Costs(**costs)


@pytest.mark.parametrize("K", [-1, 1.5, float("nan")])
def test_budgets_that_are_none(K: float) -> None:
    with pytest.raises(InputError, match="whole number"):
        DEMO.curve(K)


# --- tables ------------------------------------------------------------------------------------------------------


def test_expectations_equal_the_mean_over_all_orders() -> None:
    samples = [
        (True, True),
        (True, False),
        (True, True),
        (False, False),
        (False, True),
    ]  # (accepted, correct)
    v = table((5, 3, 3, 2))
    orders = list(itertools.permutations(samples))
    got = v.outcomes()
    for K in range(6):
        first = [next(((i, c) for i, (a, c) in enumerate(o[:K]) if a), None) for o in orders]
        assert got.right[0, K] == pytest.approx(np.mean([f is not None and f[1] for f in first]))
        assert got.wrong[0, K] == pytest.approx(np.mean([f is not None and not f[1] for f in first]))
        assert got.none[0, K] == pytest.approx(np.mean([f is None for f in first]))
        assert got.samples[0, K] == pytest.approx(np.mean([K if f is None else f[0] + 1 for f in first]))


def test_expectations_are_unbiased_for_new_samples() -> None:
    rng = np.random.default_rng(5)
    v, _ = sample_verdicts(DEMO, rng.integers(10, 15, 40_000), rng)
    mean, want = v.outcomes(10).mean(Costs(false=1)), DEMO.curve(np.arange(11), Costs(false=1))
    for name in ("right", "wrong", "none", "utility"):
        np.testing.assert_allclose(getattr(mean, name), getattr(want, name), atol=0.012)
    np.testing.assert_allclose(mean.samples, want.samples, atol=0.04)


def test_a_budget_beyond_the_samples_is_an_error() -> None:
    v = table((5, 1, 1, 1), (3, 1, 1, 1))
    assert v.budget == 3 and v.outcomes().right.shape == (2, 4)
    with pytest.raises(InputError, match=r"budget of 4.*3 samples.*'t1'"):
        v.outcomes(4)


def test_reading_a_table() -> None:
    rows = [
        {"problem": "a", "i": "1", "ok": "true", "truth": "1"},
        {"problem": "a", "i": "2", "ok": "no", "truth": True},
        {"problem": 7, "i": "1", "ok": 1, "truth": 0},
    ]
    v = read_verdicts(rows, task="problem", sample="i", base="ok", plus="truth")
    assert v.tasks == ("a", "7")
    assert [x.tolist() for x in (v.n, v.correct, v.accepted, v.both)] == [[2, 1], [2, 0], [1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"task": "a", "accepted": 1}, r"line 2: nothing in column 'correct'"),
        ({"accepted": 1, "correct": 1}, r"line 2: nothing in column 'task'"),
        ({"task": "a", "accepted": 0.3, "correct": 1}, r"line 2: accepted=0.3 is neither"),
        ({"task": "a", "accepted": 2, "correct": 1}, r"neither yes nor no"),
        ({"task": "a", "accepted": "maybe", "correct": 1}, r"neither yes nor no"),
        ({"task": "a", "accepted": 1, "correct": ""}, r"nothing in column 'correct'"),
        (
            {"task": "a", "sample": 1, "accepted": 1, "correct": 1},
            r"line 2.*'a', sample '1' stands on line 1",
        ),
    ],
)
def test_rows_that_cannot_be_counted(row: dict[str, Any], words: str) -> None:
    good = {"task": "a", "sample": 1, "accepted": 1, "correct": 1}
    with pytest.raises(InputError, match=words):
        read_verdicts([good, row], sample="sample" if "sample" in row else None)


def test_no_rows() -> None:
    with pytest.raises(InputError, match="no rows"):
        read_verdicts([])


def test_the_two_type_fit() -> None:
    v = table((10, 8, 9, 8), (10, 6, 7, 6), (10, 1, 4, 1), (10, 0, 2, 0))
    types = two_types(v)
    np.testing.assert_allclose(types.correct, [0.7, 0.05])
    assert types.share.tolist() == [0.5, 0.5]
    # of 25 wrong samples 7 were accepted
    assert types.completeness[0] == 1 and types.soundness[0] == pytest.approx(1 - 7 / 25)
    B, P, G = 22 / 40, 15 / 40, (8 / 9 + 6 / 7 + 1 / 4 + 0) / 4
    published = two_types(v, published=True).soundness[0]
    assert published == pytest.approx((1 - B - P + G * B) / (1 - P))
    with pytest.raises(InputError, match="one type only"):
        two_types(v.take([0, 1]))
    with pytest.raises(InputError, match="one type only"):
        two_types(v.take([2, 3]))


def test_the_fit_finds_the_world() -> None:
    v, _ = sample_verdicts(DEMO, np.full(2000, 60), np.random.default_rng(1))
    types = two_types(v)
    np.testing.assert_allclose(types.correct, DEMO.correct, atol=0.01)
    np.testing.assert_allclose(types.soundness, 0.75, atol=0.01)
    assert types.best(Costs(false=1)).K == 2


def test_choosing_a_budget() -> None:
    utility = np.array([[0, 0.2, 0.5, 0.3], [0, 0.2, 0.3, 0.3], [0, 0.1, 0.4, 0.0], [0, 0.1, 0.2, 0.1]])
    got = choose(utility, list(resamples(4, 300, 0)))
    assert (got.K, got.open_ended, got.low, got.high, got.at_zero, got.at_end) == (2, False, 2, 2, 0, 0)
    assert got.utility.value == pytest.approx(0.35) == got.crossfit.value
    rising = choose(utility[:, :3], list(resamples(4, 300, 0)))
    assert (rising.K, rising.open_ended, rising.at_end) == (2, True, 1)
    flat = choose(np.array([[0, 0.4, 0.4, 0.4]] * 2), list(resamples(2, 100, 0)))
    assert (flat.K, flat.open_ended) == (1, True)
    losing = choose(-utility, list(resamples(4, 300, 0)))
    assert (losing.K, losing.open_ended, losing.utility.value, losing.at_zero) == (0, False, 0, 1)
    alone = choose(utility[:1], [])
    assert alone.K == 2 and alone.low is None and alone.crossfit.value is None


def test_crossfit_is_lower_where_the_choice_is_noise() -> None:
    rng = np.random.default_rng(2)
    noise = np.concatenate([np.full((60, 1), -9.0), rng.normal(size=(60, 40))], axis=1)
    got = choose(noise, list(resamples(60, 200, 0)))
    assert got.utility.value > 0.2 > abs(got.crossfit.value)


def test_intervals_over_tasks() -> None:
    x = np.random.default_rng(0).normal(size=400)
    weights = list(resamples(400, 2000, 0))
    got = mean_over(np.append(x[:-1], np.nan), weights)
    assert got.n == 399 and got.value == pytest.approx(x[:-1].mean())
    half = 1.96 * x.std() / 20
    assert got.low == pytest.approx(got.value - half, abs=0.02) and got.high == pytest.approx(
        got.value + half, abs=0.02
    )
    sure = mean_over(np.ones(20), weights)
    assert sure.high == 1 and sure.low == pytest.approx(0.839, abs=1e-3), "Wilson's for 20 of 20"
    assert mean_over(np.array([np.nan]), []).value is None
    assert ratio_over(np.array([0, 0]), np.array([50, 50]), []).high == pytest.approx(0.658, abs=1e-3)


def test_budgets_are_thinned_only_when_there_are_many() -> None:
    assert budgets(256).tolist() == list(range(257))
    many = budgets(5000)
    assert many[:65].tolist() == list(range(65)) and many[-1] == 5000 and len(many) < 200


def test_the_line_over_models() -> None:
    x, y = [0.1, 0.4, 0.5, 0.9], [0.6, 0.8, 0.7, 0.95]
    got = line(x, y)
    assert got.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    np.testing.assert_allclose([got.slope, got.intercept], np.polyfit(x, y, 1))
    with pytest.raises(InputError, match="three models"):
        line([0.1, 0.2], [0.1, 0.2])


# --- reports -----------------------------------------------------------------------------------------------------


def notes(v: Verdicts, **costs: float) -> str:
    return " ".join(InferenceScaling(costs=Costs(**costs), n_boot=100).score(v).notes)


def test_the_report_of_a_table() -> None:
    v, _ = sample_verdicts(DEMO, np.full(200, 50), np.random.default_rng(3))
    report = InferenceScaling(costs=Costs(false=1), target=0.99, n_boot=400).score(v)
    reach, best = report.values["reach"], report.values["best"]
    assert reach["ceiling"]["low"] < DEMO.ceiling < reach["ceiling"]["high"]
    assert reach["false_discovery"]["value"] == pytest.approx(1 - reach["ceiling"]["value"])
    assert (
        reach["soundness"]["low"] < 0.75 < reach["soundness"]["high"] and reach["completeness"]["value"] == 1
    )
    assert best["low"] <= 2 <= best["high"] and not best["open_ended"]
    curve = report.values["curve"]
    assert curve["utility_low"][2] < curve["utility"][2] < curve["utility_high"][2]
    text = to_text(report)
    assert "no number of attempts" in text and "out of reach" in text and "Stop after" in text
    json.loads(to_json(report))


def test_tasks_never_accepted_bound_the_ceiling() -> None:
    v = table((10, 5, 8, 4), (10, 0, 0, 0), (10, 10, 10, 10), (10, 2, 0, 0))
    reach = InferenceScaling(n_boot=100).score(v).values["reach"]
    assert [reach[k]["value"] for k in ("ceiling", "worst_case", "best_case")] == [0.75, 0.375, 0.875]
    assert "2 of 4 tasks never had an accepted sample" in notes(v)
    assert "In 2 of 4 tasks more samples are correct than accepted" not in notes(v)
    assert "In 1 of 4 tasks" in notes(v)


def test_a_target_within_the_interval_is_not_called_out_of_reach() -> None:
    v = table(*[(10, 5, 10, 5), (10, 9, 10, 9)] * 10)  # ceiling 0.7, about 0.61 to 0.79
    said = {t: " ".join(InferenceScaling(target=t, n_boot=400).score(v).notes) for t in (0.65, 0.75, 0.95)}
    assert "does not lie below" in said[0.65] and "not with certainty" in said[0.75]
    assert "out of reach" in said[0.95] and "out of reach" not in said[0.75]


def test_limit_cases_of_a_table() -> None:
    perfect = table(*[(20, k, k, k) for k in (3, 8, 15, 20)] * 10)
    said = notes(perfect, false=5)
    assert "No wrong answer was accepted" in said and "K* is unbounded" in said and "WARNING" not in said
    assert "K* is unbounded" in notes(table((5, 2, 3, 2), (5, 4, 4, 4))), "nothing costs anything"
    one = notes(table((30, 10, 15, 10)), false=1)
    assert "One task only" in one
    assert "one sample only" in notes(table((1, 1, 1, 1), (1, 0, 1, 0)), false=0.5)
    assert "every budget loses" in notes(table((9, 2, 6, 2), (9, 3, 7, 3)), false=3)
    assert "accepted no sample" in notes(table((9, 2, 0, 0), (9, 3, 0, 0)))
    assert "curves stop at 4" in notes(table((9, 2, 3, 2), (4, 3, 3, 3)))
    for v in (perfect, table((30, 10, 15, 10)), table((1, 1, 1, 1)), table((9, 2, 0, 0))):
        report = InferenceScaling(n_boot=100).score(v)
        assert "nan" not in to_text(report) and json.loads(to_json(report))


def test_the_report_of_a_model() -> None:
    report = InferenceScaling(costs=Costs(false=0.1), target=0.9).expect(DEMO)
    assert report.values["best"]["K"] is None and report.values["best"]["unbounded"]
    said = " ".join(report.notes)
    assert "above 0.716" in said and "out of reach" in said and "unbounded" in said and "rho* = 0.598" in said
    assert InferenceScaling(costs=Costs(false=1)).expect(DEMO).values["best"]["K"] == 2
    perfect = InferenceScaling().expect(TaskTypes([0.7, 0.3], [0.5, 0], soundness=1))
    assert "rises to 0.700" in " ".join(perfect.notes) and perfect.values["long_run_ratio"] == "infinite"


def test_models_side_by_side() -> None:
    rng = np.random.default_rng(0)
    models = {
        name: sample_verdicts(TaskTypes([0.5, 0.5], r, soundness=0.7), np.full(150, 40), rng)[0]
        for name, r in {"strong": (0.99, 0.9), "middle": (0.99, 0.8), "weak": (0.6, 0.05)}.items()
    }
    report = InferenceScaling(n_boot=200).compare(models)
    assert report.values["line"]["n"] == 3 and report.values["line"]["slope"] > 0
    assert any(n.startswith("weak: WARNING") and "out of reach" in n for n in report.notes)
    assert not any("out of reach" in n for n in report.notes if n.startswith("middle"))
    with pytest.raises(InputError, match="no accuracy"):
        InferenceScaling(target=1.5)


def test_the_drawing() -> None:
    v, _ = sample_verdicts(DEMO, np.full(30, 12), np.random.default_rng(3))
    report = InferenceScaling(costs=Costs(false=1), n_boot=100).score(v)
    svg = drawing(report)
    ET.fromstring(svg)
    assert "K* =" in svg and "<script" not in svg and "--refuse:" in svg and "#0102" not in svg
    assert "--refuse:" not in drawing(report, alone=False)
    assert "K* =" not in drawing(InferenceScaling().expect(DEMO))
    with pytest.raises(InputError, match="nothing to draw"):
        drawing(InferenceScaling(n_boot=100).score(table((1, 1, 1, 1), (1, 0, 0, 0))))


# --- the command -------------------------------------------------------------------------------------------------

Lab = Callable[..., SimpleNamespace]
ROWS = "task,sample,accepted,correct\n" + "".join(
    f"t{t},{i},{int(i % 3 > 0)},{int(i % 3 == 1 or (t % 2 == 0 and i % 3 == 2))}\n"
    for t in range(6)
    for i in range(9)
)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    def run(*args: str | Path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["demur", "lab", "inference-scaling-flaws", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        seen = capsys.readouterr()
        return SimpleNamespace(code=exited.value.code or 0, out=seen.out, err=seen.err)

    return run


def test_a_table_at_the_command_line(lab: Lab, tmp_path: Path) -> None:
    file, out = tmp_path / "s.csv", tmp_path / "out"
    file.write_text(ROWS)
    done = lab(file, "--cost-false", "1", "--out", out)
    assert done.code == 0, done.err
    assert "What it can reach" in done.out and "Traceback" not in done.err
    assert sorted(p.name for p in out.iterdir()) == ["curve.csv", "curve.svg", "report.json", "report.md"]
    assert "nan" not in (out / "curve.csv").read_text()
    values = json.loads(lab(file, "--cost-false", "1", "--json").out)["values"]
    # even tasks: all six accepted are correct; odd ones: three of six
    assert values["reach"]["ceiling"]["value"] == pytest.approx(0.75)
    assert values["curve"]["right"][1] == pytest.approx((6 / 9 + 3 / 9) / 2)


def test_jsonl_and_other_columns(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps({"q": t, "ok": True, "gold": t > 0}) + "\n" for t in (0, 0, 1, 1)))
    done = lab(file, "--task", "q", "--base", "ok", "--plus", "gold", "--json")
    assert json.loads(done.out)["values"]["reach"]["ceiling"]["value"] == 0.5


def test_several_models_at_the_command_line(lab: Lab, tmp_path: Path) -> None:
    head, *rows = ROWS.splitlines()
    file = tmp_path / "s.csv"
    file.write_text("\n".join([f"model,{head}", *(f"{m},{r}" for m in "ab" for r in rows)]))
    assert "by model" in lab(file, "--by", "model").out
    done = lab(file)
    assert done.code == 2 and "sample '0' stands on line 2 too" in done.err


def test_types_at_the_command_line(lab: Lab, tmp_path: Path) -> None:
    direct = lab(
        "--type", "0.58:0.87", "--type", "0.42:0.13", "--soundness", "0.75", "--cost-false", "0.7", "--json"
    )
    assert json.loads(direct.out)["values"]["best"]["K"] == 3
    file = tmp_path / "types.yaml"
    file.write_text(
        "soundness: 0.75\ntypes:\n  easy: {share: 0.58, correct: 0.87}\n  hard: {share: 0.42, correct: 0.13}\n"
    )
    assert (
        json.loads(lab(file, "--cost-false", "0.7", "--json").out)["values"]
        == json.loads(direct.out)["values"]
    )
    assert "easy" in lab(file).out
    file.write_text("types:\n  a: {share: 1, correct: 0.5, soundness: 1, completeness: 0.5}\n")
    assert "K* is unbounded" in lab(file).out


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("task,accepted\na,1\n", [], ["line 2", "'correct'"]),
        (ROWS, ["--base", "passed"], ["'passed'", "the row has task, sample"]),
        (ROWS.replace("t0,1,1,1", "t0,1,0.7,1"), [], ["line 3", "neither yes nor no"]),
        (ROWS, ["--cost-false", "-2"], ["V_f = 2"]),
        (ROWS, ["--value", "0"], ["value=0"]),
        (ROWS, ["--target", "85"], ["target=85"]),
        (ROWS, ["--min-samples", "50"], ["none of 6 tasks"]),
        (ROWS, ["--soundness", "0.5"], ["give one of them"]),
        (ROWS, ["--by", "model"], ["'model'", "--by"]),
        (ROWS, ["--sample", "draw"], ["'draw'"]),
        ("task,accepted,correct\n", [], ["no rows"]),
    ],
)
def test_bad_input_at_the_command_line(
    lab: Lab, tmp_path: Path, text: str, arguments: list[str], words: list[str]
) -> None:
    file = tmp_path / "s.csv"
    file.write_text(text)
    done = lab(file, *arguments)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ")
    for word in words:
        assert word in done.err, done.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("types:\n  a: {share: 1, correct: 1.5}\nsoundness: 0.5\n", ["correct holds 1.5"]),
        ("types:\n  a: {share: 1, correct: 0.5}\n", ["soundness: None"]),
        ("types:\n  a: {share: 1, right: 0.5}\nsoundness: 1\n", ["right"]),
        ("- 1\n", ["no `types`"]),
        ("types: [", ["not YAML"]),
    ],
)
def test_bad_types_at_the_command_line(lab: Lab, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "types.yaml"
    file.write_text(text)
    done = lab(file)
    assert (done.code, done.out) == (2, "")
    for word in words:
        assert word in done.err, done.err


def test_nothing_and_half_a_model_at_the_command_line(lab: Lab) -> None:
    for arguments in (
        [],
        ["--type", "1:0.5"],
        ["--type", "1;0.5", "--soundness", "0.5"],
        ["--type", "1:2", "--soundness", "1"],
    ):
        done = lab(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert "--type" in done.err or "correct holds 2" in done.err
