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


CHECKS = json.loads((PACKAGE / "any_depth.json").read_text(encoding="utf-8"))
CHECKS_PAGE = (REPO / "docs" / "any-depth-alignment.md").read_text(encoding="utf-8").replace("\n", " ")


def counted(rate: dict[str, Any]) -> str:
    return f"{rate['k']} of {rate['n']}, {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def test_checks_inside_answers_were_measured_on_the_shipped_weights() -> None:
    assert CHECKS["adapter"] == POINT.model_fingerprint


@pytest.mark.parametrize("reader", ["probe", "mass", "last_token"])
def test_readers_inside_answers(reader: str) -> None:
    found = CHECKS["readers"][reader].values()
    row = " | ".join(f"{a['auroc']:.2f} [{a['interval'][0]:.2f}, {a['interval'][1]:.2f}]" for a in found)
    assert f"| {row} |" in CHECKS_PAGE


def test_stops_inside_answers() -> None:
    for part in ("without_checks", "look_ahead"):
        assert " | ".join(counted(at["to_stop"]) for at in CHECKS[part].values()) in CHECKS_PAGE
    for check, wanted in (("any-depth-probe", "0.882"), ("any-depth-mass", "0.971")):
        found = CHECKS["budget"][check]
        assert f"{found['threshold']:.3f}" == wanted and wanted in CHECKS_PAGE
        for kind in ("ordinary", "to_stop"):
            low, high = (found["stopped"]["0.5"][kind][end] for end in ("low", "high"))
            assert f"[{low:.2f}, {high:.2f}]" in CHECKS_PAGE
    costs = {(c["layer"], c["rows"]): f"{100 * c['share']:.1f} %" for c in CHECKS["cost"]}
    assert costs == {(15, 8): "2.2 %", (27, 8): "4.1 %", (15, 1): "1.7 %", (27, 1): "2.7 %"}
    assert all(share in CHECKS_PAGE for share in costs.values())
