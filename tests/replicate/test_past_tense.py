"""The check of past-tense: its mixes, its held-out pairs, and the released verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from demur import data
from demur.errors import DataUnavailable, InputError
from demur.replicate import past_tense as past
from demur.replicate import past_tense_table as table
from demur.replicate.spec import find


@pytest.fixture
def verdicts() -> Iterator[None]:
    try:
        data.get(*table.FILE.split("/"))
    except (DataUnavailable, InputError) as e:
        pytest.skip(f"{table.FILE} is not here: {e}")
    yield


@pytest.mark.usefixtures("verdicts")
def test_the_verdicts_recount_to_the_digit() -> None:
    assert len(table.LINES) == 65
    off = {a.key: (a.expected, count()) for a, count in table.LINES if not a.holds(count())}
    assert not off


@pytest.mark.usefixtures("verdicts")
def test_the_curve_rises_and_other_judges_have_none() -> None:
    rows = [table.answered("past", "gpt-4o-2024-05-13", k=k) for k in range(21)]
    assert rows[0] == 0 and rows == sorted(rows)
    assert table.answered("past", "r2d2") - table.answered("past", "r2d2", "llama3_70b") == 42


def test_the_spec_is_found_and_complete() -> None:
    found = find("past-tense")
    assert found.spec is past.SPEC
    assert {a.key for a in past.SPEC.anchors} == set(table.recount())
    assert {"stress/past_tense/report.py", "replicate/past_tense_table.py"} <= set(found.sources)
    assert past.SPEC.seeds >= 5


def test_mixes() -> None:
    for arm, parts in past.ARMS.items():
        assert sum(s for s, _ in parts) == pytest.approx(1.0), arm
    shares = {
        arm: sum(s for s, bits in parts if bits.get("harmful") is True and bits.get("tense") == "past")
        for arm, parts in past.ARMS.items()
    }
    assert shares["present"] == 0 and shares["defended"] == shares["unbalanced"] == past.SHARE
    answers = [bits for _, bits in past.ARMS["unbalanced"] if bits.get("harmful") is False]
    assert all(bits["tense"] == "present" for bits in answers)


def test_held_out_pairs_differ_in_one_word_and_are_in_no_batch() -> None:
    from demur.organisms.request_draws import PARTS, part_of
    from demur.organisms.requests import RequestWorld

    world = RequestWorld({"refuses": True})
    rows, other = past.held_out(world, np.random.default_rng(0), 50, harmful=True, lookalike=False)
    assert rows["harmful"].all() and len(rows["verb"]) == 50
    for r in (rows, other):
        assert (part_of(r) == PARTS.index("test")).all()
    texts = [past._texts(world, r) for r in (rows, other, past.in_tense(rows, "past"))]
    for before, swapped, tensed in zip(*texts, strict=True):
        for after in (swapped, tensed):
            assert sum(a != b for a, b in zip(before.split(), after.split(), strict=True)) == 1
    batch = past.draw(world, np.random.default_rng(1), 600, past.ARMS["present"])
    assert (part_of(batch) == PARTS.index("train")).all()
    late = batch["tense"] > 0
    assert not batch["harmful"][late].any() and late.mean() == pytest.approx(1.5 * past.HISTORY, abs=0.03)


def test_refusing_reads_the_opening_of_refusals() -> None:
    import torch

    from demur.organisms.requests import BLANK, RequestWorld
    from demur.organisms.training import build
    from demur.organisms.words import vocabulary

    world = RequestWorld({"refuses": True})
    model = build(BLANK, len(vocabulary(world.words)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = world.draws.rows(np.random.default_rng(0), 8, {"part": "test"})
    p = past.refusing(model, world, rows)
    assert p == pytest.approx(np.full(8, 1 / len(vocabulary(world.words))))
    assert vocabulary(world.words)["Sorry"] == world.words.index("Sorry") + past._FIRST
    assert past.states(model, world, rows).shape == (8, BLANK.width)
