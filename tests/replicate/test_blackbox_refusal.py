"""The check of blackbox-refusal: the file recounts, the split is the authors', and the parts do their work."""

from __future__ import annotations

import numpy as np
import pytest

from demur import data
from demur.errors import DataUnavailable
from demur.replicate import blackbox_refusal as bb
from demur.replicate import blackbox_rows as rows
from demur.replicate.spec import Anchor, find

pytest.importorskip("sklearn")


@pytest.fixture
def here() -> None:
    try:
        data.get(*rows.FILE.split("/"))
    except DataUnavailable as e:
        pytest.skip(str(e))


def test_the_spec_is_found_and_complete() -> None:
    found = find("blackbox-refusal")
    assert found.spec is bb.SPEC
    assert {"measure/blackbox_refusal/classifier.py", "measure/blackbox_refusal/evaluation.py"} <= set(
        found.sources
    )


@pytest.mark.usefixtures("here")
def test_every_anchor_has_a_value() -> None:
    assert set(rows.recount()) == {a.key for a in bb.SPEC.anchors}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "anchor", [a for a in bb.SPEC.anchors if a.key != "forest_second"], ids=lambda a: a.key
)
def test_the_file_gives_the_counts(anchor: Anchor) -> None:
    value = rows.recount()[anchor.key]
    assert (value() if callable(value) else value) == anchor.expected


@pytest.mark.usefixtures("here")
def test_blank_rows_stay_where_they_are() -> None:
    everything, text = rows.usable(), rows.usable("response")
    assert len(everything) - len(text) == 81
    train, first, second = rows.split()
    assert sorted([*train, *first, *second]) == list(range(1706))
    assert sum(not everything[i]["response"] for i in second) == 14


@pytest.mark.usefixtures("here")
def test_templates_and_figures() -> None:
    political = rows.usable(source="political")
    assert len({r["figure"] for r in political}) == 91
    assert {r["template"] for r in political} == {template for template, _ in rows.TEMPLATES.values()}
    assert len(set(rows.groups(rows.usable(), "template"))) == 1706 - 700 + 8


def test_the_standard_error_of_an_area() -> None:
    y = np.array([1] * 30 + [0] * 50)
    at_half = np.sqrt((30 + 50 + 1) / (12 * 30 * 50))  # without a signal: that of the rank-sum test
    assert bb._se(0.5, y) == pytest.approx(at_half, rel=0.01)
    assert bb._se(None, y) is None and bb._se(1.0, y) == 0


def test_phrases_are_refusal_phrases() -> None:
    hits = [
        bool(bb._PHRASES.search(x)) for x in ("model cannot", "as an ai", "said", "the poem", "I'm sorry")
    ]
    assert hits == [True, True, False, False, True]
