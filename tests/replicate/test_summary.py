"""Intervals that cover, controls that fall silent only when they are, and the outcome that follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special

from demur.errors import InputError
from demur.replicate import Baseline, Claim, Control, Spec, Value
from demur.replicate.store import kept
from demur.replicate.summary import N_BOOT, Measured, conclude

SPEC = Spec(
    slug="toy",
    claims=(
        Claim(key="a", text="a", at_least=0.8, null=0.5),
        Claim(key="b", text="b", at_most=0.2, null=0.5),
    ),
    controls=(
        Control(key="c", text="c", null=0.5, margin=0.1),
        Control(key="d", text="d", null=0.5, margin=0.1),
    ),
    baselines=(Baseline(key="r", text="r", against="a"),),
    run=lambda _: {},
    minutes=1,
)


def hits(share: float, n: int = 1000) -> Value:
    """n outcomes of which a share is 1, shuffled."""
    k = round(share * n)
    return Value.of(np.random.default_rng(0).permutation([1.0] * k + [0.0] * (n - k)))


def said(values: dict[str, Value | None], seeds: int = 5, **change: Any) -> dict[str, Any]:
    """The conclusion when every seed measures the same."""
    base = {"a": hits(0.9), "b": hits(0.1), "c": hits(0.5), "d": hits(0.5), "r": hits(0.6)}
    one = {k: v for k, v in {**base, **values}.items() if v is not None}
    return conclude(change.get("spec", SPEC), dict.fromkeys(range(seeds), one), change.get("anchors", []))


def status(rows: list[dict[str, Any]], key: str) -> tuple[str, str]:
    row = next(r for r in rows if r["key"] == key)
    return row["status"], row["why"]


# --- intervals --------------------------------------------------------------------------------------------------


def test_one_seed_is_the_bootstrap_over_its_items() -> None:
    got = Measured("x", [hits(0.3, 400)])
    low, high = got.interval() or (0, 0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert got.over == "1 seed, 400 items"


def test_seeds_without_items_have_the_width_of_students_t() -> None:
    points = [0.61, 0.64, 0.66, 0.69, 0.60]
    got = Measured("x", [Value(value=p) for p in points])
    low, high = got.interval() or (0, 0)
    half = special.stdtrit(4, 0.975) * np.std(points, ddof=1) / np.sqrt(5)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert got.over == "5 seeds"


def test_one_seed_without_items_has_no_interval() -> None:
    assert Measured("x", [Value(value=0.4)]).interval() is None


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between", [0.0, 0.02, 0.04, 0.2])
def test_intervals_cover_the_truth(seeds: int, between: float) -> None:
    """The standard error over items is 0.02; the seeds' own spread runs from nothing to ten times that."""
    rng = np.random.default_rng([seeds, round(100 * between)])
    inside, trials = 0, 300
    for trial in range(trials):
        points = 0.5 + between * rng.standard_normal(seeds) + 0.02 * rng.standard_normal(seeds)
        low, high = Measured(f"x{trial}", [Value(value=p, n=600, se=0.02) for p in points]).interval() or (
            0,
            0,
        )
        inside += low <= 0.5 <= high
    assert inside >= 0.91 * trials, "0.95 less three standard errors"


def test_items_that_all_seeds_share_do_not_become_more_with_seeds() -> None:
    one = hits(0.5, 100)
    shared = Value.of(one.items or (), same_items=True)
    width = {}
    for name, value in {"own": one, "shared": shared}.items():
        low, high = Measured("x", [value] * 5).interval() or (0, 0)
        width[name] = high - low
    assert width["shared"] == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    assert width["own"] == pytest.approx(width["shared"] / np.sqrt(5), rel=0.1)
    assert Measured("x", [shared] * 5).over == "5 seeds, the same 100 items"


def test_all_hits_is_no_certainty() -> None:
    assert Measured("x", [Value.of([1] * 30)]).interval() == pytest.approx((30 / (30 + 1.96**2), 1), abs=1e-4)
    assert (Measured("x", [Value.of([0] * 30)] * 3).interval() or (0, 0))[1] > 0.03


def test_all_hits_is_no_certainty_where_items_are_too_many_to_keep() -> None:
    for items, few in (([0] * 3000, 0), ([1] * 3000, 1)):
        low, high = Measured("x", [kept(Value.of(items))] * 2).interval() or (0, 0)
        assert (low, high) == pytest.approx((few * 6000 / 6003.84, 1 if few else 3.84 / 6003.84), abs=1e-5)
    one = Measured("x", [kept(Value.of([1] + [0] * 2999))]).interval() or (0, 0)
    assert one[0] == 0 and one[1] > 0.0006, "a share goes no lower than 0"
    apart = [Value.of([0.0] * 30), Value.of([2.0] * 30)]
    assert (Measured("x", apart).interval() or (0, 0))[0] < 0, "a mean of 1, but no item is"
    perfect = Measured("x", [Value(value=1.0, se=0.0, n=50, bounds=(0, 1))]).interval()
    assert perfect == pytest.approx((50 / (50 + 1.96**2), 1), abs=1e-4)


def test_a_difference_of_all_and_none_is_no_certainty() -> None:
    for n, beaten in ((1, False), (40, True)):
        got = Measured("x", [Value.of([1] * n)]).less(Measured("y", [Value.of([0] * n)]))
        assert got is not None
        gap, low, high = got
        wide = 3.8415 / (n + 3.8415)  # of each of the two
        assert (gap, low) == pytest.approx((1, 1 - wide * 2**0.5), abs=1e-3) and high == 1
        assert (low > 0) is beaten


def test_a_kept_standard_error_stands_for_many_items() -> None:
    many = Measured("x", [Value(value=0.4, n=10_000, se=0.01)]).interval() or (0, 0)
    assert many == pytest.approx((0.4 - 0.0196, 0.4 + 0.0196), abs=0.002)


def test_items_of_many_kinds() -> None:
    items = np.random.default_rng(3).normal(2.0, 1.0, 300)
    low, high = Measured("x", [Value.of(items)] * 2).interval() or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * items.std() / np.sqrt(600), rel=0.1)
    assert N_BOOT >= 4000, "Holm over ten controls looks at tails of 0.0025"


# --- claims, controls, baselines --------------------------------------------------------------------------------


def test_reproduced() -> None:
    got = said({})
    assert got["outcome"] == "reproduced"
    assert got["reason"] == "2 of 2 claims met; 2 of 2 controls silent; 1 of 1 baselines beaten"


def test_a_goal_met_by_a_noisy_value_is_not_met() -> None:
    noisy = conclude(
        SPEC,
        {
            s: {**dict.fromkeys("cd", hits(0.5)), "a": Value(value=v), "b": hits(0.1), "r": hits(0.6)}
            for s, v in enumerate([0.6, 0.9, 1.0])
        },
        [],
    )
    assert status(noisy["claims"], "a") == ("not met", "the interval holds 0.5, the value without effect")
    assert noisy["outcome"] == "partly"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (hits(0.7), "below the goal"),
        (Value(value=None), "undefined"),
    ],
)
def test_claims_that_are_not_met(value: Value, why: str) -> None:
    assert status(said({"a": value})["claims"], "a") == ("not met", why)


def test_one_seed_without_items_shows_nothing() -> None:
    got = said({"a": Value(value=0.9), "c": Value(value=0.5)}, seeds=1)
    assert status(got["claims"], "a") == ("not met", "no interval: one seed without items")
    assert status(got["controls"], "c") == ("not silent", "no interval: one seed without items")


def test_a_loud_control() -> None:
    got = said({"c": hits(0.63)})
    assert status(got["controls"], "c") == ("not silent", "its value lies outside the margin")
    assert status(got["controls"], "d")[0] == "silent"
    assert got["outcome"] == "partly"


def test_a_control_that_is_only_noisy_is_not_silent() -> None:
    got = said({"c": hits(0.5, 40)}, seeds=1)
    assert status(got["controls"], "c") == ("not silent", "its interval is wider than the margin")


def test_holm() -> None:
    """Two controls are held to 97.5 %; the one that fits leaves 95 % to the other."""
    # half width at 95 %: 1.96 * 0.5 / sqrt(110) = 0.0934 < 0.1; at 97.5 %: 0.107
    both = said({"c": hits(0.5, 110), "d": hits(0.5, 110)}, seeds=1)
    assert [(r["status"], r["level"]) for r in both["controls"]] == [("not silent", 0.975)] * 2
    one = said({"c": hits(0.5, 110), "d": hits(0.5, 4000)}, seeds=1)
    assert [(r["status"], r["level"]) for r in one["controls"]] == [("silent", 0.95), ("silent", 0.975)]


def test_baselines() -> None:
    assert said({"r": hits(0.9)})["baselines"][0]["status"] == "not beaten"
    beaten = said({})["baselines"][0]
    assert beaten["status"] == "beaten"
    gap, low, high = beaten["difference"]
    half = 1.96 * np.sqrt(0.9 * 0.1 / 5000 + 0.6 * 0.4 / 5000)
    assert (gap, low, high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=0.003)


def test_a_baseline_of_a_claim_that_goes_down() -> None:
    spec = Spec(
        slug="toy",
        claims=(Claim(key="a", text="a", at_most=0.2, null=0.5),),
        baselines=(Baseline(key="r", text="r", against="a"),),
        run=lambda _: {},
        minutes=1,
    )
    assert said({"a": hits(0.1)}, spec=spec)["baselines"][0]["status"] == "beaten"
    assert said({"a": hits(0.1), "r": hits(0.05)}, spec=spec)["baselines"][0]["status"] == "not beaten"


# --- outcomes ---------------------------------------------------------------------------------------------------


def test_no_claim_met_is_not_at_this_scale() -> None:
    assert said({"a": hits(0.5), "b": hits(0.5)})["outcome"] == "not at this scale"


def test_an_anchor_that_is_off_is_named() -> None:
    row = {"key": "x", "text": "x", "status": "off", "found": 2.0}
    got = said({}, anchors=[row])
    assert got["outcome"] == "anchor off" and got["reason"].startswith(
        "recounted otherwise than published: x;"
    )


def test_anchors_alone() -> None:
    from demur.replicate import Anchor

    spec = Spec(
        slug="toy",
        anchors=(Anchor(key="x", text="x", expected=1),),
        recount=lambda: {"x": 1.0},
        minutes=1,
    )
    assert conclude(spec, {}, [{"key": "x", "status": "exact"}])["outcome"] == "reproduced"
    assert conclude(spec, {}, [{"key": "x", "status": "skipped"}])["outcome"] == "not checked"


def test_unfit_seeds_conclude_nothing() -> None:
    spec = Spec(
        slug="toy",
        entry=(Claim(key="e", text="learnt", at_least=0.9),),
        claims=(Claim(key="a", text="a", at_least=0.8, null=0.5),),
        run=lambda _: {},
        minutes=1,
    )
    fit = {"e": Value(value=0.95), "a": hits(0.9)}
    unfit = {"e": Value(value=0.4)}
    got = conclude(spec, {0: fit, 1: unfit, 2: fit}, [])
    assert got["outcome"] == "reproduced" and list(got["unfit"]) == ["1"]
    assert got["reason"].startswith("the organism was fit in 2 of 3 seeds")
    assert got["claims"][0]["over"].startswith("2 seeds")
    none = conclude(spec, {0: unfit, 1: unfit}, [])
    assert none["outcome"] == "not at this scale"
    assert none["claims"][0]["why"] == "no fit seed"


def test_an_interval_keeps_within_the_bounds_of_its_value() -> None:
    free = [Value(value=v, se=0.1, n=50) for v in (0.95, 0.99)]
    held = [Value(value=v, se=0.1, n=50, bounds=(0.0, 1.0)) for v in (0.95, 0.99)]
    wide, cut = (Measured("k", seeds).interval() for seeds in (free, held))
    assert wide is not None and wide[1] > 1
    assert cut == (wide[0], 1.0)
    with pytest.raises(InputError, match="beyond its bounds"):
        Value(value=1.2, bounds=(0.0, 1.0))
