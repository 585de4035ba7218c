"""The figures in the model card and on the method page are those that `measure.py` stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur.files import load_operating_point

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "packages" / "demur-smollm2"
MEASURED = json.loads((PACKAGE / "measured.json").read_text(encoding="utf-8"))
POINT = load_operating_point(PACKAGE / "src" / "demur_smollm2" / "adapter" / "operating_point.yaml")
MODEL_CARD = (PACKAGE / "README.md").read_text(encoding="utf-8")
METHOD_PAGE = (REPO / "docs" / "refusal-tokens.md").read_text(encoding="utf-8")


def figure(value: float, interval: list[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def test_they_were_measured_on_the_shipped_weights() -> None:
    assert MEASURED["adapter"] == POINT.model_fingerprint
    assert MEASURED["dtype"] == POINT.dtype == "float32"


@pytest.mark.parametrize("name", MEASURED["sets"])
def test_ranking(name: str) -> None:
    found = MEASURED["sets"][name]
    accuracy = found["category_accuracy"]
    auroc = figure(found["auroc"], found["interval"])
    assert auroc in MODEL_CARD.replace("**", "")
    assert figure(accuracy["value"], [accuracy["low"], accuracy["high"]]) in MODEL_CARD
    assert f"| {found['words']['auroc']:.3f} |" in MODEL_CARD


@pytest.mark.parametrize("category", MEASURED["operating_point"])
def test_operating_point(category: str) -> None:
    found: dict[str, Any] = MEASURED["operating_point"][category]
    wrong, right = found["false_refusals_test"], found["refused_test"]
    assert found["tau"] == POINT.thresholds[category].tau
    row = f"| {category} | {found['tau']:.3f} | {wrong['k']} of {wrong['n']} | {right['k']} of {right['n']} |"
    assert row in MODEL_CARD


@pytest.mark.parametrize("page", [MODEL_CARD, METHOD_PAGE], ids=["model card", "method page"])
def test_what_falls_short_is_said(page: str) -> None:
    use = MEASURED["usefulness"]
    kept = use["still_answered"]
    assert str(kept["k"]) in page and str(use["answered_by_base"]) in page
    assert f"{kept['value']:.0%}".replace("%", " %") in page
    low, high = use["interval"]
    assert f"{use['nll_ratio']:.2f} [{low:.2f}, {high:.2f}]" in page
    (agreed,) = MEASURED["agreement"].values()
    assert f"{agreed['k']} of {agreed['n']} answers" in page
