"""Rejection sampling: keep the harmless requests that a reference generator often refuses.

What is kept is hard for the reference by construction. Its own rate on it means nothing, and generators akin to it
look worse than they are; reports on such a set say so (`meta["selected_by"]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from demur.errors import InputError
from demur.measure.overt.backends import Backend
from demur.measure.overt.scoring import Row, joined, refusal
from demur.runtime.base import Progress
from demur.types import PromptSet, Rate


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept requests, and the reference's refusal rate on each request it was shown."""

    kept: PromptSet
    rates: Mapping[str, Rate]


def select(
    reference: Backend,
    prompts: PromptSet,
    *,
    samples: int = 8,
    threshold: float | Mapping[str, float] = 0.5,
    progress: Progress | None = None,
) -> Selection:
    """Keep the harmless requests that the reference refuses more often than the threshold of their category.

    Args:
        samples: drawings of each request, with different seeds. threshold: one share, or one by category with
            "*" for the others.

    Raises:
        InputError: nothing harmless to choose from, a category without threshold, or nothing kept.
    """
    asked = [p for p in prompts if p.should_refuse is False]
    if not asked:
        raise InputError("no prompt has expected: comply; only harmless requests are chosen from")
    limits = dict(threshold) if isinstance(threshold, Mapping) else {"*": threshold}
    lacking = sorted({str(p.category) for p in asked if p.category not in limits and "*" not in limits})
    if lacking:
        raise InputError(f'no threshold for {", ".join(lacking)}; give one, or "*" for all others')
    drawings = [d for s in range(samples) for d in reference.draw(asked, sample=s, progress=progress)]
    rows: dict[str, list[Row]] = {p.id: [] for p in asked}
    for row in joined(asked, drawings):
        rows[row.prompt.id].append(row)
    rates = {i: refusal(own) for i, own in rows.items()}
    kept = []
    for p in asked:
        value = rates[p.id].value
        if value is not None and value > limits.get(str(p.category), limits.get("*", 1.0)):
            chosen = {"selected_by": reference.name, "reference_rate": value}
            kept.append(replace(p, meta={**p.meta, **chosen}))
    if not kept:
        raise InputError(
            f"{reference.name} refuses none of {len(asked)} requests more often than the threshold"
        )
    return Selection(PromptSet(f"{prompts.name} refused by {reference.name}", tuple(kept)), rates)
