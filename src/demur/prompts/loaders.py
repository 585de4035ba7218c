"""Public prompt sets in demur's form. Each loader takes the upstream file as it is, or a subset of it.

Without a path the file comes from `demur.data` (`DEMUR_DATA`, the user cache, the pinned upstream commit).
Rows whose text is blanked are left out and counted in `dropped`, never passed on as empty prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demur import data
from demur.errors import InputError
from demur.files import read_rows
from demur.types import Prompt, PromptSet, expand_expected

COCONOT_CATEGORIES: Mapping[str, str] = {
    "requests with safety concerns": "safety",
    "humanizing requests": "humanizing",
    "unsupported requests": "unsupported",
    "indeterminate requests": "indeterminate",
    "incomplete requests": "incomplete",
}

_COCONOT = (
    "CoCoNot noncompliance: declining, abstaining or asking back is right (original), or not (contrast)"
)
_COCONOT_LICENSE = "MIT AND ODC-By-1.0"


@dataclass(frozen=True, slots=True)
class LoadedSet(PromptSet):
    """A `PromptSet` with what its loader left out: `dropped` maps a reason to a number of rows."""

    dropped: Mapping[str, int] = field(default_factory=dict)


def coconot(original: str | Path | None = None, contrast: str | Path | None = None) -> LoadedSet:
    """CoCoNot evaluation: original prompts (expected: decline) and contrast prompts (expected: comply).

    Reads `coconot_eval.jsonl` and `coconot_contrast_eval.jsonl` (1,001 and 379 rows upstream: id, category,
    subcategory, prompt). `meta["kind"]` is "refuse" or "lookalike".

    >>> coconot().where(category="safety").name  # doctest: +SKIP
    'coconot'
    """
    files = [
        (Path(original) if original else data.get("coconot", "original_eval.jsonl"), "refuse"),
        (Path(contrast) if contrast else data.get("coconot", "contrast_eval.jsonl"), "lookalike"),
    ]
    rows = [(kind, path, n, row) for path, kind in files for n, row in read_rows(path, "jsonl")]
    return _collect(
        "coconot", (_coconot_prompt(kind, f"{path}, line {n}", n, row) for kind, path, n, row in rows)
    )


def coconot_preferences(path: str | Path | None = None) -> LoadedSet:
    """CoCoNot contrast training pairs: benign look-alikes with a `chosen` answer and a `rejected` one.

    The answers are written by models; the rejected one hedges or declines, but not always.
    """
    path = Path(path) if path else data.get("coconot", "contrast_pref.jsonl")
    return _collect(
        "coconot/contrast_pref",
        (_coconot_prompt("lookalike", f"{path}, line {n}", n, row) for n, row in read_rows(path, "jsonl")),
    )


def xstest(path: str | Path | None = None) -> LoadedSet:
    """XSTest: 250 safe prompts (expected: comply) that look unsafe, 200 unsafe ones (expected: refuse).

    All are about safety; prompts with the same trigger word share a `group`.
    """
    path = Path(path) if path else data.get("xstest", "prompts.csv")
    prompts = []
    for n, row in read_rows(path, "csv"):
        where = f"{path}, line {n}"
        label = _field(row, where, "label")
        if label not in ("safe", "unsafe"):
            raise InputError(f"{where}: label {label!r}, XSTest has safe and unsafe")
        safe = label == "safe"
        prompts.append(
            Prompt.of(
                _field(row, where, "prompt"),
                id=f"xstest/{_field(row, where, 'id')}",
                category="safety",
                subcategory=row.get("type"),
                expected=expand_expected("comply" if safe else "refuse"),
                definition="XSTest: safe prompts must be answered, unsafe ones refused",
                group=f"xstest/{row['focus']}" if row.get("focus") else None,
                source="xstest",
                license="CC-BY-4.0",
                meta={"kind": "lookalike" if safe else "refuse"},
            )
        )
    return _collect("xstest", prompts)


def refusal_tokens_eval(path: str | Path | None = None) -> LoadedSet:
    """The CoCoNot evaluation as the refusal-tokens repository ships it (1,380 rows upstream), in its order.

    Rows without text (redacted copies blank some) are counted in `dropped["redacted"]`.
    """
    path = Path(path) if path else data.get("refusal-tokens", "coconot_eval.csv")
    prompts: list[Prompt | str] = []
    for n, row in read_rows(path, "csv"):
        where = f"{path}, line {n}"
        kind = {"refusal": "refuse", "contrast-refusal": "lookalike"}.get(_field(row, where, "eval_split"))
        if kind is None:
            raise InputError(
                f"{where}: eval_split {row['eval_split']!r}, expected refusal or contrast-refusal"
            )
        text = row.get("prompt") or row.get("question")
        prompts.append(_coconot_prompt(kind, where, n, {**row, "prompt": text}) if text else "redacted")
    return _collect("refusal-tokens/coconot_eval", prompts)


def temporal(path: str | Path | None = None) -> LoadedSet:
    """The temporal evaluation of refusal tokens: 200 questions beyond the knowledge horizon, 236 others.

    Expected: decline for `temporal`, comply for `normal`. The 964 other upstream rows are CoCoNot prompts
    that should be refused, labelled Respond there; they are left out and counted in `dropped`.
    """
    path = Path(path) if path else data.get("refusal-tokens", "temporal_eval.csv")
    prompts: list[Prompt | str] = []
    for n, row in read_rows(path, "csv"):
        where = f"{path}, line {n}"
        split = _field(row, where, "eval_split")
        if split not in ("temporal", "normal"):
            prompts.append(f"eval_split {split}")
            continue
        text = row.get("question") or row.get("prompt")
        if not text:
            prompts.append("redacted")
            continue
        prompts.append(
            Prompt.of(
                text,
                id=str(row.get("id") or f"temporal/{n}"),
                category="unsupported",
                subcategory="temporal limitations",
                expected=expand_expected("decline" if split == "temporal" else "comply"),
                definition="the answer needs the current date or news after the training data ends",
                source=f"refusal-tokens/{split}",
                meta={"kind": "refuse" if split == "temporal" else "general"},
            )
        )
    return _collect("refusal-tokens/temporal", prompts)


def benign_alpaca(path: str | Path | None = None) -> LoadedSet:
    """300 harmless AlpacaEval prompts (expected: comply): does the model still answer ordinary requests?"""
    path = Path(path) if path else data.get("derta", "benign_alpaca_eval_300.jsonl")
    prompts = []
    for i, (n, row) in enumerate(read_rows(path, "jsonl")):
        text = row.get("prompt") or _field(row, f"{path}, line {n}", "question")
        prompts.append(
            Prompt.of(
                text,
                id=f"alpaca/{row.get('idx', i)}",
                expected=expand_expected("comply"),
                source="derta/benign_alpaca_eval_300",
                license="MIT",
                meta={"kind": "general"},
            )
        )
    return _collect("benign_alpaca", prompts)


def _coconot_prompt(kind: str, where: str, line: int, row: Mapping[str, Any]) -> Prompt | str:
    text = row.get("prompt")
    if not text:
        return "redacted"
    name = _field(row, where, "category")
    category = COCONOT_CATEGORIES.get(name.strip().lower())
    if category is None:
        raise InputError(f"{where}: category {name!r} is none of CoCoNot's ({', '.join(COCONOT_CATEGORIES)})")
    return Prompt.of(
        text,
        id=str(row.get("id") or f"{kind}/{line}"),
        category=category,
        subcategory=row.get("subcategory"),
        expected=expand_expected("decline" if kind == "refuse" else "comply"),
        definition=_COCONOT,
        chosen=row.get("chosen") or None,
        rejected=row.get("rejected") or None,
        source=f"coconot/{'original' if kind == 'refuse' else 'contrast'}",
        license=_COCONOT_LICENSE,
        meta={"kind": kind},
    )


def _field(row: Mapping[str, Any], where: str, name: str) -> str:
    value = row.get(name)
    if value in (None, ""):
        raise InputError(f"{where}: no {name!r}; it has {', '.join(map(str, row))}. Is this the right file?")
    return str(value)


def _collect(name: str, items: Iterable[Prompt | str]) -> LoadedSet:
    """The prompts; a string is the reason why a row was left out. Two of one id are an `InputError`."""
    kept, dropped = [], Counter[str]()
    for item in items:
        if isinstance(item, str):
            dropped[item] += 1
        else:
            kept.append(item)
    if not kept:
        raise InputError(f"{name}: no prompt left (left out: {dict(dropped)})")
    try:
        return LoadedSet(name, tuple(kept), dict(dropped))
    except ValueError as e:
        raise InputError(str(e)) from None
