"""What the packaged corpus promises: sizes, fields, and no overlap between parts or with public evaluation sets."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from demur import prompts
from demur.types import Prompt, PromptSet

PARTS = ("train", "select", "calibrate", "test")
NEEDED = {"calibrate": (200, 80), "test": (100, 80)}
PUBLIC = (
    "coconot/original_eval.jsonl",
    "coconot/contrast_eval.jsonl",
    "coconot/contrast_pref.jsonl",
    "xstest/prompts.csv",
    "refusal-tokens/coconot_eval_redacted.csv",
    "refusal-tokens/temporal_eval_temporal_and_normal.csv",
    "derta/benign_alpaca_eval_300.jsonl",
    "strongreject/forbidden_prompts.csv",
    "selfaware/selfaware.jsonl",
    "truthful-ai/TruthfulQA.csv",
    "jbb_judge_comparison/labels.jsonl",
    "pyrit_refusal/refusal.jsonl",
)
TEXT_COLUMNS = ("prompt", "question", "Question", "forbidden_prompt", "goal", "objective")


@cache
def part(name: str) -> PromptSet:
    return prompts.core(name)


@pytest.mark.parametrize("name", PARTS)
def test_fields(name: str) -> None:
    for p in part(name):
        assert p.license == "CC-BY-4.0" and p.language == "en" and p.should_refuse is not None
        kind = p.meta["kind"]
        assert p.should_refuse == (kind == "refuse")
        assert (p.category in prompts.CATEGORIES) == (kind != "general")
        assert (p.reference is not None) == (name == "train" and kind == "refuse")


def test_train_is_large_and_has_contrast() -> None:
    kinds = Counter(p.meta["kind"] for p in part("train"))
    assert sum(kinds.values()) >= 3000
    assert kinds["lookalike"] / sum(kinds.values()) >= 0.35


@pytest.mark.parametrize("name", NEEDED)
def test_each_category_is_large_enough(name: str) -> None:
    counts = Counter((p.category, p.meta["kind"]) for p in part(name))
    benign, refuse = NEEDED[name]
    for category in prompts.CATEGORIES:
        assert counts[category, "lookalike"] >= benign
        assert counts[category, "refuse"] >= refuse


@pytest.mark.parametrize(("name", "needed"), [("train", 1000), ("calibrate", 300), ("test", 300)])
def test_ordinary_requests_are_there_too(name: str, needed: int) -> None:
    assert sum(p.meta["kind"] == "general" for p in part(name)) >= needed


def test_the_parts_have_different_writers() -> None:
    writers = {name: {p.meta["writer"] for p in part(name)} for name in PARTS}
    for a, b in itertools.combinations(PARTS, 2):
        assert not writers[a] & writers[b]


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(PARTS, 2)))
def test_parts_do_not_overlap(a: str, b: str) -> None:
    report = prompts.overlap(part(a), part(b))
    assert report.clean, report.text()


def public_prompts(root: Path) -> PromptSet:
    """Every prompt text of the public sets under `root`, each once."""
    texts: dict[str, str] = {}
    for name in PUBLIC:
        raw = (root / name).read_text("utf-8")
        lines = raw.splitlines(keepends=True)
        rows = csv.DictReader(lines) if name.endswith(".csv") else map(json.loads, lines)
        for n, row in enumerate(rows):
            text = next((row[c] for c in TEXT_COLUMNS if row.get(c)), None)
            if text and len(text) > 8:
                texts.setdefault(text, f"{name}:{n}")
    return PromptSet("public", tuple(Prompt.of(t, id=i) for t, i in texts.items()))


@pytest.mark.parametrize("name", PARTS)
def test_no_overlap_with_public_evaluation_sets(name: str) -> None:
    root = os.environ.get("DEMUR_DATA")
    if not root or not all((Path(root) / f).is_file() for f in PUBLIC):
        pytest.skip("DEMUR_DATA names no folder with all the public sets that are compared")
    public = public_prompts(Path(root))
    assert len(public) > 5000
    report = prompts.overlap(part(name), public)
    assert report.clean, report.text()
