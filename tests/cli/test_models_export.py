"""`demur models export`: forms, consent, and what it says when options do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import demur.flows.load
from demur import models
from demur.explain.artefact import Direction
from demur.flows.load import load_runtime as real_load
from demur.models import ModelFiles
from tests.cli.conftest import Cli
from tests.runtime.tiny import tiny_runtime, tiny_tokenizer


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model stands for demur-smollm2."""
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    runtime = tiny_runtime(control=True)

    def load(model: str | None = None, **options: Any) -> Any:
        return runtime if model is None else real_load(model)

    monkeypatch.setattr(demur.flows.load, "load_runtime", load)
    files = ModelFiles(name="tiny", path=tmp_path / "source", fingerprint="tiny")
    monkeypatch.setattr(models, "resolve", lambda *_a, **_k: files)
    vector = Direction(vector=np.ones(32), origin="harmful", site=(1, -1), fingerprint=runtime.fingerprint)
    vector.save(tmp_path / "direction.safetensors")
    return tmp_path


def test_merged_with_a_vector(cli: Cli, home: Path) -> None:
    done = cli(
        "models", "export", "--to", "merged", "-o", home / "out", "--add", home / "direction.safetensors",
        "--coefficient", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.strip() == str(home / "out") and "largest difference" in done.err
    about = json.loads((home / "out" / "demur.json").read_text())
    assert about["steering"] == ["2 times harmful added behind layer 1"] and about["form"] == "merged"


def test_gguf(cli: Cli, home: Path) -> None:
    pytest.importorskip("gguf")
    where = ("--add", home / "direction.safetensors", "--layer", "2")
    done = cli("models", "export", "--to", "gguf", "-o", home / "v.gguf", *where)
    assert done.code == 0 and (home / "v.gguf").is_file(), done.err


def test_what_may_lower_refusal_needs_consent(cli: Cli, home: Path) -> None:
    direction = home / "direction.safetensors"
    for options in (("--ablate", direction), ("--add", direction, "--coefficient", "-1")):
        done = cli("models", "export", "--to", "merged", "-o", home / "out", *options)
        assert done.code == 2 and "--allow-refusal-lowering" in done.err
        assert not (home / "out").exists()
    done = cli(
        "models",
        "export",
        "--to",
        "merged",
        "-o",
        home / "out",
        "--ablate",
        direction,
        "--allow-refusal-lowering",
    )
    assert done.code == 0 and "note: refusal lowering allowed" in done.err, done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "lora", "--add", "direction.safetensors"), "--add has no place in --to lora"),
        (("--to", "gguf", "--ablate", "direction.safetensors"), "--ablate has no place in --to gguf"),
        (("--to", "gguf"), "at least one direction"),
        (("--to", "lora"), "no adapter"),
    ],
)
def test_options_that_do_not_fit(cli: Cli, home: Path, options: tuple[str, ...], words: str) -> None:
    given = [home / o if o.endswith(".safetensors") else o for o in options]
    done = cli("models", "export", *given, "-o", home / "out")
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


def test_an_existing_folder_is_left_alone(cli: Cli, home: Path) -> None:
    done = cli("models", "export", "--to", "merged", "-o", home / "source")
    assert done.code == 2 and "exists" in done.err
