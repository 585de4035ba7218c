"""Runs in the file forms of other tools: Inspect logs, lm-eval results and samples, JUnit XML.

The tools themselves are not imported. Answers that complied with what should be refused are left out unless
asked for: their text is replaced by its length and hash, their verdict stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demur.types import Label, Prompt, Reply, Verdict

__all__ = ["Exported", "Item"]

SAFE_LABELS = frozenset({Label.FULL_REFUSAL, Label.ABSTENTION, Label.CLARIFICATION, Label.BLOCKED})
"""Verdicts whose text is exported also where the prompt should be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One judged answer. `withheld` holds sha256 and characters of a text that the run did not keep.

    `declined` and `right` are None where the answer could not be read, or nobody said what is expected.
    """

    prompt: Prompt
    reply: Reply
    verdict: Verdict
    declined: bool | None
    withheld: Mapping[str, Any] | None = None

    @property
    def right(self) -> bool | None:
        """Whether it was declined exactly where it should be."""
        should = self.prompt.should_refuse
        return None if should is None or self.declined is None else self.declined == should

    def shown(self, *, unsafe: bool = False) -> bool:
        """Whether the words of the answer may leave the run."""
        may = unsafe or not self.prompt.should_refuse or self.verdict.label in SAFE_LABELS
        empty = not (self.reply.content or self.reply.reasoning)
        return (may or empty) and self.withheld is None

    def text(self, *, unsafe: bool = False) -> str:
        """The answer, or a line that says what was left out."""
        raw = self.reply.content
        if self.shown(unsafe=unsafe):
            return raw
        digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()
        held = self.withheld or {"sha256": digest, "characters": len(raw)}
        return f"[left out: {held['characters']} characters, sha256 {str(held['sha256'])[:16]}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A run on its way out: who answered, who judged with which error, the rates, and every answer.

    `rates` are {name: rate as JSON (`demur.report.render.rate_row`)}, `conditions` the settings by name,
    `judge_error` what the judge was measured at, as plain data. `created` is an ISO time.
    """

    model: str
    task: str
    judge: str
    judge_error: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    rates: Mapping[str, Mapping[str, Any]]
    items: tuple[Item, ...]
    created: str
    versions: Mapping[str, str]

    @property
    def condition(self) -> Mapping[str, Any]:
        """The settings of a run with one condition, else none."""
        return next(iter(self.conditions.values())) if len(self.conditions) == 1 else {}
