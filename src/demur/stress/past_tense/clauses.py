"""Clauses that ask: their auxiliary and subject in each tense, or why the rules do not reach them."""

from __future__ import annotations

from demur.stress.past_tense.grammar import (
    AUXILIARIES,
    BE,
    DEGREE,
    DETERMINERS,
    DO,
    FIRST_PERSON,
    HAVE,
    JOINS,
    LATER,
    OTHER,
    OVER,
    PAST,
    PRONOUNS,
    STOPS,
    WH,
    Cannot,
    Forms,
    NotHere,
    core,
    forms_of,
    put,
)
from demur.stress.past_tense.verbs import WORDS, base_of, is_participle, past_of


def clause(head: list[str], words: list[str]) -> Forms:
    """A clause that opens with a question word (maybe behind a preposition) or with its auxiliary."""
    first = core(words[0])
    wh = 1 if first in STOPS | {"of"} and first not in WH and len(words) > 1 else 0
    if wh == 0 and first in AUXILIARIES:
        return _inverted(head, words, 0, "")
    kind = core(words[wh])
    if kind == "how" and core((*words, "", "")[wh + 1]) == "to":
        return procedure(words[wh:], head)
    limit = next((i for i, w in enumerate(words) if w[-1] in ",;"), len(words) - 1)
    at = next((i for i in range(wh + 1, min(limit + 1, wh + 9)) if core(words[i]) in AUXILIARIES), None)
    if kind in ("what", "who", "which") and len(words) > wh + 1:
        verb = core(words[wh + 1])
        if verb.endswith("s") and base_of(verb) in WORDS["subject_verbs"] and (at is None or at > wh + 2):
            mark = words[wh + 1]
            return forms_of(
                [*head, *words[: wh + 1]],
                [put(mark, past_of(base_of(verb)))],
                ["will", put(mark, base_of(verb))],
                [mark],
                words[wh + 2 :],
            )
    if at is None:
        raise NotHere("no auxiliary or known verb behind the question word")
    if kind == "how" and core(words[wh + 1]) == "come":
        raise Cannot("how come, which keeps the order of a statement")
    return _inverted(head, words, at, " ".join([kind, *map(core, words[wh + 1 : at])]))


def _inverted(head: list[str], words: list[str], at: int, kind: str) -> Forms:
    """A clause whose auxiliary stands at `at`, before its subject or behind a question word that is the subject."""
    aux, before, rest = core(words[at]), [*head, *words[:at]], words[at + 1 :]
    if aux in OVER:
        raise Cannot("asks about the past already")
    if aux in LATER:
        raise Cannot("asks about the future already")
    subject = core(rest[0]) if rest else ""
    if kind == "how" and subject in ("i", "we", "one") and aux in (*DO, "can", *OTHER):
        return people(rest[1:], before)
    if aux in DO:
        will = "won't" if aux.endswith("n't") else "will"
        return forms_of(
            before,
            [put(words[at], "did" + aux[-3:] * (will != "will"))],
            [put(words[at], will)],
            [words[at]],
            rest,
        )
    if aux in BE:
        return _be(before, words[at], rest, kind)
    if aux in HAVE:
        return _have(before, words[at], rest, kind)
    return _modal(before, words[at], rest, kind)


def _modal(before: list[str], word: str, rest: list[str], kind: str) -> Forms:
    aux, subject = core(word), core(rest[0]) if rest else ""
    if aux in ("could", "would", "might", "may"):
        raise Cannot(f"{aux} is not clearly present")
    one = subject in PRONOUNS
    if aux in ("should", "must"):
        if not one:
            raise Cannot(f"{aux} with a subject of several words")
        was = "were" if subject in ("you", "we", "they", "people") else "was"
        return forms_of(
            before,
            [put(word, was), rest[0], "supposed to"],
            [put(word, "will"), rest[0], "have to"],
            [word, rest[0]],
            rest[1:],
        )
    if one and not kind:  # "Could you ...?" would be heard as a request
        was = "were" if subject in ("you", "we", "they", "people") else "was"
        return forms_of(
            before,
            [put(word, was), rest[0], "able to"],
            [put(word, "will"), rest[0], "be able to"],
            [word, rest[0]],
            rest[1:],
        )
    if one:
        return forms_of(
            before,
            [put(word, PAST[aux]), rest[0]],
            [put(word, "will"), rest[0], "be able to"],
            [word, rest[0]],
            rest[1:],
        )
    return forms_of(
        before, [put(word, PAST[aux])], [put(word, "won't" if aux != "can" else "will")], [word], rest
    )


def _have(before: list[str], word: str, rest: list[str], kind: str) -> Forms:
    """A perfect, or the main verb have behind its subject."""
    at = next((i for i, w in enumerate(rest[:6]) if is_participle(core(w)) and core(w) != "have"), None)
    first = core(rest[0]) if rest else ""
    if first in DETERMINERS and before and (at is not None or kind.startswith("how ")):
        raise Cannot("a perfect, or have as a full verb: the rules cannot tell")
    if not before or first in PRONOUNS:
        if at is None or not at or core(word).endswith("n't"):
            raise Cannot("a perfect whose participle was not found")
        return forms_of(
            before,
            [put(word, "had"), *rest[:at]],
            [put(word, "will"), *rest[:at], "have"],
            [word, *rest[:at]],
            rest[at:],
        )
    return forms_of(before, [put(word, PAST[core(word)])], [put(word, "will have")], [word], rest)


def _be(before: list[str], word: str, rest: list[str], kind: str) -> Forms:
    if not rest:
        raise Cannot("nothing behind the verb")
    if core(rest[0]) == "going" or (
        len(rest) > 1 and core(rest[1]) == "going" and "to" in map(core, rest[2:3])
    ):
        raise Cannot("asks about the future already")
    if "going to" in " ".join(map(core, rest)):
        raise Cannot("asks about the future already")
    at = _predicate(rest, kind)
    will = "won't" if core(word).endswith("n't") else "will"
    be = [*rest[:at], "be"]
    if at and be[at - 1][-1] in ",.?!":  # "Where is Oslo?": be goes before the mark
        be[at - 1], be[at] = be[at - 1][:-1], "be" + be[at - 1][-1]
    was = BE[core(word)]
    return forms_of(
        before, [put(word, was), *rest[:at]], [put(word, will), *be], [word, *rest[:at]], rest[at:]
    )


def _predicate(rest: list[str], kind: str) -> int:
    """Where the predicate begins behind a form of be, that is, where the future puts its "be"."""
    bare = [core(w) for w in rest]
    end = next((i for i, w in enumerate(rest) if w[-1] in ",;?.!"), len(rest) - 1) + 1
    if bare[0] in PRONOUNS or (
        bare[0] in ("this", "that", "these", "those") and (len(bare) < 3 or bare[1] in STOPS)
    ):
        return 1
    superlative = bare[0] == "the" and len(bare) > 1 and (bare[1] in DEGREE or bare[1].endswith("est"))
    noun = kind.startswith(("what ", "whose ", "which ", "how many ", "how much "))
    if noun and (superlative or (bare[0] not in DETERMINERS and rest[0][0].islower())):
        return 0  # the words before the verb are its subject
    clause = next((i for i in range(1, end) if bare[i] in PRONOUNS | JOINS), end)
    for i in range(1, clause):
        if is_participle(bare[i]) and bare[i - 1] not in DETERMINERS:
            while i > 1 and bare[i - 1] in DEGREE:
                i -= 1
            return i
    if kind in ("what", "who", "which"):
        return 0
    stop = next((i for i in range(1, end) if bare[i] in STOPS), end)
    again = next((i for i in range(2, stop) if bare[i] in ("a", "an", "the") and bare[i - 1] != "of"), None)
    if again is not None:
        return again
    whole = (
        noun
        or kind in ("where", "when")
        or kind.startswith("how ")
        or stop == 1
        or (stop == 2 and bare[0] in DETERMINERS)
    )
    at = stop if whole else stop - 1
    while not whole and at > 1 and bare[at - 1] in DEGREE:
        at -= 1
    return at


def procedure(words: list[str], head: list[str] | None = None) -> Forms:
    """ "how to VERB ..." and "how I can VERB ..." """
    skip = 2 if core(words[1]) == "to" else 3
    return people(words[skip:], [*(head or ()), words[0]])


def people(verb: list[str], before: list[str] | None = None) -> Forms:
    """ "How did people VERB ...?" from the words from the verb on; the asker is one of the people."""
    if not verb:
        raise Cannot("no verb behind the subject")
    if (
        core(verb[0]) == "help"
        and len(verb) > 2
        and core(verb[1]) in ("me", "us")
        and core(verb[2]) not in STOPS | DETERMINERS
    ):
        verb = verb[2:]
    rest: list[str] = [verb[0][0].lower() + verb[0][1:]]
    for i, word in enumerate(verb[1:], 1):
        bare, last = core(word), core(verb[i - 1])
        new = FIRST_PERSON.get(bare)
        if bare in ("me", "us") and (i == 1 or last == "to"):
            new = "others"
        if last in ("i", "we") and bare in ("am", "was"):
            new = "are" if bare == "am" else "were"
        rest.append(word if new is None else put(word, new))
    if core(rest[-1]) == "please":
        rest = rest[:-1]
    before = before or ["How"]
    return forms_of(before, ["did", "people"], ["will", "people"], ["do", "people"], rest)
