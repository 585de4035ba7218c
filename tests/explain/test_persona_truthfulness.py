"""Likelihoods of given answers, questions from files, folds by category, and probes that find what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError
from demur.explain import persona_truthfulness as method
from demur.explain.likelihood import answer_loglik
from demur.explain.persona_truthfulness import (
    Question,
    by_category,
    check_folds,
    leaning,
    load_questions,
    mean_auroc,
    out_of_fold,
    read_before_answer,
    weighted_f1,
)
from demur.runtime.openai import OpenAIRuntime
from demur.types import Condition, Message, Prompt
from tests.runtime.tiny import tiny_runtime

ASKED = [
    (Prompt.of("what is the capital of norway ?", id="a"), "the capital"),
    (Prompt.of("how do you boil an egg ?", id="b"), "red"),
    (Prompt.of("why ?", id="c"), "the dog and the cat and the egg"),
    (Prompt.of("tell me about the weather today please", id="d"), "no"),
    (Prompt.of("can you help me with a poem", id="e"), "sorry I cannot"),
]


def naive(runtime: Any, prompt: Prompt, answer: str) -> tuple[float, int]:
    """One full pass over one row, every position through the unembedding."""
    before = runtime.chat.render(prompt).ids
    answer_ids = runtime.tokenizer.encode(answer, add_special_tokens=False)
    with torch.no_grad():
        logp = runtime.model(input_ids=torch.tensor([before + answer_ids])).logits[0].log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(answer_ids) - 1)
    return sum(float(logp[p, t]) for p, t in zip(places, answer_ids, strict=True)), len(answer_ids)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt_neox"])
@pytest.mark.parametrize("system", [None, "be brief and polite and tell me no more than that please"])
def test_likelihood_is_what_single_full_passes_give(arch: str, system: str | None) -> None:
    runtime = tiny_runtime(arch)
    found = answer_loglik(runtime, ASKED, Condition(system=system))
    for (total, n), (prompt, answer) in zip(found, ASKED, strict=True):
        expected, m = naive(runtime, prompt.with_system(system), answer)
        assert n == m
        assert total == pytest.approx(expected, abs=1e-4)


def test_likelihood_sees_the_prompt_and_restores_the_model() -> None:
    runtime = tiny_runtime()
    twice = answer_loglik(runtime, [(ASKED[0][0], "red"), (ASKED[1][0], "red")])
    assert abs(twice[0][0] - twice[1][0]) > 1e-3
    ids = torch.tensor([runtime.chat.render(ASKED[0][0]).ids])
    assert runtime.model(input_ids=ids).logits.shape[:2] == ids.shape  # no hook is left behind


def test_an_answer_that_names_a_control_token_stays_text() -> None:
    runtime = tiny_runtime()
    (_, n), (_, plain) = answer_loglik(runtime, [(ASKED[0][0], "<|user|>"), (ASKED[0][0], "red")])
    assert n >= plain


def test_what_has_no_likelihood() -> None:
    runtime = tiny_runtime()
    with pytest.raises(InputError, match="empty"):
        answer_loglik(runtime, [(ASKED[0][0], "  ")])
    with pytest.raises(InputError, match="pair of answers"):
        leaning(runtime, [Question(id="q", text="why ?", category="c", truthful=True)])
    with pytest.raises(CapabilityError):
        answer_loglik(OpenAIRuntime("http://localhost:1/v1", "m"), ASKED)  # type: ignore[arg-type]


def test_leaning_by_hand() -> None:
    runtime = tiny_runtime()
    q = Question(id="q", text="why ?", category="c", true="the red dog", false="no")
    (a, n), (b, m) = (naive(runtime, q.prompt, t) for t in ("the red dog", "no"))
    assert leaning(runtime, [q]) == pytest.approx([a / n - b / m], abs=1e-4)


# --- questions --------------------------------------------------------------------------------------------------


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_questions_of_a_file(tmp_path: Path) -> None:
    pair = {"question": "Why?", "category": "c", "true": "so", "false": "no"}
    judged = {"prompt": "Why?", "category": "c", "truthful": "no", "id": 7}
    assert load_questions(write(tmp_path / "a.jsonl", pair))[0].true == "so"
    found = load_questions(write(tmp_path / "b.jsonl", judged))[0]
    assert (found.id, found.truthful, found.true) == ("7", False, None)
    table = tmp_path / "t.csv"
    table.write_text('Category,Question,Best Answer,Best Incorrect Answer\nLaw,"Is it, so?",Yes,No\n')
    assert load_questions(table)[0].false == "No"


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"category": "c", "true": "a", "false": "b"}], "no question"),
        ([{"question": "q", "true": "a", "false": "b"}], "no category"),
        ([{"question": "q", "category": "c", "true": "a"}], "two answers"),
        ([{"question": "q", "category": "c", "truthful": "maybe"}], "'maybe'"),
        (
            [
                {"question": "q", "category": "c", "truthful": True},
                {"question": "q", "category": "c", "true": "a", "false": "b"},
            ],
            "some rows only",
        ),
        ([{"id": "x", "question": "q", "category": "c", "truthful": True}] * 2, "stands twice"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, rows: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(InputError, match=word):
        load_questions(write(tmp_path / "a.jsonl", *rows))


@pytest.mark.skipif(not os.environ.get("DEMUR_DATA"), reason="DEMUR_DATA is not set")
def test_truthfulqa_loads() -> None:
    questions = load_questions()
    assert len(questions) == 790
    assert len({q.category for q in questions}) == 37
    assert all(q.true and q.false for q in questions)


# --- folds and probes -------------------------------------------------------------------------------------------


def test_folds_keep_categories_whole_and_are_even() -> None:
    categories = [f"c{i % 17}" for i in range(300)]
    fold = by_category(categories, 5, seed=1)
    assert all(len(set(fold[[c == name for c in categories]])) == 1 for name in set(categories))
    sizes = np.bincount(fold)
    assert len(sizes) == 5 and sizes.min() >= 50
    assert (by_category(categories, 5, seed=2) != fold).any()
    with pytest.raises(InputError, match="2 categories for 5 folds"):
        by_category(["a", "b"] * 9, 5)
    with pytest.raises(InputError, match="fold 1 has 0 of 4"):
        check_folds(np.array([1, 1, 0, 0, 0, 0, 0, 0], bool), np.repeat([0, 1], 4))


def test_figures_by_hand() -> None:
    y = np.array([1, 0, 1, 0], bool)
    s = np.array([2.0, 1.0, 0.0, 3.0])
    assert mean_auroc(s, y, np.array([0, 0, 1, 1])) == 0.5  # 1 in one fold, 0 in the other
    assert mean_auroc(s, y, np.array([0, 0, 1, 0])) == 0.5  # the fold with one label does not count
    # said 1 1 0 1: true F1 2/5, false 0; each label is half of the rows
    assert weighted_f1(np.array([1, 1, 0, 1], bool), y) == pytest.approx(0.2)
    assert weighted_f1(y, y) == 1


def synthetic(where: str, n: int = 240) -> tuple[dict[Any, Any], np.ndarray, np.ndarray, list[str]]:
    """States or texts that hold the label, at one site of three."""
    rng = np.random.default_rng(0)
    y = rng.random(n) < 0.5
    states = {(layer, "t_post"): rng.normal(size=(n, 12)) for layer in range(3)}
    if where == "states":
        states[1, "t_post"][:, 0] += 3 * y
    texts = [f"{'why' if v and where == 'texts' else 'what'} {i}" for i, v in enumerate(y)]
    return states, y, by_category([f"c{i % 20}" for i in range(n)], 4), texts


@pytest.mark.parametrize("where", ["states", "texts", "nowhere"])
def test_the_reader_that_has_the_label_finds_it(where: str) -> None:
    states, y, fold, texts = synthetic(where)
    scores, sweeps = out_of_fold(states, y, fold, texts)
    found = {name: mean_auroc(s, y, fold) for name, s in scores.items()}
    for name, home in (("probe", "states"), ("bag of words", "texts")):
        assert (found[name] > 0.9) if where == home else (0.35 < found[name] < 0.65)
    if where == "states":
        assert {s.site for s in sweeps} == {(1, "t_post")}


def test_a_reading_from_end_to_end(tmp_path: Path) -> None:
    runtime = tiny_runtime()
    words = ["boil", "egg", "fjord", "write", "letter", "cat", "dog", "red", "blue", "green", "one", "two"]
    rng = np.random.default_rng(0)
    questions = [
        Question(
            id=f"q{i}",
            text=" ".join(rng.choice(words, 4)),
            category=f"c{i % 6}",
            true=" ".join(rng.choice(words, 2)),
            false=" ".join(rng.choice(words, 2)),
        )
        for i in range(60)
    ]
    seen: list[str] = []
    reading = read_before_answer(
        runtime, questions, folds=3, positions=("t_post",), progress=lambda what, *_: seen.append(what)
    )
    assert reading.margins is not None
    assert (reading.truthful == (reading.margins > 0)).all()
    assert set(seen) == {"likelihood of answers", "states", "probes"}
    values = reading.report.values
    assert values["truthful"].k == reading.truthful.sum()
    assert values["probe"]["low"] <= values["probe"]["auroc"] <= values["probe"]["high"]
    assert values["majority"]["accuracy"].value >= 0.5
    assert reading.rows(questions)[3]["category"] == "c3"
    reading.probe.save(tmp_path / "p.safetensors")
    assert reading.probe.fingerprint == runtime.fingerprint
    judged = [
        Question(id=q.id, text=q.text, category=q.category, truthful=bool(t))
        for q, t in zip(questions, reading.truthful, strict=True)
    ]
    again = read_before_answer(runtime, judged, folds=3, positions=("t_post",))
    assert again.margins is None
    assert again.report.values["probe"]["auroc"] == values["probe"]["auroc"]
    with pytest.raises(InputError, match="6 categories for 7 folds"):
        read_before_answer(runtime, questions, folds=7)


def test_the_prompt_ends_where_an_answer_would_begin() -> None:
    runtime = tiny_runtime()
    q = Question(id="q", text="why ?", category="c", true="a", false="no")
    assert q.prompt.messages == (Message(role="user", content="why ?"),)
    assert runtime.chat.render(q.prompt).ids[-1] == runtime.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert method.CARD.slug == "persona-truthfulness"
