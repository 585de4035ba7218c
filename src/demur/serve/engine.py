"""What the gateway must know of a model that runs in another process: its tokenizer and its control tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from demur.errors import InputError, MissingExtra
from demur.files import read_text
from demur.models.control import FILE_NAME, control_ids, presets
from demur.runtime.base import ControlTokens
from demur.types import RESPOND

ABOUT_FILE, POINT_FILE = "demur.json", "operating_point.yaml"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; nothing is fetched.

    Raises:
        MissingExtra: transformers is not installed. InputError: no tokenizer there, or one without a chat template.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("Writing token ids for an engine (--tokenizer)", "local") from None
    if not folder.is_dir():
        raise InputError(
            f"tokenizer {folder}: no such folder; it is the one the engine's model was loaded from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(f"tokenizer {folder}: {e}") from None
    if not tokenizer.chat_template:
        raise InputError(f"tokenizer {folder}: it has no chat template (chat_template.jinja)")
    return tokenizer


def control_of(folder: Path, tokenizer: Any, given: str | None = None) -> ControlTokens:
    """The control tokens of an engine's checkpoint.

    Args:
        folder: of the tokenizer, which may hold `control_tokens.yaml` or an adapter's `demur.json`.
        given: a preset's name or a YAML file, before what the folder holds. Tokens given by id alone may lie beyond
            the tokenizer's reach: that is how ours are made.

    Raises:
        InputError: none are named, or they do not fit this tokenizer.
    """
    if given is None and not (folder / FILE_NAME).is_file() and (folder / ABOUT_FILE).is_file():
        ids = json.loads(read_text(folder / ABOUT_FILE)).get("control_tokens") or {}
        return ControlTokens(ids=ids)
    source = given or str(folder / FILE_NAME)
    tokens = _tokens(source)
    if all("text" not in spec for spec in tokens.values()):
        named = {str(name): spec.get("id") for name, spec in tokens.items()}
        if bad := [name for name, i in named.items() if not isinstance(i, int) or i < 0]:
            raise InputError(f"{source}: {bad[0]} has neither `id` nor `text`")
        ids = {name: i for name, i in named.items() if isinstance(i, int)}
        return ControlTokens(ids=ids, textless=all(i >= len(tokenizer) for i in ids.values()))
    found = control_ids(folder, tokenizer, source)
    assert found is not None
    return ControlTokens(ids=found, textless=False)


class Export(NamedTuple):
    """What the folder of a served checkpoint tells of it.

    `fingerprint` is that of the model its operating point is for. `rows_in_base`: the LoRA is apart, and the
    folder, which is then the base model too, holds the control tokens' rows.
    """

    fingerprint: str | None
    point: Path | None
    rows_in_base: bool = False


def export_of(folder: Path) -> Export:
    """What is known of a checkpoint that demur exported; nothing of another one."""
    about = folder / ABOUT_FILE
    told = json.loads(read_text(about)) if about.is_file() else {}
    point = folder / POINT_FILE
    apart = told.get("form") == "lora"
    return Export(
        told.get("source_fingerprint" if apart else "fingerprint"), point if point.is_file() else None, apart
    )


def texts_of(given: str) -> dict[str, str]:
    """{category: text} of control tokens that have text, for engines whose tokenizer is not at hand."""
    tokens = _tokens(given)
    if lacking := [str(name) for name, spec in tokens.items() if not spec.get("text")]:
        raise InputError(
            f"{given}: {', '.join(lacking)} has no text. Control tokens without text can only be read by their "
            "ids: give the tokenizer's folder (--tokenizer)"
        )
    if RESPOND not in tokens:
        raise InputError(f"{given}: needs {RESPOND!r} beside the refuse categories")
    return {str(name): str(spec["text"]) for name, spec in tokens.items()}


def _tokens(source: str) -> Mapping[str, Mapping[str, Any]]:
    if source in (known := presets()):
        data = known[source]
    elif not Path(source).is_file():
        raise InputError(
            f"control tokens {source}: no such file or preset (presets: {', '.join(known)}). Name the file that "
            "came with the checkpoint's export (--control-tokens)"
        )
    else:
        try:
            data = yaml.safe_load(read_text(source))
        except yaml.YAMLError as e:
            raise InputError(f"{source}: not YAML ({e})") from None
        if isinstance(data, dict) and "tokens" not in data and len(data) == 1:
            data = next(iter(data.values()))
    tokens = data.get("tokens") if isinstance(data, dict) else None
    if not isinstance(tokens, dict) or not all(isinstance(t, dict) and t for t in tokens.values()):
        raise InputError(f"{source}: expected `tokens: {{category: {{id: 49152}}, ...}}`")
    return tokens
