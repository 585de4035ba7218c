"""Corrections by people's labels: hand calculations, the published formula, and coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest

from demur.errors import InputError
from demur.measure.paired import score_interval
from demur.stats import corrected_change, from_cells, labels_needed, prediction_powered, rate, rogan_gladen

RUNS = 1000


def covered(found: float) -> bool:
    return 0.93 <= found <= 0.97


# --- prediction-powered ---


def test_prediction_powered_by_hand() -> None:
    judged = [1] * 60 + [0] * 40
    r = prediction_powered(judged, [1] * 6 + [0] * 4, [1, 1, 1, 1, 1, 0, 1, 0, 0, 0], judge="j")
    # people say yes to 5 of 6 that the judge calls yes, and to 1 of 4 others
    assert r.corrected == pytest.approx(0.6 * 5 / 6 + 0.4 * 1 / 4)
    assert (r.k, r.n, r.judge) == (60, 100, "j")
    assert r.corrected_interval is not None and r.corrected_interval[0] < 0.6 < r.corrected_interval[1]


def test_prediction_powered_is_ppi_plus_plus() -> None:
    rng = np.random.default_rng(0)
    f = rng.random(900) < 0.4
    y = np.where(rng.random(900) < 0.15, ~f, f)
    n, other = 120, 780
    mine = prediction_powered(f, f[:n], y[:n]).corrected
    # Angelopoulos, Duchi, Zrnic 2023: labelled and other answers apart, lambda = cov / ((1 + n/N) var)
    slope = np.cov(y[:n], f[:n], bias=True)[0, 1] / ((1 + n / other) * f[:n].var())
    assert mine == pytest.approx(y[:n].mean() + slope * (f[n:].mean() - f[:n].mean()))


def test_a_judge_of_one_answer_leaves_the_labels_mean() -> None:
    r = prediction_powered([1] * 50, [1] * 10, [1, 0] * 5)
    assert r.corrected == pytest.approx(0.5) and r.value == 1


def test_labels_narrow_less_the_worse_the_judge() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(2000) < 0.4
    good, bad = (np.where(rng.random(2000) < wrong, ~y, y) for wrong in (0.05, 0.4))
    widths = [np.ptp(prediction_powered(f, f[:150], y[:150]).corrected_interval) for f in (good, bad)]
    assert widths[0] < 0.7 * widths[1]


def test_samples_of_one_prompt_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(rng.random(400) < 0.4, 5)
    f = np.where(np.repeat(rng.random(400) < 0.1, 5), ~y, y)
    of = np.repeat(np.arange(400), 5)
    alone = prediction_powered(f, f[:200], y[:200])
    together = prediction_powered(f, f[:200], y[:200], clusters=(of, of[:200]))
    assert together.corrected == alone.corrected
    assert np.ptp(together.corrected_interval) > 1.8 * np.ptp(alone.corrected_interval)


def test_nothing_labelled_and_what_does_not_fit() -> None:
    assert prediction_powered([1, 0], [], []).corrected is None
    with pytest.raises(InputError, match="same answers"):
        prediction_powered([1, 0], [1], [1, 0])
    with pytest.raises(InputError, match="clusters"):
        prediction_powered([1, 0], [1], [1], clusters=([1], [1]))


# --- cells ---


def test_cells_by_hand() -> None:
    # weights .6 (judge no), .3 (yes), .1 (not read); people say yes to .1, .9, .5 of them
    e = from_cells([600, 300, 100], [0, 1, np.nan], [2, 18, 5], [20, 20, 10])
    assert e.rate.value == pytest.approx(0.06 + 0.27 + 0.05)
    assert e.sensitivity.value == pytest.approx(0.27 / 0.33)  # read cells alone
    assert e.specificity.value == pytest.approx(0.54 / 0.57)
    observed, chance = 0.81 / 0.9, (0.3 * 0.33 + 0.6 * 0.57) / 0.81
    assert e.kappa.value == pytest.approx((observed - chance) / (1 - chance))


def test_equal_sampling_is_the_plain_estimate() -> None:
    cells = from_cells([600, 400], [0, 1], [1, 7], [12, 8])
    plain = prediction_powered([0] * 600 + [1] * 400, [0] * 12 + [1] * 8, [1] + [0] * 11 + [1] * 7 + [0])
    assert cells.rate.value == pytest.approx(plain.corrected)
    assert cells.rate.interval == pytest.approx(plain.corrected_interval, abs=0.01)


def test_undefined_and_perfect_and_unlabelled() -> None:
    none = from_cells([10, 10], [0, 0], [0, 0], [5, 5])
    assert none.sensitivity.value is None and none.sensitivity.interval is None and none.kappa.value is None
    perfect = from_cells([100, 100], [0, 1], [0, 30], [30, 30])
    assert perfect.sensitivity.value == 1 and perfect.sensitivity.interval[1] == 1
    assert perfect.kappa.value == 1 and perfect.kappa.interval[1] == 1
    blind = from_cells([100, 100], [0, 1], [0, 0], [30, 0])
    assert blind.rate.interval[1] - blind.rate.interval[0] > 0.4
    with pytest.raises(InputError, match="some cell a label"):
        from_cells([10], [0], [0], [0])
    with pytest.raises(InputError, match="shapes"):
        from_cells([10, 10], [0], [0], [1])


def test_labels_needed_give_the_width() -> None:
    size, says, share = np.array([6000, 4000]), [0, 1], np.array([0.1, 0.9])
    first = from_cells(size, says, share * 40, [40, 40])
    needed = labels_needed(first.spread, 10_000, 0.04)
    half = needed / 2
    low, high = from_cells(size, says, share * half, [half, half]).rate.interval
    assert high - low == pytest.approx(0.04, abs=0.003)
    assert labels_needed(first.spread, 300, 0.04) is None  # 300 answers cannot carry it
    with pytest.raises(InputError, match="width"):
        labels_needed(first.spread, 300, 5)


# --- coverage: a judge of known error, 1,000 runs each ---


def test_rogan_gladen_covers_where_the_raw_rate_does_not() -> None:
    truth, se, sp = 0.3, 0.85, 0.9
    rng = np.random.default_rng(1)
    inside = raw = 0
    for i in range(RUNS):
        seen = rate(int(rng.binomial(400, truth * se + (1 - truth) * (1 - sp))), 400)
        a, b = rate(int(rng.binomial(120, se)), 120), rate(int(rng.binomial(150, sp)), 150)
        low, high = rogan_gladen(seen, a, b, draws=1000, seed=i).corrected_interval
        inside += low <= truth <= high
        raw += seen.low <= truth <= seen.high
    assert covered(inside / RUNS) and raw / RUNS < 0.9


@pytest.mark.parametrize("truth", [0.08, 0.3])
def test_prediction_powered_covers_where_the_raw_rate_does_not(truth: float) -> None:
    rng = np.random.default_rng(2)
    inside = raw = 0
    for i in range(RUNS):
        y = rng.random(1500) < truth
        f = np.where(y, rng.random(1500) < 0.8, rng.random(1500) < 0.12)
        r = prediction_powered(f, f[:150], y[:150], draws=1000, seed=i)
        inside += r.corrected_interval[0] <= truth <= r.corrected_interval[1]
        raw += r.low <= truth <= r.high
    assert covered(inside / RUNS) and raw / RUNS < 0.9


def test_150_weighted_labels_cover_where_the_raw_rate_does_not() -> None:
    # two judges; cells no-no, yes-yes, first alone yes, second alone yes; disagreement drawn far more densely
    share, chance = np.array([0.6, 0.25, 0.1, 0.05]), np.array([0.03, 0.95, 0.35, 0.6])
    says, drawn = np.array([0, 1, 1, 0]), np.array([50, 30, 40, 30])
    yes, no = share * chance, share * (1 - chance)
    truth = {
        "rate": yes.sum(),
        "sensitivity": yes[says == 1].sum() / yes.sum(),
        "specificity": no[says == 0].sum() / no.sum(),
    }
    rng = np.random.default_rng(3)
    inside, raw, unweighted = dict.fromkeys(truth, 0), 0, 0
    for i in range(RUNS):
        size = rng.multinomial(2000, share)
        people = rng.binomial(size, chance)
        n = np.minimum(drawn, size)
        k = rng.hypergeometric(people, size - people, n)
        found = from_cells(size, says, k, n, draws=1000, seed=i)
        for name, true in truth.items():
            low, high = getattr(found, name).interval
            inside[name] += low <= true <= high
        seen, plain = rate(int(size[says == 1].sum()), 2000), rate(int(k.sum()), int(n.sum()))
        raw += seen.low <= truth["rate"] <= seen.high
        unweighted += plain.low <= truth["rate"] <= plain.high
    assert covered(inside["rate"] / RUNS) and raw / RUNS < 0.5 and unweighted / RUNS < 0.5
    assert all(0.91 <= inside[name] / RUNS <= 0.985 for name in truth), inside


# --- changes ---


def test_a_corrected_change_covers_where_the_raw_one_does_not() -> None:
    rng, n, labels = np.random.default_rng(5), 1200, 150
    se, sp, before, after = 0.7, 0.95, 0.2, 0.35
    raw = corrected = 0
    for _ in range(RUNS):
        chance = rng.random(n)  # the same prompts are hard for both runs
        said = [rng.random(n) < np.where(chance < share, se, 1 - sp) for share in (before, after)]
        gained, lost = int((said[1] & ~said[0]).sum()), int((said[0] & ~said[1]).sum())
        interval = score_interval(gained, lost, n)
        known = [rate(int(rng.binomial(labels, x)), labels) for x in (se, sp)]
        found = corrected_change((gained - lost) / n, interval, *known)
        assert found is not None
        raw += interval[0] <= after - before <= interval[1]
        corrected += found[1][0] <= after - before <= found[1][1]
    assert covered(corrected / RUNS) and raw / RUNS < 0.2


def test_a_corrected_change_of_nothing_is_nothing_and_a_coin_says_nothing() -> None:
    assert corrected_change(0.0, (-0.04, 0.04), 1.0, 1.0) == (
        0.0,
        (pytest.approx(-0.04, abs=2e-3), pytest.approx(0.04, abs=2e-3)),
    )
    assert corrected_change(0.2, (0.1, 0.3), 0.4, 0.6) is None
    assert corrected_change(0.2, (0.1, 0.3), rate(0, 0), 0.9) is None
    assert corrected_change(0.2, (0.1, 0.3), rate(6, 10), rate(6, 10)) == (1.0, (-1.0, 1.0))
