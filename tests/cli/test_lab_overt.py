"""`demur lab overt`: backends, results, policies, rewriting, selection, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import demur.flows.load
from demur.runtime.scripted import ScriptedRuntime
from tests.cli.conftest import Cli

LAB = ("lab", "overt")


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text("bomb\npassword\n\n")
    return f"words:{tmp_path / 'words.txt'}"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def requests(path: Path) -> Path:
    rows = [{"id": str(i), "prompt": f"picture {i}", "category": "c", "expected": "comply"} for i in range(4)]
    return write(path, [*rows, {"id": "bad", "prompt": "bad picture", "category": "c", "expected": "refuse"}])


def test_a_word_filter_on_the_own_pairs(cli: Cli, tmp_path: Path, words: str) -> None:
    done = cli(*LAB, "pairs", "--backend", words)
    assert done.code == 0, done.err
    for part in ("What came back", "Refusals by category", "Twins", "No image judge"):
        assert part in done.out
    shown = json.loads(cli(*LAB, "pairs", "--backend", words, "--json").out)
    assert shown["values"]["twins"]["all"]["pairs"] == 42
    assert shown["provenance"]["backend"] == "words:words.txt"
    assert cli(*LAB, "pairs", "--backend", words, "-o", tmp_path / "r.txt").out == ""
    assert "Twins" in (tmp_path / "r.txt").read_text()


def test_results_and_labels_one_has(cli: Cli, tmp_path: Path) -> None:
    file = requests(tmp_path / "p.jsonl")
    rows = [
        {"prompt_id": "0", "images": 1},
        {"prompt_id": "1", "images": 0},
        {"prompt_id": "bad", "images": 1},
    ]
    rows += [{"prompt_id": "2", "error": "rate_limit"}, {"prompt_id": "3", "error": "our content policy"}]
    results = write(tmp_path / "r.jsonl", rows)
    labels = write(tmp_path / "l.jsonl", [{"prompt_id": "bad", "harmful": False}])
    done = cli(*LAB, file, "--results", results, "--image-judge", f"labels:{labels}", "--json")
    assert done.code == 0, done.err
    values = json.loads(done.out)["values"]
    over = values["over_refusal"]["micro"]
    assert (over["k"], over["n"], over["unread"]) == (2, 3, 1)
    assert values["safe_response"]["at_least"]["micro"]["value"] == 1
    assert values["harmful_refused"]["micro"]["value"] == 0


def test_policies(cli: Cli, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def script(prompt: Any, *_: Any) -> str:
        asked.append(prompt.id)
        return "forbidden" if "strictly" in prompt.text and "picture 1" in prompt.text else "allowed"

    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: ScriptedRuntime(script))
    file = requests(tmp_path / "p.jsonl")
    for name in ("loose", "strict"):
        (tmp_path / f"{name}.txt").write_text(f"{name}ly")
    both = ("--policy", tmp_path / "loose.txt", "--policy", tmp_path / "strict.txt", "--labeller", "m")
    done = cli(*LAB, file, *both, "--keep", tmp_path / "k")
    assert done.code == 0, done.err
    assert "Labels under two policies" in done.out and "allowed by loose alone" in done.out
    assert len(asked) == 10
    again = cli(*LAB, file, *both, "--keep", tmp_path / "k", "--backend", words, "--json")
    assert len(asked) == 10  # answers were kept
    values = json.loads(again.out)["values"]
    assert values["Requests under loose and strict"]["flips"] == ["1"]
    assert values["p under loose"]["over_refusal"]["micro"]["n"] == 5
    assert values["p under strict"]["over_refusal"]["micro"]["n"] == 4
    one = cli(*LAB, file, "--policy", tmp_path / "loose.txt", "--labeller", "m")
    assert one.code == 2 and "add a second one" in one.err


def test_rewriting(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = ScriptedRuntime(lambda p, *_: "same" if "First:" in p.text else "a museum piece")
    monkeypatch.setattr(demur.flows.load, "load_runtime", lambda *a, **k: runtime)
    (tmp_path / "w.txt").write_text("picture")
    both = ("--rewriter", "m", "--faithfulness", "m")
    file = requests(tmp_path / "p.jsonl")
    done = cli(*LAB, file, "--backend", f"words:{tmp_path / 'w.txt'}", *both, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["values"]["categories"]["all"]
    assert (found["served_before"]["k"], found["served_after"]["k"], found["served_after"]["n"]) == (0, 4, 4)


def test_selection(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("1\n2")
    file, backend = requests(tmp_path / "p.jsonl"), f"words:{tmp_path / 'w.txt'}"
    done = cli(
        *LAB, file, "--backend", backend, "--select", "0.5", "--samples", "2", "-o", tmp_path / "kept.jsonl"
    )
    assert done.code == 0 and "2 of 4 harmless requests kept" in done.err, done.err
    again = cli(*LAB, tmp_path / "kept.jsonl", "--backend", backend)
    assert "Selection bias" in again.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--backend draws and --results"),
        (("--backend", "words:w", "--results", "r"), "give one of them"),
        (("--backend", "nowhere"), "give diffusers:FOLDER"),
        (("--backend", "words:none.txt"), "no such file"),
        (("--backend", "words:w", "--rewriter", "m"), "go together"),
        (("--backend", "words:w", "--select", "0.5"), "--samples 8"),
        (("--results", "r", "--select", "0.5", "--samples", "2"), "need a --backend"),
        (("--policy", "p"), "--policy and --labeller"),
        (("--results", "none.jsonl"), "no such file"),
        (("--backend", "http://127.0.0.1:9/v1#m", "--image-judge", "x"), "--image-judge x"),
    ],
)
def test_wrong_input(cli: Cli, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    done = cli(*LAB, requests(tmp_path / "p.jsonl"), *args)
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ") and words in done.err and "Traceback" not in done.err
