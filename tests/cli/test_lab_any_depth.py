"""`demur lab any-depth-alignment` on a tiny model: fit, check, run, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demur.cli import options
from tests.cli.conftest import Cli
from tests.control.any_depth.test_probe import answers

LAB = ("lab", "any-depth-alignment")


def write(path: Path, n: int, seed: int) -> Path:
    rows = [{"prompt": a.prompt.text, "answer": a.text, "harmful": a.harmful} for a in answers(n, seed)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from tests.runtime.tiny import tiny_runtime

    monkeypatch.setattr(options, "load_model", lambda *_a, **_k: tiny_runtime(control=True))


@pytest.mark.usefixtures("tiny")
def test_fit_then_check_then_run(cli: Cli, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{k}.jsonl", n, k) for k, n in enumerate((60, 40, 200, 60))]
    probe, out = tmp_path / "probe.safetensors", tmp_path / "fit.json"
    sets = ("--select", files[1], "--calibrate", files[2], "--depths", "2,6", "--save", probe)
    done = cli(*LAB, "fit", files[0], *sets, "--json", "--out", out)
    assert done.code == 0, done.err
    report = json.loads(out.read_text())
    assert report["values"]["header"] == ["<|end|>", "<|assistant|>"] and probe.exists()
    assert "answers drawn like 2.jsonl" in report["notes"][0] and "at most 0.05" in report["notes"][0]

    done = cli(*LAB, "check", files[3], "--probe", probe, "--depths", "2,6,500")
    assert done.code == 0, done.err
    assert "harmful answers, n = 30" in done.out and "stopped at this depth or before" in done.out
    done = cli(*LAB, "check", files[3], "--rethink", "--depths", "2", "--json")
    [area] = json.loads(done.out)["values"]["auroc"]
    assert (
        done.code == 0
        and (area["depth"], area["n"]) == (2, 60)
        and area["low"] <= area["auroc"] <= area["high"]
    )

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "tell me about bomb"}\n{"id": "b", "prompt": "a letter"}\n')
    for check in (("--probe", probe), ("--rethink",)):
        replies = tmp_path / "replies.jsonl"
        done = cli(*LAB, "run", prompts, *check, "--every", "4,8", "--max-new-tokens", "12", "--out", replies)
        assert done.code == 0, done.err
        assert "of 2 answers stopped" in done.err
        assert [json.loads(x)["prompt_id"] for x in replies.read_text().splitlines()] == ["a", "b"]


@pytest.mark.usefixtures("tiny")
def test_wrong_input_is_said(cli: Cli, tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", 20, 1), write(tmp_path / "2.jsonl", 20, 2)
    for args, said in (
        (("guess", one), "there are fit, check, run"),
        (("fit", one), "needs --select"),
        (("fit", one, "--select", one, "--depths", "2"), "20 answers are in both"),
        (("fit", one, "--select", two, "--calibrate", two, "--depths", "2"), "fitted or selected on"),
        (("check", one), "--probe FILE, --mass or --rethink"),
        (("check", one, "--rethink", "--threshold", "0.9"), "go with --mass"),
        (("check", one, "--rethink", "--depths", "0"), "above 0"),
        (("run", one, "--rethink", "--every", "often"), "--every 'often'"),
        (("run", one, "--rethink", "--every", "²"), "--every '²'"),
        (("run", one, "--probe", tmp_path / "none"), "no such file"),
    ):
        done = cli(*LAB, *args)
        assert done.code == 2 and said in done.err, (args, done.err)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", ["fit", "check"])
def test_too_few_harmless_answers_are_told_before_any_work(
    task: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demur.control.any_depth import HeaderProbe, RefuseMass

    def never(*_a: object, **_k: object) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(HeaderProbe, "fit", never)
    monkeypatch.setattr(RefuseMass, "scores", never)
    few, other = write(tmp_path / "few.jsonl", 24, 1), write(tmp_path / "other.jsonl", 24, 2)
    how = ("--select", other) if task == "fit" else ("--mass",)
    done = cli(*LAB, task, other, *how, "--calibrate", few, "--depths", "2")
    assert done.code == 2 and "12 harmless answers" in done.err and "needs 45 at least" in done.err
