"""`demur replicate`, `demur methods` and `demur lab` at the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from demur import methods
from demur.cli import lab
from demur.replicate import store
from tests.cli.conftest import Cli
from tests.replicate import toy


def test_json_is_the_result(cli: Cli, tmp_path: Path) -> None:
    done = cli("replicate", toy.write(tmp_path), "--out", tmp_path / "out", "--seeds", "4", "--json")
    assert done.code == 0
    shown = json.loads(done.out)
    assert shown["outcome"] == "reproduced" and shown["seeds"] == [0, 1, 2, 3]
    assert shown["claims"][0]["value"] == pytest.approx(0.8, abs=0.05)
    assert "toy: 4 seeds to run" in done.err


def test_text(cli: Cli, tmp_path: Path) -> None:
    done = cli("replicate", toy.write(tmp_path), "--out", tmp_path / "out")
    assert done.code == 0
    for words in ("toy: reproduced", "it is told apart", "labels shuffled", "always yes", "one and one"):
        assert words in done.out


def test_exit_codes(cli: Cli, tmp_path: Path) -> None:
    absent = toy.write(tmp_path / "absent", p=0.5)
    assert cli("replicate", absent, "--out", tmp_path / "absent", "--json").code == 0
    assert cli("replicate", absent, "--out", tmp_path / "absent", "--json", "--strict").code == 1
    off = toy.write(tmp_path / "off", two=2.1)
    assert cli("replicate", off, "--out", tmp_path / "off", "--json").code == 1
    broken = toy.write(tmp_path / "broken", drop="hits")
    done = cli("replicate", broken, "--out", tmp_path / "broken")
    assert done.code == 2 and "no value for hits" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nonsense",), "no replication check is called 'nonsense'"),
        (("tracealign",), "no replication check yet"),
        ((), "name systems or pass --all"),
        (("toy", "--all"), "not both"),
        (("toy", "--seeds", "-3"), "--seeds"),
        (("toy", "--seeds", "0"), "--seeds"),
        (("toy", "--jobs", "0"), "--jobs"),
    ],
)
def test_bad_input(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("replicate", *args)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_list_and_methods_show_outcomes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"schema_version": 1, "slug": "tracealign", "outcome": "partly", "reason": "r", "seeds": [0, 1]}
    result |= {"minutes": 1.5, "provenance": {"sources": {"replicate/gone.py": "0"}}}
    monkeypatch.setattr("demur.replicate.store.read_results.__defaults__", (tmp_path,))
    store.write_result(tmp_path, result)
    rows = {r["slug"]: r for r in json.loads(cli("replicate", "--list", "--json").out)}
    assert rows["tracealign"]["outcome"] == "partly" and rows["tracealign"]["stale"]
    assert {c.slug for c in methods.cards()} <= set(rows)
    listed = cli("replicate", "--list").out
    assert "partly (stale)" in listed and "no check yet" in listed
    assert "partly (stale)" in cli("methods").out
    assert json.loads(cli("methods", "tracealign", "--json").out)["replication"] == "partly (stale)"


def test_a_lab_command_is_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_method.py").write_text(
        '"""A method."""\n\ndef run(file: str, times: int = 1) -> None:\n    """Say a word several times."""\n'
        "    print(' '.join([file] * times))\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    monkeypatch.setattr(lab, "__path__", [str(tmp_path)])
    assert cli("lab", "my-method", "word", "--times", "2").out == "word word\n"
    done = cli("lab", "my-method", "--help")
    assert "Say a word several times." in done.out and "--times" in done.out
    assert cli("lab", "nothing").code == 2


def test_every_lab_method_is_a_method_with_help(cli: Cli) -> None:
    for slug in lab._Files():
        module = importlib.import_module(f"demur.cli.lab.{slug.replace('-', '_')}")
        assert methods.get(getattr(module, "METHOD", slug))
        done = cli("lab", slug, "--help")
        assert done.code == 0 and "Usage:" in done.out
