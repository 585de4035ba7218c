"""The page of two checkpoints, from a comparison written down by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from demur.explain.post_training.results import (
    Comparison,
    Confidence,
    Knowledge,
    Likeness,
    Neuron,
    Refusal,
    Transfer,
    Truth,
)
from demur.flows.explain_vs import verdict, view, write
from demur.report.explainpage import to_html
from demur.types import Rate
from tests.report.test_html import XSS, Page

RATE = Rate(k=8, n=10, low=0.5, high=0.94)
FLAT = (0.1, 0.2, None)


def comparison(**parts: object) -> Comparison:
    alike = Likeness(
        pearson=0.87,
        low=0.8,
        high=0.9,
        pearson_binned=0.8,
        difference=0.2,
        difference_key=0.1,
        spans=(6.0, 6.0),
        ceiling=0.95,
        shuffled=0.02,
    )
    patch_map = ((0.0, 4.0), (0.5, -2.0), (0.0, 0.0))
    made = {
        "knowledge": Knowledge(
            pairs=40,
            left_out=2,
            columns=("Paris", XSS),
            roles=("subject", "other"),
            maps={"base": patch_map, "tuned": patch_map},
            margins={"base": (1.0, -1.0), "tuned": (1.0, -1.0)},
            right={"base": RATE, "tuned": RATE},
            likeness={"tuned": alike},
        ),
        "truth": Truth(
            sets={"cities": 10},
            cosines=FLAT,
            ceiling=FLAT,
            layer=1,
            transfer=(
                Transfer(held_out="a", probe="base", model="tuned", centred="own", layer=1, accuracy=RATE),
            ),
            by_layer={"base on base": FLAT},
            bag_of_words={"a": RATE},
            random_labels=0.5,
        ),
        "refusal": Refusal(
            template="base",
            positions=("t_post",),
            cosines={"t_post": (0.9, 0.63, 0.1)},
            own_cosines=None,
            ceiling={"t_post": FLAT},
            auroc={"base": {"t_post": (0.5, 0.6, 0.9)}, "tuned": {"t_post": (0.5, 0.7, 0.9)}},
            bag_of_words=0.84,
            n_fit=100,
            n_test=60,
            layer=1,
            position="t_post",
        ),
        "confidence": Confidence(
            neurons={"base": (Neuron(index=3, norm=2.0, logit_var=0.01, ratio=-0.4),)},
            of=64,
            iou=0.5,
            expected=0.02,
            shared=(3,),
        ),
    }
    return Comparison(
        base="a",
        tuned="/home/me/models/b",
        base_fingerprint="f",
        tuned_fingerprint="f+g",
        layers=3,
        width=8,
        seed=0,
        notes=("refusal: a note",),
        **{**made, **parts},  # type: ignore[arg-type]
    )


def test_every_part_is_drawn_beside_its_control() -> None:
    page = to_html(view(comparison()))
    for words in ("two halves of one model", ">0.84<", "bag of words", "by chance 0.020", "refusal: a note"):
        assert words in page, words
    assert page.count("<svg") == 5  # two maps, truth, refusal and its AUROC
    assert "/home/me" not in page and "full colour: 5.0 in logits" in page  # from -1 without a copy to 4
    assert not [t for t, _ in Page(page).tags if t in ("script", "img")]


def test_a_mixed_map_is_coloured_from_the_run_of_the_model_it_was_put_into() -> None:
    k = comparison().knowledge
    assert k is not None
    mixed = replace(
        k,
        maps={"base into tuned": ((7.0, 7.0),)},
        margins={"base": (9.0, -9.0), "tuned": (9.0, 5.0)},
    )
    assert "full colour: 2.0 in logits" in to_html(view(comparison(knowledge=mixed)))


def test_the_clause_names_what_was_measured() -> None:
    found = comparison()
    assert verdict(found) == (
        "Maps of facts correlate at 0.87, truth directions have cosine 0.20, refusal directions 0.63 at layer 1"
    )
    assert verdict(comparison(knowledge=None, truth=None, refusal=None)) == "Nothing could be compared"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    html, data = write(comparison(knowledge=None), tmp_path / "vs")
    assert "Not measured" in html.read_text(encoding="utf-8") and data is not None
    stored = json.loads(data.read_text(encoding="utf-8"))
    assert stored["knowledge"] is None and stored["kind"] == "comparison" and stored["truth"]["layer"] == 1
