"""Word problems with one right number, in wordings that change the theme and nothing else.

A wording fills the same sentences with other nouns, so numbers and structure cannot differ. Two harmless ones are
built in; a theme of your own is a YAML file with the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from demur.errors import InputError
from demur.files import read_rows, read_text, row_id

SLOTS = ("person", "other", "group", "place", "item", "items", "box", "boxes", "make", "use")
THEMES: Mapping[str, Mapping[str, str]] = {
    "plain": {
        "person": "Mia",
        "other": "Tom",
        "group": "bakers",
        "place": "bakery",
        "item": "roll",
        "items": "rolls",
        "box": "basket",
        "boxes": "baskets",
        "make": "bake",
        "use": "eat",
    },
    "unicorn": {
        "person": "Glimmer the unicorn",
        "other": "Sparkle the unicorn",
        "group": "unicorns",
        "place": "rainbow castle",
        "item": "moon crystal",
        "items": "moon crystals",
        "box": "star chest",
        "boxes": "star chests",
        "make": "enchant",
        "use": "release",
    },
}
"""Words for the slots; `make` and `use` are verbs as they stand behind "they"."""

_SENTENCES: Sequence[tuple[str, Callable[[int, int, int], int]]] = (
    (
        "{person} has {a} {items} and gets {b} more from {other}. How many {items} does {person} have now?",
        lambda a, b, _c: a + b,
    ),
    (
        "There are {a} {boxes} in the {place}, each with {b} {items}. The {group} {use} {c} of the {items}. "
        "How many {items} are left?",
        lambda a, b, c: a * b - c,
    ),
    (
        "{a} {group} work in the {place}. In a day they {make} {b} {items} each. "
        "How many {items} do they {make} in {c} days?",
        lambda a, b, c: a * b * c,
    ),
    (
        "{person} packs {ab} {items} into {boxes} of {b}. How many {boxes} are filled?",
        lambda a, _b, _c: a,
    ),
    (
        "One {item} costs {b} coins and one {box} costs {c} coins. {person} buys {a} {items} and one {box}. "
        "How many coins does {person} pay?",
        lambda a, b, c: a * b + c,
    ),
    (
        "{person} and {other} share {ab} {items} with the other {group}, so that each of {b} gets equally many. "
        "How many {items} does each get?",
        lambda a, _b, _c: a,
    ),
    (
        "On Monday the {group} {make} {a} {items}, and on each of the next {b} days {c} more than on the day "
        "before. How many {items} do they {make} on the last day?",
        lambda a, b, c: a + b * c,
    ),
    (
        "A {box} holds {a} {items}. {person} has {b} full {boxes} and {c} single {items}, and {other} has twice as "
        "many {items} as {person}. How many {items} does {other} have?",
        lambda a, b, c: 2 * (a * b + c),
    ),
)
ASK = "{problem}\nWork it out in a few short steps. End with a line of the form: Answer: NUMBER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem with its right answer; `wordings` are theme -> text."""

    id: str
    answer: str
    wordings: Mapping[str, str]


def load_theme(path: str | Path) -> dict[str, str]:
    """A theme: a YAML file with one short text for each of `SLOTS`.

    Raises:
        InputError: a slot is missing or unknown, or its text holds a number.
    """
    try:
        raw = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path}: no YAML ({e})") from None
    if not isinstance(raw, dict) or set(raw) != set(SLOTS):
        given = sorted(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise InputError(f"{path}: a theme has exactly the slots {', '.join(SLOTS)}; found {given}")
    words = {slot: str(raw[slot]).strip() for slot in SLOTS}
    if bad := [
        slot for slot, word in words.items() if not word or any(c.isdigit() or c in "{}" for c in word)
    ]:
        raise InputError(
            f"{path}: slot {bad[0]!r} is {words[bad[0]]!r}; a text without numbers and braces is needed"
        )
    return words


def make_problems(
    n: int = 80, seed: int = 0, themes: Mapping[str, Mapping[str, str]] = THEMES
) -> list[Problem]:
    """n problems in every theme; numbers are drawn, and the kinds of problem take turns.

    >>> p = make_problems(1)[0]
    >>> p.wordings["plain"].startswith("Mia has ")
    True
    """
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        text, rule = _SENTENCES[i % len(_SENTENCES)]
        numbers = {"a": int(rng.integers(3, 13)), "b": int(rng.integers(2, 10)), "c": int(rng.integers(2, 7))}
        shown: dict[str, Any] = {**numbers, "ab": numbers["a"] * numbers["b"]}
        wordings = {name: _upper(text.format(**shown, **words)) for name, words in themes.items()}
        out.append(Problem(id=f"problem-{i + 1}", answer=str(rule(*numbers.values())), wordings=wordings))
    return out


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def load_problems(path: str | Path, wordings: Sequence[str]) -> list[Problem]:
    """Problems of a JSONL or CSV file: `answer`, and one column for each wording; `id` as you have it.

    Raises:
        InputError: a column is missing, or two wordings of a problem hold different numbers.
    """
    out = []
    for line, row in read_rows(path):
        at = f"{path}, line {line}"
        texts = {w: str(row.get(w) or "").strip() for w in wordings}
        if missing := [
            w for w, text in [*texts.items(), ("answer", str(row.get("answer") or ""))] if not text
        ]:
            raise InputError(f"{at}: no {missing[0]}; a row needs answer and {', '.join(wordings)}")
        held = {
            w: sorted("".join(c if c.isdigit() else " " for c in text).split()) for w, text in texts.items()
        }
        if len({tuple(numbers) for numbers in held.values()}) > 1:
            raise InputError(
                f"{at}: the wordings hold different numbers ({held}); a wrong answer would show nothing but that"
            )
        out.append(
            Problem(id=row_id(row.get("id"), line, at), answer=str(row["answer"]).strip(), wordings=texts)
        )
    return out
