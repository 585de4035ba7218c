from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError
from demur.prompts import split, stratified
from demur.types import Prompt, PromptSet, expand_expected

SHARES = {"fit": 0.5, "calibrate": 0.3, "test": 0.2}


def make(n: int, groups: int | None = None) -> PromptSet:
    return PromptSet(
        "s",
        tuple(Prompt.of(str(i), id=f"p{i}", group=f"g{i % groups}" if groups else None) for i in range(n)),
    )


def test_by_hand() -> None:
    u = int(hashlib.sha256(b"0\nid:p0").hexdigest()[:16], 16) / 2**64
    expected = "fit" if u < 0.5 else "calibrate" if u < 0.8 else "test"
    parts = split(make(200), SHARES)
    assert "p0" in {p.id for p in parts[expected]}
    assert parts["fit"].name == "s/fit"


def test_is_a_partition_in_order_of_about_the_right_size() -> None:
    s = make(2000)
    parts = split(s, SHARES, seed=3)
    assert sorted(p.id for part in parts.values() for p in part) == sorted(p.id for p in s)
    for name, share in SHARES.items():
        # four standard deviations of the binomial
        assert abs(len(parts[name]) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
        order = [int(p.text) for p in parts[name]]
        assert order == sorted(order)


@given(st.integers(0, 10_000), st.integers(50, 80))
def test_adding_prompts_moves_none(seed: int, n: int) -> None:
    place = {p.id: name for name, part in split(make(n), {"a": 0.5, "b": 0.5}, seed).items() for p in part}
    later = {
        p.id: name for name, part in split(make(n + 40), {"a": 0.5, "b": 0.5}, seed).items() for p in part
    }
    assert place.items() <= later.items()


def test_groups_stay_together_and_seeds_differ() -> None:
    s = make(300, groups=60)
    parts = split(s, SHARES)
    groups = [{p.group for p in part} for part in parts.values()]
    assert sum(map(len, groups)) == 60
    assert split(s, SHARES, seed=1)["fit"].hash != parts["fit"].hash


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan"), "b": 1.0}])
def test_bad_shares(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="add up to 1"):
        split(make(10), shares)


def test_an_empty_part_is_an_error_unless_asked_for() -> None:
    with pytest.raises(InputError, match="came out empty"):
        split(make(3), {"a": 0.999, "b": 0.001})
    assert len(split(make(3), {"a": 1.0, "b": 0.0})["b"]) == 0


def test_a_sample_takes_turns_between_the_kinds_and_is_stable() -> None:
    rows = [Prompt.of("x", id=f"a{i}", category="a", expected=expand_expected("refuse")) for i in range(20)]
    rows += [Prompt.of("x", id=f"b{i}", category="b", expected=expand_expected("refuse")) for i in range(3)]
    rows += [Prompt.of("x", id=f"c{i}", category="a", expected=expand_expected("comply")) for i in range(20)]
    prompts = PromptSet("s", tuple(rows))
    some = stratified(prompts, 13)
    assert Counter(p.id[0] for p in some) == {"a": 5, "b": 3, "c": 5}
    assert some == stratified(prompts, 13) != stratified(prompts, 13, seed=1)
    assert [p.id for p in some] == [p.id for p in rows if p in some]
    assert len(stratified(prompts, 4)) == 4 and stratified(prompts, 99) == prompts.prompts
