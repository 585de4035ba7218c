"""Image requests as prompts: OVERT's files, one's own, and the minimal pairs that come with demur.

`expected` says what a good generator does (comply or refuse), `group` joins twins, and `meta["ambiguous"]` marks
requests whose label is debatable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from demur import data
from demur.errors import InputError
from demur.files import load_prompts, parse_json, read_rows, read_text
from demur.types import Prompt, PromptSet, expand_expected

CATEGORIES = (
    "privacy_individual",
    "privacy_public",
    "copyright_violations",
    "self_harm",
    "sexual_content",
    "illegal_activities",
    "unethical_unsafe_action",
    "discrimination",
    "violence",
)
"""The nine categories of OVERT."""

GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("privacy_individual", "privacy_public"), "privacy"),
    "copyright_violations": "copyright",
    "discrimination": "discrimination",
    **dict.fromkeys(CATEGORIES[3:7], "nsfw"),
    "violence": "nsfw",
}
"""The four groups of the paper's trade-off view."""

_SPELLINGS = {
    "illegal_activites": "illegal_activities",  # so spelt in the released runner
    "unethical": "unethical_unsafe_action",  # so named in the released unsafe file
    "copyright": "copyright_violations",
}
_TEXTS = ("image_prompt", "image_prompts", "unsafe_prompts", "benign_image_prompt", "unsafe_image_prompt")
_DEFINITION = "OVERT: harmless requests that look risky deserve a picture, their harmful twins do not"


def load_cases(path: str | Path) -> PromptSet:
    """Image requests of a file: demur's prompt rows, or rows as OVERT has them.

    OVERT's rows have image_prompt, a list image_prompts, the pair benign_image_prompt and unsafe_image_prompt, or
    a list unsafe_prompts of such pairs. A JSON file holds a list of rows.

    Raises:
        InputError: a file of neither kind, or a row without text.
    """
    if Path(path).suffix.lower() == ".json":
        rows = list(enumerate(_json_rows(path), 1))
    else:
        rows = read_rows(path)
    if not any(k in row for _, row in rows for k in _TEXTS):
        return load_prompts(path)
    prompts = [p for n, row in rows for p in _prompts(row, n, f"{path}, row {n}", Path(path).stem)]
    return PromptSet(Path(path).stem, tuple(prompts))


def mini() -> PromptSet:
    """OVERT-mini, 1,800 benign requests, from the data folder or upstream.

    Raises:
        DataUnavailable: it is not to be had here.
    """
    return load_cases(data.get("overt", "OVERT_mini.csv"))


def own_pairs() -> PromptSet:
    """Short minimal pairs written for demur: a harmless request and its twin, equal but for one detail."""
    with resources.as_file(resources.files("demur.measure.overt").joinpath("pairs.jsonl")) as path:
        return load_prompts(path, name="demur image pairs")


def category(name: str) -> str:
    """A category in OVERT's main spelling; others are only brought to lower case with underscores.

    >>> category("Illegal activites"), category("maps")
    ('illegal_activities', 'maps')
    """
    key = re.sub(r"\W+", "_", name.strip().lower()).strip("_")
    return _SPELLINGS.get(key, key)


def _json_rows(path: str | Path) -> list[dict[str, Any]]:
    rows = parse_json(read_text(path), str(path))
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise InputError(f"{path}: expected a list of objects, one for each seed prompt")
    return rows


def _prompts(row: Mapping[str, Any], n: int, where: str, source: str) -> Iterator[Prompt]:
    texts = list(_texts(row))
    if not texts or not all(isinstance(t, str) and t.strip() for _, _, t in texts):
        raise InputError(f"{where}: a request is empty or no text; it has the columns {', '.join(row)}")
    pair = any(side == "unsafe" for _, side, _ in texts)
    named = row.get("category") or next((c for c in CATEGORIES if source.startswith(c)), None)
    for i, side, text in texts:
        name = f"{row.get('id', n)}" + (f".{i}" if texts[-1][0] else "") + (f"-{side}" if pair else "")
        group = f"{source}/{row.get('id', n)}" + (f".{i}" if pair and texts[-1][0] else "")
        yield Prompt.of(
            text,
            id=name,
            category=category(str(named)) if named else None,
            expected=expand_expected("comply" if side == "benign" else "refuse"),
            definition=_DEFINITION,
            group=group if pair or len(texts) > 1 else None,
            source=source,
            meta={
                k: row[k] for k in ("seed_prompt", "generation_type", "ambiguous") if row.get(k) is not None
            },
        )


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(number, side, text) of each request in a row."""
    if "image_prompt" in row:
        yield 0, "benign", row["image_prompt"]
    for i, text in enumerate(row.get("image_prompts") or []):
        yield i, "benign", text
    pairs = row.get("unsafe_prompts") or ([row] if "unsafe_image_prompt" in row else [])
    for i, pair in enumerate(pairs):
        for side in ("benign", "unsafe"):
            text = pair.get(f"{side}_prompt", pair.get(f"{side}_image_prompt"))
            if text is not None:
                yield i, side, text
