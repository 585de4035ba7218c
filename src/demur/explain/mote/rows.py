"""Prompts with a response class each: from a file, or read from the model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demur import judges
from demur.errors import InputError
from demur.files import read_rows, row_id
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt, Reply

REFUSED, ANSWERED = "refused", "answered"
"""Classes that a judge gives; one's own may be any words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt. `label`: its response class or None. `topic`, `template`: what it asks about and in which form."""

    prompt: Prompt
    label: str | None = None
    topic: str | None = None
    template: str | None = None


def load_rows(path: str | Path) -> list[Row]:
    """Rows of a JSONL or CSV file with the column prompt, and maybe id, label, topic, template.

    Raises:
        InputError: no rows, a row without prompt, an id twice.
    """
    out = []
    for line, row in read_rows(path):
        where, text = f"{path}, row {line}", row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: no text in 'prompt'")
        named = {k: str(row[k]) for k in ("label", "topic", "template") if row.get(k) not in (None, "")}
        out.append(Row(prompt=Prompt.of(text, id=row_id(row.get("id"), line, where)), **named))
    if not out or len({r.prompt.id for r in out}) < len(out):
        raise InputError(
            f"{path}: {'no rows' if not out else 'an id stands twice'}; each row needs its own id"
        )
    return out


def label_by_response(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    judge: str = "rules/demur-v1",
    condition: Condition | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[list[str | None], list[Reply]]:
    """Let the model answer, and label each prompt by what the answer does: refused, answered, or None (unread).

    >>> labels, _ = label_by_response(runtime, prompts)  # doctest: +SKIP
    """
    replies = list(runtime.generate(prompts, condition, progress=progress))
    verdicts = judges.judge_all(judges.get(judge), list(zip(prompts, replies, strict=True)))
    read = [judges.positive(v) for v in verdicts]
    return [None if r is None else REFUSED if r else ANSWERED for r in read], replies
