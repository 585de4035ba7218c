"""Plain text work that the rule judges share: normalising, sentences, and "is this English?"."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

_CHARS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.S)
_QUOTED = re.compile(r"`[^`]*`|https?://\S+")
_BLANKS = re.compile(r"[ \t]+")
_EMPHASIS = str.maketrans({**dict.fromkeys("*_#>"), "`": "'"})
_CONTRACTIONS = [
    (needle, re.compile(pattern), full)
    for needle, pattern, full in (
        ("can", r"\bcan'?t\b", "cannot"),
        ("can not", r"\bcan not\b", "cannot"),
        ("won't", r"\bwon't\b", "will not"),
        (
            "n't",
            r"\b(do|does|did|is|are|was|were|would|could|should|have|has)n't\b",
            r"\1 not",
        ),
        ("dont", r"\bdont\b", "do not"),
        ("i'm", r"\bi'm\b", "i am"),
        ("'s", r"\b(it|that|there|he|she|what|here)'s\b", r"\1 is"),
        ("'ve", r"\b(i|you|we|they)'ve\b", r"\1 have"),
        ("'re", r"\b(you|we|they)'re\b", r"\1 are"),
        ("'d", r"\b(i|it|that|you|we)'d\b", r"\1 would"),
        ("'ll", r"\b(i|it|you|we)'ll\b", r"\1 will"),
    )
]
"""What a contraction holds (looked for first, being fast), the contraction, and what it stands for."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


def straighten(text: str) -> str:
    """NFKC, straight quotes and dashes, no zero-width characters. Case, line breaks and backticks stay."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text.translate(_CHARS))


@lru_cache(maxsize=512)  # judges ask several times about one text, the classifier batch by batch
def plain(text: str) -> str:
    """`straighten`, lower case, contractions written out, fenced code and Markdown emphasis removed.

    >>> plain("I\u2019m **sorry**, I can\u2019t.")
    'i am sorry, i cannot.'
    """
    out = _without_code(straighten(text)).translate(_EMPHASIS).lower()
    for needle, pattern, full in _CONTRACTIONS:
        if needle in out:
            out = pattern.sub(full, out)
    return (_BLANKS.sub(" ", out) if "  " in out or "\t" in out else out).strip()


def _without_code(text: str) -> str:
    return _CODE.sub(" ", text) if "```" in text else text


def sentences(text: str) -> list[str]:
    """Sentences (or lines) of plain text, empty ones left out."""
    return list(_sentences(text))


@lru_cache(maxsize=512)
def _sentences(text: str) -> tuple[str, ...]:
    return tuple(s for p in _SENTENCE_END.split(text) if (s := p.strip(" \"'-")))


_WORDS = json.loads(resources.files("demur.judges").joinpath("words.json").read_text("utf-8"))
_ENGLISH = frozenset(_WORDS["english"].split())
_PLAIN = (_ENGLISH | set(_WORDS["vocabulary"].split())) - {"no"}
_IN_NAMES = frozenset(_WORDS["in_names"].split())
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _WORDS["languages"].items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)
_ENDING = re.compile(r"\w{3}(?:ing|ed|ly|ness|ism|ists?|ians?|ogy|phy|sis|ts|ers?)$")
_CODE_MARKS = re.compile(r"[=<>{}\[\]\\/_;|$@#]|\w\(|--")
_ARTICLES = frozenset(_WORDS["articles"].split())
_LOANS = frozenset(_WORDS["loans"].split())
_ACCENTED = frozenset(_WORDS["accented"].split())
_TAKEN_OVER = _LOANS | _ACCENTED
_SHARED = {language: frozenset(words.split()) for language, words in _WORDS["shared"].items()}
_FRENCH_REPLIES = frozenset(["non", "c'est non", "ben non", "hors de question", "pas mon rayon"])
"""Whole replies whose words all stand in English names too."""
_ELISION = {
    **dict.fromkeys(["c", "d", "j", "l", "m", "n", "qu", "s"], "fr"),  # c'est, j'ai, n'est
    **dict.fromkeys(["all", "com", "dall", "dell", "dov", "nell", "quell", "quest", "sull", "un"], "it"),
}
_FOREIGN_ENDING = re.compile(
    r"\w{3}(?:"
    r"[cs]ión|(?:cc|aci|uci|si)ones|ções|ção|idad(?:es?)?|[aeil]mente|amiento|imiento|[áí]vel|[áí]veis|"
    r"zion[ei]|[ai]bil[ei]|evol[ei]|iamo(?:ci)?|ità|ités?|issements?|"
    r"keit(?:en)?|heit(?:en)?|schaft(?:en)?|ungen|\w\w(?<!str)(?<!sl)(?<!sw)(?<!fl)(?<!h)ung|ität(?:en)?|"
    r"\w(?:l|s)ich(?:e[mnrs]?)?|\wische[mnrs]?|\wier(?:t|en)|\w\w(?:ig|haft|bar)e[mnrs])$"
    r"|^(?:ab|auf|aus|ein|frei|mit|nach|vor|weg|zurück)ge\w{3,}(?:t|en)(?:e[mnrs]?)?$"
)
"""Endings that make words of other languages and hardly any English one."""


def foreign(text: str, *, asked: str = "", language: str = "en") -> str | None:
    """Why a reply does not look English, or None.

    Code is ignored. Evidence is needed to say "not English": a non-Latin script, an inverted question mark, more
    common words of one other language than English function words, a single one that names and titles do not hold
    where there is no English one at all (or only one that both languages have), words with accents or hardly any
    word that is known in English where there is none, or no English function word in a longer text of running
    sentences, or after a request in another language. Other short replies, names, numbers and lists stay English.

    Args:
        asked: the request. language: its language as the prompt set has it.

    >>> foreign("Lo siento, no puedo ayudar con eso.")
    'es'
    >>> foreign("No.", asked="¿Puedes hacerlo?"), foreign("No.")
    ('es', None)
    """
    body, n, english, best, most, bare, alone = _counted(text)
    if body.strip(" .!\n\"'") in _FRENCH_REPLIES:
        return "fr"
    if not body.isascii() and (script := _script(body, n, english)):
        return script
    if most >= 2 and most > english and most >= 0.15 * n:
        return best
    if not n or not alone:
        return None
    words = re.findall(_WORD, _prose(text))
    telling = sum(_tells(w, after, best) for w, after in zip(words, [*words[1:], ""], strict=True))
    if telling >= max(1, 0.15 * n):
        return best or "no English words"
    if not bare:
        return None
    accented = sum(w.islower() and not w.isascii() and w not in _ACCENTED for w in words)
    if n > 1 and accented >= max(1, 0.15 * n):
        return "accents"
    runs = [len(s.split()) for s in re.split(r"[,;:.!?\n|=(){}\[\]<>]+", body) if s.strip()]
    run = sum(runs) / max(len(runs), 1)
    if n >= 12 and not english and run >= 4:
        return "no English function words"
    if run >= 2 and not _known(text):  # not a list of words
        return "no English words"
    asked_in = language.split("-")[0].lower()
    return asked_in if asked_in not in ("", "en", "und") else _asked_in(asked)


def _tells(word: str, after: str, language: str) -> bool:
    """Whether a word shows that a text without English is in another language: a word of that language that stands
    in no name or loan, or an article or apostrophe with a common noun behind it."""
    low = word.lower()
    start, _, rest = word.partition("'")
    if start.lower() in _ELISION and _common(rest):
        return True
    if language not in _LANGUAGES.get(low, ()) or low in _SHARED.get(language, ()):
        return (low in _ARTICLES and _common(after)) or _built_abroad(low)
    return _common(after) if low in _IN_NAMES else low not in _TAKEN_OVER


def _built_abroad(low: str) -> bool:
    return low not in _TAKEN_OVER and low not in _PLAIN and bool(_FOREIGN_ENDING.search(low))


def _common(word: str) -> bool:
    """Whether a word behind another is neither part of a name nor of a loan such as "de facto"."""
    return len(word) > 2 and word.islower() and word not in _LOANS and word not in _IN_NAMES


def _prose(text: str) -> str:
    """Straightened text without code and addresses."""
    text = _without_code(straighten(text))
    return _QUOTED.sub(" ", text) if "`" in text or "http" in text else text


def _known(text: str) -> bool:
    """Whether a third of a text's words are English, counting those that are no part of names: in small
    letters, and the first. One word alone says nothing, nor does what has the marks of code."""
    if _CODE_MARKS.search(text):
        return True
    words = re.findall(r"[^\W\d_]+", _without_code(straighten(text)))
    small = [w.lower() for i, w in enumerate(words) if i == 0 or (w.islower() and w not in _IN_NAMES)]
    english = sum(w in _PLAIN or w in _TAKEN_OVER or _ends_as_english(w) for w in small)
    return len(small) < 2 or english >= len(small) / 3


def _ends_as_english(low: str) -> bool:
    return low not in _LANGUAGES and bool(_ENDING.search(low))


class _Counts(NamedTuple):
    """A text without code in lower case, its number of words, of English ones, the likeliest other language and the
    number of its words, whether no English word but "no" is among them, and whether none but those is that that
    language shares."""

    body: str
    n: int
    english: int
    best: str
    most: int
    bare: bool
    alone: bool


def _counted(text: str) -> _Counts:
    body = _prose(text).lower()
    counts = Counter(re.findall(_WORD, body))
    english = sum(k for w, k in counts.items() if (w.split("'")[0] if "'" in w else w) in _ENGLISH)
    hits: Counter[str] = Counter()
    for word, k in counts.items():
        for known in _LANGUAGES.get(word, ()) if len(word) > 1 else ():
            hits[known] += k
        if "'" in word and word.split("'")[0] in _ELISION:
            hits[_ELISION[word.split("'")[0]]] += k
    shared = {
        language: sum(counts[w] for w in (words | {"no"}) & _ENGLISH) for language, words in _SHARED.items()
    }
    best = max(hits, key=lambda language: (hits[language], shared.get(language, 0)), default="")
    alone = english == shared.get(best, counts["no"])
    return _Counts(body, counts.total(), english, best, hits[best], english == counts["no"], alone)


def _asked_in(asked: str) -> str | None:
    """The language of a request, if not English: `foreign`, or two words of one and no English one."""
    if not asked:
        return None
    seen = _counted(asked)
    return foreign(asked) or (seen.best if seen.bare and seen.most >= 2 else None)


def _script(body: str, words: int, english: int) -> str | None:
    """The script that most letters have, or more than there are Latin words, if not Latin; "es" for ¿ and ¡."""
    if "¿" in body or "¡" in body:
        return None if english > 1 else "es"
    letters = sum(map(str.isalpha, body))
    scripts = [unicodedata.name(c, "?").split()[0] for c in body if c > "\x7f" and c.isalpha()]
    other = [s for s in scripts if s != "LATIN" and not (s == "GREEK" and letters <= 5)]
    latin_words = words - len(re.findall(r"[^\W\d_a-z\u00c0-\u024f]+", body))
    if len(other) > 0.5 * letters or (len(other) >= 4 and len(other) > latin_words and english <= 1):
        return f"{other[0].lower()} script"
    return None
