"""The card's section on depth: what it asks, what it costs, how it is drawn, and that it fails alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur import prompts
from demur.flows import card as flow
from demur.flows import section_depth
from demur.flows.card import card
from demur.flows.sections import SECTIONS, affordable
from demur.runtime.local import LocalRuntime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Label, Prompt, PromptSet
from tests.report.test_html import Page
from tests.runtime.tiny import tiny_runtime, tiny_tokenizer

KINDS = ("humanizing", "unsupported")


def asked() -> PromptSet:
    """Two requests to refuse of each of three categories, and two harmless ones of each, in known words."""
    words = ("egg", "fjord", "cat", "dog", "story", "poem")
    rows = [
        Prompt.of(
            f"tell me about {word} {category[:1]}",
            id=f"{category}-{side}-{word}",
            category=category,
            expected=frozenset({label}),
        )
        for category in (*KINDS, "safety")
        for side, label in (("refuse", Label.FULL_REFUSAL), ("comply", Label.COMPLIANCE))
        for word in words[:2]
    ]
    return PromptSet("tiny", tuple(rows))


def made(out: Path, runtime: Any = None, baseline: Any = None, **options: Any) -> dict[str, Any]:
    card(
        runtime or tiny_runtime(control=True),
        asked(),
        out,
        baseline=baseline or tiny_runtime(),
        progress=False,
        texts=2,
        condition=Condition(max_new_tokens=2),
        **{"budget": None, **options},
    )
    found: dict[str, Any] = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    # reading states of the packaged prompts is not what is tested here
    monkeypatch.setattr(flow, "states_stages", lambda *_a, **_k: [])


def test_the_section_holds_both_curves_with_n_and_interval(tmp_path: Path) -> None:
    section = made(tmp_path / "run")["sections"]["depth"]
    values = section["values"]
    # safety is left out on the side to refuse: 4 requests to refuse, 6 harmless ones
    assert values["asked"] == 10 and 0 < values["forced"] <= 10
    assert {p["group"] for p in values["curves"]} == {"should refuse", "should answer"}
    for p in values["curves"]:
        if p["value"] is not None and p["n"]:
            assert p["low"] <= p["value"] <= p["high"]
    deepest = [p for p in values["curves"] if p["curve"] == "reheader" and p["depth"] == 32]
    assert len(deepest) == 2
    [table, _] = section["tables"]
    assert table["columns"][:2] == ["depth", "n"] and len(table["rows"]) == len(section_depth.DEPTHS)
    assert any("xstest" in note for note in section["notes"])
    page = (tmp_path / "run" / "card.html").read_text(encoding="utf-8")
    assert "How deep" in page and "Refusal behind forced tokens" in page
    assert not [t for t, _ in Page(page).tags if t == "script"]
    stream = (tmp_path / "run" / "depth.jsonl").read_bytes()
    assert made(tmp_path / "run")["sections"]["depth"] == section
    assert (tmp_path / "run" / "depth.jsonl").read_bytes() == stream  # read again, not made again


def test_only_a_local_model_with_a_base_is_asked() -> None:
    some, plain = asked(), Condition()
    one = section_depth.depth_stages(tiny_runtime(control=True), tiny_runtime(), some, plain, None)
    assert [s.name for s in one] == ["depth"]
    assert one[0].seconds == pytest.approx(30 * 10 / 30, abs=0.1)
    assert section_depth.depth_stages(tiny_runtime(control=True), None, some, plain, None) == []
    assert section_depth.depth_stages(ScriptedRuntime({"*": "Yes."}), tiny_runtime(), some, plain, None) == []
    benign = PromptSet("b", tuple(p for p in some if not p.should_refuse))
    assert section_depth.depth_stages(tiny_runtime(), tiny_runtime(), benign, plain, None) == []


def test_a_template_without_a_header_costs_the_section_only(tmp_path: Path) -> None:
    bare = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    runtime = LocalRuntime(tiny_runtime().model, tiny_tokenizer(), name="bare", template=bare)
    found = made(tmp_path / "run", runtime, runtime)["sections"]["depth"]
    assert "no header" in found["missing"]


def test_without_a_base_the_card_says_what_to_do(tmp_path: Path) -> None:
    card(
        tiny_runtime(),
        asked(),
        tmp_path / "run",
        progress=False,
        texts=1,
        condition=Condition(max_new_tokens=2),
    )
    found = json.loads((tmp_path / "run" / "card.json").read_text())["sections"]["depth"]
    assert "demur lab depth FILE" in found["missing"]


def test_its_cost_is_declared_and_fits_the_default_card() -> None:
    n = len(prompts.core("test"))
    usual = {"scores": 0.1 * n, "scores-tense": 32.0, "texts": 150.0, "texts-baseline": 50.0}
    states = {"where": 0.06 * (2 * 530 + 120), "changed": 0.06 * 350}
    [stage] = section_depth.depth_stages(
        tiny_runtime(control=True), tiny_runtime(), prompts.core("test"), Condition(), None
    )
    assert len(stage.prompts) == section_depth.REFUSE + section_depth.ANSWER
    assert all(p.category in section_depth_categories() for p in stage.prompts if p.should_refuse)
    assert stage.seconds <= 40
    every = usual | states | {"depth": stage.seconds}
    assert affordable(every, flow.DEFAULT_BUDGET) == {}
    assert "depth" in affordable(every, flow.DEFAULT_BUDGET - 20)
    assert [s.optional for s in SECTIONS if s.slug == "depth"] == [True]


def section_depth_categories() -> frozenset[str]:
    from demur.measure.depth import UNHARMFUL

    assert "safety" not in UNHARMFUL
    return UNHARMFUL
