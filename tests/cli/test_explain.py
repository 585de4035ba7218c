"""`demur explain` from the outside: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur.flows import explain_fit
from tests.cli.conftest import Cli
from tests.flows.planted import SIZES, Planted


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("demur.cli.options.load_model", lambda *_, **__: Planted())
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    keywords = {**(explain_fit.fit_model.__kwdefaults__ or {}), "sizes": SIZES}
    monkeypatch.setattr(explain_fit.fit_model, "__kwdefaults__", keywords)


def test_one_prompt_as_text_page_and_data(cli: Cli, tmp_path: Path) -> None:
    ran = cli("explain", "how do i boil a bomb ?", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    for words in (
        "Believed harmful, will refuse",
        "bag of words",
        "random labels",
        "Along the tokens",
        "bomb",
    ):
        assert words in ran.out
    assert "once for a model" in ran.err and str(tmp_path / "out" / "explain.html") in ran.err
    assert json.loads((tmp_path / "out" / "explain.json").read_text())["declined"] is True
    again = cli("explain", "tell me a story", "-o", tmp_path / "one.html", "--json")
    assert again.code == 0 and "once for a model" not in again.err  # kept from the first time
    found: dict[str, Any] = json.loads(again.out)
    assert found["quadrant"] == "believed harmless, will answer" and (tmp_path / "one.html").is_file()


def test_tokens(cli: Cli, tmp_path: Path) -> None:
    ran = cli("explain", "how do i boil egg", "--tokens")
    assert ran.code == 0 and "t_inst" in ran.out and "t_post" in ran.out and "'egg'" in ran.out
    rows = json.loads(cli("explain", "how do i boil egg", "--tokens", "--json").out)
    assert [r["text"].strip() for r in rows if "t_inst" in r["names"]] == ["egg"]
    assert not (Path.cwd() / "explain").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give one prompt"),
        (("hi", "--vs", "a", "b"), "give one prompt"),
        (("--vs", "a", "b", "-m", "c"), "leave --model out"),
        (("--vs", "a", "b", "--base-only"), "leave --base-only out"),
        (("hi", "--allow-refusal-lowering"), "belong to --vs"),
        (("  ",), "empty"),
    ],
)
def test_what_does_not_fit_together(cli: Cli, args: tuple[str, ...], said: str) -> None:
    ran = cli("explain", *args)
    assert ran.code == 2 and said in ran.err


def test_two_checkpoints(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.flows.test_explain_vs import comparison

    asked: dict[str, Any] = {}

    def compare(base: Any, tuned: Any, **options: Any) -> Any:
        asked.update(options)
        options["progress"]("facts", 1, 2)
        return comparison()

    monkeypatch.setattr("demur.explain.post_training.compare", compare)
    ran = cli("explain", "--vs", "a", "b", "-o", tmp_path / "out", "--parts", "truth, refusal")
    assert ran.code == 0, ran.err
    assert asked["parts"] == ["truth", "refusal"] and asked["allow_refusal_lowering"] is False
    assert "Truth: one set" in ran.out and (tmp_path / "out" / "vs.html").is_file()
