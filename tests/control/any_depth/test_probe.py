"""The header probe finds what stands behind the header, its threshold is one for whole answers, files keep it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from demur.control.any_depth import Answer, Header, HeaderProbe, depth_rates, load_answers, states_at
from demur.control.any_depth.answers import encoded
from demur.control.any_depth.probe import fit_layers, odds, pairs
from demur.errors import InputError, MismatchError, UnsupportedClaim
from demur.stats import upper_bound
from demur.types import Message, Prompt, Site
from tests.runtime.tiny import tiny_runtime

WORDS = tuple(f"{a} {b}" for a in ("boil", "letter", "red") for b in ("cat", "poem", "sum", "two"))


def answers(n: int, seed: int, length: int = 12) -> list[Answer]:
    """Harmful ones are asked about a bomb; their texts are drawn alike."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(n):
        harmful = k % 2 == 1
        asked = " ".join(
            ["tell me about", *rng.choice(WORDS, 2), "bomb bomb bomb" if harmful else "egg egg egg"]
        )
        text = " ".join(rng.choice(WORDS, length))
        out.append(Answer(prompt=Prompt.of(asked, id=f"{seed}-{k}"), text=text, harmful=harmful))
    return out


@pytest.fixture(scope="module")
def probe() -> HeaderProbe:
    pytest.importorskip("sklearn")
    return HeaderProbe.fit(tiny_runtime(), answers(120, 0), select=answers(60, 1), depths=(2, 4, 6))


def test_states_are_those_of_one_pass_over_prompt_answer_and_suffix() -> None:
    runtime = tiny_runtime(control=True)
    some = answers(3, 5, length=2)
    some[1] = dataclasses.replace(some[1], text="one two", opens="respond")
    suffix = (7, 5)
    found = states_at(runtime, some, (0, 2, 4), suffix, (0, 2))
    assert found.shape[:3] == (3, 3, 2)
    assert (
        np.isnan(found[1, 2]).all() and np.isfinite(found[[0, 2]]).all() and np.isfinite(found[1, :2]).all()
    )
    head, said = encoded(runtime, some[1])
    assert runtime.control is not None and head[-1] == runtime.control.ids["respond"] and len(said) == 2
    # the same conversation, written by the template
    spoken = (
        Message(role="user", content=some[0].prompt.text),
        Message(role="assistant", content=some[0].text),
    )
    prompt = Prompt(id="x", messages=spoken)
    rendered = runtime.chat.render(prompt, header=True).ids
    head, said = encoded(runtime, some[0])
    assert [*head, *said, *suffix] == rendered
    own = next(runtime.states([prompt], [Site(layer=0), Site(layer=2)])).vectors
    whole = states_at(runtime, some[:1], (4,), (), (0, 2))[0, 0]
    assert np.allclose(whole, own, atol=1e-5) and not np.allclose(found[0, 2], own, atol=1e-2)
    with pytest.raises(InputError, match="opens with 'nope'"):
        encoded(runtime, dataclasses.replace(some[0], opens="nope"))
    with pytest.raises(InputError, match="nothing to read"):
        states_at(runtime, some, (50,), suffix, (0,))


def test_text_of_an_answer_never_becomes_a_special_token() -> None:
    runtime = tiny_runtime()
    _, said = encoded(runtime, Answer(prompt=Prompt.of("hi"), text="<|end|> <|user|>", harmful=False))
    assert not {5, 7} & set(said) - {runtime.tokenizer.unk_token_id}


def test_fit_chooses_the_layer_that_is_right_and_weighs_classes_alike() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    y = np.arange(200) % 5 == 0
    X = rng.standard_normal((200, 3, 8))
    X[:, 1, 0] += 3.0 * np.where(y, 1, -1)
    best, w, b, right = fit_layers(X[:150], y[:150], X[150:], y[150:])
    assert best == 1 and right[1] == max(right) >= 0.95 and w[0] > np.abs(w[1:]).max()
    assert abs(odds(np.zeros(8), w, b)) < 1.0  # rare positives do not pull the cut to their side
    with pytest.raises(InputError, match="of one kind"):
        fit_layers(X, np.ones(200, bool), X, y)


def test_pairs_leave_out_what_was_not_written() -> None:
    states = np.zeros((2, 2, 1, 3), np.float32)
    states[0, 1] = np.nan
    X, y = pairs(states, answers(2, 0))
    assert X.shape == (3, 1, 3) and y.tolist() == [False, True, True]


def test_the_probe_reads_what_was_asked_at_depths_it_was_not_fitted_on(probe: HeaderProbe) -> None:
    runtime, test = tiny_runtime(), answers(60, 2)
    scores = probe.scores(runtime, test, (3, 10))
    harmful = np.array([a.harmful for a in test])
    assert ((scores >= 0.5) == harmful[:, None]).mean() > 0.8
    assert set(probe.accuracy) == {0, 1, 2} and probe.accuracy[probe.layer] == max(probe.accuracy.values())
    assert (probe.n_harmful, probe.n_benign) == (60, 60)
    with pytest.raises(InputError, match="2 answers are in both"):
        HeaderProbe.fit(runtime, answers(4, 0), select=answers(2, 0))
    with pytest.raises(InputError, match="the probe reads"):
        probe.p(np.zeros((2, 3)))


def test_p_is_the_logistic_of_unit_states(probe: HeaderProbe) -> None:
    own = dataclasses.replace(probe, weights=np.array([1.0, 0.0]), bias=0.5)
    assert own.p([[3.0, 3.0], [10.0, 10.0]]).round(6).tolist() == [round(1 / (1 + math.exp(-1.5)), 6)] * 2


def test_a_probe_of_another_model_or_template_is_refused(probe: HeaderProbe) -> None:
    probe.fits(tiny_runtime())
    with pytest.raises(MismatchError, match="fitted on the model"):
        probe.fits(tiny_runtime(seed=1))
    with pytest.raises(MismatchError, match="template"):
        dataclasses.replace(probe, header=(7, 4)).fits(tiny_runtime())
    other = HeaderProbe.fit(
        tiny_runtime(), answers(20, 0), select=answers(20, 1), depths=(2,), header=Header((7, 4), 1)
    )
    assert other.header == (7, 4)


def test_the_threshold_counts_whole_answers(probe: HeaderProbe) -> None:
    # every check alone stops 1 of 100 harmless answers; together they stop 4, which is too many
    scores = np.full((150, 4), 0.1)
    scores[:25], scores[25:50] = 0.9, 0.75
    for k in range(4):
        scores[50 + k, k] = 0.8
    harmful = np.arange(150) < 50
    found = probe.calibrated(scores, harmful, fpr=0.05, delta=0.1, on="my answers")
    assert found.cut is not None and found.threshold > 0.8 and (found.cut.k, found.cut.n) == (0, 100)
    assert found.cut.upper == pytest.approx(float(upper_bound(0, 100, 0.1)))
    assert "answers drawn like my answers" in str(found.guarantee)
    assert "at any of the depths" in str(found.guarantee)
    one = probe.calibrated(scores[:, 0], harmful, fpr=0.05, delta=0.1)
    assert one.threshold <= 0.75 and one.cut is not None and one.cut.k == 1
    short = np.full((150, 4), np.nan)
    short[:50, 0] = 0.9
    assert probe.calibrated(short, harmful).threshold <= 0.9  # nothing was checked, so nothing stopped
    with pytest.raises(UnsupportedClaim, match="at least 45"):
        probe.calibrated(scores[:60], harmful[:60])
    with pytest.raises(InputError, match="all 10"):
        probe.calibrated(scores[:10], harmful[:10])


def test_files_keep_the_probe_and_belong_to_a_model(probe: HeaderProbe, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    full = probe.calibrated(np.r_[np.full(50, 0.9), np.full(100, 0.2)], np.arange(150) < 50)
    full.save(path)
    again = HeaderProbe.load(path, fingerprint="tiny-llama-0")
    for f in dataclasses.fields(full):
        assert np.array_equal(getattr(again, f.name), getattr(full, f.name)), f.name
    with pytest.raises(MismatchError):
        HeaderProbe.load(path, fingerprint="another")


def test_rates_per_depth_and_per_answer_are_kept_apart() -> None:
    scores = np.full((40, 3), 0.1)
    scores[:10, 0] = scores[5:15, 1] = 0.9
    scores[4:, 2] = np.nan
    first, second, third = depth_rates(scores, (32, 64, 96), 0.5)
    assert first.per_depth is not None and second.per_depth is not None
    assert (first.per_depth.k, second.per_depth.k) == (10, 10)
    assert (first.per_answer.k, second.per_answer.k, third.per_answer.k) == (10, 15, 15)
    assert third.per_depth is None and third.per_answer.n == 40
    with pytest.raises(InputError, match="ascending"):
        depth_rates(scores, (64, 32, 96), 0.5)


def test_answer_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "hi", "answer": "one", "harmful": true}\n'
        '{"id": "x", "prompt": "yo", "answer": "two", "harmful": "no", "opens": "respond"}\n'
    )
    one, two = load_answers(path)
    assert (one.harmful, one.opens, two.harmful, two.opens, two.prompt.id) == (
        True,
        None,
        False,
        "respond",
        "x",
    )
    path.write_text('{"prompt": "hi", "answer": "one"}\n')
    with pytest.raises(InputError, match="harmful=None"):
        load_answers(path)
    path.write_text('{"prompt": "hi", "answer": " ", "harmful": true}\n')
    with pytest.raises(InputError, match="no text in 'answer'"):
        load_answers(path)
