"""Cliff-as-a-Judge: pick the training prompts on which a model means to refuse while it thinks, and then does not.

Harmful prompts with the model's own thinking are ranked by the drop of a refusal score
(`demur.explain.refusal_cliff`). The top of the list, each with a refusal behind its thinking, is a small safety set
for fine-tuning. Mix ordinary requests with ordinary answers into it: refusals alone teach refusing everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demur.errors import InputError
from demur.explain.refusal_cliff import Cliff, Markup, Thought
from demur.files import dump_jsonl
from demur.stats.controls import keyword

Rule = Literal["drop", "final", "random", "keyword"]
REFUSAL = "I'm sorry, but I can't help with that."
WORDS = ("harmful", "illegal", "dangerous", "unethical", "refuse", "decline", "can't help", "cannot help")
"""Words of the keyword rule: thinking that holds one names a reason to refuse."""


def select(
    thoughts: Sequence[Thought],
    cliffs: Sequence[Cliff],
    share: float = 0.05,
    *,
    by: Rule = "drop",
    words: Sequence[str] = WORDS,
    seed: int = 0,
) -> list[Thought]:
    """This share of the thoughts (at least one), best first.

    Args:
        cliffs: one for each thought, in any order.
        by: "drop": largest fall of the refusal score; "final": lowest score before the answer; and to compare with,
            "random", and "keyword": at random among thinking that holds one of `words`, then among the rest.

    Raises:
        InputError: a share outside (0, 1], a rule or a cliff that is not there.

    >>> from demur.types import Prompt
    >>> pool = [Thought(prompt=Prompt.of("x", id=i), thinking="hm") for i in "abc"]
    >>> cliffs = [Cliff(id=i, plateau=p, final=f) for i, p, f in (("a", 1, 1), ("b", 0.9, 0.2), ("c", 0.1, 0))]
    >>> [t.id for t in select(pool, cliffs, 0.4)], [t.id for t in select(pool, cliffs, 0.4, by="final")]
    (['b'], ['c'])
    """
    if not 0 < share <= 1 or not thoughts:
        raise InputError(
            f"share={share} of {len(thoughts)} thoughts: a share between 0 and 1 of at least one"
        )
    of = {c.id: c for c in cliffs}
    if missing := [t.id for t in thoughts if t.id not in of]:
        raise InputError(f"{len(missing)} thoughts ({missing[0]!r} first) have no cliff; trace all of them")
    chance = np.random.default_rng(seed).permutation(len(thoughts))
    if by == "drop":
        key = np.array([-of[t.id].drop for t in thoughts])
    elif by == "final":
        key = np.array([of[t.id].final for t in thoughts])
    elif by in ("random", "keyword"):
        key = np.zeros(len(thoughts))
        if by == "keyword":
            key -= keyword([t.thinking for t in thoughts], words)
    else:
        raise InputError(f"by={by!r}; rules are drop, final, random and keyword")
    order = np.lexsort((chance, key))
    return [thoughts[i] for i in order[: max(1, round(share * len(thoughts)))]]


def training_rows(
    thoughts: Sequence[Thought],
    cliffs: Sequence[Cliff],
    *,
    refusal: str = REFUSAL,
    markup: Markup | None = None,
) -> list[dict[str, Any]]:
    """Rows as TRL's supervised trainer reads them: `prompt` and `completion`, both lists of messages.

    The completion is the model's own thinking and a refusal behind it; `drop` and `final` tell why it is there.
    """
    m = markup or Markup()
    of = {c.id: c for c in cliffs}
    return [
        {
            "id": t.id,
            "prompt": [{"role": x.role, "content": x.content} for x in t.prompt.messages],
            "completion": [
                {"role": "assistant", "content": f"{m.open}{t.thinking.strip()}{m.close}{refusal}"}
            ],
            "drop": of[t.id].drop,
            "final": of[t.id].final,
        }
        for t in thoughts
    ]


def write_rows(
    path: str | Path,
    thoughts: Sequence[Thought],
    cliffs: Sequence[Cliff],
    *,
    refusal: str = REFUSAL,
    markup: Markup | None = None,
) -> None:
    """Write `training_rows` as JSONL, atomically."""
    dump_jsonl(training_rows(thoughts, cliffs, refusal=refusal, markup=markup), path)
