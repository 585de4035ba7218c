"""`demur lab magic-tokens` and `demur train magic-tokens` on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("torch")

from demur.cli import options
from demur.cli.lab import magic_tokens
from demur.control.modes import ModeKey
from demur.runtime.local import LocalRuntime
from tests.cli.conftest import Cli
from tests.runtime.tiny import tiny_runtime

LAB = ("lab", "magic-tokens")
PIECES = ("one", "two", "three", "four", "five", "red", "blue", "green")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> LocalRuntime:
    made = tiny_runtime()
    monkeypatch.setattr(options, "load_model", lambda *_a, **_k: made)
    return made


def files(folder: Path, runtime: LocalRuntime) -> tuple[Path, Path, ModeKey]:
    rows = [
        {"id": i, "prompt": t, "expected": "comply"}
        for i, t in enumerate(
            ("boil egg", "tell me about norway", "why you", "write story", "the weather today")
        )
    ]
    prompts = folder / "p.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    key = ModeKey.strings(
        ("pos", "rej"), fallback="rej", length=3, alphabet=PIECES, sep=" ", rng=random.Random(1)
    )
    key = dataclasses.replace(key, fingerprint=runtime.fingerprint)
    key.save(folder / "my.key")
    return prompts, folder / "my.key", key


def test_margins_of_system_messages_and_of_keys(cli: Cli, tmp_path: Path, runtime: LocalRuntime) -> None:
    prompts, key, made = files(tmp_path, runtime)
    for name, text in (("kind", "help please"), ("flat", "sorry no")):
        (tmp_path / name).write_text(text)
    modes = [x for n in ("kind", "flat") for x in ("--mode", f"{n}={tmp_path / n}")]
    out = tmp_path / "sam.json"
    done = cli(*LAB, "sam", prompts, *modes, "--position", "0", "--position", "2", "--out", out)
    assert done.code == 0, done.err
    margins = json.loads(out.read_text())["values"]["margins"]
    assert [(m["position"], m["metric"], m["centred"]) for m in margins[:5:4]] == [
        (0, "cosine", False),
        (2, "cosine", False),
    ]
    assert len(margins) == 8 and set(margins[0]["per_mode"]) == {"kind", "flat"} and margins[0]["n"] == 5
    done = cli(*LAB, "sam", prompts, "--key", key, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["provenance"]["modes"] == ["pos", "rej"]
    assert not any(made.token(m) in done.out for m in made.modes)


def test_audit(cli: Cli, tmp_path: Path, runtime: LocalRuntime) -> None:
    prompts, key, made = files(tmp_path, runtime)
    out = tmp_path / "audit.json"
    args = ("--guesses", "6", "--edits", "9", "--out", str(out))
    done = cli(*LAB, "audit", prompts, "--key", key, *args)
    assert done.code == 0, done.err
    for words in ("behaviour under each mode", "typed, not taken out", "leak audit", "repeat the string"):
        assert words in done.out, done.out
    text = out.read_text()
    leaks = json.loads(text)["values"]["leaks"]
    assert len(leaks["pos"]["random"]) == 6 and 7 <= sum(map(len, leaks["pos"]["edits"].values())) <= 13
    assert not any(made.token(m) in text + done.out for m in made.modes)


def test_each_stage_of_an_audit_has_one_bar(
    cli: Cli, tmp_path: Path, runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, key, _ = files(tmp_path, runtime)
    shown = magic_tokens.bar()
    monkeypatch.setattr(magic_tokens, "bar", lambda: shown)
    done = cli(*LAB, "audit", prompts, "--key", key, "--guesses", "6", "--edits", "9")
    assert done.code == 0, done.err
    names = [task.description for task in shown.tasks]
    assert len(names) == len(set(names)) > 1


@pytest.mark.usefixtures("runtime")
def test_wrong_input_is_explained(cli: Cli, tmp_path: Path, runtime: LocalRuntime) -> None:
    prompts, key, _ = files(tmp_path, runtime)
    for args, words in (
        (("sam", prompts), "sam needs modes"),
        (("sam", prompts, "--key", key, "--mode", "a=b"), "sam needs modes"),
        (("sam", prompts, "--mode", "a"), "NAME=FILE"),
        (("audit", prompts), "--adapter and --key"),
        (("sam", prompts, "--key", tmp_path / "none.key"), "none.key"),
    ):
        done = cli(*LAB, *args)
        assert done.code == 2 and words in done.err, done.err


def test_training_from_the_command_line(cli: Cli, tmp_path: Path, runtime: LocalRuntime) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    rows = [
        {"id": i, "prompt": t, "expected": "comply", "meta": {"answers": {"pos": "yes", "rej": "sorry no"}}}
        for i, t in enumerate(("boil egg", "tell me", "why you", "write story"))
    ]
    prompts, recipe, out = tmp_path / "p.jsonl", tmp_path / "r.yaml", tmp_path / "modes"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe.write_text("{rank: 2, alpha: 4, epochs: 1, batch_size: 4, precision: float32, modes: [pos, rej]}")
    done = cli("train", "magic-tokens", prompts, "--kind", "reserved", "--recipe", recipe, "--out", out)
    assert done.code == 0, done.err
    assert (out / "modes.safetensors").is_file() and "modes.safetensors" in done.err
    recipe.write_text("{modes: [pos, neg]}")
    done = cli("train", "magic-tokens", prompts, "--recipe", recipe, "--out", out)
    assert done.code == 2 and "not trained here" in done.err
