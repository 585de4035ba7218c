"""True and false statements: pairs for tracing, labelled sets for the truth direction, and how they are asked.

The public files of `post-training-mechanistic` are only looked for, never shipped; files of one's own have the
same columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demur import data
from demur.errors import DataUnavailable, InputError
from demur.files import read_rows

SLUG = "post-training-mechanistic"
SETS = ("cities", "sp_en_trans", "inventors", "animal_class", "element_symb", "facts")
"""The sets of the paper's leave-one-out."""
SUFFIX = " This statement is:"
ANSWERS = (" TRUE", " FALSE")
FEW_SHOT = (
    "The city of Cairo is in Egypt. This statement is: TRUE\n"
    "The city of Paris is in Kenya. This statement is: FALSE\n"
    "The city of Cairo is in Norway. This statement is: FALSE\n"
    "The city of Paris is in France. This statement is: TRUE\n"
)
"""Four labelled examples in the paper's form, in one order for all pairs so that they are computed once."""


COMPLETIONS = "The city of Cairo is in Egypt.\nThe city of Paris is in France.\n"
"""Examples before pairs that are to be completed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two statements that differ in their subject only.

    Asked for a verdict, they end with the same word, which is right for one of them: `true` and `false`. To be
    completed, they stop before that word, and `answers` are the right next words of `true` and of `false`.
    """

    true: str
    false: str
    answers: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A statement and whether it is true."""

    text: str
    true: bool


def load_pairs(path: str | Path | None = None) -> list[Pair]:
    """Pairs of a CSV or JSONL file with `true_statement` and `false_statement`; by default the public cities.

    With columns `true_answer` and `false_answer` they are pairs to be completed.

    Raises:
        InputError: a column is missing. DataUnavailable: the public file is not here.
    """
    where = _public("patching_pairs.csv") if path is None else Path(path)
    out = []
    for n, row in read_rows(where):
        at = f"{where}, line {n}"
        texts = [_cell(row, name, at) for name in ("true_statement", "false_statement")]
        asked = any(str(row.get(name) or "").strip() for name in ("true_answer", "false_answer"))
        answers = (_cell(row, "true_answer", at), _cell(row, "false_answer", at)) if asked else None
        out.append(Pair(true=texts[0], false=texts[1], answers=answers))
    return out


def completions(pairs: Sequence[Pair]) -> list[Pair]:
    """The public pairs of cities as sentences to be completed: "The city of X is in", with the right countries.

    Which country is right for the city of the false statement is looked up in the set `cities`; pairs whose
    cities are not there, or lie in the same country, are left out.

    Raises:
        DataUnavailable: the public file is not here.
    """
    rows = (row for _, row in read_rows(_public("cities.csv")))
    right = {str(row["city"]): str(row["correct_country"]) for row in rows}
    out = []
    for pair in pairs:
        (head, country), (other, _) = (text.rstrip(".").split(" is in ") for text in (pair.true, pair.false))
        own = right.get(other.removeprefix("The city of "))
        if own is not None and own != country:
            out.append(Pair(true=f"{head} is in", false=f"{other} is in", answers=(f" {country}", f" {own}")))
    return out


def unasked(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of one's own as sentences to be completed: each stops before its last word.

    The right next word of a false statement is looked up among the true ones; pairs whose false subject has no
    true statement there, or the same last word, are left out. Pairs with answers stay as they are.

    Raises:
        InputError: no pair is left.

    >>> pairs = [Pair(true="Oslo is in Norway.", false="Rome is in Norway.")]
    >>> unasked([*pairs, Pair(true="Rome is in Italy.", false="Oslo is in Italy.")])[0]
    Pair(true='Oslo is in', false='Rome is in', answers=(' Norway', ' Italy'))
    """
    right = dict(_before_last(p.true) for p in pairs if p.answers is None)
    out = []
    for pair in pairs:
        (true, word), (false, _) = _before_last(pair.true), _before_last(pair.false)
        own = right.get(false)
        if pair.answers is not None:
            out.append(pair)
        elif own is not None and own != word:
            out.append(replace(pair, true=true, false=false, answers=(f" {word}", f" {own}")))
    if not out:
        raise InputError(
            f"none of {len(pairs)} pairs can be completed: no false statement's subject has a true statement among "
            "the others, so its right next word is not known. Give the columns true_answer and false_answer"
        )
    return out


def _before_last(text: str) -> tuple[str, str]:
    head, _, word = text.rstrip(" .!?").rpartition(" ")
    return head, word


def load_statements(
    paths: Mapping[str, str | Path] | None = None, *, per_set: int | None = 160, seed: int = 0
) -> dict[str, list[Statement]]:
    """Labelled statements by set: files with `statement` and `label` (1 true, 0 false); by default the public six.

    Args:
        paths: name -> file. per_set: at most so many of each, half true and half false, drawn with `seed`.

    Raises:
        InputError: a column is missing, a label is neither 0 nor 1. DataUnavailable: a public file is not here.
    """
    files = {name: _public(f"{name}.csv") for name in SETS} if paths is None else paths
    return {name: _thin(_read(Path(file)), per_set, seed) for name, file in files.items()}


def _public(name: str) -> Path:
    try:
        return data.get(SLUG, name)
    except InputError:  # the set is not registered, so it is found in DEMUR_DATA or not at all
        raise DataUnavailable(
            f"{SLUG}/{name} is not here. Set DEMUR_DATA to a folder that holds it, or pass pairs and statements of "
            "your own"
        ) from None


def _read(where: Path) -> list[Statement]:
    out = []
    for n, row in read_rows(where):
        label = str(row.get("label", "")).strip()
        if label not in ("0", "1"):
            raise InputError(f"{where}, line {n}: label {label!r}; write 1 for true and 0 for false")
        out.append(Statement(text=_cell(row, "statement", f"{where}, line {n}"), true=label == "1"))
    return out


def _cell(row: Mapping[str, object], name: str, at: str) -> str:
    text = str(row.get(name) or "").strip()
    if not text:
        raise InputError(f"{at}: no {name}; a row needs it")
    return text


def _thin(rows: Sequence[Statement], most: int | None, seed: int) -> list[Statement]:
    if most is None or len(rows) <= most:
        return list(rows)
    rng = np.random.default_rng(seed)
    kept: list[int] = []
    for label in (True, False):
        mine = [i for i, s in enumerate(rows) if s.true == label]
        kept += rng.permutation(mine)[: most // 2].tolist()
    return [rows[i] for i in sorted(kept)]
