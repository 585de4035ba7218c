"""Splits and samples that never move a prompt: its place is a function of the seed and of its group or id."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import groupby

from demur.errors import InputError
from demur.types import RESPOND, Prompt, PromptSet

GENERAL = "general"
"""Row of benign prompts that resemble no category."""


def split(prompts: PromptSet, shares: Mapping[str, float], seed: int = 0) -> dict[str, PromptSet]:
    """Divide a set into named parts of about the given shares.

    A prompt's place is u = sha256(seed, group or id) / 2^64 in [0, 1), compared with the running sum of the
    shares: prompts of one group stay together, and adding prompts later moves none of the old ones. Part
    sizes therefore vary like a binomial around their share.

    >>> parts = split(prompts, {"fit": 0.8, "test": 0.2})  # doctest: +SKIP

    Returns:
        {name: PromptSet}, each named `<set>/<name>`, in the order of the set.

    Raises:
        InputError: shares are negative or do not add up to 1, or a part with a share came out empty.
    """
    if (
        not shares
        or any(not s >= 0 for s in shares.values())
        or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6)
    ):
        raise InputError(
            f"shares {dict(shares)} must be at least 0 and add up to 1 (they add up to "
            f"{sum(shares.values())})"
        )
    parts: dict[str, list[Prompt]] = {name: [] for name in shares}
    for p in prompts:
        parts[_part(_unit(seed, p), shares)].append(p)
    empty = [name for name, share in shares.items() if share and not parts[name]]
    if empty:
        raise InputError(
            f"{prompts.name}: part {', '.join(empty)} came out empty: {len(prompts)} prompts in "
            f"{len({_key(p) for p in prompts})} groups are too few for {dict(shares)}; use larger shares "
            "or more prompts"
        )
    return {name: PromptSet(f"{prompts.name}/{name}", tuple(kept)) for name, kept in parts.items()}


def _key(p: Prompt) -> str:
    # the prefix keeps a group from meeting an id of the same name
    return f"group:{p.group}" if p.group is not None else f"id:{p.id}"


def _unit(seed: int, p: Prompt) -> float:
    digest = hashlib.sha256(f"{seed}\n{_key(p)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _part(u: float, shares: Mapping[str, float]) -> str:
    total, last = 0.0, ""
    for name, share in shares.items():
        total += share
        if share:
            last = name
            if u < total:
                return name
    return last  # rounding of the sum


def row_of(prompt: Prompt) -> str:
    """The row a prompt is counted in: its category, or `general` for benign prompts that resemble none."""
    if prompt.should_refuse:
        return prompt.category or "uncategorised"
    if prompt.category in (None, "", RESPOND, GENERAL) or prompt.meta.get("kind") == GENERAL:
        return GENERAL
    return str(prompt.category)


def stratified(prompts: PromptSet, n: int, seed: int = 0) -> tuple[Prompt, ...]:
    """At most `n` prompts, equally many of each (row, expected or not), in set order.

    Which ones depends on the seed and the ids alone, so that adding a prompt hardly changes the sample.

    >>> ps = PromptSet("s", tuple(Prompt.of("x", id=str(i), category="ab"[i % 2]) for i in range(10)))
    >>> [p.category for p in stratified(ps, 4)].count("a")
    2
    """
    if n >= len(prompts):
        return prompts.prompts

    def rank(p: Prompt) -> str:
        return hashlib.sha256(f"{seed}:{p.id}".encode("utf-8", "surrogatepass")).hexdigest()

    def stratum(p: Prompt) -> tuple[str, str]:
        return (row_of(p), str(p.should_refuse))

    strata = [sorted(some, key=rank) for _, some in groupby(sorted(prompts, key=stratum), key=stratum)]
    chosen: list[str] = []
    depth = 0
    while len(chosen) < n:
        layer = [some[depth].id for some in strata if depth < len(some)]
        chosen += layer[: n - len(chosen)]
        depth += 1
    keep = set(chosen)
    return tuple(p for p in prompts if p.id in keep)
