"""The check of overt: its simulated runs have the effects they need, and the public files recount."""

from __future__ import annotations

import numpy as np
import pytest

from demur import data
from demur.errors import DataUnavailable, InputError
from demur.replicate import overt
from demur.replicate.spec import Anchor, find


def test_the_spec_is_found_and_complete() -> None:
    found = find("overt")
    assert found.spec is overt.SPEC
    assert "measure/overt/pairs.jsonl" in found.sources
    assert set(overt.recount()) == {a.key for a in overt.SPEC.anchors}


def test_intervals_hold_unless_failures_count_as_refusals() -> None:
    hits = overt.coverage(np.random.default_rng(0), 60)
    assert len(hits["macro"]) == 60 and len(hits["youden"]) == 540
    assert np.mean(hits["macro"]) > 0.88 and np.mean(hits["youden"]) > 0.9
    assert np.mean(hits["naive"]) < 0.6


def test_what_a_system_chose_makes_it_look_worse_than_its_equal() -> None:
    chosen, everything = overt.selection(np.random.default_rng(1), 600)
    assert 30 < len(chosen) < 300 and len(everything) == 600
    assert np.mean(chosen) > 0.1 > 0.06 > abs(np.mean(everything))


def test_words_tell_no_twins_apart() -> None:
    gaps = overt.pair_gaps(overt.by_words)
    assert len(gaps) == 42 and not any(gaps)
    harmful = overt.pair_gaps(lambda prompts: {p.id: float(bool(p.should_refuse)) for p in prompts})
    assert set(harmful) == {1.0}
    tossed = overt.at_random(np.random.default_rng(2), 0.6, 20)
    assert len(tossed) == 840 and abs(np.mean(tossed)) < 0.06


@pytest.mark.parametrize("anchor", overt.SPEC.anchors, ids=lambda a: a.key)
def test_the_public_files_give_the_counts(anchor: Anchor) -> None:
    for need in anchor.needs:
        try:
            data.get(*need.split("/"))
        except (DataUnavailable, InputError) as e:
            pytest.skip(f"{need} is not here: {e}")
    assert overt.recount()[anchor.key]() == anchor.expected
