"""`demur measure` on the command line: answers, batches, parts, gates, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demur.files import dump_jsonl
from tests.cli.conftest import Cli
from tests.fixtures.answers import build


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return build.as_csv(tmp_path, build.answers(120))


def test_answers_from_a_file(cli: Cli, answers: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "r.md"
    done = cli("measure", "--replies", answers, "--out", out, "--markdown", page)
    assert done.code == 0, done.err
    assert "Declined, by category and expectation" in done.out
    assert "rules/demur-v1 against people's labels" in done.out
    assert page.read_text().startswith("# Measured: rows")
    printed = cli("measure", "--replies", answers, "--out", out, "--json", "--fail-if", "over_refusal > 0.9")
    assert (printed.code, json.loads(printed.out)["values"]["prompts"]) == (0, 120)
    failed = cli("measure", "--replies", answers, "--out", out, "--fail-if", "over_refusal > 0.1")
    assert failed.code == 1
    assert "FAIL" in failed.out


def test_to_batch_from_batch_parts_and_join(cli: Cli, answers: Path, tmp_path: Path) -> None:
    brief = tmp_path / "be brief.txt"
    brief.write_text("Be brief.")
    same = ("--suite", answers, "--system", "none", "--system", brief)
    asked = cli("measure", "-m", "http://localhost:9/v1#my-model", *same, "--to-batch", tmp_path / "in.jsonl")
    assert asked.code == 0, asked.err
    requests = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    assert len(requests) == 240
    assert requests[0]["body"]["model"] == "my-model"
    assert {r["custom_id"].split("/")[0] for r in requests} == {"none", "be-brief"}
    lines = [build.batch_line(r["custom_id"], f"Sure, open it. {n}") for n, r in enumerate(requests)]
    dump_jsonl(lines, tmp_path / "out.jsonl")
    read = ("measure", *same, "--from-batch", tmp_path / "out.jsonl")
    assert cli(*read, "--out", tmp_path / "whole").code == 0
    for i in (1, 2):
        assert cli(*read, "--shard", f"{i}/2", "--out", tmp_path / f"part{i}").code == 0
    joined = cli("measure", "--merge", tmp_path / "part1", tmp_path / "part2", "--out", tmp_path / "joined")
    assert joined.code == 0, joined.err
    assert "Flips between conditions" in joined.out
    names = {p.name for p in (tmp_path / "whole").iterdir() if not p.name.startswith(".")}
    assert {"replies-none.jsonl", "replies-be-brief.jsonl", "report.json"} <= names
    for name in names:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_endpoint_is_divided_prompt_by_prompt(cli: Cli, answers: Path, tmp_path: Path) -> None:
    asked = ("measure", "-m", "http://localhost:9/v1#m", "--suite", answers, "--limit", "6")
    for i in (1, 2, 3):
        made = cli(*asked, "--shard", f"{i}/3", "--dry-run")
        assert made.code == 0 and made.out.startswith("requests:       2\n"), made.out + made.err


def test_batch_output_with_its_input_as_prompts(cli: Cli, answers: Path, tmp_path: Path) -> None:
    some = build.answers(3)
    cli("measure", "-m", "m", "--suite", answers, "--limit", "3", "--to-batch", tmp_path / "in.jsonl")
    requests = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    dump_jsonl([build.batch_line(r["custom_id"], some[0].text) for r in requests], tmp_path / "out.jsonl")
    given = ("--replies", tmp_path / "out.jsonl", "--prompts", tmp_path / "in.jsonl")
    done = cli("measure", *given, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "(no expectation)" in done.out
    assert "3/3" in done.out


def test_a_dry_run_asks_nothing_and_writes_nothing(cli: Cli, answers: Path, tmp_path: Path) -> None:
    done = cli(
        *("measure", "-m", "http://localhost:9/v1#m", "--suite", answers, "--dry-run"),
        *("--samples", "3", "--temperature", "0.7", "--out", tmp_path / "out"),
    )
    assert done.code == 0, done.err
    assert "requests:       360" in done.out
    assert "estimated at 4 characters a token" in done.out
    assert "not measured" in done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "x"], "nothing to ask: name a suite"),
        (["--suite", "nope"], "no such suite or file"),
        (["--replies", "FILE", "--merge", "x"], "choose one"),
        (["--replies", "FILE", "--suite", "twins"], "leave --suite out"),
        (["--merge", "--out", "x"], "--merge needs the folders"),
        (["FILE", "--suite", "twins"], "only --merge takes folders"),
        (["--suite", "FILE", "--prompts", "FILE"], "--prompts goes with --replies"),
        (["--replies", "FILE", "--junit", "x.xml"], "add --fail-if"),
        (["--suite", "FILE", "--shard", "3/2", "--dry-run"], "--shard '3/2'"),
        (["--suite", "FILE", "--samples", "2", "--dry-run"], "add --temperature"),
        (["--replies", "FILE", "--judge", "rubric/xstest-3way-v1"], "asks a model"),
        (["--suite", "FILE", "--from-batch", "no.jsonl"], "no.jsonl: no such file"),
    ],
)
def test_what_clashes_is_said(
    cli: Cli, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("measure", *(str(answers) if word == "FILE" else word for word in options))
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
