import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from demur.errors import InputError
from demur.stats import bootstrap_interval, proportion_interval, rate, share_interval, upper_bound


def test_no_observations_are_undefined_not_zero():
    r = rate(0, 0, unread=3)
    assert r.value is None and r.low is None and r.high is None and r.unread == 3
    assert np.isnan(proportion_interval([0], [0])).all()
    assert share_interval([]) is None


def test_wilson_by_hand():
    # k=8, n=10, z=1.96: centre (0.8 + z2/20)/(1 + z2/10), half z sqrt(.016 + z2/400)/(1 + z2/10)
    z2 = 1.959963984540054**2
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    half = math.sqrt(z2) * math.sqrt(0.8 * 0.2 / 10 + z2 / 400) / (1 + z2 / 10)
    r = rate(8, 10)
    assert (r.low, r.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


@given(st.integers(1, 300), st.data(), st.sampled_from(["wilson", "exact"]), st.sampled_from([0.9, 0.95]))
def test_both_methods_equal_scipy(n, data, method, level):
    k = data.draw(st.integers(0, n))
    want = reference.binomtest(k, n).proportion_ci(level, method=method)
    got = rate(k, n, method=method, level=level)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)
    assert got.low <= k / n <= got.high


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(InputError, match="0 <= k <= n"):
        rate(k, n)


def test_unknown_method_and_level():
    with pytest.raises(InputError, match="wilson"):
        proportion_interval(1, 2, method="wald")
    with pytest.raises(InputError, match="between 0 and 1"):
        rate(1, 2, level=95)


def test_upper_bound_is_where_the_binomial_tail_is_delta():
    for k, n, delta in [(0, 45, 0.1), (3, 200, 0.02), (10, 400, 0.1)]:
        p = float(upper_bound(k, n, delta))
        assert reference.binom.cdf(k, n, p) == pytest.approx(delta, abs=1e-9)
    assert float(upper_bound(5, 5, 0.1)) == 1.0


def test_bootstrap_of_a_mean_matches_the_normal_interval_and_repeats():
    x = np.random.default_rng(0).normal(size=400)
    half = 1.96 * x.std() / 20
    low, high = bootstrap_interval(np.mean, x, n_boot=2000)
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.015)
    assert (low, high) == bootstrap_interval(np.mean, x, n_boot=2000)


def test_bootstrap_resamples_rows_of_all_arrays_together():
    x = np.arange(50.0)
    low, high = bootstrap_interval(lambda a, b: float(np.abs(a - b).max()), x, x, n_boot=50)
    assert (low, high) == (0.0, 0.0)


def test_clusters_widen_the_interval_by_the_design_effect():
    # 40 clusters of 25 identical rows carry the information of 40 rows, so the width grows about 5 times
    hits = np.repeat(np.arange(40) % 2, 25).astype(bool)
    groups = np.repeat(np.arange(40), 25)
    for f in (
        lambda c: share_interval(hits, c),
        lambda c: bootstrap_interval(np.mean, hits, clusters=c, n_boot=600),
    ):
        alone, together = f(None), f(groups)
        assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(5, rel=0.15)


def test_share_interval_agrees_with_the_plain_bootstrap():
    rng = np.random.default_rng(3)
    hits, groups = rng.random(300) < 0.3, rng.integers(0, 60, 300)
    fast = share_interval(hits, groups, n_boot=4000)
    slow = bootstrap_interval(np.mean, hits, clusters=groups, n_boot=2000)
    assert fast == pytest.approx(slow, abs=0.015)


def test_share_interval_claims_no_certainty_at_the_ends():
    low, high = share_interval(np.zeros(20, bool))
    assert low == 0 and high == pytest.approx(rate(0, 20).high)
    # two clusters of 10 are two observations, not twenty
    assert share_interval(np.zeros(20, bool), np.repeat([0, 1], 10))[1] == pytest.approx(rate(0, 2).high)


def test_undefined_resamples_give_no_interval():
    assert all(math.isnan(v) for v in bootstrap_interval(lambda a: float("nan"), [1, 2], n_boot=10))
    assert all(math.isnan(v) for v in bootstrap_interval(lambda a: None, [1, 2], n_boot=10))
    assert all(math.isnan(v) for v in bootstrap_interval(np.mean, [], n_boot=10))


def test_lengths_must_agree():
    with pytest.raises(InputError, match="equal lengths"):
        bootstrap_interval(np.mean, [1, 2], [1])
    with pytest.raises(InputError, match="one cluster label per row"):
        bootstrap_interval(np.mean, [1, 2], clusters=[1])
