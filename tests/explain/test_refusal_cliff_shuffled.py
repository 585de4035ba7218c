"""Traces, drops and curve of shuffled labels, against readers shuffled by hand."""

import dataclasses

import numpy as np
import pytest

from demur.explain.refusal_cliff import (
    cliff,
    curve,
    fit_probes,
    shuffled_curve,
    shuffled_drops,
    shuffled_traces,
    trace,
)
from demur.explain.refusal_cliff.tracing import By, fit_reader, gather
from tests.explain.test_refusal_cliff import MARKUP, thoughts
from tests.runtime.tiny import tiny_runtime

pytest.importorskip("sklearn")


@pytest.mark.parametrize("by", ["groups", "final"])
def test_one_draw_is_the_curve_of_probes_with_permuted_labels(by: By) -> None:
    runtime, labelled, some = tiny_runtime(), thoughts(40), thoughts(9, seed=4)
    probes = fit_probes(runtime, labelled, layer=1, markup=MARKUP)
    y = np.random.default_rng(3).permutation([bool(t.refused) for t in labelled])
    X = gather(runtime, labelled, 1, MARKUP, None)
    readers = {name: fit_reader(H, y[owner]) for name, (H, owner) in X.items()}
    by_hand = dataclasses.replace(probes, final=readers.pop("final"), groups=readers)
    traced = trace(runtime, by_hand, some, by=by)
    expected = curve(traced)
    drawn = shuffled_traces(runtime, labelled, some, probes, by=by, draws=1, seed=3)
    assert shuffled_drops(drawn) == pytest.approx([np.median([cliff(t).drop for t in traced])], abs=1e-6)
    found = shuffled_curve(drawn)
    assert [(p.span, p.place, p.n) for p in found] == [(p.span, p.place, p.n) for p in expected]
    assert [p.median for p in found] == pytest.approx([p.median for p in expected], abs=1e-6)
    assert all(p.low == p.median == p.high for p in found)


def test_many_draws_spread_around_one_half() -> None:
    runtime, labelled = tiny_runtime(), thoughts(40)
    probes = fit_probes(runtime, labelled, markup=MARKUP)
    drawn = shuffled_traces(runtime, labelled, thoughts(9, seed=4), probes, draws=40)
    found, drops = shuffled_curve(drawn), shuffled_drops(drawn)
    assert len(set(drops.tolist())) == 40 and abs(np.median(drops)) < 0.1
    assert all(p.low < 0.5 < p.high and 0.35 < p.median < 0.65 for p in found)
