"""What errors say to do."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

import demur.flows.load
from demur.control.steering import consent
from demur.errors import RefusalLowering
from demur.runtime.scripted import ScriptedRuntime
from demur.train.magic_tokens import MagicTokens
from tests.cli.conftest import Cli, cli

__all__ = ["cli"]


def told(error: BaseException) -> None:
    """The message names each way to consent once, says that it is logged and where it is written why."""
    text = str(error)
    for part in (
        "--allow-refusal-lowering",
        "allow_refusal_lowering=True",
        "logged",
        "docs/design.md, section 12",
    ):
        assert text.count(part) == 1, text


def test_a_change_that_lowers_refusal_says_how_to_consent() -> None:
    error = RefusalLowering("This answers what should be refused")
    told(error)
    told(pickle.loads(pickle.dumps(error)))  # noqa: S301
    with pytest.raises(RefusalLowering, match="'x' may lower refusal") as caught:
        consent("'x'", allowed=False)
    told(caught.value)


def test_consent_to_a_mode_is_logged(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Hi?", "expected": "comply"}\n{"prompt": "Ho?", "expected": "comply"}\n')
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *_, **__: ScriptedRuntime({"*": "Yes."}))
    monkeypatch.setattr(MagicTokens, "fit", lambda *_, **__: SimpleNamespace())
    same = ("train", "magic-tokens", asked, "-o", tmp_path / "modes")
    assert cli(*same).code == 0 and "allowed" not in caplog.text
    assert cli(*same, "--allow-refusal-lowering").code == 0
    assert "allowed: modes that answer prompts which should be refused" in caplog.text
