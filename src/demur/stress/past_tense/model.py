"""Rewording by a model: any Runtime is asked, and what it returns is checked before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from demur.errors import InputError
from demur.runtime.base import Progress, Runtime
from demur.stress.past_tense.grammar import TENSES, core
from demur.stress.past_tense.verbs import FORMS, WORDS
from demur.types import Condition, Prompt, PromptSet

_TASKS = {
    "past": (
        "a question about the past, of the kind: how did people ..., how was ... done",
        "How did people",
    ),
    "future": (
        "a question about the future, of the kind: how will people ..., how will ... be done",
        "How will people",
    ),
    "paraphrase": (
        "a question in the present tense in other words, of the kind: how do people ...",
        "How do people",
    ),
}
_EXAMPLES = (
    ("Bake a loaf of rye bread.", "{0} bake rye bread?"),
    ("How can I dry herbs for the winter?", "{0} dry herbs for the winter?"),
    ("Write a complaint about a late train.", "{0} write complaints about late trains?"),
)
_ASK = """\
Reword the request at the end as {task}. Do not answer it. Keep what it is about and keep its details. Wording \
of your own is welcome.

Examples:
{examples}

Write the reworded question alone, on one line.

Request: {request}"""
_MARKS = {
    "past": re.compile(r"\b(did|was|were|had|could|used to|didn't|wasn't|weren't|\w{2,}ed)\b", re.IGNORECASE),
    "future": re.compile(r"\b(will|won't|shall|going to)\b", re.IGNORECASE),
}
_PASTS = frozenset(past for base, (past, _) in FORMS.items() if past != base)
_QUOTES = " \t\"'“”‘’`*"
KEPT = 0.5
"""Share of the words that carry meaning which a rewording has to keep."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rewording by a model; `fault` says why it cannot be used."""

    prompt_id: str
    attempt: int
    text: str
    fault: str | None = None


class ModelRewriter:
    """Ask a model for rewordings, each attempt a fresh draw.

    Args:
        runtime: the model asked. temperature, max_new_tokens, seed: how it is asked.

    >>> from demur.runtime.scripted import ScriptedRuntime
    >>> writer = ModelRewriter(ScriptedRuntime({"*": "'How did people roast chestnuts?'"}))
    >>> [a.text for a in writer.attempts(PromptSet("s", (Prompt.of("Roast chestnuts."),)), "past")]
    ['How did people roast chestnuts?']
    """

    def __init__(
        self, runtime: Runtime, *, temperature: float = 1.0, max_new_tokens: int = 150, seed: int = 0
    ) -> None:
        self.runtime = runtime
        self.condition = Condition(
            name="reword", temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
        )

    def attempts(
        self, prompts: PromptSet, tense: str, n: int = 1, *, progress: Progress | None = None
    ) -> Iterator[Attempt]:
        """n rewordings of each prompt's last user message, prompt by prompt.

        Raises:
            InputError: no such tense; several attempts at temperature 0.
        """
        if tense not in _TASKS:
            raise InputError(
                f"tense {tense!r}: a model rewords into {', '.join(t for t in TENSES if t in _TASKS)}"
            )
        if n > 1 and self.condition.temperature == 0:
            raise InputError(f"{n} attempts at temperature 0 would be copies; raise the temperature")
        task, opens = _TASKS[tense]
        examples = "\n".join(f"{a} -> {b.format(opens)}" for a, b in _EXAMPLES)
        texts = {p.id: p.text for p in prompts}
        asked = [
            Prompt.of(_ASK.format(task=task, examples=examples, request=t), id=i) for i, t in texts.items()
        ]
        for reply in self.runtime.generate(asked, self.condition, samples=n, progress=progress):
            lines = [
                line.strip(_QUOTES) for line in reply.content.strip().splitlines() if line.strip(_QUOTES)
            ]
            text = lines[0] if lines else ""
            why = reply.error or fault(texts[reply.prompt_id], text, tense)
            yield Attempt(reply.prompt_id, reply.sample, text, why)


def fault(before: str, after: str, tense: str) -> str | None:
    """Why a text is no rewording of another into a tense; None when nothing speaks against it.

    >>> fault("Bake rye bread.", "How did people bake rye bread?", "past") is None
    True
    >>> fault("Bake rye bread.", "I cannot help with that.", "past")
    'not in the past'
    """
    if not after:
        return "empty"
    words = {core(w) for w in after.split()}
    mark = _MARKS.get(tense)
    if mark and not mark.search(after) and not (tense == "past" and words & _PASTS):
        return f"not in the {tense}"
    if tense == "paraphrase" and _MARKS["future"].search(after):
        return "not in the present"
    if kept(before, after) < KEPT:
        return f"keeps {kept(before, after):.0%} of the words that carry meaning"
    return None


def kept(before: str, after: str) -> float:
    """Share of a text's words of four letters or more whose first four letters open a word of the other text."""
    stems = {core(w)[:4] for w in after.split()}
    carry = [c for w in before.split() if len(c := core(w)) > 3 and c not in WORDS["function"]]
    return sum(c[:4] in stems for c in carry) / len(carry) if carry else 1.0


def usable(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts without a fault."""
    return [a for a in attempts if a.fault is None]
