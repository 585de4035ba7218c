"""States of answers against single passes, the monitor on planted lies, and steering that can be worked out."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demur.errors import CapabilityError, InputError, MismatchError
from demur.explain.artefact import Direction
from demur.explain.honesty import (
    HonestyMonitor,
    Statement,
    fit_monitor,
    fitting,
    load_statements,
    mean_states,
    reply_states,
    steering_curve,
)
from demur.explain.probe import fit_probe
from demur.runtime.openai import OpenAIRuntime
from demur.types import Condition, Message, Prompt, Site
from tests.runtime.tiny import tiny_runtime

SAID = [
    (Prompt.of("what is the capital of norway ?", id="a"), "the capital"),
    (Prompt.of("how do you boil an egg ?", id="b"), "red"),
    (Prompt.of("why ?", id="c"), "the dog and the cat and the egg"),
    (Prompt.of("tell me about the weather", id="d"), "sorry I cannot"),
]


def test_states_of_answers_are_those_of_the_whole_conversation() -> None:
    runtime, layers = tiny_runtime(), [0, 2]
    for drop in (0, 2):
        found = dict(reply_states(runtime, SAID, layers, Condition(system="be brief"), drop=drop))
        assert sorted(found) == [0, 1, 2, 3]
        for i, (prompt, answer) in enumerate(SAID):
            size = len(answer.split())
            kept = max(size - drop, 1)
            full = prompt.with_system("be brief")
            full = Prompt(id="x", messages=(*full.messages, Message(role="assistant", content=answer)))
            sites = [Site(layer=layer, position=t - size) for t in range(kept) for layer in layers]
            expected = next(iter(runtime.states([full], sites))).vectors
            assert found[i].shape[:2] == (kept, 2)
            np.testing.assert_allclose(found[i].reshape(len(sites), -1), expected, atol=1e-5)


def test_an_answer_of_as_many_tokens_as_are_dropped_keeps_one() -> None:
    found = dict(reply_states(tiny_runtime(), [(SAID[0][0], "red blue")], [0], drop=2))
    assert found[0].shape[0] == 1


def test_means_are_in_the_order_of_the_answers() -> None:
    runtime = tiny_runtime()
    means = mean_states(runtime, SAID, [1])
    for i, states in reply_states(runtime, SAID, [1]):
        np.testing.assert_allclose(means[i], states.mean(axis=0), atol=1e-6)


def test_what_has_no_states() -> None:
    with pytest.raises(InputError, match="empty"):
        mean_states(tiny_runtime(), [(SAID[0][0], " ")], [0])
    with pytest.raises(InputError, match="no answers"):
        mean_states(tiny_runtime(), [], [0])
    with pytest.raises(CapabilityError):
        monitor(tiny_runtime()).score(OpenAIRuntime("http://localhost:1/v1", "m"), [SAID[0][0]], ["x"])


# --- the monitor ------------------------------------------------------------------------------------------------


def monitor(runtime: Any, **fields: Any) -> HonestyMonitor:
    """Told to say "red" is a lie, "blue" none; the words stand in the answers, so a probe must find them."""
    answers = ["red dog", "the red cat", "blue dog", "the blue cat"] * 4
    said = [(SAID[i % 4][0], text) for i, text in enumerate(answers)]
    H = mean_states(runtime, said, [1])[:, 0]
    return HonestyMonitor(
        probe=fit_probe(H, ["red" in a for a in answers], C=10.0, site=(1, "reply"), **fields)
    )


def test_the_score_is_the_mean_logit_over_tokens() -> None:
    runtime = tiny_runtime()
    m = monitor(runtime)
    prompt, answer = SAID[2]
    tokens = next(iter(reply_states(runtime, [(prompt, answer)], [1])))[1][:, 0]
    assert m.score(runtime, [prompt], [answer])[0] == pytest.approx(m.probe.score(tokens).mean(), abs=1e-4)
    lies, true = m.score(runtime, [prompt, prompt], ["red egg", "blue egg"])
    assert lies > true


def test_a_threshold_file_and_another_model(tmp_path: Path) -> None:
    runtime = tiny_runtime()
    runtime.fingerprint = "mine"
    m = monitor(runtime, fingerprint="mine")
    texts = [f"blue {a} {b}" for a in ("dog", "cat", "egg") for b in ("poem", "story", "number")]
    cut = m.calibrated(runtime, [SAID[1][0]] * 9, texts, fpr=0.25)
    assert cut.probe.cut is not None and cut.probe.cut.k == 2
    cut.save(tmp_path / "m.safetensors")
    again = HonestyMonitor.load(tmp_path / "m.safetensors", fingerprint="mine")
    assert again.layer == 1 and again.probe.threshold == cut.probe.threshold
    with pytest.raises(MismatchError):
        HonestyMonitor.load(tmp_path / "m.safetensors", fingerprint="other")
    runtime.fingerprint = "other"
    with pytest.raises(MismatchError, match="fit one"):
        m.score(runtime, [SAID[0][0]], ["x"])
    fit_probe(np.eye(4), [0, 1, 0, 1], "mean_difference", site=(1, "t_post")).save(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="no honesty monitor"):
        HonestyMonitor.load(tmp_path / "p.safetensors", fingerprint=None, allow_unknown=True)


def test_steering_towards_a_word_makes_it_likelier_and_leaves_the_model_alone() -> None:
    runtime = tiny_runtime()
    word = runtime.tokenizer.convert_tokens_to_ids("red")
    toward = runtime.model.get_output_embeddings().weight[word].detach().double().numpy()
    last = len(runtime.model.model.layers) - 1
    direction = Direction(vector=toward, origin="by hand", site=(last, "reply"))
    asked = [(SAID[0][0], "red"), (SAID[1][0], "red")]
    curve = steering_curve(runtime, direction, asked, (-2.0, 0.0, 2.0))
    assert curve.shape == (3, 2)
    assert (curve[0] < curve[1]).all() and (curve[1] < curve[2]).all()
    assert steering_curve(runtime, direction, asked, (0.0,))[0] == pytest.approx(curve[1])
    with pytest.raises(InputError, match="no layer"):
        steering_curve(runtime, Direction(vector=toward, origin="by hand"), asked, (1.0,))


# --- statements and fitting -------------------------------------------------------------------------------------


def test_statements_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    file.write_text(
        "statement,label\nThe dog is red today.,1\nThe dog is red now.,0\nThe dog is red today.,1\n"
    )
    found = load_statements(file)
    assert [(s.true, s.group) for s in found] == [(True, "the dog is red"), (False, "the dog is red")]
    file.write_text("statement,label\nx,2\n")
    with pytest.raises(InputError, match="line 2"):
        load_statements(file)


@pytest.mark.skipif(not os.environ.get("DEMUR_DATA"), reason="DEMUR_DATA is not set")
def test_the_public_facts_load() -> None:
    facts = load_statements()
    assert len(facts) == 598
    assert 290 < sum(s.true for s in facts) < 306


def statements() -> list[Statement]:
    """True ones speak of the dog, false ones of the egg: words tell them apart."""
    words = ["letter", "poem", "story", "sum", "number", "capital", "weather", "norway", "france", "fjord"]
    out = []
    for i in range(60):
        true = i % 2 == 0
        who = "dog" if true else "egg"
        text = f"the {who} is in the {words[i % 10]} of my {words[i // 6]} today {words[-i % 10]}"
        out.append(Statement(id=f"s{i}", text=text, true=true, group=f"g{i // 3}"))
    return out


def test_fitting_finds_the_instruction_and_shows_what_words_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PERSONA", "please tell me with {} about that")
    monkeypatch.setattr(fitting, "LIAR", "bomb")
    monkeypatch.setattr(fitting, "HONEST", "poem")
    monkeypatch.setattr(fitting, "OTHER_WORDS", {"bomb": "yes", "poem": "no"})
    monkeypatch.setattr(fitting, "PLAIN", "tell me")
    read = []

    def spied(do: Any, runtime: Any, said: Any, *args: Any, drop: int = 0, **kw: Any) -> Any:
        read.append(({text for _, text in said}, drop))
        return do(runtime, said, *args, drop=drop, **kw)

    monkeypatch.setattr(fitting, "reply_states", partial(spied, reply_states))
    monkeypatch.setattr(fitting, "mean_states", partial(spied, mean_states))
    fitted = fit_monitor(tiny_runtime(), statements(), drop=2)
    values = fitted.report.values
    assert fitted.layers.shape == (3,) and values["instructed"]["auroc"] > 0.9
    assert values["instructed"]["bag_of_words"]["auroc"] == 1.0
    assert values["other_words"]["bag_of_words"]["auroc"] == 0.5  # none of these words was in the fit
    assert fitted.truth.auroc > 0.9 and values["true_false"]["bag_of_words"]["auroc"] > 0.9
    assert fitted.monitor.layer == values["layer"]
    # fitted, chosen and tested on groups of their own, true statements alone, without their last two tokens
    of = {s.text: s for s in statements()}
    fit, select, test, other = ({of[text] for text in texts} for texts, _ in read[:4])
    assert test == other and all(s.true for s in fit | select | test)
    groups = [{s.group for s in part} for part in (fit, select, test)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert [drop for _, drop in read] == [2, 2, 2, 2, 0]
    assert len(fitted.report.tables[1].rows) == 3


def test_the_layer_is_chosen_where_it_was_not_fitted() -> None:
    class Planted:
        """Layer 4 tells the sides apart, layer 2 only where it was fitted, layer 6 nowhere."""

        layers, runtime = (2, 4, 6), SimpleNamespace(fingerprint=None)

        def tokens(self, part: str, *_: Any) -> Any:
            y = np.arange(80) % 2 == 1
            X = np.random.default_rng(len(part)).normal(size=(80, 3, 4))
            X[:, 1, 0] += 2 * y
            X[:, 0, 0] += 9 * y * (part == "fit")
            return X, y

        means = tokens

    said: Any = {"fit": "fit", "select": "select"}
    reader: Any = Planted()
    probe, k, areas = fitting._fitted(reader, said, {}, 0.1)
    assert k == 1 and probe.site == (4, "reply")
    assert areas[1] > 0.85 and areas[[0, 2]] == pytest.approx(0.5, abs=0.2)


def test_too_few_statements() -> None:
    with pytest.raises(InputError, match="20 of each"):
        fit_monitor(tiny_runtime(), statements()[:30])
