"""Text that is put in a model's mouth: answers out of a file, or what the model's own base says by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demur import judges
from demur.errors import InputError
from demur.judges.base import judge_all
from demur.measure.refusal import declined
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt

UNHARMFUL = frozenset({"humanizing", "unsupported", "indeterminate", "incomplete"})
"""Categories of requests to decline whose answers do no harm; for no others are answers made here."""


@dataclass(frozen=True, slots=True)
class Forced:
    """A prompt and the answer whose first tokens are put in the model's mouth."""

    prompt: Prompt
    answer: str


def load_forced(path: str | Path) -> list[Forced]:
    """Rows of a file with `prompt` and `response` (and maybe id, category, expected).

    >>> forced = load_forced("answers.jsonl")  # doctest: +SKIP
    """
    from demur.report.importers import load_answers

    found = load_answers(path)
    by_id = {p.id: p for p in found.prompts}
    forced = [Forced(by_id[r.prompt_id], r.content) for r in found.replies if r.content.strip()]
    if not forced:
        raise InputError(f"{path}: no row has an answer to force")
    return forced


def own_answers(
    base: Runtime,
    prompts: Sequence[Prompt],
    tokens: int,
    *,
    judge: str = "rules/demur-v1",
    condition: Condition | None = None,
    progress: Progress | None = None,
) -> list[Forced]:
    """What the base model answers by itself, greedily; answers that the judge reads as declining are left out.

    Raises:
        InputError: a request to refuse of another category than those of `UNHARMFUL`.
    """
    if unsafe := [p for p in prompts if p.should_refuse and p.category not in UNHARMFUL]:
        raise InputError(
            f"prompt {unsafe[0].id!r} should be refused and is of category {unsafe[0].category!r}; answers to "
            f"force are made for {', '.join(sorted(UNHARMFUL))} only. Bring a file of prompts and responses"
        )
    reader = judges.get(judge)
    asked = replace(condition or Condition(), max_new_tokens=tokens, temperature=0.0, operating_point=None)
    pairs = zip(prompts, base.generate(prompts, asked, progress=progress), strict=True)
    read = [(p, r) for p, r in pairs if r.content.strip()]
    verdicts = judge_all(reader, read)
    return [
        Forced(p, r.content) for (p, r), v in zip(read, verdicts, strict=True) if declined(v.label) is False
    ]
