"""The card's sections from hidden states, on planted states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demur import prompts
from demur.flows import card as flow
from demur.flows import explain_fit, where
from demur.flows.card import card
from demur.flows.collect import Stage
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, PromptSet
from tests.flows.planted import SIZES, Planted
from tests.report.test_html import Page

KEYWORDS = dict(explain_fit.fit_model.__kwdefaults__ or {})


@pytest.fixture(autouse=True, scope="module")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(where, "SIZES", SIZES)
        patch.setattr(explain_fit.fit_model, "__kwdefaults__", {**KEYWORDS, "sizes": SIZES})
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "run"
    made(folder)
    return folder


def sections(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "card.json").read_text(encoding="utf-8"))["sections"]
    return found


def made(out: Path, **options: Any) -> dict[str, Any]:
    asked = PromptSet("core/test", prompts.stratified(prompts.core("test"), 60))
    options = {"baseline": Planted(declines=False), "texts": 2, "budget": None, **options}
    card(Planted(), asked, out, progress=False, condition=Condition(max_new_tokens=2), **options)
    found: dict[str, Any] = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return found


def test_where_it_lives(out: Path) -> None:
    section = sections(out)["where"]
    values = section["values"]
    assert set(values["maps"]) == {"harmful t_inst", "harmful t_post", "refuse t_inst", "refuse t_post"}
    assert (
        min(values["maps"]["harmful t_inst"][1:]) > 0.95 and len(values["cosines"]) == values["layers"] == 3
    )
    assert max(map(abs, values["cosines"])) < 0.5  # planted on two axes
    table = {row[0]: row[1:] for row in section["tables"][1]["rows"]}
    # what is to refuse and not harmful is believed harmless, and refused; all else agrees (up to planted noise)
    asked = prompts.stratified(prompts.core("test"), 60)
    harmful = sum(map(explain_fit.is_harmful, asked))
    other = sum(bool(p.should_refuse) for p in asked) - harmful
    expected = {"harmful, will refuse": harmful, "harmless, will refuse": other, "harmless, will answer": 60}
    expected["harmless, will answer"] -= harmful + other
    for words, n in expected.items():
        assert abs(sum(table[f"believed {words}"]) - n) <= 4, words
    page = (out / "card.html").read_text(encoding="utf-8")
    assert "Where it lives" in page and "What changed inside" in page
    assert not [t for t, _ in Page(page).tags if t == "script"]


def test_what_changed(out: Path) -> None:
    values = sections(out)["changed"]["values"]
    harm, refuse = values["axes"]["harmful"], values["axes"]["refuse"]
    assert min(harm["cosines"][1:]) > 0.95 and max(refuse["cosines"][1:]) < 0.9
    assert min(harm["auroc"]["base"][1:] + harm["auroc"]["tuned"][1:]) > 0.95
    assert min(harm["halves"][1:]) > 0.9 > 0.6 > abs(harm["halves"][0])  # layer 0 is noise
    assert refuse["auroc"]["tuned"][2] > 0.95 > 0.8 > refuse["auroc"]["base"][2]
    shift = {(s["axis"], s["group"]): s["tuned"] - s["base"] for s in values["shifts"]}
    assert shift["refuse", "to refuse"] > 1 and shift["refuse", "to answer"] < -1
    assert abs(shift["harmful", "to refuse"]) < 0.5 and abs(shift["harmful", "to answer"]) < 0.5


def test_a_finished_reading_is_not_made_again_and_gives_the_same_bytes(out: Path) -> None:
    first = {f.name: f.read_bytes() for f in out.glob("*.json*")}
    stamps = {n: (out / n).stat().st_mtime_ns for n in ("where.jsonl", "changed.jsonl")}
    made(out)
    assert {f.name: f.read_bytes() for f in out.glob("*.json*")} == first
    assert {n: (out / n).stat().st_mtime_ns for n in stamps} == stamps


def test_share_leaves_the_prompts_out(tmp_path: Path) -> None:
    shared = made(tmp_path / "run", share=True)
    text = json.dumps(shared["sections"]["where"]) + (tmp_path / "run" / "card.html").read_text(
        encoding="utf-8"
    )
    assert not [p.text for p in prompts.core("test") if len(p.text) > 15 and p.text in text]


def test_without_states_the_card_says_why(tmp_path: Path) -> None:
    asked = PromptSet("s", prompts.core("test").prompts[:6])
    card(ScriptedRuntime({"*": "Yes."}), asked, tmp_path / "run", progress=False)
    found = sections(tmp_path / "run")
    assert "endpoint" in found["where"]["missing"] and "--vs BASE TUNED" in found["changed"]["missing"]


def test_what_it_costs_is_declared_and_the_budget_leaves_it_out(tmp_path: Path) -> None:
    sample, plain = PromptSet("s", prompts.core("test").prompts[:10]), Condition()
    one, two = where.states_stages(Planted(), Planted(declines=False), sample, plain)
    every = sum(SIZES.values())
    assert (one.passes, two.passes) == (2 * every + 10, SIZES["train"] + SIZES["test"])
    assert one.seconds == pytest.approx(0.06 * one.passes) and isinstance(one, Stage)
    (bare,) = where.states_stages(Planted(control=False), None, sample, plain)
    assert bare.passes == every + 10  # without control tokens only harmfulness
    (full,) = where.states_stages(Planted(control=False), None, sample, plain, full=True)
    assert full.passes > 5 * every
    found = made(tmp_path / "run", budget=30)["sections"]
    assert "Run with --full" in found["where"]["missing"]


def test_the_default_card_fits_its_budget() -> None:
    from demur.flows.sections import affordable

    n = len(prompts.core("test"))
    usual = {"scores": 0.1 * n, "scores-tense": 32.0, "texts": 150.0, "texts-baseline": 50.0}
    states = {"where": 0.06 * (2 * 530 + 120), "changed": 0.06 * 350}
    assert sum(explain_fit.SIZES.values()) == 530
    assert affordable(usual | states, flow.DEFAULT_BUDGET) == {}
