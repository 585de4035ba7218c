"""`import demur` is light, and its public names are exactly what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import demur

HEAVY = ("torch", "transformers", "sklearn", "pandas", "altair", "peft", "trl", "datasets")
LIGHT_MODULES = ("demur", "demur.types", "demur.files", "demur.methods", "demur.cli")


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_all_is_what_is_visible_and_sorted() -> None:
    assert dir(demur) == sorted(demur.__all__)
    assert demur.__all__[1:] == sorted(demur.__all__[1:])
    for name in demur.__all__:
        assert getattr(demur, name) is not None


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(AttributeError, match="PromptSet"):
        demur.PromptSets  # noqa: B018
