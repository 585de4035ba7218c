"""The corpus `core`: prompts written for this project, packaged as JSONL, English only."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Literal, get_args

from demur.errors import DataUnavailable, InputError
from demur.files import load_prompts
from demur.types import PromptSet

Part = Literal["train", "select", "calibrate", "test"]
PARTS: tuple[str, ...] = get_args(Part)

CATEGORIES = ("humanizing", "incomplete", "indeterminate", "safety", "unsupported")
"""The five refuse categories (of CoCoNot); look-alike benign prompts carry the one they resemble."""


def core(part: Part | str) -> PromptSet:
    """One part of the packaged corpus, named `core/<part>`.

    `meta["kind"]` is "refuse", "lookalike" (benign, in the form of a refused prompt of its category) or
    "general".

    >>> core("test").name
    'core/test'

    Raises:
        InputError: unknown part. DataUnavailable: the installation lacks the file.
    """
    if part not in PARTS:
        raise InputError(f"core has no part {part!r}; its parts are {', '.join(PARTS)}")
    entry = resources.files("demur.prompts").joinpath("core", f"{part}.jsonl")
    with resources.as_file(entry) as path:
        if not path.is_file():
            raise DataUnavailable(
                f"the packaged corpus lacks prompts/core/{part}.jsonl: the installation is incomplete, "
                "reinstall demur"
            )
        rows = load_prompts(path, name=f"core/{part}")
    # every row would say the same, a megabyte in all
    return PromptSet(rows.name, tuple(replace(p, source="demur core", license="CC-BY-4.0") for p in rows))
