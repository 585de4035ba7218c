"""Pairs of runs: intervals and tests of a change, and what may be compared at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from demur.errors import InputError
from demur.measure.paired import compare, compare_pairs, flip_test, match, score_interval
from demur.measure.refusal import Record
from demur.types import Label, Prompt, Reply, Verdict

COMPLY = frozenset({Label.COMPLIANCE})


def record(
    id: str,
    declined: bool | None,
    *,
    text: str | None = None,
    judge: str = "j",
    condition: str = "default",
    sample: int = 0,
    group: str | None = None,
    category: str | None = None,
) -> Record:
    label = Label.ERROR if declined is None else Label.FULL_REFUSAL if declined else Label.COMPLIANCE
    key = {"prompt_id": id, "condition": condition, "sample": sample}
    prompt = Prompt.of(text or f"Name {id}.", id=id, expected=COMPLY, group=group, category=category)
    return Record(prompt, Reply(**key, content="x"), Verdict(**key, label=label, judge=judge))


def z_of(b: int, c: int, n: int, d: float) -> float:
    """Tango's statistic by its definition: the likelihood maximised under p12 - p21 = d, numerically."""

    def minus_log(q: float) -> float:
        cells = np.array([b, c, n - b - c]) * np.log(np.array([q + d, q, 1 - d - 2 * q]))
        return -float(cells.sum())

    edges = (max(0.0, -d) + 1e-12, (1 - d) / 2 - 1e-12)
    q = float(optimize.minimize_scalar(minus_log, bounds=edges, method="bounded", options={"xatol": 1e-12}).x)
    return (b - c - n * d) / float(np.sqrt(n * (2 * q + d - d * d)))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (3, 9, 40), (5, 5, 200)])
def test_score_interval_inverts_the_score_test(b: int, c: int, n: int) -> None:
    low, high = score_interval(b, c, n)
    assert z_of(b, c, n, low) == pytest.approx(1.959964, abs=1e-3)
    assert z_of(b, c, n, high) == pytest.approx(-1.959964, abs=1e-3)


def test_score_interval_at_the_edges() -> None:
    z2 = 1.959964**2
    assert score_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-6)
    assert score_interval(20, 0, 20) == pytest.approx(((20 - z2) / (20 + z2), 1.0), abs=1e-6)


def test_flip_test_is_the_enumeration_of_signs() -> None:
    totals = np.array([3, -1, 2, 1, 0])
    sums = [
        sum(s * abs(t) for s, t in zip(signs, totals, strict=True))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    greater, less = flip_test(totals)
    assert greater == pytest.approx(np.mean([s >= totals.sum() for s in sums]))
    assert less == pytest.approx(np.mean([s <= totals.sum() for s in sums]))


def test_single_answers_give_mcnemar() -> None:
    a = [True] * 4 + [False] * 96
    b = [False] * 3 + [True] * 13 + [False] * 84
    made = compare(a, b)
    assert (made.gained, made.lost, made.a, made.b) == (12, 3, 4, 13)
    assert made.p_value == pytest.approx(stats.binomtest(12, 15, 0.5).pvalue)
    assert made.difference == pytest.approx(0.09)
    assert made.effective == pytest.approx((12, 3, 100))
    assert made.bootstrap is not None and made.bootstrap[0] < 0.09 < made.bootstrap[1]


def test_copies_of_an_answer_add_nothing() -> None:
    a, b = [False] * 30, [True] * 6 + [False] * 24
    single = compare(a, b)
    copied = compare(np.repeat(a, 5), np.repeat(b, 5), [str(i) for i in np.repeat(range(30), 5)])
    assert copied.interval == pytest.approx(single.interval, abs=1e-6)
    assert copied.p_value == pytest.approx(single.p_value)
    assert (copied.n, copied.clusters) == (150, 30)


def test_no_flips_still_leave_doubt_and_nothing_is_undefined() -> None:
    made = compare([True] * 40, [True] * 40)
    assert made.interval is not None and made.interval[1] > 0.05
    assert made.p_value == 1 and made.detectable is not None
    empty = compare([], [])
    assert (empty.difference, empty.interval, empty.detectable, empty.p_value) == (None, None, None, 1.0)


def test_interval_covers_the_change_of_clustered_answers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    runs = 250
    for _ in range(runs):
        taste = rng.beta(0.5, 1.5, 60)  # prompts differ, so their samples move together
        a = rng.random((60, 4)) < taste[:, None]
        b = rng.random((60, 4)) < np.minimum(taste + 0.1 * (taste < 0.9), 1)[:, None]
        made = compare(a.ravel(), b.ravel(), [str(i) for i in np.repeat(range(60), 4)])
        truth = 0.1 * float((taste < 0.9).mean())
        covered += made.interval is not None and made.interval[0] <= truth <= made.interval[1]
    assert 0.92 <= covered / runs <= 0.99


def test_match_joins_by_id_and_names_what_is_left() -> None:
    a = [record("1", True), record("2", False), record("3", False)]
    b = [record("3", True), record("1", True), record("4", None)]
    joined = match(a, b)
    assert [(x.prompt.id, y.prompt.id) for x, y in joined.pairs] == [("3", "3"), ("1", "1")]
    assert [r.prompt.id for r in joined.only_a] == ["2"]
    assert [r.prompt.id for r in joined.only_b] == ["4"]
    assert compare_pairs(joined.pairs).gained == 1


def test_one_condition_each_is_compared_with_a_warning_and_several_by_name() -> None:
    joined = match([record("1", True)], [record("1", False, condition="system")])
    assert len(joined.pairs) == 1 and "system" in joined.warnings[0]
    several = [record("1", True, condition=c) for c in ("x", "y")]
    joined = match(several, [record("1", False, condition="y")])
    assert len(joined.pairs) == 1 and len(joined.only_a) == 1


def test_relabelled_prompts_are_said() -> None:
    joined = match([record("1", True)], [record("1", True, category="safety")])
    assert "another category" in joined.warnings[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record("1", True, judge="k"), "judged by j and by k"),
        (record("1", True, text="Something else."), "another text"),
        (record("9", True), "no prompt id in common"),
    ],
)
def test_what_cannot_be_compared_is_an_error(other: Record, message: str) -> None:
    with pytest.raises(InputError, match=message):
        match([record("1", True)], [other])
