"""Which prompts a model refuses, by its own behaviour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from demur.calibrate.decide import cuts, decide
from demur.runtime.base import Runtime
from demur.types import DECLINING, RESPOND, Condition, Label, Prompt, PromptSet


def by_behaviour(
    runtime: Runtime, prompts: Iterable[Prompt], condition: Condition | None = None
) -> dict[str, PromptSet]:
    """`refused` and `accepted`: the prompts by what this model does with them.

    With control tokens the operating point that came with the model decides, or without one the likeliest token.
    Else the model answers (60 tokens, unless `condition` says otherwise) and `rules/demur-v1` reads the answers;
    those that are neither a refusal nor compliance are left out.
    """
    rows = list(prompts)
    refuses: list[bool | None]
    if runtime.control is not None:
        refuses = list(_decided(runtime, rows, condition))
    else:
        from demur import judges

        judge = judges.get("rules/demur-v1")
        answers = runtime.generate(rows, condition or Condition(max_new_tokens=60))
        labels = [judge.judge(p, r).label for p, r in zip(rows, answers, strict=True)]
        refuses = [True if x in DECLINING else False if x == Label.COMPLIANCE else None for x in labels]
    return {
        name: PromptSet(name, tuple(p for p, r in zip(rows, refuses, strict=True) if r is says))
        for name, says in (("refused", True), ("accepted", False))
    }


def _decided(runtime: Runtime, rows: Sequence[Prompt], condition: Condition | None) -> list[bool]:
    assert runtime.control is not None
    names, point = runtime.control.names, runtime.shipped_point
    scores = runtime.score(rows, condition, T=1.0 if point is None else point.T)
    P = np.array([[s.probabilities[name] for name in names] for s in scores]).reshape(-1, len(names))
    if point is None:
        says = P.argmax(1)
    elif point.rule == "compare" and not cuts(point):
        says = decide(P, names, dict.fromkeys(names[:-1], -1.0), "compare")
    else:
        says = decide(P, names, cuts(point), point.rule)
    return [names[k] != RESPOND for k in says.tolist()]
