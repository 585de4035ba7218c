"""Control tokens of published checkpoints, from presets, with the checks that their look-up needs.

The usual look-up, the last id of the encoded text, fails silently: when a token was never added, "[refuse]"
and "[respond]" are split and both end in the id of "]", so refusing and responding become the same token.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from demur.errors import InputError
from demur.files import read_text
from demur.types import RESPOND

FILE_NAME = "control_tokens.yaml"


def control_ids(model: str | Path, tokenizer: Any, preset: str | Path | None = None) -> dict[str, int] | None:
    """Category -> token id for a checkpoint whose control tokens are in its own vocabulary, or None.

    Args:
        model: hub id or folder. A folder's own `control_tokens.yaml` comes first, then the presets by name.
        tokenizer: the checkpoint's tokenizer (transformers).
        preset: a preset's name or a YAML file of the same form; None goes by `model` and may find nothing.

    Raises:
        InputError: unknown preset, broken file, or a token that is not one distinct id of this tokenizer.
    """
    entry = _entry(str(model), preset)
    if entry is None:
        return None
    where, tokens = entry
    ids = {
        str(category): _single_id(tokenizer, spec, f"{where}: {category}")
        for category, spec in tokens.items()
    }
    by_id: dict[int, str] = {}
    for category, i in ids.items():
        if i in by_id:
            raise InputError(
                f"{where}: {by_id[i]!r} and {category!r} are both token {i}; each needs an id of its own"
            )
        by_id[i] = category
    if RESPOND not in ids or len(ids) < 2:
        raise InputError(f"{where}: needs {RESPOND!r} and at least one refuse category, has {', '.join(ids)}")
    return ids


def presets() -> dict[str, Any]:
    """The presets that ship with demur, by name."""
    text = resources.files("demur").joinpath(FILE_NAME).read_text("utf-8")
    return dict(yaml.safe_load(text))


def _entry(model: str, preset: str | Path | None) -> tuple[str, Mapping[str, Any]] | None:
    known = presets()
    if preset is not None:
        if str(preset) in known:
            return str(preset), _tokens(known[str(preset)], str(preset))
        if not Path(preset).is_file():
            raise InputError(
                f"control tokens {str(preset)!r}: no such file or preset; presets are {', '.join(known)}"
            )
        return str(preset), _read(Path(preset))
    if (own := Path(model) / FILE_NAME).is_file():
        return str(own), _read(own)
    last = model.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1]
    for name, spec in known.items():
        if any(model == m or last == m.rsplit("/", 1)[-1] for m in spec["match"]):
            return name, _tokens(spec, name)
    return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not YAML ({e})") from None
    if isinstance(data, dict) and "tokens" not in data and len(data) == 1:
        data = next(iter(data.values()))  # a named preset, as in the shipped file
    return _tokens(data, str(path))


def _tokens(spec: Any, where: str) -> Mapping[str, Any]:
    tokens = spec.get("tokens") if isinstance(spec, dict) else None
    if not isinstance(tokens, dict) or not all(isinstance(t, dict) and t for t in tokens.values()):
        raise InputError(f'{where}: expected `tokens: {{category: {{id: 128256, text: "[refuse]"}}, ...}}`')
    return tokens


def _single_id(tokenizer: Any, spec: Mapping[str, Any], where: str) -> int:
    """The id of one control token, after checking that id and text are one and the same token."""
    text, wanted = spec.get("text"), spec.get("id")
    if text is not None and not isinstance(text, str):
        raise InputError(f'{where}: text {text!r} is no string; put it into quotes, as in text: "[refuse]"')
    if text is None:
        if not isinstance(wanted, int):
            raise InputError(f"{where}: needs `text`, `id` or both, got {dict(spec)}")
        textless = "text" in spec  # `text: null` says that no text stands for this id
        if wanted < 0 or (wanted >= len(tokenizer) and not textless):
            raise InputError(
                f"{where}: id {wanted} is outside the tokenizer's {len(tokenizer)} tokens; where the model has "
                "a row for it that no text reaches, write `text: null` beside it"
            )
        return wanted
    forms = [tokenizer.encode(form, add_special_tokens=False) for form in (text, f" {text}")]
    single = {form[0] for form in forms if len(form) == 1}
    if not single:
        pieces = tokenizer.convert_ids_to_tokens(forms[0])
        raise InputError(
            f"{where}: {text!r} is no token of this tokenizer but is split into {pieces}; taking the "
            "last piece "
            "would give every control token the same id. This is not the checkpoint that the preset describes"
        )
    if wanted is None:
        if len(single) > 1:
            raise InputError(
                f"{where}: {text!r} is token {sorted(single)} with and without a leading blank; give its `id`"
            )
        return int(single.pop())
    if wanted not in single:
        raise InputError(
            f"{where}: {text!r} is token {min(single)} here, the preset says {wanted}; wrong checkpoint"
        )
    return int(wanted)
