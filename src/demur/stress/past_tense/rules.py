"""English questions and requests in another tense, by rule; a request becomes a question about what people did.

Only the frame of the sentence moves: the auxiliary, its subject, and auxiliaries further on. Words that carry
meaning stay. What these rules cannot reword well they leave alone, and say why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from demur.stress.past_tense.clauses import clause, people, procedure
from demur.stress.past_tense.grammar import (
    AUXILIARIES,
    DETERMINERS,
    PRONOUNS,
    STOPS,
    TENSES,
    WH,
    Cannot,
    Forms,
    NotHere,
    core,
    expand,
    word_edits,
)
from demur.stress.past_tense.verbs import REQUESTS

_LEADS = ("", "So,", "Tell me:", "Please tell me:", "Please tell me this:", "I would like to know:")
_SHELL = re.compile(
    r"(?:(?:please|can you|could you|would you|will you|do you know|i (?:want|need) to know|"
    r"i(?:'d| would) like to know|let me know|i wonder)\s+)*(?:please\s+)?"
    r"(?:(?:tell|show|teach|explain|advise|describe)(?: to)?(?: me| us)?\s+)?"
    r"(?=how (?:to|(?:i|we|one) (?:can|could|should|would)) )",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"(?:(?:please|kindly|now|can you please|could you(?: please)?|would you(?: please)?|will you please|"
    r"i (?:want|need) you to|i(?:'d| would) like you to)[ ,]+)+",
    re.IGNORECASE,
)
_CARRIES = re.compile(r"[\n\"“”`]|(?:^|\s)'\w|: *\S")


@dataclass(frozen=True, slots=True)
class Reworded:
    """A prompt in each of `TENSES`, and how many words each changes (edit distance over words)."""

    texts: Mapping[str, str]
    edits: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Left:
    """A prompt that stays as it is, and why."""

    reason: str


def reword(text: str) -> Reworded | Left:
    """The prompt in other tenses, or why it was left alone.

    All questions of a prompt are reworded. Without one, its single request becomes "How did people ...?". Procedure
    questions ("How do I ...?") ask about people too, in every tense but the present, which is the prompt untouched.

    >>> made = reword("How do I sharpen a pencil?")
    >>> made.texts["past"], made.texts["future"]
    ('How did people sharpen a pencil?', 'How will people sharpen a pencil?')
    >>> made.texts["paraphrase"], made.edits["past"], made.edits["paraphrase"]
    ('So, how do people sharpen a pencil?', 2, 2)
    >>> reword("Who won in 1998?").reason
    'no auxiliary or known verb behind the question word'
    """
    try:
        return _reword(re.sub(" +", " ", text).strip())
    except Cannot as e:
        return Left(str(e))


def _reword(text: str) -> Reworded:
    if _CARRIES.search(text):
        raise Cannot("carries a text of its own (a quotation, lines, or what follows a colon)")
    sentences = re.split(r"(?<=[.?!])\s+(?=\S)", text)
    split = [expand(s.split()) for s in sentences]
    asked = [i for i, words in enumerate(split) if _asks(words)]
    if asked:
        forms = {i: _question(split[i]) for i in asked}
    else:
        orders = [i for i, s in enumerate(sentences) if _order(s)]
        if len(orders) != 1:
            raise Cannot(
                "several requests" if orders else "no question and no request that opens with a known verb"
            )
        forms = {orders[0]: _imperative(sentences[orders[0]])}
    out = {"present": text}
    for tense in TENSES[1:]:
        out[tense] = " ".join(
            _sentence(forms[i][tense], s) if i in forms else s for i, s in enumerate(sentences)
        )
    if missing := word_edits(text, out["past"]) - word_edits(text, out["paraphrase"]):
        i = min(forms)
        sentences[i] = _led(_sentence(forms[i]["paraphrase"], sentences[i]), missing)
        same = (
            _sentence(forms[k]["paraphrase"], s) if k in forms and k != i else s
            for k, s in enumerate(sentences)
        )
        out["paraphrase"] = " ".join(same)
    return Reworded(out, {t: word_edits(text, out[t]) for t in TENSES})


def _led(text: str, missing: int) -> str:
    """The text behind a lead-in of as many words as are missing, or the longest there is."""
    first = text.split()[0]
    known = core(first) in WH | AUXILIARIES | STOPS | DETERMINERS | {"of"} or first.endswith("ly")
    rest = text[0].lower() + text[1:] if known and first != "I" else text
    return f"{_LEADS[min(missing, len(_LEADS) - 1)]} {rest}"


def _sentence(words: list[str], before: str) -> str:
    made = " ".join(words)
    made = (
        re.sub(r"[\s,.!?]*$", "", made) + "?"
        if re.search(r"[.!?]$", before) or not _asks(before.split())
        else made
    )
    return made[0].upper() + made[1:] if before[0].isupper() else made[0].lower() + made[1:]


def _asks(words: list[str]) -> bool:
    """Whether a sentence is a question: by its mark, or by how it begins."""
    if not words:
        return False
    first, second = core(words[0]), core(words[1]) if len(words) > 1 else ""
    marked = words[-1].rstrip("\"')").endswith("?")
    opens = first in WH or (first in AUXILIARIES and second in PRONOUNS | DETERMINERS)
    return marked or (opens and not (first in ("do", "have") and second not in PRONOUNS))


def _question(words: list[str]) -> Forms:
    text = " ".join(words)
    if (found := _SHELL.match(text)) and (found.end() or core(words[1]) == "to"):
        return procedure(text[found.end() :].split())
    if (found := _POLITE.match(text)) and core(text[found.end() :].split(" ")[0]) in REQUESTS:
        return people(text[found.end() :].split())
    error: NotHere | None = None
    for start in _starts(words):
        try:
            return clause(words[:start], words[start:])
        except NotHere as e:
            error = error or e
    raise error or Cannot("no question word or auxiliary at the head of a clause")


def _starts(words: list[str]) -> Iterator[int]:
    """Where the main clause may begin: at the start, behind a comma or dash, at a question word."""
    bare = [core(w) for w in words]
    heads = WH | AUXILIARIES
    for i in range(len(words)):
        fresh = i == 0 or words[i - 1][-1] in ",;–-"
        if fresh and (
            bare[i] in heads or (bare[i] in STOPS | {"of"} and bare[i + 1 : i + 2] and bare[i + 1] in WH)
        ):
            yield i
    yield from (i for i in range(1, len(words)) if bare[i] in WH and words[i - 1][-1] not in ",;–-")


def _order(sentence: str) -> bool:
    """Whether a sentence opens as a request: a known verb, maybe behind a polite word, or "tell me how to"."""
    if _SHELL.match(sentence) and not sentence.lower().startswith("how"):
        return True
    found = _POLITE.match(sentence)
    words = [core(w) for w in sentence[found.end() if found else 0 :].split()]
    if len(words) < 2 or words[0] not in REQUESTS:
        return False
    return words[1] not in {"is", "are", "was", "of"} | (frozenset(AUXILIARIES) - {"do", "have"})


def _imperative(sentence: str) -> Forms:
    if found := _SHELL.match(sentence):
        return procedure(expand(sentence[found.end() :].split()))
    found = _POLITE.match(sentence)
    words = expand(sentence[found.end() if found else 0 :].split())
    return people(words)
