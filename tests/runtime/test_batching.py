"""The batch plan: a permutation, within budget, pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.runtime.batching import common_prefix, plan, windows

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


@given(LENGTHS, st.integers(1, 2000))
def test_plan_is_a_permutation_within_budget(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
    assert plan(list(lengths), budget) == batches


@given(LENGTHS, st.integers(1, 2000))
def test_plan_sorts_and_fills(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    order = [lengths[i] for b in batches for i in b]
    assert order == sorted(order, reverse=True)
    for batch in batches[:-1]:
        head = lengths[batch[0]]
        following = batches[batches.index(batch) + 1]
        assert head * (len(batch) + 1) > budget, f"{following[0]} would have fitted"


def test_plan_by_hand() -> None:
    # sorted 9, 4, 3; budget 8: 9 alone, then 4 x 2 = 8 fits
    assert plan([3, 9, 4], 8) == [[1], [2, 0]]
    assert plan([2, 2, 2], 4) == [[0, 1], [2]]  # equal lengths keep their order
    assert plan([], 4) == []
    with pytest.raises(ValueError, match="token budget 0"):
        plan([1], 0)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6))
def test_common_prefix_is_the_longest(rows: list[list[int]]) -> None:
    n = common_prefix(rows)
    assert all(row[:n] == rows[0][:n] for row in rows)
    if rows and min(map(len, rows)) > n:
        assert len({row[n] for row in rows}) > 1


def test_windows_do_not_read_ahead() -> None:
    taken: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for i in range(10):
            taken.append(i)
            yield i

    stream = windows(source(), 4)
    assert next(stream) == [0, 1, 2, 3]
    assert taken == [0, 1, 2, 3]
    assert list(stream) == [[4, 5, 6, 7], [8, 9]]
