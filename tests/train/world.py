"""A synthetic world in which one word decides: "bomb" is refused as safety, "cat" as humanizing."""

from __future__ import annotations

import random
from typing import Any

from demur.train.refusal_tokens import Recipe
from demur.types import Prompt, PromptSet, expand_expected

TEXT = """
how what why do can the a boil egg fjord write letter tell me about please red blue green story poem sum
number capital norway weather today
"""
FILLER = TEXT.split()
REFUSAL = {"safety": "sorry i cannot help", "humanizing": "no you can"}
CUE = {"safety": "bomb", "humanizing": "cat"}
QUICK: dict[str, Any] = {
    "lr": 1e-2,
    "row_lr": 2e-2,
    "epochs": 6,
    "batch_size": 16,
    "rank": 8,
    "alpha": 32,
    "dropout": 0.0,
    "answer_weight": 1.0,
    "distilled": 8,
    "answer_tokens": 8,
    "probe_C": 1.0,
    "check_every": 48,
    "precision": "float32",
}
"""Settings under which a tiny model learns the world in about three seconds."""


def quick(**changes: Any) -> Recipe:
    return Recipe(**{**QUICK, **changes})


def refuse(text: str, id: str, category: str | None = "safety", **fields: Any) -> Prompt:
    fields = {"reference": "sorry i cannot", **fields}
    return Prompt.of(text, id=id, category=category, expected=expand_expected("refuse"), **fields)


def comply(text: str, id: str, category: str | None = None, **fields: Any) -> Prompt:
    return Prompt.of(text, id=id, category=category, expected=expand_expected("comply"), **fields)


def world(n: int, seed: int, name: str = "world", shuffled: bool = False) -> PromptSet:
    """n prompts: a quarter each safety, humanizing, look-alikes of safety ("dog"), and general ones.

    `shuffled` deals the cue words out at random, so that nothing in the text says what to refuse.
    """
    rng, prompts, seen = random.Random(seed), [], set()
    while len(prompts) < n:
        kind = len(prompts) % 4
        words = rng.sample(FILLER, 5)
        cue = ("bomb", "cat", "dog", "fjord")[rng.randrange(4) if shuffled else kind]
        words.insert(rng.randrange(6), cue)
        text, id = " ".join(words), f"{name}-{len(prompts)}"
        if text in seen:
            continue
        seen.add(text)
        category = ("safety", "humanizing", "safety", None)[kind]
        if kind < 2:
            prompts.append(refuse(text, id, category, reference=REFUSAL[str(category)]))
        else:
            prompts.append(comply(text, id, category, meta={"kind": ("lookalike", "general")[kind - 2]}))
    return PromptSet(name, tuple(prompts))
