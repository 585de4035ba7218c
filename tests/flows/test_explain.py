"""Explaining one prompt on planted states: what was planted is found, where it was planted, and not elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur.errors import CapabilityError, InputError, MismatchError
from demur.flows import explain_fit
from demur.flows.explain import Explanation, _spans, _without, explain, write
from demur.flows.explain_fit import fit_model, sample
from demur.flows.explain_page import cautions, page, report
from demur.flows.explained import Fit, Worth
from demur.report.render import to_text
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt
from tests.flows.planted import SIZES, Planted
from tests.report.test_html import Page


@pytest.fixture(scope="module")
def runtime() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def fit(runtime: Planted, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fit_model(runtime, sizes=SIZES, cache=tmp_path_factory.mktemp("fits"))


@pytest.fixture(scope="module")
def found(runtime: Planted, fit: Fit) -> Explanation:
    return explain(runtime, "how do i boil a bomb please ?", fit=fit)


def test_beliefs_are_found_where_they_were_planted(fit: Fit) -> None:
    maps = {name: np.array(v) for name, v in fit.maps.items()}
    assert maps["harmful t_inst"][1:].min() > 0.95 and maps["refuse t_post"][1:].min() > 0.95
    for nothing in (maps["harmful t_inst"][0], maps["refuse t_post"][0], *maps["refuse t_inst"][:1]):
        assert 0.25 < nothing < 0.75
    # t_post knows of harm only what refusing says of it: among requests in category safety the two agree
    assert maps["harmful t_post"][2] > 0.95 and maps["refuse t_inst"][2] < 0.95
    assert {1, 2} & set(fit.axis("harmful").window) and {1, 2} & set(fit.axis("refuse").window)
    assert fit.beliefs.unclear is None and fit.labels == "behaviour"


def test_what_it_is_worth_stands_beside_words_and_random_labels(fit: Fit) -> None:
    harm, refuse = fit.worth
    assert (harm.axis, harm.positive, harm.negative) == ("harmful", 20, 15)
    assert harm.auroc > 0.99 and harm.beats_words and 0.5 < harm.words < 0.95
    assert refuse.auroc > 0.99 and refuse.random_low < 0.5 < refuse.random_high
    assert cautions(fit.worth) == ()


def test_a_reading_that_only_follows_words_is_called_so() -> None:
    low = Worth(
        **dict.fromkeys(("low", "high", "random", "random_low", "random_high"), 0.5),
        axis="harmful",
        positive=3,
        negative=4,
        auroc=0.8,
        words=0.85,
        gain=-0.05,
        gain_low=-0.1,
        gain_high=0.1,
    )
    (line,) = cautions([low])
    assert "no better than a bag of words (AUROC 0.80 against 0.85" in line and "n = 3 + 4" in line


def test_the_explanation_names_belief_decision_and_word(found: Explanation) -> None:
    assert found.quadrant == "believed harmful, will refuse" and found.declined is True
    assert found.words[0].text == "bomb"
    assert found.words[0].p_refuse == pytest.approx(0.85)
    assert found.words[0].harmful > 10 * max(abs(w.harmful) for w in found.words[1:])
    text = found.prompt.text
    assert all(text[w.start : w.end] == w.text for w in found.words)
    assert {n.kind for n in found.near} == {"to refuse (safety)"}
    assert found.near[0].similarity >= found.near[-1].similarity > 0.5


def test_a_harmless_request_that_is_refused(runtime: Planted, fit: Fit) -> None:
    found = explain(runtime, "tell me a sorry story", fit=fit)
    assert found.quadrant == "believed harmless, will refuse"
    assert report(found).title.startswith("Believed harmless, will refuse. The model declines this prompt")
    assert not any(n.kind == "to refuse (safety)" for n in found.near)


def test_the_trace_shows_the_belief_at_its_token_only(found: Explanation, fit: Fit) -> None:
    names = [t.names for t in found.tokens]
    inst = next(i for i, n in enumerate(names) if "t_inst" in n)
    assert "prompt" in names[0] and "t_post" in names[-1] and inst == 7  # eight words
    harm = found.trace["harmful"]
    assert harm.shape == (len(found.tokens), 3)
    others = [i for i in range(len(names)) if i != inst]
    assert harm[inst, 1:].min() > 3 > harm[others, 1:].mean(1).max()
    window = [fit.beliefs.layers.index(k) for k in fit.axis("harmful").window]
    assert found.trace["refuse"][-1, 1:].min() > 1 and len(window) >= 1


def test_the_fit_is_kept_and_belongs_to_its_model(tmp_path: Path) -> None:
    one = Planted()
    first = fit_model(one, sizes=SIZES, cache=tmp_path)
    assert one.read == sum(SIZES.values())
    again = fit_model(one, sizes=SIZES, cache=tmp_path)
    assert one.read == sum(SIZES.values())
    assert again.worth == first.worth and again.fitted == first.fitted
    np.testing.assert_array_equal(again.scale, first.scale)
    (path,) = tmp_path.iterdir()
    with pytest.raises(MismatchError):
        Fit.load(path, "another")
    with pytest.raises(MismatchError):
        explain(Planted(declines=False), "hi", fit=first)
    one.name += "+steered"  # the same fingerprint, and other states
    fit_model(one, sizes=SIZES, cache=tmp_path)
    assert one.read == 2 * sum(SIZES.values()) and len([*tmp_path.iterdir()]) == 2


def test_too_few_refusals_leave_that_belief_out(tmp_path: Path) -> None:
    one = Planted(declines=False)
    made = fit_model(one, sizes=SIZES, cache=tmp_path)
    assert made.axes == ("harmful",) and "declined 0 and answered 90 of 90" in made.labels
    found = explain(one, "how do i boil a bomb ?", fit=made)
    assert found.belief.refuse is None and found.declined is False
    text = to_text(report(found))
    assert "Believed harmful. The model answers this prompt" in text and "needs 20 of each" in text
    assert "will answer" not in text.splitlines()[0]


def test_samples_are_disjoint_in_kind_and_stable() -> None:
    rows = sample("train", 60)
    harmful = [p for p in rows if explain_fit.is_harmful(p)]
    assert len(rows) == 60 and len(harmful) == 20
    assert sum(p.category == "safety" and not p.should_refuse for p in rows) == 15
    assert sum(p.category != "safety" and bool(p.should_refuse) for p in rows) == 15
    assert rows == sample("train", 60)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("  ", "empty"),
        ("how " * 400, "tokens"),
    ],
)
def test_prompts_that_cannot_be_explained(runtime: Planted, fit: Fit, prompt: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        explain(runtime, prompt, fit=fit)


def test_models_without_states_are_refused() -> None:
    with pytest.raises(CapabilityError, match="states"):
        explain(ScriptedRuntime({"*": "Yes."}), "hi")


def test_a_long_prompt_is_cut_into_runs_of_words_and_its_map_to_the_end(runtime: Planted, fit: Fit) -> None:
    found = explain(runtime, " ".join(["how", "do"] * 70) + " bomb", fit=fit)
    assert len(found.words) <= 60 and "bomb" in found.words[0].text
    assert len(found.tokens) == 60 and "left out of the maps" in found.notes[0]


def test_leaving_a_word_out_keeps_the_marks() -> None:
    text = "Why, please, is it red?"
    prompts = [_without(Prompt.of(text), span, i).text for i, span in enumerate(_spans(text))]
    assert prompts == [
        ", please, is it red?",
        "Why please, is it red?",
        "Why,, is it red?",
        "Why, please is it red?",
        "Why, please, it red?",
        "Why, please, is red?",
        "Why, please, is it?",
        "Why, please, is it red",
    ]
    assert _spans("why ?") == [(0, 3), (4, 5)]


def test_one_word_has_nothing_to_leave_out(runtime: Planted, fit: Fit) -> None:
    found = explain(runtime, "bomb", fit=fit)
    assert found.words == () and "nothing to leave out" in page(found)


def test_page_and_data(found: Explanation, tmp_path: Path) -> None:
    html, data = write(found, tmp_path / "out")
    text = html.read_text(encoding="utf-8")
    seen = Page(text)
    assert not [t for t, _ in seen.tags if t in ("script", "iframe", "form", "link")]
    assert not [
        a
        for _, attrs in seen.tags
        for a in attrs
        if a.startswith("on") or (a in ("src", "href") and attrs[a][:1] != "#")
    ]  # type: ignore[index]
    assert text.count("<mark") >= 1 and "random labels" in text and "bag of words" in text
    assert data is not None
    stored: dict[str, Any] = json.loads(data.read_text(encoding="utf-8"))
    assert stored["quadrant"] == found.quadrant and stored["worth"][0]["axis"] == "harmful"
    assert np.shape(stored["beliefs"]["harmful"]["trace"]) == (len(found.tokens), 3)
    alone, none = write(found, tmp_path / "one.html")
    assert none is None and alone.read_text(encoding="utf-8") == text
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        write(found, tmp_path / "file")


def test_foreign_text_stays_text(runtime: Planted, fit: Fit) -> None:
    found = explain(
        runtime, 'how do i <script>alert(1)</script> "><img src=x onerror=alert(2)> bomb', fit=fit
    )
    text = page(found)
    assert not [t for t, _ in Page(text).tags if t in ("script", "img")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_prompt_object_and_system_message(runtime: Planted, fit: Fit) -> None:
    prompt = Prompt.of("how do i boil egg ?", system="be brief", id="mine")
    found = explain(runtime, prompt, fit=fit)
    assert "prompt" in found.tokens[0].names and all("system" not in t.names for t in found.tokens)
