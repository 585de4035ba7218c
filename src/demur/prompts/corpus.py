"""The corpus `core`: prompts written for this project, packaged as JSONL, English only.

The part `train`, ten times as large as the others, comes with the adapter's distribution `demur-smollm2`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Literal, get_args

from demur.errors import DataUnavailable, InputError, MissingExtra
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
        InputError: unknown part. MissingExtra: `train` without demur-smollm2, which the extra `local` installs.
        DataUnavailable: the installation lacks the file.
    """
    if part not in PARTS:
        raise InputError(f"core has no part {part!r}; its parts are {', '.join(PARTS)}")
    package = "demur_smollm2" if part == "train" else "demur.prompts"
    try:
        entry = resources.files(package).joinpath("core", f"{part}.jsonl")
    except ModuleNotFoundError:
        raise MissingExtra("The training part of the corpus", "local") from None
    with resources.as_file(entry) as path:
        if not path.is_file():
            raise DataUnavailable(
                f"{package} lacks core/{part}.jsonl: the installation is incomplete, reinstall it"
            )
        rows = load_prompts(path, name=f"core/{part}")
    # every row would say the same, a megabyte in all
    return PromptSet(rows.name, tuple(replace(p, source="demur core", license="CC-BY-4.0") for p in rows))
