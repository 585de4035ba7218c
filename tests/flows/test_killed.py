"""kill -9 at any moment, then the same command: the same bytes as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "run.json",
    "prompts.jsonl",
    "scores.jsonl",
    "replies.jsonl",
    "verdicts.jsonl",
    "card.json",
    "card.html",
)


def run(out: Path, moment: str, count: int) -> int:
    command = [sys.executable, "-m", "tests.flows.killed", str(out), moment, str(count)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def content(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_killed_at_many_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, "never", 0) == 0
    moments = [("fsync", 1), ("half", 1), ("fsync", 4), ("call", 40), ("half", 1), ("fsync", 3), ("half", 2)]
    for moment, count in moments:
        assert run(killed, moment, count) == -9, (moment, count)
        assert not (killed / "card.json").exists()
    assert run(killed, "never", 0) == 0
    assert content(killed) == content(whole)
    assert not list(killed.glob(".*.*"))  # no temporary file is left behind


def test_a_finished_card_is_not_collected_again(tmp_path: Path) -> None:
    assert run(tmp_path, "never", 0) == 0
    before = content(tmp_path)
    assert run(tmp_path, "call", 1) == 0  # it would die at its first question
    assert content(tmp_path) == before
