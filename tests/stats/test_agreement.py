import warnings

import numpy as np
import pytest
from scipy import stats as reference

from demur.errors import InputError
from demur.stats import (
    WeakJudgeWarning,
    cohen_kappa,
    mcnemar,
    minimum_detectable_difference,
    paired_interval,
    rate,
    rogan_gladen,
    sensitivity_specificity,
)


def test_kappa_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o .7, p_e .5 * .6 + .5 * .4 = .5, kappa .4
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_undefined_cases():
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["y", "y"], ["y", "y"]) is None
    assert cohen_kappa("yn", "ny") == -1
    with pytest.raises(InputError, match="same items"):
        cohen_kappa("y", "yn")


def test_sensitivity_and_specificity():
    se, sp = sensitivity_specificity([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], judge="j")
    assert (se.k, se.n, sp.k, sp.n, se.judge) == (2, 3, 1, 2, "j")
    se, _ = sensitivity_specificity([1], [0])
    assert se.value is None


def test_rogan_gladen_by_hand_and_clipped():
    assert rogan_gladen(rate(50, 100), 0.9, 0.8).corrected == pytest.approx(0.3 / 0.7)
    assert rogan_gladen(rate(8, 100), 0.9, 0.9).corrected == 0.0
    assert rogan_gladen(rate(92, 100), 0.9, 0.9).corrected == 1.0
    assert rogan_gladen(rate(0, 0), 0.9, 0.9).corrected is None


def test_a_perfect_known_judge_changes_nothing():
    r = rogan_gladen(rate(30, 200), 1.0, 1.0)
    assert r.corrected == pytest.approx(0.15)
    assert r.corrected_interval == pytest.approx((rate(30, 200).low, rate(30, 200).high), abs=0.01)


def test_judge_uncertainty_widens_the_interval():
    known = rogan_gladen(rate(300, 1000), 0.9, 0.9).corrected_interval
    measured = rogan_gladen(rate(300, 1000), rate(45, 50), rate(45, 50)).corrected_interval
    assert measured[1] - measured[0] > 1.3 * (known[1] - known[0])


def test_corrected_interval_covers_the_truth():
    # truth .3, Se .85, Sp .9; the judge is measured on 100 + 100 items, the rate on 300
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(300):
        seen = rate(int(rng.binomial(300, 0.3 * 0.85 + 0.7 * 0.1)), 300)
        se, sp = rate(int(rng.binomial(100, 0.85)), 100), rate(int(rng.binomial(100, 0.9)), 100)
        low, high = rogan_gladen(seen, se, sp, draws=2000, seed=i).corrected_interval
        inside += low <= 0.3 <= high
    assert 0.91 <= inside / 300 <= 0.985


def test_corrected_rates_lie_within_their_interval_and_never_claim_certainty():
    for k in (0, 100):
        r = rogan_gladen(rate(k, 100), 1.0, 1.0)
        assert r.corrected == k / 100 and r.corrected_interval[0] <= k / 100 <= r.corrected_interval[1]
    # false alarms on 10 % of the negatives, yet none in 50: the judge errs otherwise here
    r = rogan_gladen(rate(0, 50), rate(50, 50), rate(45, 50))
    assert r.corrected is None and r.corrected_interval is None


def test_weak_judges_warn_and_useless_ones_correct_nothing():
    with pytest.warns(WeakJudgeWarning, match="says little"):
        weak = rogan_gladen(rate(50, 100), rate(11, 20), rate(12, 20))
    assert weak.corrected_interval == (0.0, 1.0)
    with pytest.warns(WeakJudgeWarning):
        assert rogan_gladen(rate(50, 100), 0.5, 0.5).corrected is None
    with pytest.raises(InputError, match="sensitivity"):
        rogan_gladen(rate(1, 2), 1.2, 0.9)


@pytest.mark.parametrize(("b", "c"), [(0, 4), (3, 9), (10, 10), (1, 0)])
def test_mcnemar_is_the_sign_test_on_discordant_items(b, c):
    a_only, b_only = [(1, 0)] * b, [(0, 1)] * c
    x, y = zip(*a_only, *b_only, (1, 1), (0, 0), strict=True)
    got = mcnemar(x, y)
    assert got.p_value == pytest.approx(reference.binomtest(min(b, c), b + c).pvalue)
    assert got.difference == pytest.approx((c - b) / (b + c + 2))
    assert (got.only_a, got.only_b) == (b, c)


def test_mcnemar_without_discordant_items_or_without_items():
    same = mcnemar([1, 0], [1, 0])
    assert same.p_value == 1 and same.detectable is None
    none = mcnemar([], [])
    assert none.difference is None and none.interval is None
    with pytest.raises(InputError, match="same items"):
        mcnemar([1], [1, 0])


def test_one_number_has_no_spread():
    assert paired_interval([0.2], [0.5]) is None
    assert paired_interval([0.2, 0.3], [0.5, 0.4], clusters=["a", "a"]) is None
    assert paired_interval([0], [1]) is not None  # a yes/no outcome has Wilson's


def test_paired_interval_matches_the_normal_one_and_clusters_widen_it():
    rng = np.random.default_rng(0)
    a, b = rng.random(500), rng.random(500) + 0.1
    d = b - a
    half = 1.96 * d.std() / np.sqrt(500)
    assert paired_interval(a, b) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.006)
    wide = paired_interval(np.repeat(a, 4), np.repeat(b, 4), clusters=np.repeat(np.arange(500), 4))
    assert wide == pytest.approx(paired_interval(a, b), abs=0.006)


@pytest.mark.parametrize(("a", "b", "difference"), [(0, 0, 0.0), (1, 1, 0.0), (0, 1, 1.0), (1, 0, -1.0)])
def test_paired_outcomes_that_change_alike_keep_a_width(a, b, difference):
    room = 1.959963984540054**2 / (20 + 1.959963984540054**2)  # Wilson's upper end of 0 in 20
    low, high = mcnemar([a] * 20, [b] * 20).interval
    want = max(difference - room, -1), min(difference + room, 1)
    assert (low, high) == pytest.approx(want)
    # 60 answers to 20 prompts say no more than 20 do
    assert paired_interval([a] * 60, [b] * 60, clusters=np.arange(60) // 3) == pytest.approx(want)


def test_minimum_detectable_difference_solves_its_equation_and_has_its_power():
    n, psi = 300, 0.2
    d = minimum_detectable_difference(n, psi)
    z, zp = 1.959964, 0.8416212
    assert d * np.sqrt(n) == pytest.approx(z * np.sqrt(psi) + zp * np.sqrt(psi - d**2), abs=1e-4)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(600):
        kinds = rng.multinomial(n, [(psi - d) / 2, (psi + d) / 2, 1 - psi])
        found += abs(kinds[1] - kinds[0]) / np.sqrt(kinds[0] + kinds[1]) > z
    assert found / 600 == pytest.approx(0.8, abs=0.06)
    assert minimum_detectable_difference(5, 0.05) is None
    with pytest.raises(InputError, match="share"):
        minimum_detectable_difference(10, 0)


def test_no_warning_for_a_good_judge():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rogan_gladen(rate(5, 10), 0.95, 0.95).value == pytest.approx(0.5)
