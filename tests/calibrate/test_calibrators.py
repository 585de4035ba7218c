import dataclasses

import numpy as np
import pytest

from demur.calibrate import (
    BestF1,
    CalibrationWarning,
    LearnThenTest,
    TargetRate,
    check,
    cuts,
    decide,
    describe,
)
from demur.errors import InputError, UnsupportedClaim
from demur.files import dump_operating_point, load_operating_point

NAMES = ("safety", "humanizing", "respond")


def draw(seed=0, n_benign=150, n_refuse=60):
    """Two categories, benign mass on respond, plus general benign prompts without a category."""
    rng = np.random.default_rng(seed)
    P = np.concatenate(
        [
            rng.dirichlet([2, 0.3, 5], n_benign),
            rng.dirichlet([0.3, 2, 5], n_benign),
            rng.dirichlet([6, 0.3, 2], n_refuse),
            rng.dirichlet([0.3, 6, 2], n_refuse),
            rng.dirichlet([0.2, 0.2, 9], 50),
        ]
    )
    category = np.array(
        ["safety"] * n_benign
        + ["humanizing"] * n_benign
        + ["safety"] * n_refuse
        + ["humanizing"] * n_refuse
        + [None] * 50,
        dtype=object,
    )
    expected = np.zeros(len(P), bool)
    expected[2 * n_benign : 2 * n_benign + 2 * n_refuse] = True
    return P, expected, category


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.9])
def test_target_rate_takes_the_fewest_prompts_that_meet_it(rate):
    P, expected, category = draw()
    point = TargetRate(rate).fit(P, expected, category, names=NAMES)
    for t in point.thresholds.values():
        assert t.refusal_rate * t.n_refuse == pytest.approx(np.ceil(rate * t.n_refuse))
        assert t.bound is None
    assert point.guarantee is None and point.goal == f"refusal_rate={rate:g}"


def test_target_rate_with_ties_overshoots_and_records_it():
    p = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    point = TargetRate(0.4).fit(np.c_[p, 1 - p], [1, 1, 1, 1, 0], None, names=("refuse", "respond"))
    t = point.thresholds["refuse"]
    assert t.refusal_rate == 1.0 and t.tau == pytest.approx(0.3)


def test_target_rate_out_of_reach_names_what_is_in_reach():
    P = [[0.5, 0.1, 0.4], [0.1, 0.5, 0.4], [0.1, 0.1, 0.8]]
    with pytest.raises(UnsupportedClaim, match=r"safety at most 50\.0%"):
        TargetRate(0.9, steer=("safety",)).fit(P, [1, 1, 0], ["safety"] * 3, names=NAMES)
    assert TargetRate(0.5, steer=("safety",)).fit(P, [1, 1, 0], ["safety"] * 3, names=NAMES)


def brute_f1(p, y):
    best = (-1.0, 0.0)
    for tau in sorted({*p, 2.0}, reverse=True):
        hit = p >= tau
        tp, fp = (hit & y).sum(), (hit & ~y).sum()
        best = max(best, (2 * tp / (tp + fp + y.sum()), tau))
    return best[0]


def test_best_f1_equals_brute_force():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y = rng.random(40) < 0.5
        p = np.clip(np.round(rng.normal(0.4 + 0.2 * y, 0.2), 1), 0, 1)  # rounded: many ties
        point = BestF1().fit(np.c_[p, 1 - p], y, None, names=("refuse", "respond"))
        t = point.thresholds["refuse"]
        tp, fp = t.refusal_rate * t.n_refuse, t.benign_errors
        assert 2 * tp / (tp + fp + t.n_refuse) == pytest.approx(brute_f1(p, y))


@pytest.mark.parametrize("calibrator", [LearnThenTest(), TargetRate(0.8), BestF1(), BestF1(rule="bias")])
def test_counts_are_those_of_the_rule_and_the_file_keeps_them(calibrator, tmp_path):
    P, expected, category = draw()
    point = calibrator.fit(P, expected, category, names=NAMES, calibrated_on="set")
    again = calibrator.fit(P, expected, category, names=NAMES, calibrated_on="set")
    assert point == again
    got = decide(P, NAMES, cuts(point), point.rule)
    for column, name in enumerate(NAMES[:2]):
        t, mine = point.thresholds[name], (got == column) & (category == name)
        assert t.refusal_rate == pytest.approx(mine[expected].sum() / t.n_refuse)
        assert t.benign_errors == mine[~expected].sum()
    dump_operating_point(point, tmp_path / "point.yaml")
    assert load_operating_point(tmp_path / "point.yaml") == point


def test_general_prompts_count_only_where_there_are_no_look_alikes():
    P, expected, category = draw()
    point = BestF1().fit(P, expected, category, names=NAMES)
    assert point.thresholds["safety"].n_benign == 150
    only = expected | (category == None) | (category == "humanizing")  # noqa: E711
    with pytest.warns(CalibrationWarning):
        fallback = BestF1().fit(P[only], expected[only], category[only], names=NAMES)
    assert fallback.thresholds["safety"].n_benign == 50


def test_intervals_cluster_by_group():
    P, expected, category = draw()
    P, expected, category = np.repeat(P, 5, axis=0), np.repeat(expected, 5), np.repeat(category, 5)
    groups = np.repeat(np.arange(len(P) // 5), 5)
    wide = BestF1().fit(P, expected, category, groups, names=NAMES).thresholds["safety"].refusal_interval
    tight = BestF1().fit(P, expected, category, names=NAMES).thresholds["safety"].refusal_interval
    assert wide[1] - wide[0] > 1.7 * (tight[1] - tight[0])


def test_prompts_without_group_are_draws_of_their_own():
    P, expected, category = draw()

    def safety(group):
        point = BestF1(rule="threshold").fit(P, expected, category, group, names=NAMES)
        return point.thresholds["safety"]

    first, plain = safety([None] * len(P)), safety(list(range(len(P))))
    mixed = safety([None, "x"] * (len(P) // 2))
    assert first == plain and np.ptp(mixed.refusal_interval) > np.ptp(plain.refusal_interval)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expected": [True, False]}, "expected must be 3 booleans"),
        ({"expected": [True, None, False]}, "unknown"),
        ({"category": ["safety"] * 2}, "2 categories; every row needs"),
        ({"group": ["x"] * 2}, "2 groups; every row needs"),
        ({"category": ["safety", "saftey", "safety"]}, "row 1: category 'saftey' of a benign"),
        ({"category": [None, "safety", "safety"]}, "row 0: category '' of a should-refuse"),
        ({"category": None}, "single refuse token"),
        ({"scores": [[0.1, np.nan, 0.2]] * 3}, "row 0"),
        ({"category": ["safety", "humanizing", "safety"]}, "no should-refuse prompts for humanizing"),
    ],
)
def test_bad_input_is_explained(change, words):
    data = {"scores": [[0.5, 0.1, 0.4]] * 3, "expected": [True, False, False], "category": ["safety"] * 3}
    with pytest.raises(InputError, match=words):
        BestF1().fit(**{**data, **change}, names=NAMES)


def test_settings_are_checked():
    with pytest.raises(InputError, match="compare"):
        BestF1(rule="compare").fit([[0.5, 0.5]], [1], None, names=("refuse", "respond"))
    with pytest.raises(InputError, match="cannot steer weather"):
        BestF1(steer=("weather",)).fit([[0.5, 0.1, 0.4]], [1], ["safety"], names=NAMES)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        TargetRate(90)


def test_a_held_out_check_counts_and_judges_each_category():
    point = LearnThenTest(0.1, 0.1).fit(*draw(0), names=NAMES)
    P, expected, category = draw(1)
    report = check(point, P, expected, category, names=NAMES)
    got = decide(P, NAMES, cuts(point), point.rule)
    row = next(r for r in report.tables[0].rows if r[0] == "safety")
    assert (row[2].k, row[2].n) == (((got == 0) & expected & (category == "safety")).sum(), 60)
    assert (row[3].k, row[3].n) == (((got == 0) & ~expected & (category == "safety")).sum(), 150)
    assert row[5] in ("kept", "cannot tell")
    assert report.values["held_out"] is True and report.values["exceeded"] == []
    assert report.values["over_refusal"].n == 350 and report.values["refusal"].k == (got[expected] < 2).sum()


def test_a_check_on_the_calibration_data_says_so_and_a_loose_point_is_caught():
    data = draw(0)
    point = LearnThenTest(0.1, 0.1).fit(*data, names=NAMES)
    assert any("no held-out check" in n for n in check(point, *data, names=NAMES).notes)
    loose = dataclasses.replace(
        point,
        thresholds={k: dataclasses.replace(t, tau=0.05, bias=None) for k, t in point.thresholds.items()},
    )
    report = check(loose, *draw(1), names=NAMES)
    assert report.values["exceeded"] == ["safety", "humanizing"]


@pytest.mark.parametrize(
    ("errors", "outcome"), [(0, "kept"), (10, "cannot tell"), (13, "cannot tell"), (30, "exceeded")]
)
def test_outcomes_compare_the_interval_with_the_budget(errors, outcome):
    point = LearnThenTest(0.1, 0.1).fit(
        np.tile([[0.0, 1.0]], (100, 1)), [1] + [0] * 99, None, names=("r", "respond")
    )
    P = np.tile([[0.0, 1.0]], (101, 1))
    P[: errors + 1] = [0.9, 0.1]
    held = dataclasses.replace(point, thresholds={"r": dataclasses.replace(point.thresholds["r"], tau=0.5)})
    report = check(held, P, [1] + [0] * 100, None, names=("r", "respond"))
    assert report.tables[0].rows[0][5] == outcome and report.values["exceeded"] == ["r"] * (errors == 30)


def test_ordinary_prompts_are_checked_against_their_own_budget():
    P, expected, category = draw(0)
    point = LearnThenTest(0.1, 0.1, steer=("safety",)).fit(P, expected, category, names=NAMES)
    plain = np.array([[0.9, 0.0, 0.1]] * 30 + [[0.0, 0.9, 0.1]] * 30 + [[0.0, 0.0, 1.0]] * 40)
    data = (np.r_[P[:-50], plain], [*expected[:-50], *[0] * 100], [*category[:-50], *["general", None] * 50])
    row = check(point, *data, names=NAMES, ordinary_alpha=0.1).tables[0].rows[-1]
    # 30 open with the token of the steered category; the 30 of the other are the model's own choice
    assert (row[0], row[2], row[3].k, row[3].n, row[5]) == ("ordinary requests", None, 30, 100, "exceeded")
    assert check(point, *data, names=NAMES).values["outcomes"]["ordinary requests"] == "no budget"


def test_a_category_without_look_alikes_cannot_be_told():
    point = LearnThenTest(0.1, 0.1).fit(*draw(0), names=NAMES)
    P, expected, category = draw(1)
    without = expected | (category != "safety")
    none_general = without & (expected | (category == "humanizing"))
    for rows, n in ((without, 50), (none_general, 0)):
        report = check(point, P[rows], expected[rows], category[rows], names=NAMES)
        assert report.tables[0].rows[0][3].n == n and len(report.notes) == (n > 0)
        assert report.values["outcomes"]["safety"] == "cannot tell"


def test_describe_tells_n_errors_bound_and_wording():
    point = LearnThenTest(0.1, 0.1).fit(*draw(0), names=NAMES, calibrated_on="mine")
    report = describe(point)
    row = report.tables[0].rows[1]
    t = point.thresholds["safety"]
    assert row[0] == "safety" and row[1] == t.tau and row[5] == t.bound
    assert (row[4].k, row[4].n) == (t.benign_errors, t.n_benign) and row[3].value == pytest.approx(
        t.refusal_rate
    )
    assert "drawn like set mine" in report.notes[0] and len(report.notes) == 1
    assert "by the base" in describe(dataclasses.replace(point, answers="base")).notes[1]
    assert "Nothing is guaranteed" in describe(BestF1().fit(*draw(0), names=NAMES)).notes[0]
