from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.calibrate import bias_to_tau, cuts, decide, is_steered, tau_to_bias
from demur.errors import InputError
from demur.types import OperatingPoint, Threshold

NAMES = ("safety", "humanizing", "respond")
SAFETY, HUMANIZING, RESPOND = range(3)


def one(row, thresholds, rule="threshold"):
    return int(decide([row], NAMES, thresholds, rule)[0])


def probability_rows():
    return st.lists(st.floats(0, 1), min_size=4, max_size=4).map(
        lambda v: [x / (sum(v) or 1.0) for x in v[:3]]  # the fourth is mass off the control tokens
    )


def test_category_threshold_rule_by_hand():
    row = [0.3, 0.1, 0.6]
    assert one(row, {"safety": 0.3}) == SAFETY  # at the threshold, although respond is likelier
    assert one(row, {"safety": 0.31}) == RESPOND
    assert one([0.5, 0.1, 0.4], {"safety": 0.6}) == RESPOND  # and suppressed although it is likelier


@pytest.mark.parametrize(
    ("row", "own"),
    [([0.1, 0.6, 0.3], HUMANIZING), ([0.1, 0.3, 0.6], RESPOND), ([0.1, 0.45, 0.45], HUMANIZING)],
)
@pytest.mark.parametrize("rule", ["threshold", "total_mass", "bias", "compare"])
@pytest.mark.parametrize("tau", [0.0, 0.2, 1.01])
def test_an_unsteered_likeliest_category_leaves_the_models_own_choice(row, own, rule, tau):
    assert one(row, {"safety": tau}, rule) == own


@pytest.mark.parametrize("rule", ["threshold", "total_mass", "bias"])
def test_tau_0_refuses_all_and_above_1_none(rule):
    P = np.random.default_rng(0).dirichlet([1, 1, 1], 200)
    P[0], P[1] = [0, 0, 1], [1, 0, 0]
    both = {"safety": 0.0, "humanizing": 0.0}
    assert (decide(P, NAMES, both, rule) != RESPOND).all()
    assert (decide(P, NAMES, dict.fromkeys(both, 1.01), rule) == RESPOND).all()


def test_tau_1_refuses_only_certainty():
    assert one([1.0, 0, 0], {"safety": 1.0}) == SAFETY
    assert one([0.999, 0, 0.001], {"safety": 1.0}) == RESPOND


@given(probability_rows())
def test_tau_minus_1_compares(row):
    minus = dict.fromkeys(NAMES[:2], -1.0)
    assert one(row, minus) == one(row, {}, "compare") == int(np.argmax(row))


def test_ties_go_to_refusing_and_to_the_first_category():
    assert one([0.4, 0.2, 0.4], {}, "compare") == SAFETY
    assert one([0.3, 0.3, 0.4], {"safety": 0.3, "humanizing": 0.1}) == SAFETY
    assert one([0.3, 0.3, 0.4], {"humanizing": 0.1}) == RESPOND  # safety is c* and is not steered
    assert one([0.0, 0.0, 0.0], {"safety": 0.5}, "bias") == SAFETY


def test_total_mass_sums_the_steered_categories_only():
    row = [0.3, 0.25, 0.45]
    assert one(row, {"safety": 0.5, "humanizing": 0.5}, "total_mass") == SAFETY
    assert one(row, {"safety": 0.5}, "total_mass") == RESPOND


@given(probability_rows(), st.floats(-8, 8))
def test_bias_on_the_logit_is_the_threshold_on_the_share(row, bias):
    if min(row) < 1e-9:
        return
    best = int(np.argmax(row[:2]))
    margin = np.log(row[best]) + bias - np.log(row[2])
    if abs(margin) < 1e-6:
        return
    want = best if margin > 0 else RESPOND
    assert one(row, dict.fromkeys(NAMES[:2], bias_to_tau(bias)), "bias") == want


@given(st.floats(-12, 12))
def test_bias_and_threshold_convert_both_ways(bias):
    assert tau_to_bias(bias_to_tau(bias)) == pytest.approx(bias, abs=1e-6)
    assert bias_to_tau(bias) == pytest.approx(1 / (1 + np.exp(bias)), abs=1e-12)


def test_ends_of_the_conversion():
    assert tau_to_bias(0.0) == np.inf and tau_to_bias(1.0) == tau_to_bias(1.01) == -np.inf
    with pytest.raises(InputError, match="compare"):
        tau_to_bias(-1.0)


@given(
    st.lists(probability_rows(), max_size=6),
    st.floats(0, 1.01),
    st.sampled_from(["threshold", "total_mass", "bias"]),
)
def test_raising_a_threshold_never_adds_a_refusal(rows, tau, rule):
    low = decide(rows, NAMES, dict.fromkeys(NAMES[:2], tau), rule)
    high = decide(rows, NAMES, dict.fromkeys(NAMES[:2], tau + 0.1), rule)
    assert ((high == low) | (high == RESPOND)).all()


def test_steered_rows_are_those_whose_likeliest_category_has_a_threshold():
    P = [[0.3, 0.1, 0.6], [0.1, 0.3, 0.6]]
    assert is_steered(P, NAMES, {"safety": 0.5}).tolist() == [True, False]
    assert decide(np.empty((0, 3)), NAMES, {"safety": 0.5}).shape == (0,)


@pytest.mark.parametrize(
    ("P", "names", "thresholds", "rule", "words"),
    [
        ([[0.5, 0.5]], NAMES, {}, "threshold", r"expected \(n, 3\)"),
        ([[0.5, np.nan, 0.5]], NAMES, {}, "threshold", "row 0"),
        ([[0.1, 0.1, 0.1], [3.0, -1.0, 0.2]], NAMES, {}, "threshold", "row 1"),
        ([[0.5, 0.4, 0.4]], NAMES, {}, "threshold", "no probabilities"),
        ([[0.5, 0.1, 0.4]], NAMES, {"saftey": 0.5}, "threshold", "'saftey'"),
        ([[0.5, 0.1, 0.4]], NAMES, {"safety": np.nan}, "threshold", "NaN"),
        ([[0.5, 0.1, 0.4]], NAMES, {}, "sum", "total_mass"),
        ([[0.5, 0.5]], ("respond", "safety"), {}, "threshold", "last one"),
    ],
)
def test_bad_input_is_explained(P, names, thresholds, rule, words):
    with pytest.raises(InputError, match=words):
        decide(P, names, thresholds, rule)


def test_cuts_leave_out_shadow_and_read_the_bias():
    point = OperatingPoint(
        id="p",
        rule="bias",
        thresholds={
            "safety": Threshold(tau=bias_to_tau(1.0), bias=1.0),
            "humanizing": Threshold(tau=0.5, mode="shadow"),
        },
    )
    assert cuts(point) == {"safety": pytest.approx(0.26894142)}
    wrong = replace(point, thresholds={"safety": Threshold(tau=0.9, bias=1.0)})
    with pytest.raises(InputError, match="disagree"):
        cuts(wrong)
