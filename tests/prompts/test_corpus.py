"""Reading the packaged corpus. What it must contain is checked in test_core_corpus.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from demur import prompts
from demur.errors import DataUnavailable, InputError, MissingExtra
from demur.files import dump_jsonl, prompt_row
from demur.prompts import corpus
from demur.types import Prompt, expand_expected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corpus.resources, "files", lambda package: tmp_path)
    return tmp_path / "core"


def test_reads_a_part(package: Path) -> None:
    package.mkdir()
    p = Prompt.of(
        "Write to my landlord.",
        id="t1",
        category="incomplete",
        expected=expand_expected("comply"),
        meta={"kind": "lookalike"},
    )
    dump_jsonl([prompt_row(p)], package / "test.jsonl")
    loaded = prompts.core("test")
    assert loaded.name == "core/test"
    assert loaded.prompts == (replace(p, source="demur core", license="CC-BY-4.0"),)


def test_without_the_adapters_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "demur_smollm2", None)
    with pytest.raises(MissingExtra, match=r"demur\[local\]"):
        prompts.core("train")


def test_missing_and_unknown_parts(package: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"select\.jsonl"):
        prompts.core("select")
    with pytest.raises(InputError, match="train, select, calibrate, test"):
        prompts.core("dev")
