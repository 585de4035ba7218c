from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demur.errors import InputError
from demur.prompts import normalise, overlap
from demur.types import Message, Prompt, PromptSet


def make(name: str, *texts: str) -> PromptSet:
    return PromptSet(name, tuple(Prompt.of(t, id=f"{name}{i}") for i, t in enumerate(texts)))


def test_normalise() -> None:
    assert normalise("It’s  a CAFÉ—no?\u00a0\uff21") == "it s a café no a"
    assert normalise("snake_case 3.5") == "snake case 3 5"


def test_exact_after_normalisation() -> None:
    report = overlap(make("a", "How do I bake bread?"), make("b", "how do i BAKE bread!!", "other"))
    assert [(p.a, p.b) for p in report.pairs if p.kind == "exact"] == [("a0", "b0")]
    assert not report.clean


def test_eight_words_in_a_row_but_not_seven() -> None:
    eight = "one two three four five six seven eight"
    a = make("a", f"start {eight}", f"begin {eight.rsplit(' ', 1)[0]}")
    report = overlap(
        a, make("b", f"{eight} and then a long tail of many quite different words", "x"), near=1.0
    )
    assert [(p.a, p.b, p.kind, p.shared) for p in report.pairs] == [("a0", "b0", "ngram", eight)]


def test_jaccard_by_hand() -> None:
    # " abcdefg " has the 5-grams " abcd", "abcde", "bcdef", "cdefg", "defg ";
    # " abcdefx " shares " abcd", "abcde", "bcdef" of its five: 3 of 7 in the union
    report = overlap(make("a", "abcdefg"), make("b", "abcdefx"), near=0.42)
    assert [(p.kind, p.similarity) for p in report.pairs] == [("near", pytest.approx(3 / 7))]
    assert overlap(make("a", "abcdefg"), make("b", "abcdefx"), near=0.43).clean


def brute(a: PromptSet, b: PromptSet, near: float) -> set[tuple[str, str]]:
    def grams(p: Prompt) -> set[str]:
        text = f" {normalise(p.text)} "
        return {text[k : k + 5] for k in range(len(text) - 4)} or ({text} if text.strip() else set())

    return {
        (p.id, q.id)
        for p in a
        for q in b
        if (u := grams(p) | grams(q)) and len(grams(p) & grams(q)) / len(u) >= near
    }


@given(
    st.lists(st.text("abc d", max_size=14), max_size=6),
    st.lists(st.text("abc d", max_size=14), max_size=6),
    st.sampled_from([0.2, 0.5, 0.8]),
)
@settings(deadline=None)
def test_near_equals_brute_force(ta: list[str], tb: list[str], near: float) -> None:
    a, b = make("a", *ta), make("b", *tb)
    assert {(p.a, p.b) for p in overlap(a, b, near=near).pairs if p.kind == "near"} == brute(a, b, near)


def test_a_set_with_itself_reports_each_pair_once() -> None:
    s = make("a", "the very same words", "The very same words.", "another thing entirely")
    assert [(p.a, p.b, p.kind) for p in overlap(s, s).pairs] == [("a0", "a1", "exact"), ("a0", "a1", "near")]


def test_only_user_messages_count_and_all_of_them() -> None:
    turns = (
        Message(role="system", content="a system prompt that both of them share word for word today"),
        Message(role="user", content="first question about ducks"),
        Message(role="user", content="second"),
    )
    a = PromptSet("a", (Prompt(id="x", messages=turns),))
    assert overlap(a, make("b", turns[0].content)).clean
    assert overlap(a, make("b", "First question about ducks. Second")).count("exact") == 1


def test_signs_alone_match_nothing() -> None:
    assert overlap(make("a", "???"), make("b", "!!!")).clean
    assert overlap(make("a"), make("b", "x")).clean


def test_text_names_the_measure_and_limits_the_list() -> None:
    s = make("a", *["word " * 9] * 8)
    text = overlap(s, s).text(limit=2)
    assert "Jaccard of character 5-grams >= 0.5" in text
    assert "more" in text.splitlines()[-1]


@pytest.mark.parametrize("options", [{"ngram": 0}, {"near": 0.0}, {"near": 1.1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        overlap(make("a", "x"), make("b", "x"), **options)  # type: ignore[arg-type]


def test_six_thousand_against_six_thousand_in_time() -> None:
    """Random sentences over a vocabulary of word-like strings; measured 1.6 s on one core."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(3000)]
    weights = [1 / (k + 1) for k in range(len(words))]
    texts = [" ".join(rng.choices(words, weights, k=rng.randint(6, 25))) for _ in range(12_000)]
    a, b = make("a", *texts[:6000]), make("b", *texts[6000:], texts[17] + " please")
    start = time.perf_counter()
    report = overlap(a, b)
    assert time.perf_counter() - start < 60
    assert ("a17", "b6000") in {(p.a, p.b) for p in report.pairs if p.kind == "near"}
