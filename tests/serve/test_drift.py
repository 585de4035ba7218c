from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from demur.errors import InputError
from demur.serve import drift as module
from demur.serve.drift import Drift


def scores(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    """Two humps, as first-position scores have: a third refused, the rest answered."""
    z = np.where(rng.random(n) < 0.35, rng.normal(3, 2, n), rng.normal(-3, 2, n)) + shift
    return 1 / (1 + np.exp(-z))


def fed(drift: Drift, values: np.ndarray) -> Drift:
    for p in values:
        drift.add(float(p))
        if drift.alarm:
            break
    return drift


def test_false_alarms_stay_under_the_stated_bound() -> None:
    # bound n / c = 300 * 1e-3 = 0.3 for each stream; a broken rank or bet alarms in nearly all of them
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        alarms += fed(Drift(scores(rng, 60), per_request=1e-3, seed=seed), scores(rng, 300)).alarm
    assert alarms <= stats.binom.ppf(0.999, 300, 0.3)
    assert alarms > 0  # a test that can never alarm would pass everything else


def test_the_default_is_silent_without_a_shift() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert not fed(Drift(scores(rng, 400), seed=seed), scores(rng, 2000)).alarm


def test_ties_and_heaped_scores_raise_no_alarm() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        heap = np.array([0.0, 1e-9, 0.5, 1.0])
        drift = Drift(rng.choice(heap, 60, p=[0.6, 0.1, 0.1, 0.2]), per_request=1e-6, seed=seed)
        assert not fed(drift, rng.choice(heap, 1000, p=[0.6, 0.1, 0.1, 0.2])).alarm


@pytest.mark.parametrize("shift", [1.5, -1.5, 3.0])
@pytest.mark.parametrize("before", [0, 1500])
def test_an_injected_shift_alarms_within_a_thousand_requests(shift: float, before: int) -> None:
    delays = []
    for seed in range(30):
        rng = np.random.default_rng(5000 + seed)
        drift = fed(Drift(scores(rng, 400), seed=seed), scores(rng, before))
        assert not drift.alarm
        fed(drift, scores(rng, 1000, shift))
        delays.append(drift.alarmed_at - before if drift.alarmed_at else math.inf)
    assert sum(d <= 1000 for d in delays) >= 29
    if shift == 3.0:
        assert np.median(delays) < 120


def test_a_change_of_spread_alone_is_seen() -> None:
    rng = np.random.default_rng(1)
    drift = Drift(scores(rng, 400))
    fed(drift, np.where(rng.random(1000) < 0.5, 0.99, 0.01) * rng.uniform(0.98, 1, 1000))
    assert drift.alarm


def test_every_bet_is_fair() -> None:
    assert module._TABLE.mean(axis=0) == pytest.approx(np.ones(len(module._BETAS)), abs=1e-9)
    assert (module._TABLE >= 0).all()
    drift = Drift(np.linspace(0, 1, 50))
    for u in np.random.default_rng(0).beta(3, 1, 40):
        drift._pay(float(u))
    shape = drift._shape.copy()
    pays = []
    for u in (np.arange(module._COARSE) + 0.5) / module._COARSE:
        drift._shape = shape.copy()
        pays.append(drift._pay(float(u))[-1])
    assert np.mean(pays) == pytest.approx(1) and max(pays) > 1.2


def test_evidence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # one bet that doubles in the lower half and loses all in the upper: R = (1 + R) * 2 or 0
    drift = Drift(np.full(20, 0.5), per_request=1 / 14)
    monkeypatch.setattr(drift, "_pay", lambda u: np.array([2.0 if u < 0.5 else 0.0]))
    drift._bets = np.zeros(1)
    drift.add(0.9)  # larger than all: rank 0 to 1 of 21, lower half
    assert drift._bets[0] == 2
    drift.add(0.9)
    assert drift._bets[0] == 6 and not drift.alarm
    assert drift.p_value == pytest.approx(2 / 6)
    drift.add(0.95)
    assert drift._bets[0] == 14 and drift.alarm and drift.alarmed_at == 3
    drift.add(0.1)  # smaller than all: upper half
    assert drift._bets[0] == 0 and drift.alarm, "an alarm stays until it is reset"
    drift.reset()
    assert not drift.alarm and drift.n == 0 and drift.distance is None


def test_distance_is_the_largest_gap() -> None:
    drift = Drift(np.linspace(0, 1, 101), window=50)
    for _ in range(200):
        drift.add(1.0)
    assert drift.distance == pytest.approx(100 / 101)


def test_memory_is_bounded_and_odd_numbers_are_passed_over() -> None:
    drift = Drift(np.linspace(0, 1, 50), window=10)
    for p in (math.nan, -0.1, 1.1, math.inf):
        drift.add(p)
    assert drift.n == 0
    for _ in range(3000):
        drift.add(1.0)
    assert len(drift._recent) == 10 and drift._counts.size == module.BINS
    assert math.isfinite(drift.value) and 0 <= drift.p_value <= 1


@pytest.mark.parametrize("bad", [[0.5] * 19, [0.5] * 30 + [1.2], [math.nan] * 30, []])
def test_a_reference_of_no_use_is_refused(bad: list[float]) -> None:
    with pytest.raises(InputError, match="reference"):
        Drift(bad)


def test_the_rate_must_be_a_probability() -> None:
    with pytest.raises(InputError, match="per_request"):
        Drift([0.5] * 30, per_request=0)
