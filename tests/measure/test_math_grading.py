"""Answers are found in solutions and compared; what cannot be compared in time is undecided."""

from __future__ import annotations

import importlib.util
import itertools
import json
import threading
from collections.abc import Iterator

import pytest

from demur import data
from demur.errors import DataUnavailable, InputError, MissingExtra
from demur.measure.math_false_positives.grading import (
    Grader,
    aime_number,
    answer_part,
    extract_answer,
    normalise,
)

needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (extra math)"
)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=60) as g:  # generous: a loaded machine must not make an answer undecided
        yield g


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"A set: $\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"broken \boxed{3 and nothing", "3"),
        ("Therefore, the final answer is: $12$. I hope it is correct.", "12"),
        ("The answer is 3.5", "3.5"),
        ("So we get 1,251 apples of 7", "7"),
        ("<think>The answer is 5</think>It is 6", "6"),
        ("I give up.", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_answer_is_taken(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_thinking_is_no_answer_part() -> None:
    assert answer_part("<think>a</think>b<think>c</think> d ") == "d"
    assert answer_part("plain") == "plain"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        (r"\text{ Evelyn }", "Evelyn"),
        ("26{,}000".replace("{,}", ","), "26000"),
        (r"\$32,348", "32348"),
        (r"120^\circ", "120"),
        (r"\textbf{(C)}", "C"),
        (r"\(x+1\)", "x + 1."),
    ],
)
def test_normalised_forms_agree(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)


def test_normalising_keeps_what_matters() -> None:
    assert normalise("(1,2)") != normalise("(2,1)")
    assert normalise("x") != normalise("X")
    assert normalise(r"\leftarrow") != normalise("arrow")


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [("025", "25", True), ("$116$", "116", True), ("-4", "4", False), ("a", "3", False), ("1.0", "10", True)],
)
def test_aime_reads_digits_and_minus_only(grader: Grader, answer: str, gold: str, equal: bool) -> None:
    assert grader.grade(answer, gold, "AIME 2024") is equal
    assert aime_number("--3") is None


def test_no_answer_and_plain_integers_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with Grader() as g:
        assert g.grade(None, "3") is False
        assert g.grade("3", "4") is False and g.grade("007", "7") is True
        assert g.grade("Odd", r"\text{odd}") is True
        with pytest.raises(MissingExtra, match=r"demur\[math\]"):
            g.grade("0.5", r"\frac12")


@needs_math
@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("0.5", r"\frac12", True),
        ("137.5", r"137 \frac{1}{2}", True),
        (r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", True),
        (r"\begin{pmatrix} 0.2 \\ -3.5 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", False),
        ("x > 5", r"(5,\infty)", True),
        ("x < 5", r"(5,\infty)", False),
        (r"[5,\infty)", r"(5,\infty)", False),
        (r"(12,102) \cup (2,12)", r"(2,12) \cup (12,102)", True),
        ("(1,2)", "(2,1)", False),
        (r"\sqrt{452}", r"2\sqrt{113}", True),
        ("-24 - 4r + 6r^2", "6r^2-4r-24", True),
        ("x = 4", "4", True),
        (r"\text{even}", r"\text{odd}", False),
        (r"\frac{", "3", False),
    ],
)
def test_equal_in_mathematics(grader: Grader, answer: str, gold: str, equal: bool) -> None:
    assert grader.grade(answer, gold) is equal


@needs_math
def test_what_takes_too_long_is_undecided_also_in_a_thread() -> None:
    found: list[bool | None] = []
    with Grader(timeout=60) as g:
        assert g.grade("0.25", r"\frac14") is True  # starts the helper
        g.timeout = 1.0

        def work() -> None:
            found.append(g.grade("9^{9^{9^{9}}}", "3"))
            g.timeout = 60
            found.append(g.grade("0.75", r"\frac34"))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [None, True]  # killed, and a new helper serves the next question


def test_a_timeout_is_a_positive_number() -> None:
    with pytest.raises(InputError, match="seconds"):
        Grader(timeout=0)


@needs_math
def test_the_answers_of_math100(grader: Grader) -> None:
    """Each reference equals its own in another dress, and no other reference."""
    try:
        path = data.get("math-false-positives", "MATH100.jsonl")
    except (DataUnavailable, InputError) as e:
        pytest.skip(str(e))
    gold = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    assert len(gold) == 100
    dressed = [f"$ {g} $".replace(r"\frac", r"\dfrac").replace(" - ", "-") for g in gold]
    assert all(grader.grade(d, g) for d, g in zip(dressed, gold, strict=True))
    kinds = [g for g in dict.fromkeys(gold) if not g.lstrip("-").isdigit()]
    others = [(a, b) for a, b in itertools.pairwise(kinds) if normalise(a) != normalise(b)]
    same = [(a, b) for a, b in others if grader.grade(a, b) is not False]
    assert len(others) > 25 and not same
