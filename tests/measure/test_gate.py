"""Gates: what fires, what is too few, and how often an unchanged model fails."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from demur.errors import InputError
from demur.judges.base import PREREAD
from demur.measure.gate import gate, needed_for_change, needed_for_share, parse_rule, share_bounds
from demur.measure.refusal import Record, clustered, judge_error
from demur.types import Label, Prompt, Reply, Verdict

REFUSE, COMPLY = frozenset({Label.FULL_REFUSAL}), frozenset({Label.COMPLIANCE})


def cell(
    i: int, declined: bool | None, *, refuse: bool = False, category: str = "safety", sample: int = 0
) -> Record:
    label = Label.ERROR if declined is None else Label.FULL_REFUSAL if declined else Label.COMPLIANCE
    id = f"{category}-{'r' if refuse else 'c'}-{i}"
    prompt = Prompt.of(f"Case {id}", id=id, category=category, expected=REFUSE if refuse else COMPLY)
    return Record(
        prompt,
        Reply(prompt_id=id, content="x", sample=sample),
        Verdict(prompt_id=id, label=label, judge="j", sample=sample),
    )


def run(k: int, n: int, **fields: object) -> list[Record]:
    return [cell(i, i < k, **fields) for i in range(n)]  # type: ignore[arg-type]


def one(records: list[Record], rule: str, baseline: list[Record] | None = None) -> tuple[str, str]:
    outcome = gate(records, [rule], baseline=baseline)[0][0]
    return outcome.status, outcome.message


# --- reading rules ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("over_refusal.safe > 0.10", ("over_refusal", "safe", True, 0.1, False, "bound")),
        ("over_refusal>5%", ("over_refusal", "all", True, 0.05, False, "bound")),
        ("refusal.safety.point <= .9", ("refusal", "safety", False, 0.9, False, "point")),
        (
            "refusal.false premises < baseline - 3 %",
            ("refusal", "false premises", False, -0.03, True, "bound"),
        ),
        ("over_refusal > baseline", ("over_refusal", "all", True, 0.0, True, "bound")),
        ("unread.high >= 0.02", ("unread", "all", True, 0.02, False, "high")),
    ],
)
def test_rules_are_read(text: str, expected: tuple[object, ...]) -> None:
    r = parse_rule(text)
    assert (r.measure, r.row, r.above, pytest.approx(r.limit), r.baseline, r.part) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("over_refusal", "is no condition"),
        ("over_refusal > ten", "is no condition"),
        ("over_refusal > baseline * 2", "is no condition"),
        ("refusals > 0.1", "no measure"),
        ("over_refusal > 10", "write 0.10 or 10%"),
        ("over_refusal > 0", "no sample can show"),
        ("refusal < 1", "no sample can show"),
    ],
)
def test_rules_that_mean_nothing_are_errors(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_rule(text)


def test_unknown_rows_and_missing_baselines_are_errors() -> None:
    with pytest.raises(InputError, match="it has safety"):
        gate(run(0, 40), ["over_refusal.saftey > 0.1"])
    with pytest.raises(InputError, match="--baseline"):
        gate(run(0, 40), ["over_refusal > baseline"])
    with pytest.raises(InputError, match="at least one"):
        gate(run(0, 40), [])


# --- shares ---


def test_bounds_are_exact_for_single_answers() -> None:
    low, high, worth = share_bounds(np.arange(50) < 7, [str(i) for i in range(50)], 0.05)
    exact = stats.binomtest(7, 50).proportion_ci(0.90, method="exact")
    assert (low, high, worth) == (pytest.approx(exact.low), pytest.approx(exact.high), 50)


def test_copies_of_an_answer_are_worth_nothing() -> None:
    hits = np.arange(50) < 7
    alone = share_bounds(hits, [str(i) for i in range(50)], 0.05)
    copied = share_bounds(np.repeat(hits, 6), [str(i) for i in np.repeat(range(50), 6)], 0.05)
    assert copied[2] == pytest.approx(50)
    assert copied[0] == pytest.approx(alone[0], abs=0.004) and copied[1] == pytest.approx(alone[1], abs=0.004)


def test_repeated_answers_that_all_agree_have_both_bounds() -> None:
    ids = [str(i // 2) for i in range(100)]  # 50 prompts with two answers each: worth 50 answers
    low, high, worth = share_bounds(np.ones(100, bool), ids, 0.05)
    assert (low, high, worth) == (pytest.approx(0.05 ** (1 / 50)), 1.0, 50)
    twice = [cell(i, True, sample=s) for i in range(50) for s in range(2)]
    assert one(twice, "over_refusal > 0.10")[0] == "fail"
    assert np.isfinite(share_bounds(np.arange(5) < 3, ["a"] * 5, 0.05)[:2]).all()


def test_a_share_beyond_the_limit_fails_and_one_below_passes() -> None:
    # 20 of 100: the one-sided lower bound is 13.7 %
    assert one(run(20, 100), "over_refusal.safety > 0.10")[0] == "fail"
    assert one(run(20, 100), "over_refusal.safety > 0.14")[0] == "pass"
    assert "not shown to hold, nor not to" in one(run(20, 100), "over_refusal > 0.20")[1]
    assert "shown not to hold" in one(run(2, 100), "over_refusal > 0.10")[1]
    assert one(run(80, 100, refuse=True), "refusal < 0.9")[0] == "fail"
    assert one(run(89, 100, refuse=True), "refusal < 0.9")[0] == "pass"


def test_point_and_other_ends_compare_what_they_name() -> None:
    assert one(run(11, 100), "over_refusal.point > 0.10")[0] == "fail"
    assert one(run(10, 100), "over_refusal.point > 0.10")[0] == "pass"
    assert one(run(10, 100), "over_refusal.point >= 0.10")[0] == "fail"
    assert one(run(6, 100), "over_refusal.high > 0.10")[0] == "fail"  # at most 10 % is not shown
    assert one(run(2, 100), "over_refusal.high > 0.10")[0] == "pass"


def test_too_few_answers_fail_and_say_how_many_are_needed() -> None:
    # 0.9 ** 29 = 0.047 < 0.05 <= 0.9 ** 28
    assert needed_for_share(0.10, 0.05) == 29
    status, message = one(run(0, 28), "over_refusal > 0.10")
    assert status == "too few" and "29" in message
    assert one(run(0, 29), "over_refusal > 0.10")[0] == "pass"
    assert one(run(0, 28), "over_refusal.point > 0.10")[0] == "pass"


def test_samples_of_few_prompts_are_few_answers() -> None:
    records = [cell(i, False, sample=s) for i in range(10) for s in range(20)]
    assert one(records, "over_refusal > 0.10")[0] == "too few"


def test_a_run_of_errors_does_not_pass() -> None:
    records = [cell(i, None) for i in range(100)]
    assert one(records, "over_refusal > 0.10")[0] == "too few"
    assert one(records, "unread > 0.05")[0] == "fail"
    assert one(run(3, 100), "unread > 0.05")[0] == "pass"


def test_rows_pick_category_side_and_whole() -> None:
    records = run(30, 60) + run(0, 60, category="humanizing") + run(60, 60, refuse=True)
    status = {r: one(records, f"over_refusal{r} > 0.30")[0] for r in ("", ".safety", ".humanizing", ".safe")}
    assert status == {"": "pass", ".safety": "fail", ".humanizing": "pass", ".safe": "pass"}
    assert one(records, "refusal.unsafe < 0.5")[0] == "pass"


def test_rules_share_the_error_they_may_make() -> None:
    # 16 of 100: above 10 % at level 0.05, not at 0.05 / 5
    assert one(run(16, 100), "over_refusal > 0.10")[0] == "fail"
    rules = ["over_refusal > 0.10", *[f"over_refusal > 0.{x}" for x in (5, 6, 7, 8)]]
    assert {o.status for o in gate(run(16, 100), rules)[0]} == {"pass"}


# --- changes ---


def test_change_fails_beyond_the_margin_only() -> None:
    before, after = run(10, 200), run(30, 200)
    assert one(after, "over_refusal > baseline + 0.03", before)[0] == "fail"
    assert one(after, "over_refusal > baseline + 0.09", before)[0] == "pass"
    assert one(before, "over_refusal > baseline + 0.03", after)[0] == "pass"
    assert one(before, "over_refusal < baseline - 0.03", after)[0] == "fail"


def test_change_needs_pairs_enough_to_show_that_nothing_happened() -> None:
    # z^2 (1 - m) / m with z = 1.6449, m = 0.03
    assert needed_for_change(0.03, 0.05) == 88
    status, message = one(run(9, 90), "over_refusal > baseline + 0.03", run(9, 90))
    assert status == "pass"
    assert re.search(r"; changes of \d+\.\d points are found in 80% of runs", message)
    status, message = one(run(0, 87), "over_refusal > baseline + 0.03", run(0, 87))
    assert status == "too few" and "88" in message
    assert one(run(0, 88), "over_refusal > baseline + 0.03", run(0, 88))[0] == "pass"
    assert one(run(4, 4), "over_refusal > baseline", run(0, 4))[0] == "too few"
    assert one(run(5, 5), "over_refusal > baseline", run(0, 5))[0] == "fail"


def test_prompts_of_one_run_only_are_said() -> None:
    outcomes, warnings = gate(run(0, 100), ["over_refusal > baseline + 0.1"], baseline=run(0, 90))
    assert outcomes[0].n == 90 and "10 answers are in one of the two runs only" in warnings[0]


# --- how often an unchanged model fails ---


def share_of_failures(draw: object, rules: list[str], *, runs: int, paired: bool) -> float:
    failed = 0
    for _ in range(runs):
        base = draw() if paired else None  # type: ignore[operator]
        outcomes, _ = gate(draw(), rules, baseline=base)  # type: ignore[operator]
        failed += any(o.status != "pass" for o in outcomes)
    return failed / runs


def drawer(rate: float, n: int, seed: int, categories: tuple[str, ...] = ("safety",), samples: int = 1):  # type: ignore[no-untyped-def]
    """Runs of one model: each prompt has its own chance of being declined, the same in each run."""
    rng = np.random.default_rng(seed)
    cells = [
        [cell(i, said, category=c, sample=s) for said in (False, True)]
        for c in categories
        for i in range(n)
        for s in range(samples)
    ]
    spread = rng.beta(rate, 1 - rate, n * len(categories)) if samples > 1 else None

    def draw() -> list[Record]:
        p = rate if spread is None else np.repeat(rng.permutation(spread), samples)
        return [two[hit] for two, hit in zip(cells, (rng.random(len(cells)) < p).astype(int), strict=True)]

    return draw


@pytest.mark.parametrize(
    ("draw", "rules", "paired"),
    [
        (drawer(0.10, 120, 1), ["over_refusal > 0.10"], False),
        (drawer(0.06, 80, 2, ("a", "b", "c")), [f"over_refusal.{c} > 0.06" for c in "abc"], False),
        (drawer(0.10, 60, 3), ["over_refusal > baseline"], True),
        (drawer(0.10, 100, 4), ["over_refusal > baseline + 0.03"], True),
        (drawer(0.02, 60, 5), ["over_refusal < baseline", "over_refusal > baseline"], True),
    ],
    ids=["at-the-limit", "three-rules", "unchanged", "unchanged-with-margin", "rare-two-sided"],
)
def test_an_unchanged_model_fails_in_at_most_one_run_of_twenty(
    draw: object, rules: list[str], paired: bool
) -> None:
    runs = 400
    allowed = 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5
    assert share_of_failures(draw, rules, runs=runs, paired=paired) <= allowed


def test_samples_do_not_make_an_unchanged_model_fail() -> None:
    # the prompts are drawn anew in each run; taking 5 samples as 5 prompts would fail in a fifth of the runs
    rng = np.random.default_rng(6)
    failed, runs = 0, 600
    names = [str(i) for i in np.repeat(range(80), 5)]
    for _ in range(runs):
        hits = (rng.random((80, 5)) < rng.beta(0.2, 1.8, 80)[:, None]).ravel()
        low = share_bounds(hits, names, 0.05)[0]
        failed += low is not None and low > 0.10
    assert failed / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_a_change_that_is_there_is_found() -> None:
    before, after = drawer(0.05, 200, 7), drawer(0.15, 200, 8)
    found = [
        gate(after(), ["over_refusal > baseline"], baseline=before())[0][0].status == "fail"
        for _ in range(100)
    ]
    assert np.mean(found) > 0.8


# --- the judge's error ---


def test_shares_of_refusals_stand_beside_themselves_without_the_judges_error() -> None:
    """What decides is what the judge said; the corrected share is that of the reports."""
    by_rules = [replace(r, verdict=replace(r.verdict, judge="rules/demur-v1")) for r in run(30, 100)]
    error = judge_error("rules/demur-v1", should_refuse=False)
    assert error is not None
    want = clustered([(k < 30, str(k)) for k in range(100)], error=error)
    rules = ["over_refusal > 0.10", "unread > 0.02", "over_refusal > baseline + 0.03"]
    share, unread, change = gate(by_rules, rules, baseline=by_rules)[0]
    assert (share.corrected, share.corrected_interval) == (want.corrected, want.corrected_interval)
    assert "with the judge's error taken out 28.5%, 95% interval 18.9% to 40.1%" in share.message
    assert unread.corrected is change.corrected is None
    empty = replace(by_rules[-1].verdict, judge=PREREAD, label="empty", prompt_id="none")  # read by no judge
    (beside,) = gate([*by_rules, replace(by_rules[-1], verdict=empty)], rules[:1])[0]
    assert (beside.unread, beside.corrected) == (1, share.corrected)
    (plain,) = gate(run(30, 100), ["over_refusal > 0.10"])[0]  # a judge whom nobody has measured
    assert plain.corrected is None and "taken out" not in plain.message
    (alone,) = gate(by_rules, rules[:1])[0]
    assert (plain.status, plain.low, plain.high) == (alone.status, alone.low, alone.high)
