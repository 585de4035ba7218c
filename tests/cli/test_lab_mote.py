"""`demur lab mote` on a random mixture: what is printed, what is written, and that experts stay unnamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur.cli import options
from tests.cli.conftest import Cli

LAB = ("lab", "mote")
TOPICS = ("egg", "fjord", "cat", "dog", "poem", "story", "norway", "weather")


def write(path: Path, template: str, label: Any) -> Path:
    rows = [
        {"id": i, "prompt": f"{template} {t} {more}", "topic": t, "label": label(k)}
        for i, (k, t, more) in enumerate(
            (k, t, w) for k, t in enumerate(TOPICS) for w in ("please", "today", "now")
        )
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    first = write(tmp_path / "a.jsonl", "tell me about", lambda k: "refused" if k < 4 else "answered")
    second = write(tmp_path / "b.jsonl", "where is", lambda _k: "answered")
    return str(first), "--second", str(second), "-m", "moe", "--k", "2"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.runtime.local import LocalRuntime
    from tests.runtime.moe import moe_model
    from tests.runtime.tiny import tiny_tokenizer

    made = LocalRuntime(moe_model("qwen2_moe"), tiny_tokenizer(), name="moe", fingerprint="f")
    monkeypatch.setattr(options, "load_model", lambda *_a, **_k: made)


def test_routing_alone_needs_no_consent(cli: Cli, files: tuple[str, ...], tmp_path: Path) -> None:
    done = cli(*LAB, *files, "--out", str(tmp_path / "out.json"))
    assert done.code == 0, done.err
    for words in ("routing", "second template", "not switched off"):
        assert words in done.out
    values = json.loads((tmp_path / "out.json").read_text())["values"]
    assert values["experts"] == 12 and values["n"] == {"refused": 12, "answered": 12}
    assert values["topic_check"]["verdict"] in ("topic", "response", "unclear")
    assert "masks" not in values and "top" not in values


def test_masks_and_answers_without_names(cli: Cli, files: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--allow-refusal-lowering", "--masks", "20", "--answers", "--max-new-tokens", "4")
    done = cli(*LAB, *files, *options, "--out", str(out))
    assert done.code == 0, done.err
    assert "allowed: 2 experts off" in done.err and "20 random masks" in done.out
    values = json.loads(out.read_text())["values"]
    assert [(m["experts"], m["prompts"]) for m in values["masks"]] == [
        ("off", "refused"),
        ("off", "others"),
        ("forced in", "others"),
    ]
    assert isinstance(values["localised"], bool) and "answers" in values
    assert "top" not in values and '"expert"' not in out.read_text() and "\nexperts\n" not in done.out
    named = cli(*LAB, *files, *options[:3], "--show-experts", "--json")
    assert named.code == 0, named.err
    top = json.loads(named.out)["values"]["top"]
    assert len(top) == 2 and all(0 <= layer < 3 and 0 <= e < 4 and s > 0 for layer, e, s in top)


@pytest.mark.parametrize("flag", ["--show-experts", "--answers"])
def test_what_needs_consent(cli: Cli, files: tuple[str, ...], flag: str) -> None:
    done = cli(*LAB, *files, flag)
    assert done.code == 2 and "--allow-refusal-lowering" in done.err


def test_wrong_input(cli: Cli, files: tuple[str, ...], tmp_path: Path) -> None:
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"prompt": "how", "label": "refused"}\n', encoding="utf-8")
    done = cli(*LAB, str(lone), "-m", "moe")
    assert done.code == 2 and "at least 4" in done.err
    done = cli(*LAB, files[0], "-m", "moe")
    assert done.code == 2 and "of 12 experts" in done.err
    done = cli(*LAB, files[0], "-m", "moe", "--k", "2", "--second", str(lone))
    assert done.code == 2 and "topic" in done.err
