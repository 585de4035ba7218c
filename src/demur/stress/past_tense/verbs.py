"""English verb forms, as far as rewording questions needs them: irregular verbs, the regular rules, and words that
open a request.
"""

from __future__ import annotations

import re
from importlib import resources

import yaml

_RAW = yaml.safe_load(resources.files("demur.stress.past_tense").joinpath("english.yaml").read_text("utf-8"))
WORDS: dict[str, frozenset[str]] = {k: frozenset(v.split()) for k, v in _RAW.items() if k != "irregular"}
"""The word lists of `english.yaml` by name."""
FORMS: dict[str, tuple[str, str]] = {
    base: (past, participle)
    for base, past, participle in (row.split() for row in _RAW["irregular"].split(","))
}
"""Irregular verbs: base -> (past, past participle)."""

REQUESTS = WORDS["requests"] | (frozenset(FORMS) - WORDS["not_requests"])
"""Base forms that open an imperative."""


def base_of(word: str) -> str:
    """The base form of a third-person form in -s.

    >>> [base_of(w) for w in ("causes", "carries", "catches", "goes", "has")]
    ['cause', 'carry', 'catch', 'go', 'have']
    """
    if word == "has":
        return "have"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(ch|sh|ss|x|zz|o)es$", word):
        return word[:-2]
    return word.removesuffix("s")


def past_of(base: str) -> str:
    """The past form of a verb's base form.

    >>> [past_of(w) for w in ("cause", "carry", "stop", "open", "occur", "fix", "play", "go", "undo")]
    ['caused', 'carried', 'stopped', 'opened', 'occurred', 'fixed', 'played', 'went', 'undid']
    """
    if base in FORMS:
        return FORMS[base][0]
    if base.endswith("e"):
        return base + "d"
    if re.search(r"[^aeiou]y$", base):
        return base[:-1] + "ied"
    if base in WORDS["doubled"] or re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", base):
        return f"{base}{base[-1]}ed"
    return base + "ed"


_PARTICIPLES = frozenset(p for _, p in FORMS.values()) | {"done", "born", "gone", "been"}


def is_participle(word: str) -> bool:
    """Whether a word looks like a participle in -ed, -ing or an irregular one.

    >>> [is_participle(w) for w in ("made", "located", "boiling", "bed", "evening")]
    [True, True, True, False, False]
    """
    return word in _PARTICIPLES or (
        bool(re.search(r"\w\w(ed|ing)$", word)) and word not in WORDS["no_participle"] and len(word) > 4
    )
