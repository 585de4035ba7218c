"""The guarantee, on worlds whose true false refusal rates are known."""

import numpy as np
import pytest
from scipy import stats as reference

from demur.calibrate import CalibrationWarning, LearnThenTest, decide, sample_size
from demur.calibrate.base import Choice, Slice, candidates, count_at_least
from demur.calibrate.learn_then_test import _group_risk, hoeffding_bentkus
from demur.errors import InputError, UnsupportedClaim

NAMES = ("safety", "humanizing", "unsupported", "indeterminate", "incomplete", "respond")
ALPHA, DELTA = 0.05, 0.1
# Benign scores are Beta(1, b): the true false refusal rate at tau is (1 - tau) ** b.
SHAPES = (2.0, 3.0, 4.0, 6.0, 9.0)


def benign(rng, shape, n):
    return rng.beta(1, shape, n)


def world(rng, n_benign, n_refuse, confused=0.0):
    """Probability tables with scores on the row's own category, or on another one for a `confused` share."""
    rows, expected, category = [], [], []
    for c, shape in enumerate(SHAPES):
        # should-refuse scores lie everywhere, so that every step down gains a refusal and the budget binds
        scores = np.r_[benign(rng, shape, n_benign), np.linspace(0, 1, n_refuse)]
        P = np.zeros((len(scores), len(NAMES)))
        column = np.where(rng.random(len(scores)) < confused, (c + 1) % len(SHAPES), c)
        P[np.arange(len(scores)), column] = scores
        P[:, -1] = 1 - scores
        rows.append(P)
        expected += [False] * n_benign + [True] * n_refuse
        category += [NAMES[c]] * len(scores)
    return np.concatenate(rows), np.array(expected), np.array(category)


def joint_risks(point, share_own=1.0):
    """True false refusal rate of each category at its threshold."""
    return [
        share_own * (1 - min(point.thresholds[name].tau, 1.0)) ** shape
        for name, shape in zip(NAMES[:-1], SHAPES, strict=True)
    ]


class Uncorrected(LearnThenTest):
    """The same tests without the correction for five categories."""

    def choose(self, slices):
        return [self._choose(s, self.delta, self.alpha, candidates(s)) for s in slices]


class PlugIn(LearnThenTest):
    """Takes the observed rate for the true one."""

    def choose(self, slices):
        out = []
        for s in slices:
            taus = np.r_[1.01, np.unique(np.r_[s.benign, s.refuse])[::-1]]
            fits = taus[count_at_least(s.benign, taus) / s.benign.size <= self.alpha]
            out.append(Choice(float(fits.min())))
        return out


def simulate(calibrator, runs=300, n_benign=200, confused=0.0, seed=0):
    rng = np.random.default_rng(seed)
    risks = []
    for _ in range(runs):
        P, expected, category = world(rng, n_benign, 500, confused)
        risks.append(joint_risks(calibrator.fit(P, expected, category, names=NAMES), 1 - confused))
    return np.array(risks)


def most_violations(runs, delta):
    """More violations than this happen by chance in one run of the test in a thousand, if delta holds."""
    return reference.binom.ppf(0.999, runs, delta)


@pytest.mark.parametrize("n", [77, 200])
def test_the_guarantee_holds_jointly_over_five_categories_and_is_not_vacuous(n):
    runs = 300
    risks = simulate(LearnThenTest(ALPHA, DELTA, n_boot=10), runs, n)
    violations = int((risks > ALPHA).any(axis=1).sum())
    assert violations <= most_violations(runs, DELTA)
    # Not vacuous: k errors pass in each category, so the mean rate above the threshold is (k + 1) / (n + 1),
    # and delta is used up as far as whole numbers of errors allow.
    k = max(k for k in range(n) if reference.binom.cdf(k, n, ALPHA) <= DELTA / 5)
    assert risks.mean() == pytest.approx((k + 1) / (n + 1), rel=0.08)
    theory = 1 - (1 - reference.binom.cdf(k, n, ALPHA)) ** 5
    assert reference.binomtest(violations, runs, theory).pvalue > 0.001


def test_more_prompts_bring_the_rate_closer_to_the_budget():
    risks = simulate(LearnThenTest(ALPHA, DELTA, n_boot=10), runs=60, n_benign=2000)
    assert (risks > ALPHA).any(axis=1).sum() <= most_violations(60, DELTA)
    assert risks.mean() > 0.75 * ALPHA


@pytest.mark.parametrize("broken", [Uncorrected(ALPHA, DELTA, n_boot=10), PlugIn(ALPHA, DELTA, n_boot=10)])
def test_the_simulation_catches_broken_variants(broken):
    risks = simulate(broken, runs=100)
    assert (risks > ALPHA).any(axis=1).sum() > most_violations(100, DELTA)


def test_the_guarantee_holds_where_prompts_are_taken_for_another_category():
    risks = simulate(LearnThenTest(ALPHA, DELTA, n_boot=10), runs=300, confused=0.3, seed=1)
    assert (risks > ALPHA).any(axis=1).sum() <= most_violations(300, DELTA)


def test_the_guarantee_holds_on_a_fixed_grid():
    grid = tuple(np.linspace(0, 1, 101))
    risks = simulate(LearnThenTest(ALPHA, DELTA, taus=grid, n_boot=10), runs=200, seed=2)
    assert (risks > ALPHA).any(axis=1).sum() <= most_violations(200, DELTA)
    point = LearnThenTest(ALPHA, DELTA, taus=grid).fit(*world(np.random.default_rng(0), 200, 40), names=NAMES)
    assert all(t.tau in (*grid, 1.01) for t in point.thresholds.values())


def grouped(rng, n_groups, size):
    """One refuse token; the prompts of a group share one benign score."""
    score = np.repeat(benign(rng, 3.0, n_groups), size)
    everywhere = np.linspace(0, 1, 200)
    P = np.r_[np.c_[score, 1 - score], np.c_[everywhere, 1 - everywhere]]
    groups = np.r_[np.repeat(np.arange(n_groups), size), n_groups + np.arange(200)]
    return P, np.arange(len(P)) >= len(score), None, groups


def test_prompts_of_one_group_count_as_one_draw():
    rng = np.random.default_rng(0)
    aware, naive = [], []
    for _ in range(300):
        P, expected, category, groups = grouped(rng, 100, 8)
        for found, g in ((aware, groups), (naive, None)):
            point = LearnThenTest(ALPHA, DELTA, n_boot=10).fit(
                P, expected, category, g, names=("refuse", "respond")
            )
            found.append((1 - min(point.thresholds["refuse"].tau, 1)) ** 3.0)
    assert (np.array(aware) > ALPHA).sum() <= most_violations(300, DELTA)
    assert np.mean(aware) > 0.2 * ALPHA
    assert (np.array(naive) > ALPHA).sum() > most_violations(300, DELTA)


def test_groups_of_one_are_plain_prompts_and_the_bound_is_inverted():
    P, expected, category, groups = grouped(np.random.default_rng(1), 200, 1)
    plain = LearnThenTest().fit(P, expected, category, names=("refuse", "respond"))
    single = LearnThenTest().fit(P, expected, category, groups, names=("refuse", "respond"))
    assert plain.thresholds == single.thresholds and plain.guarantee == single.guarantee
    P, expected, category, groups = grouped(np.random.default_rng(1), 100, 3)
    point = LearnThenTest().fit(P, expected, category, groups, names=("refuse", "respond"))
    t = point.thresholds["refuse"]
    risk = t.benign_errors / t.n_benign
    assert t.bound <= 0.05 and "group" in point.guarantee
    assert float(hoeffding_bentkus(risk, 100, t.bound)) == pytest.approx(0.1, abs=1e-6)


def test_one_threshold_by_hand():
    # 100 benign at 0.01 ... 1.00; Bin(100, .05) has P(X <= 1) = .037 and P(X <= 2) = .118, so at delta = .1
    # one error passes (the benign 1.00): the threshold refuses 0.995, lies above 0.99 and leaves 0.985 alone
    b = np.arange(1, 101) / 100
    p = np.r_[b, [0.995, 0.985]]
    point = LearnThenTest(0.05, 0.1).fit(
        np.c_[p, 1 - p], [0] * 100 + [1] * 2, None, names=("refuse", "respond")
    )
    t = point.thresholds["refuse"]
    assert t.benign_errors == 1 and t.n_benign == 100 and t.tau == pytest.approx(0.9925)
    assert t.refusal_rate == 0.5
    assert t.bound == pytest.approx(reference.beta.ppf(0.9, 2, 99))


def test_ties_in_true_refusals_take_the_safest_threshold():
    p = np.r_[np.full(20, 0.9), np.full(60, 0.2)]
    point = LearnThenTest().fit(np.c_[p, 1 - p], [1] * 20 + [0] * 60, None, names=("refuse", "respond"))
    assert point.thresholds["refuse"].tau == pytest.approx(0.55)
    never = LearnThenTest().fit(np.c_[1 - p, p], [1] * 20 + [0] * 60, None, names=("refuse", "respond"))
    assert never.thresholds["refuse"].tau == 1.01 and never.thresholds["refuse"].refusal_rate == 0


def test_wording_and_fields():
    P, expected, category = world(np.random.default_rng(0), 100, 30)
    fit = LearnThenTest(0.05, 0.1).fit
    point = fit(P, expected, category, names=NAMES, calibrated_on="core/calibrate", T=1.5)
    assert point.guarantee == (
        "On prompts drawn like set core/calibrate, the share of look-alike benign prompts of category c "
        "answered with refuse_c is at most 0.05 with probability at least 0.9, jointly over safety, "
        "humanizing, unsupported, indeterminate, incomplete."
    )
    assert point.goal == "max_tpr_fpr<=0.05@delta=0.1"
    assert (point.alpha, point.delta, point.T) == (0.05, 0.1, 1.5)
    t = point.thresholds["safety"]
    assert t.n_benign == 100 and t.n_refuse == 30 and t.bound <= 0.05
    assert t.refusal_interval[0] <= t.refusal_rate <= t.refusal_interval[1]
    refused = decide(P, NAMES, {k: v.tau for k, v in point.thresholds.items()}) == 0
    own = ~expected & (category == "safety")
    assert t.benign_errors == (refused & own).sum()


@pytest.mark.parametrize("rule", ["total_mass", "bias"])
def test_other_rules_are_calibrated_for_their_own_score(rule):
    rng = np.random.default_rng(0)
    P = np.r_[rng.dirichlet([1, 1, 6], 400), rng.dirichlet([6, 1, 1], 60), rng.dirichlet([1, 6, 1], 60)]
    expected = np.arange(520) >= 400
    category = np.array(["a", "b"] * 200 + ["a"] * 60 + ["b"] * 60)
    point = LearnThenTest(0.05, 0.1, rule=rule).fit(P, expected, category, names=("a", "b", "respond"))
    got = decide(P, ("a", "b", "respond"), {k: v.tau for k, v in point.thresholds.items()}, rule)
    for column, name in enumerate("ab"):
        t = point.thresholds[name]
        assert t.benign_errors == ((got == column) & ~expected & (category == name)).sum()
        assert t.refusal_rate == ((got == column) & expected & (category == name)).sum() / 60 > 0.5
        assert (t.bias is not None) == (rule == "bias")


def test_too_few_prompts_are_told_how_many_would_do():
    P, expected, category = world(np.random.default_rng(0), 76, 20)
    with pytest.raises(UnsupportedClaim, match=r"at least 77 .* found 76 for safety"):
        LearnThenTest(0.05, 0.1).fit(P, expected, category, names=NAMES)
    one = LearnThenTest(0.05, 0.1, steer=("safety",)).fit(P, expected, category, names=NAMES)
    assert one.steered == ("safety",)


def test_sample_sizes_of_the_design():
    assert sample_size(0.05, 0.1) == 45 and 0.95**45 <= 0.1 < 0.95**44
    assert sample_size(0.05, 0.1, 5) == 77 and 0.95**77 <= 0.02 < 0.95**76
    # about 400 for 89 % power at a true rate of 2 %, jointly over five categories
    assert 380 <= sample_size(0.05, 0.1, 5, true_rate=0.02, power=0.89) <= 400
    with pytest.raises(InputError, match="below alpha"):
        sample_size(0.05, 0.1, true_rate=0.06)


def test_stated_power_is_met():
    n = sample_size(0.05, 0.1, true_rate=0.02, power=0.8)
    k = max(k for k in range(n) if reference.binom.cdf(k, n, 0.05) <= 0.1)
    assert reference.binom.cdf(k, n, 0.02) >= 0.8


def test_hoeffding_bentkus_is_a_p_value_and_at_zero_risk_the_exact_one():
    assert float(hoeffding_bentkus(0.0, 45, 0.05)) == pytest.approx(0.95**45)
    # risk .03 of 80: Hoeffding exp(-80 kl(.03, .05)) = .68, Bentkus e P(Bin(80, .05) <= 3) = 1.16; at .01 of
    # 400 they are exp(-400 kl) = 5.0e-5 and e P(Bin(400, .05) <= 4) = 3.3e-5
    kl = 0.03 * np.log(0.03 / 0.05) + 0.97 * np.log(0.97 / 0.95)
    assert float(hoeffding_bentkus(0.03, 80, 0.05)) == pytest.approx(np.exp(-80 * kl))
    assert float(hoeffding_bentkus(0.01, 400, 0.05)) == pytest.approx(
        np.e * reference.binom.cdf(4, 400, 0.05)
    )
    assert float(hoeffding_bentkus(0.2, 80, 0.05)) == 1.0
    rng = np.random.default_rng(0)
    risk = rng.binomial(5, 0.05, (4000, 80)).mean(axis=1) / 5  # mean of 80 losses in {0, .2, ..., 1}
    assert (hoeffding_bentkus(risk, 80, 0.05) <= 0.1).mean() <= 0.115


def test_a_category_without_look_alikes_falls_back_and_says_so():
    P, expected, category = world(np.random.default_rng(0), 100, 30)
    category = category.astype(object)
    category[~expected & (category == "safety")] = None
    with pytest.warns(CalibrationWarning, match="'safety' has no look-alike"):
        point = LearnThenTest().fit(P, expected, category, names=NAMES)
    assert "For safety there were no look-alike benign prompts" in point.guarantee
    with pytest.raises(UnsupportedClaim, match="look-alike"):
        LearnThenTest(missing="error").fit(P, expected, category, names=NAMES)
    keep = expected | (category == "humanizing")
    with pytest.raises(UnsupportedClaim, match="no general benign"):
        LearnThenTest().fit(P[keep], expected[keep], category[keep], names=NAMES)


def test_groups_weigh_alike_whatever_their_size():
    # group 0 has scores .2, .8, .9, group 1 has .5: (2/3 + 0) / 2 at .6, (2/3 + 1) / 2 at .5, 0 above all
    scores, groups = np.array([0.2, 0.5, 0.8, 0.9]), np.array([0, 1, 0, 0])
    assert _group_risk(scores, groups, np.array([0.95, 0.6, 0.5])) == pytest.approx([0, 1 / 3, 5 / 6])


def test_a_benign_score_equal_to_the_threshold_is_an_error():
    s = Slice("a", np.full(5, 0.7), np.r_[0.5, np.zeros(99)])
    point = LearnThenTest(taus=(0.5, 0.75)).fit_slices([s], digest="d" * 16)
    assert point.thresholds["a"].tau == 0.5 and point.thresholds["a"].benign_errors == 1


def test_thresholds_separate_neighbouring_floats():
    first = np.nextafter(0.3, 1)
    for low in (0.3, first):  # one of the two midpoints rounds down to its lower neighbour
        s = Slice("a", np.full(5, np.nextafter(low, 1)), np.full(60, low))
        assert low < LearnThenTest().choose([s])[0].tau <= s.refuse[0]


def test_slices_are_plain_data():
    s = Slice("a", np.array([0.9, 0.8]), np.linspace(0, 0.5, 100))
    assert LearnThenTest().choose([s])[0].tau == pytest.approx(0.65)


@pytest.mark.parametrize("value", [0, 1, -0.1, 5])
def test_shares_outside_0_and_1_are_refused(value):
    with pytest.raises(InputError, match="alpha"):
        LearnThenTest(alpha=value)
    with pytest.raises(InputError, match="delta"):
        LearnThenTest(delta=value)


def with_ordinary(rng, n_ordinary, shape=5.0):
    """`world`, and ordinary prompts spread over the categories with scores Beta(1, shape)."""
    P, expected, category = world(rng, 200, 500)
    extra = np.zeros((n_ordinary, len(NAMES)))
    column = rng.integers(0, len(SHAPES), n_ordinary)
    extra[np.arange(n_ordinary), column] = benign(rng, shape, n_ordinary)
    extra[:, -1] = 1 - extra.sum(1)
    return (
        np.concatenate([P, extra]),
        np.r_[expected, np.zeros(n_ordinary, bool)],
        [*category, *["general"] * n_ordinary],
    )


def ordinary_risk(point, shape=5.0):
    return float(np.mean([(1 - min(point.thresholds[c].tau, 1.0)) ** shape for c in NAMES[:-1]]))


def test_the_budget_for_ordinary_prompts_holds_and_keeps_the_other_ones():
    runs, budget = 200, 0.02
    rng = np.random.default_rng(5)
    risks, ordinary = [], []
    for _ in range(runs):
        data = with_ordinary(rng, 400)
        point = LearnThenTest(ALPHA, DELTA, ordinary_alpha=budget, n_boot=10).fit(*data, names=NAMES)
        risks.append(joint_risks(point))
        ordinary.append(ordinary_risk(point))
    exceeded = (np.array(risks) > ALPHA).any(axis=1) | (np.array(ordinary) > budget)
    assert exceeded.sum() <= most_violations(runs, DELTA)
    # not vacuous: k refusals of 400 pass, and the threshold lies midway to the next one
    k = max(k for k in range(400) if reference.binom.cdf(k, 400, budget) <= DELTA / 6)
    assert np.mean(ordinary) == pytest.approx((k + 0.5) / 401, rel=0.15)
    free = LearnThenTest(ALPHA, DELTA, n_boot=10).fit(*data, names=NAMES)
    assert ordinary_risk(free) > 1.5 * budget  # without it they are refused


def test_every_category_gives_up_the_same_share_of_its_true_refusals_for_ordinary_prompts():
    data = with_ordinary(np.random.default_rng(2), 400)
    held = LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.015, n_boot=10).fit(*data, names=NAMES)
    free = LearnThenTest(ALPHA, DELTA * 5 / 6, n_boot=10).fit(*data, names=NAMES)
    kept = [held.thresholds[c].refusal_rate / free.thresholds[c].refusal_rate for c in NAMES[:-1]]
    refused = min(free.thresholds[c].refusal_rate * free.thresholds[c].n_refuse for c in NAMES[:-1])
    assert max(kept) < 1 and max(kept) - min(kept) <= 1.01 / refused
    assert all(held.thresholds[c].tau > free.thresholds[c].tau for c in NAMES[:-1])


def test_ordinary_prompts_within_their_budget_change_nothing_but_the_level():
    data = with_ordinary(np.random.default_rng(0), 400, shape=200.0)
    held = LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.05, n_boot=10).fit(*data, names=NAMES)
    plain = LearnThenTest(ALPHA, DELTA * 5 / 6, n_boot=10).fit(*data, names=NAMES)
    assert {c: t.tau for c, t in held.thresholds.items()} == {c: t.tau for c, t in plain.thresholds.items()}
    assert held.goal == "max_tpr_fpr<=0.05,ordinary<=0.05@delta=0.1"
    assert (
        "Of ordinary benign prompts drawn like its 400, at most 0.05 open with the refuse token of a steered"
        in held.guarantee
    )


def test_ordinary_prompts_that_score_1_push_their_threshold_beyond_reach():
    P, expected, category = with_ordinary(np.random.default_rng(0), 300)
    P[-300:] = np.eye(len(NAMES))[0]
    point = LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.05, n_boot=10).fit(
        P, expected, category, names=NAMES
    )
    assert point.thresholds[NAMES[0]].tau == 1.01


def certain(a_benign, ordinary):
    """Categories a and b refused at 1, 100 benign look-alikes each, 300 ordinary prompts."""
    a, b, respond = np.eye(3)
    P = [a] * 20 + [b] * 20 + [a_benign] * 100 + [b * 0.1 + respond * 0.9] * 100 + ordinary
    return {
        "scores": P,
        "expected": np.arange(len(P)) < 40,
        "category": ["a"] * 20 + ["b"] * 20 + ["a"] * 100 + ["b"] * 100 + ["general"] * len(ordinary),
        "names": ["a", "b", "respond"],
    }


def test_a_threshold_of_1_is_raised_too():
    a, b, respond = np.eye(3)
    data = certain(b * 1e-3 + respond * 0.9, [a] * 300)
    assert LearnThenTest(ALPHA, DELTA).fit(**data).thresholds["a"].tau == 1
    held = LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.05).fit(**data).thresholds
    assert held["a"].tau > 1  # at 1 all ordinary prompts would be refused


def test_a_category_that_never_refuses_costs_the_ordinary_budget_nothing():
    a, _, respond = np.eye(3)
    data = certain(a, [a] * 60 + [respond] * 240)
    plain = LearnThenTest(ALPHA, DELTA).fit(**data).thresholds
    held = LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.05).fit(**data).thresholds
    assert plain["a"].tau > 1 and held["b"].tau == plain["b"].tau


def test_a_budget_for_ordinary_prompts_needs_enough_of_them():
    data = with_ordinary(np.random.default_rng(0), 50)
    with pytest.raises(UnsupportedClaim, match=r"at least 203 independent ordinary .* found 50"):
        LearnThenTest(ALPHA, DELTA, ordinary_alpha=0.02).fit(*data, names=NAMES)
    with pytest.raises(InputError, match="ordinary_alpha"):
        LearnThenTest(ordinary_alpha=1.5)
    P, expected, category = with_ordinary(np.random.default_rng(0), 300)
    category = [c if e else "general" for c, e in zip(category, expected, strict=True)]
    with pytest.raises(UnsupportedClaim, match="twice"), pytest.warns(CalibrationWarning):
        LearnThenTest(ordinary_alpha=0.05).fit(P, expected, category, names=NAMES)
