"""What a model is asked when it checks a solution, and how its reply is read."""

from __future__ import annotations

import re

CHECK = """\
You are an experienced mathematician marking a written solution. Decide whether its reasoning is sound.

Problem:
{problem}

Solution:
{solution}

Check every step from first to last: does each one follow, is each calculation right, is each theorem used
where it applies, is nothing that matters skipped or guessed? A right final answer proves nothing by itself.
Disregard harmless slips: typing errors, and mistakes that change neither the result nor any later step or that
the solution itself corrects.

Answer with one word and nothing else: True if the reasoning is sound, False if it is not."""

_TOKEN = re.compile(r"\b(True|TRUE|False|FALSE)\b")
_PROSE = re.compile(
    r"\bsolution\b[^.!?\n]*?\b(incorrect|not (?:\w+ )?correct|correct)\b(?![^.!\n]*\?)", re.IGNORECASE
)


def check_text(problem: str, solution: str) -> str:
    """The question to a checker about one solution.

    >>> "1 + 1" in check_text("What is 1 + 1?", "It is 2.")
    True
    """
    head, rest = CHECK.split("{problem}")  # not str.format: mathematical text is full of braces
    middle, tail = rest.split("{solution}")
    return head + problem.strip() + middle + solution.strip() + tail


def parse_verdict(text: str) -> bool | None:
    """A checker's reply as a verdict: True sound, False flawed, None unreadable.

    The last word True or False counts. Without one, the last sentence of the kind "the solution ... is
    correct / incorrect" does. Everything else is unreadable and never counted as either.

    >>> parse_verdict("Step 2 is True, but step 3 fails. **False**")
    False
    >>> parse_verdict("The solution given is not correct."), parse_verdict("It is true that"), parse_verdict("true")
    (False, None, True)
    """
    if found := _TOKEN.findall(text):
        return bool(found[-1].lower() == "true")
    if (word := text.strip(" \n\t*.`'\"").lower()) in ("true", "false"):
        return word == "true"
    if prose := _PROSE.findall(text):
        return bool(prose[-1].lower() == "correct")
    return None
