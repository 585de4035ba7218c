"""Which prompts are chosen for fine-tuning, and how their rows look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demur.errors import InputError
from demur.explain.refusal_cliff import Cliff, Thought
from demur.train.cliff_selection import select, training_rows, write_rows
from demur.types import Prompt

POOL = [
    Thought(
        prompt=Prompt.of(f"question {i}", id=f"q{i}"), thinking="this is illegal" if i < 4 else "let me see "
    )
    for i in range(20)
]
CLIFFS = [Cliff(id=f"q{i}", plateau=0.5 + 0.02 * i, final=0.9 if i % 2 else 0.01 * i) for i in range(20)]


def ids(by: str, share: float = 0.1, seed: int = 0) -> list[str]:
    return [t.id for t in select(POOL, CLIFFS[::-1], share, by=by, seed=seed)]  # type: ignore[arg-type]


def test_rules_by_hand() -> None:
    # even i: drop = 0.5 + 0.01 i, so the largest even ones; final = 0.01 i, so the smallest even ones
    assert ids("drop") == ["q18", "q16"]
    assert ids("final") == ["q0", "q2"]
    assert set(ids("keyword", 0.2)) == {"q0", "q1", "q2", "q3"}
    assert len(ids("drop", 0.001)) == 1 and len(ids("drop", 1.0)) == 20


def test_chance_is_fair_and_repeats() -> None:
    assert ids("random", seed=3) == ids("random", seed=3)
    picked = [i for seed in range(300) for i in ids("random", seed=seed)]
    counts = [picked.count(f"q{i}") for i in range(20)]
    assert min(counts) > 10 and max(counts) < 60  # 30 expected
    assert {i for seed in range(60) for i in ids("keyword", 0.05, seed)} == {"q0", "q1", "q2", "q3"}


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no cliff"):
        select(POOL, CLIFFS[:3])
    with pytest.raises(InputError, match="rules are"):
        select(POOL, CLIFFS, by="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="share=0"):
        select(POOL, CLIFFS, 0)


def test_rows_are_prompt_thinking_and_refusal(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", POOL[5:7], CLIFFS, refusal="No.")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == training_rows(POOL[5:7], CLIFFS, refusal="No.")
    assert rows[0]["prompt"] == [{"role": "user", "content": "question 5"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nNo."}]
    assert rows[1]["drop"] == pytest.approx(0.62 - 0.06) and rows[1]["final"] == 0.06
