"""The words of English that the tense rules know, and small changes to them."""

from __future__ import annotations

import re

from demur.stress.past_tense.verbs import WORDS

TENSES = ("present", "past", "future", "paraphrase")
"""Present is the prompt as it was; the paraphrase stays in the present and changes as many words as the past."""

WH = WORDS["wh"]
MODALS = {"can": "could", "can't": "couldn't", "cannot": "couldn't"}
BE = {"is": "was", "are": "were", "am": "was", "isn't": "wasn't", "aren't": "weren't"}
DO = {"do": "did", "does": "did", "don't": "didn't", "doesn't": "didn't"}
HAVE = {"has": "had", "have": "had", "hasn't": "hadn't", "haven't": "hadn't"}
PAST = {**DO, **BE, **HAVE, **MODALS}
OTHER = WORDS["other"]
OVER = WORDS["over"]
LATER = WORDS["later"]
AUXILIARIES = frozenset(PAST) | OTHER | OVER | LATER
PRONOUNS = WORDS["pronouns"]
DETERMINERS = WORDS["determiners"]
DEGREE = WORDS["degree"]
STOPS = WORDS["stops"]
JOINS = WORDS["joins"]
FIRST_PERSON = {
    **dict.fromkeys(("i", "we"), "they"),
    **dict.fromkeys(("me", "us"), "them"),
    **dict.fromkeys(("my", "our"), "their"),
    **dict.fromkeys(("mine", "ours"), "theirs"),
    **dict.fromkeys(("myself", "ourselves"), "themselves"),
    **dict.fromkeys(("i'm", "we're"), "they are"),
    **dict.fromkeys(("i've", "we've"), "they have"),
}
SHORT = {
    **{f"{w}'s": (w, "is") for w in (*WH, "that", "there", "here", "it", "he", "she")},
    **{f"{w}'re": (w, "are") for w in (*WH, "they", "we", "you")},
    "i'm": ("I", "am"),
}
TIMES = {
    "past": {"today": "then", "now": "then", "currently": "then", "nowadays": "then", "tonight": "that night"}
    | {"tomorrow": "the next day"},
    "future": {"today": "then", "now": "then", "currently": "then", "nowadays": "then"},
}

Forms = dict[str, list[str]]
"""Words of a sentence by tense: past, future, and `paraphrase`, the same frame in the present."""


class Cannot(Exception):
    """Why a text cannot be reworded."""


class NotHere(Cannot):
    """No clause of the kind looked for begins here; the next place may hold one."""


def core(word: str) -> str:
    """A word without the marks around it, in lower case and with straight apostrophes.

    >>> core('(Don’t!')
    "don't"
    """
    return re.sub(r"^[^\w]+|[^\w]+$", "", word.lower().replace("’", "'"))


def put(word: str, new: str) -> str:
    """`new` with the marks and the capital of `word`."""
    bare = core(word)
    at = word.lower().replace("’", "'").find(bare)
    capital = word[at].isupper() and bare != "i" and not bare.startswith("i'")
    return word[:at] + (new[0].upper() + new[1:] if capital else new) + word[at + len(bare) :]


def expand(words: list[str]) -> list[str]:
    """Words with "what's" and its like written out.

    >>> expand(["What's", "tofu?"])
    ['What', 'is', 'tofu?']
    """
    out: list[str] = []
    for word in words:
        if two := SHORT.get(core(word)):
            head, marks = put(word, two[0]), ""
            if head[-1] in ",.?!;:":
                head, marks = head[:-1], head[-1]
            out += [head, two[1] + marks]
        else:
            out.append(word)
    return out


def word_edits(a: str, b: str) -> int:
    """Words to insert, delete or replace to get from one text to the other; marks and case do not count.

    >>> word_edits("How do I bake bread?", "How did people bake bread?")
    2
    """
    x, y = ([core(w) for w in s.split() if core(w)] for s in (a, b))
    row = list(range(len(y) + 1))
    for i, word in enumerate(x, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(y, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != other))
    return row[-1]


def later(words: list[str], tense: str) -> list[str]:
    """The rest of a clause: auxiliaries of its finite verbs go into the past with it, words for now to then."""
    out = []
    for i, word in enumerate(words):
        bare, before = core(word), core(words[i - 1]) if i else ""
        finite = before in PRONOUNS | {"who", "which", "that"}
        ends = i + 1 == len(words) or word[-1] in ",.?!;" or core(words[i + 1]) in STOPS
        new = TIMES.get(tense, {}).get(bare) if ends else None
        if tense == "past" and new is None:
            sure = bare in ("is", "are", "isn't", "aren't", "does", "doesn't", "can't", "cannot", "has")
            if sure or (finite and bare in ("am", "do", "don't", "have", "haven't", "can")):
                new = PAST[bare]
        out.append(word if new is None else put(word, new))
    return out


def forms_of(words: list[str], past: list[str], future: list[str], same: list[str], rest: list[str]) -> Forms:
    """A sentence of unchanged words, the part that differs by tense, and the rest of its clause."""
    return {
        "past": [*words, *past, *later(rest, "past")],
        "future": [*words, *future, *later(rest, "future")],
        "paraphrase": [*words, *same, *rest],
    }
