"""Scores joined with what is expected of their prompts: thresholds from some, a check of them on others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from demur.calibrate import (
    BestF1,
    Calibrator,
    LearnThenTest,
    TargetRate,
    calibrate_table,
    check,
    check_table_rows,
)
from demur.errors import InputError
from demur.prompts import normalise
from demur.types import RESPOND, OperatingPoint, Prompt, PromptSet, Report, Score

Keys = frozenset[tuple[str, str]]
"""What a row can be recognised by: (kind, value) of its id and its text."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores and, in the same order, their prompts, all with `expected`; `name` is that of the prompt set."""

    scores: tuple[Score, ...]
    prompts: tuple[Prompt, ...]
    name: str

    @property
    def expected(self) -> list[bool]:
        """Whether each prompt should be refused."""
        return [bool(p.should_refuse) for p in self.prompts]

    @property
    def names(self) -> list[str]:
        """The categories of the scores, `respond` last; empty where they have none."""
        found = self.scores[0].probabilities
        return [*(c for c in found if c != RESPOND), RESPOND] if found else []

    @property
    def draws(self) -> list[str | None] | None:
        """Group of each prompt, or None where no prompt has one."""
        return [p.group for p in self.prompts] if any(p.group for p in self.prompts) else None

    def probabilities(self) -> list[list[float]]:
        """One row for each score, columns `names`."""
        return [[s.probabilities[c] for c in self.names] for s in self.scores]


def join(scores: Sequence[Score], prompts: PromptSet) -> Scored:
    """Scores with their prompts, by id.

    Raises:
        InputError: an id without prompt or expectation, or with several scores; p_refuse that is no probability.
    """
    known = {p.id: p for p in prompts}
    lost = [s.id for s in scores if s.id not in known or known[s.id].should_refuse is None]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(scores)} scores (first: {lost[0]!r}) have no prompt with `expected` in "
            f"{prompts.name!r}; name the file they were scored on with --prompts"
        )
    if len({s.id for s in scores}) < len(scores):
        twice = next(i for i, n in Counter(s.id for s in scores).items() if n > 1)
        raise InputError(
            f"id {twice!r} has several scores; counting a prompt twice would claim more than the data hold. Keep "
            "one row per prompt"
        )
    if wrong := [s for s in scores if not 0 <= s.p_refuse <= 1]:
        raise InputError(
            f"score {wrong[0].id!r}: p_refuse is {wrong[0].p_refuse:g}, no probability. For scores of another "
            "kind name the column: --score p_refuse --label y"
        )
    return Scored(tuple(scores), tuple(known[s.id] for s in scores), prompts.name)


def one_source(scores: Sequence[Score]) -> None:
    """Refuse scores that thresholds of one model at one temperature cannot be for."""
    if len({(tuple(s.probabilities), s.T) for s in scores}) > 1:
        raise InputError(
            "the scores differ in their categories or in T; calibrate the scores of one model at one T"
        )
    if len({(s.condition, s.model, s.fingerprint, s.dtype) for s in scores}) > 1:
        raise InputError(
            "the scores come from several models or conditions (columns model, fingerprint, dtype, condition); "
            "thresholds hold for one of each"
        )


def fit(rows: Scored, choice: Mapping[str, Any], ordinary_alpha: float | None = None) -> OperatingPoint:
    """Calibrate.

    Args:
        choice: alpha, delta, goal and rate, as `demur.calibrate.calibrate_table` takes them.
        ordinary_alpha: budget for ordinary prompts, see `demur.calibrate.LearnThenTest`.

    Raises:
        InputError: scores that differ in categories, T or source. UnsupportedClaim: too few of them.
    """
    one_source(rows.scores)
    first = rows.scores[0]
    if not rows.names:
        if ordinary_alpha is not None:
            raise InputError(
                "these scores have no categories, so --ordinary-alpha has nothing to hold; leave it out"
            )
        table, columns = _flat(rows), _flat_columns(rows)
        return replace(calibrate_table(table, **columns, calibrated_on=rows.name, **choice), T=first.T)
    calibrator: Calibrator = BestF1()
    if choice["goal"] == "max-tpr":
        calibrator = LearnThenTest(choice["alpha"], choice["delta"], ordinary_alpha=ordinary_alpha)
    elif choice["goal"] == "target-rate":
        calibrator = TargetRate(choice["rate"])
    point = calibrator.fit(
        rows.probabilities(),
        rows.expected,
        [p.category for p in rows.prompts],
        rows.draws,
        names=rows.names,
        calibrated_on=rows.name,
        T=first.T,
    )
    return replace(point, model=first.model, model_fingerprint=first.fingerprint, dtype=first.dtype)


def check_held_out(
    point: OperatingPoint, fitted: Scored, held_out: Scored, ordinary_alpha: float | None = None
) -> Report:
    """How a point that was fitted on `fitted` does on other prompts (`demur.calibrate.check`).

    Raises:
        InputError: scores of another source.
    """
    one_source((*fitted.scores, *held_out.scores))
    if not held_out.names:
        columns = {**_flat_columns(held_out), "group": _flat_columns(fitted)["group"]}
        return check_table_rows(point, _flat(held_out), **columns)
    return check(
        point,
        held_out.probabilities(),
        held_out.expected,
        [p.category for p in held_out.prompts],
        held_out.draws,
        names=fitted.names,
        ordinary_alpha=ordinary_alpha,
    )


def _flat(rows: Scored) -> list[dict[str, Any]]:
    """The rows as `calibrate_table` reads them, for scores without categories."""
    return [
        {"p": s.p_refuse, "y": int(e), "g": p.category or "", "c": p.group or f"prompt {p.id}"}
        for s, e, p in zip(rows.scores, rows.expected, rows.prompts, strict=True)
    ]


def _flat_columns(rows: Scored) -> dict[str, Any]:
    group = "g" if any(p.category for p in rows.prompts) else None
    return {"score": "p", "label": "y", "group": group, "cluster": "c" if rows.draws else None}


def prompt_keys(prompt: Prompt) -> Keys:
    """Id and text of a prompt. An id that is only its line in a file says nothing beside another file's.

    >>> sorted(prompt_keys(Prompt.of("Hello!", id="a")))
    [('id', 'a'), ('text', 'hello')]
    """
    text = normalise("\n".join(m.content for m in prompt.messages))
    own_id = not re.fullmatch(r"line\d+", prompt.id)
    named = [("id", prompt.id)] if own_id or not text else []
    return frozenset([*named, *([("text", "\n".join([text, *prompt.images]))] if text else [])])


def row_keys(row: Mapping[str, Any]) -> Keys:
    """`prompt_keys` of a row of any table: its columns `id`, `prompt`, `text` and `prompt_hash`, where it has them.

    >>> sorted(row_keys({"id": 7, "prompt": "Hello!", "p": 0.5}))
    [('id', '7'), ('text', 'hello')]
    """
    found = [("id", row.get("id")), ("prompt_hash", row.get("prompt_hash"))]
    found += [("text", normalise(str(row.get(c) or ""))) for c in ("prompt", "text")]
    return frozenset((kind, str(value)) for kind, value in found if value not in (None, ""))


def refuse_shared(fitted: Iterable[Keys], held_out: Iterable[Keys]) -> None:
    """Refuse to check on rows that were calibrated on.

    Raises:
        InputError: an id or a text stands on both sides.
    """
    known = frozenset[tuple[str, str]]().union(*fitted)
    shared = [both for keys in held_out if (both := keys & known)]
    if shared:
        kind, value = min(shared[0])
        raise InputError(
            f"{len(shared)} rows of --check are among those calibrated on (the first by its {kind}: "
            f"{value[:60]!r}), so a check on them would flatter. Take them out of one of the two; if they are "
            "other prompts, give them other ids"
        )
