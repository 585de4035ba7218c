import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError
from demur.stats import auroc, auroc_interval, curve, ece, reliability


def brute(scores, positive):
    pairs = [
        1.0 if p > q else 0.5 if p == q else 0.0
        for p, y in zip(scores, positive, strict=True)
        if y
        for q, z in zip(scores, positive, strict=True)
        if not z
    ]
    return sum(pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_counts_pairs_with_half_for_ties(rows):
    scores, positive = [r[0] for r in rows], [r[1] for r in rows]
    if len(set(positive)) < 2:
        assert auroc(scores, positive) is None and auroc_interval(scores, positive) is None
    else:
        assert auroc(scores, positive) == pytest.approx(brute(scores, positive))


def test_auroc_interval_covers_about_as_often_as_it_says():
    # positives N(1, 1), negatives N(0, 1): true area Phi(1 / sqrt 2) = 0.7602
    rng = np.random.default_rng(0)
    y = np.repeat([True, False], [60, 40])
    inside = 0
    for _ in range(400):
        low, high = auroc_interval(rng.normal(size=100) + y, y)
        inside += low <= 0.76025 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_delong_by_hand():
    # positives 3, 1 beat shares 1, 2/3 of the negatives; negatives 2, 0, 0 lose to shares 1/2, 1, 1: area
    # 5/6, variance (1/18) / 2 + (1/12) / 3 = 1/18
    half = 1.959963984540054 * np.sqrt(1 / 18) / (5 / 36)
    want = [1 / (1 + np.exp(-(np.log(5) + sign * half))) for sign in (-1, 1)]
    assert auroc_interval([3, 1, 2, 0, 0], [1, 1, 0, 0, 0]) == pytest.approx(want)


def test_perfect_separation_keeps_a_width():
    low, high = auroc_interval([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
    assert high == 1 and 0.3 < low < 0.9
    many = auroc_interval(np.arange(400), np.arange(400) >= 200)
    assert 0.98 < many[0] < 1


def test_auroc_interval_with_clusters_is_wider():
    rng = np.random.default_rng(1)
    y = np.tile([True, False], 30)
    s = rng.normal(size=60) + y
    scores, labels, groups = np.repeat(s, 6), np.repeat(y, 6), np.repeat(np.arange(60), 6)
    plain = auroc_interval(scores, labels)
    by_group = auroc_interval(scores, labels, clusters=groups, n_boot=400)
    assert by_group[1] - by_group[0] > 1.8 * (plain[1] - plain[0])


def test_auroc_interval_of_clusters_keeps_a_width_and_is_never_undefined():
    # perfect separation in 6 clusters of two rows: no more sure than 3 and 3 rows are
    scores, labels = [1, 2, 3, 4, 5, 6] * 2, [0, 0, 0, 1, 1, 1] * 2
    perfect = auroc_interval(scores, labels, clusters=list("abcdef") * 2)
    assert perfect == auroc_interval(scores[:6], labels[:6])
    # of 4 clusters, one of eight resamples lacks a class
    low, high = auroc_interval([0.1, 0.6, 0.5, 0.9], [0, 0, 1, 1], clusters=list("abcd"))
    assert 0 <= low < 0.75 < high <= 1


def test_pairs_within_a_cluster_do_not_push_the_estimate_out_of_its_interval():
    # in each of 60 pairs the positive is just above its own negative, and says nothing beyond its pair
    level = np.random.default_rng(0).normal(size=60)
    scores, labels = np.r_[level + 1e-6, level], np.repeat([1, 0], 60)
    low, high = auroc_interval(scores, labels, clusters=np.tile(np.arange(60), 2), n_boot=400)
    assert low < auroc(scores, labels) < high


def test_curve_by_hand():
    c = curve([0.0, 0.3, 0.5, 1.0], [False, True, False, True], [0, 0.3, 0.5, 0.51, 1, 1.01])
    assert c.refusal.tolist() == [1, 1, 0.5, 0.5, 0.5, 0]
    assert c.over_refusal.tolist() == [1, 0.5, 0.5, 0, 0, 0]
    refuse_band, _ = c.bands()
    assert refuse_band.shape == (2, 6) and (refuse_band[0] <= c.refusal).all()


def test_curve_never_rises_and_has_101_points():
    rng = np.random.default_rng(0)
    c = curve(rng.random(500), rng.random(500) < 0.4)
    assert len(c.taus) == 101 and (np.diff(c.refusal) <= 0).all() and (np.diff(c.over_refusal) <= 0).all()


def test_curve_of_one_class_is_undefined_on_the_other_side():
    c = curve([0.2, 0.7], [1, 1])
    assert np.isnan(c.over_refusal).all() and np.isnan(c.bands()[1]).all() and c.n_negative == 0


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        ([0.1, np.nan], [0, 1], r"scores\[1\] is nan"),
        ([0.1], [0, 1], "shape"),
        ([0.1, 0.2], [0, 2], "0 and 1"),
    ],
)
def test_bad_input_is_named(scores, labels, words):
    with pytest.raises(InputError, match=words):
        auroc(scores, labels)


def test_reliability_by_hand():
    r = reliability([0.1, 0.2, 0.9, 1.0], [0, 1, 1, 1], bins=2)
    assert r.counts.tolist() == [2, 2]
    assert r.confidence == pytest.approx([0.15, 0.95]) and r.frequency == pytest.approx([0.5, 1.0])
    # 2/4 * 0.35 + 2/4 * 0.05
    assert ece([0.1, 0.2, 0.9, 1.0], [0, 1, 1, 1], bins=2) == pytest.approx(0.2)


def test_ece_is_small_for_honest_probabilities_and_large_for_inflated_ones():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = rng.random(20_000) < p
    assert ece(p, y) < 0.02
    assert ece(np.sqrt(p), y) > 0.1


def test_empty_bins_are_undefined():
    r = reliability([0.95], [1], bins=10)
    assert np.isnan(r.frequency[0]) and r.counts[9] == 1
    assert ece([], []) is None


def test_reliability_needs_probabilities():
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        reliability([1.5], [1])
    with pytest.raises(InputError, match="at least one bin"):
        reliability([0.5], [1], bins=0)
