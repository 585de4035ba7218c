"""Seeds are kept at once, never run twice, merged, and forgotten when the code they came from changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from demur.errors import DemurError, InputError
from demur.replicate import Value, harness, store
from demur.replicate.harness import replicate
from demur.replicate.spec import find
from tests.replicate import toy

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


def command(spec: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "demur.cli", "replicate", str(spec), "--out", str(out), *more]


def without_minutes(document: dict[str, Any]) -> dict[str, Any]:
    """Without what a run took and which libraries its process happened to have loaded."""
    seeds = [{**s, "minutes": 0, "versions": {}} for s in document["per_seed"]]
    provenance = {**document["provenance"], "versions": {}}
    return {**document, "minutes": 0, "per_seed": seeds, "provenance": provenance}


def test_a_real_effect_is_reproduced_and_kept(tmp_path: Path) -> None:
    steps: list[tuple[int, str, int, int | None]] = []
    lines: list[str] = []
    spec = toy.write(tmp_path)
    got = replicate(spec, out=tmp_path / "out", progress=lambda *e: steps.append(e), say=lines.append)
    assert got["outcome"] == "reproduced"
    assert got["reason"].endswith("1 of 1 baselines beaten; 1 of 2 anchors exact, 1 skipped")
    assert got["seeds"] == [0, 1, 2] and got["stored_seeds"] == []
    assert got["claims"][0]["over"] == "3 seeds, 400 items each"
    assert json.loads((tmp_path / "out" / "toy.json").read_text()) == got
    assert steps[:3] == [(0, "steps", 0, 3), (0, "steps", 1, 3), (0, "steps", 2, 3)]
    assert "about" in lines[0] and any("min left" in line for line in lines)
    skipped = got["anchors"][1]
    assert skipped["status"] == "skipped" and "no-such-set/x.csv" in skipped["why"]
    assert not [p for p in (tmp_path / "out" / "toy").iterdir() if p.is_dir()], "scratch is removed"
    assert set(got["provenance"]["sources"]) == {"toy.py", "recipe.txt"}
    assert "numpy" in got["provenance"]["versions"]
    assert str(tmp_path) not in json.dumps(got), "no path of this machine is kept"


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    first = replicate(spec, out=tmp_path / "out", seeds=2)
    again = replicate(spec, out=tmp_path / "out", seeds=3)
    assert toy.runs(tmp_path) == {0: 1, 1: 1, 2: 1}
    assert again["per_seed"][:2] == first["per_seed"]
    for file in (tmp_path / "out" / "toy").glob("*.json"):
        file.unlink()
    assert replicate(spec, out=tmp_path / "out") == again, "the result file alone holds its seeds"
    assert toy.runs(tmp_path) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("changed", ["recipe.txt", "toy.py"])
def test_a_changed_source_makes_seeds_stale(tmp_path: Path, changed: str) -> None:
    spec = toy.write(tmp_path)
    got = replicate(spec, out=tmp_path / "out", seeds=1)
    assert not store.is_stale(got, find(spec))
    with (tmp_path / changed).open("a") as f:
        f.write("\n")
    assert store.is_stale(got, find(spec))
    replicate(spec, out=tmp_path / "out", seeds=1)
    assert toy.runs(tmp_path) == {0: 2}


def test_a_killed_run_loses_one_seed_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = replicate(toy.write(whole), out=whole / "out")
    spec = toy.write(killed, die=1)
    done = subprocess.run(command(spec, killed / "out"), env=ENV, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.seed_file(killed / "out", "toy", 0).exists()
    assert not (killed / "out" / "toy.json").exists()
    toy.write(killed)  # the same spec in a world where nothing dies
    got = replicate(spec, out=killed / "out")
    assert toy.runs(killed) == {0: 1, 1: 2, 2: 1}
    assert without_minutes(got) == without_minutes(expected)


def test_parallel_seeds_measure_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, two = tmp_path / "one", tmp_path / "two"
    expected = replicate(toy.write(one), out=one / "out")
    steps: list[tuple[int, str, int, int | None]] = []
    got = replicate(toy.write(two), out=two / "out", jobs=2, progress=lambda *e: steps.append(e))
    assert [s["values"] for s in got["per_seed"]] == [s["values"] for s in expected["per_seed"]]
    assert {s for s, *_ in steps} == {0, 1, 2}
    threads = (two / "runs" / "0").read_text().strip()
    assert threads == str(max(1, (os.cpu_count() or 1) // 2)), "processes share the cores"
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_killed_process_is_said_and_costs_one_seed(tmp_path: Path) -> None:
    spec = toy.write(tmp_path, die=2)
    with pytest.raises(DemurError, match="fewer --jobs"):
        replicate(spec, out=tmp_path / "out", seeds=3, jobs=2)
    assert not store.seed_file(tmp_path / "out", "toy", 2).exists()
    toy.write(tmp_path)
    assert replicate(spec, out=tmp_path / "out")["outcome"] == "reproduced"


def test_a_missing_extra_is_named_in_parallel_too(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    raising = '    from demur.errors import MissingExtra\n    raise MissingExtra("this check", "local")\n'
    spec.write_text(spec.read_text().replace("def run(context):\n", "def run(context):\n" + raising))
    with pytest.raises(DemurError, match=r"demur\[local\]"):
        replicate(spec, out=tmp_path / "out", jobs=2)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    spec = toy.write(tmp_path, pause=0.4)
    process = subprocess.Popen(command(spec, tmp_path / "out"), env=ENV, stderr=subprocess.PIPE, text=True)
    first = store.seed_file(tmp_path / "out", "toy", 0)
    for _ in range(600):
        if first.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "after its last finished seed" in err
    assert first.exists()


def test_ctrl_c_ends_parallel_seeds_too(tmp_path: Path) -> None:
    spec = toy.write(tmp_path, pause=30)  # a seed takes 90 s
    process = subprocess.Popen(
        command(spec, tmp_path / "out", "--jobs", "2"), env=ENV, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if len(list((tmp_path / "runs").glob("*"))) == 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err


def test_an_unfit_organism_concludes_nothing(tmp_path: Path) -> None:
    got = replicate(toy.write(tmp_path, held_in=0.5), out=tmp_path / "out")
    assert list(got["unfit"]) == ["1", "2"] and "needs at least 0.9" in got["unfit"]["1"]
    assert got["reason"].startswith("the organism was fit in 1 of 3 seeds")
    assert got["claims"][0]["over"] == "1 seed, 400 items"


def test_a_loud_control_and_an_absent_effect(tmp_path: Path) -> None:
    loud = replicate(toy.write(tmp_path / "a", control=0.7), out=tmp_path / "a")
    assert loud["outcome"] == "partly"
    assert [c["status"] for c in loud["controls"]] == ["not silent", "silent"]
    absent = replicate(toy.write(tmp_path / "b", p=0.5), out=tmp_path / "b")
    assert absent["outcome"] == "not at this scale"
    assert absent["baselines"][0]["status"] == "not beaten"


def test_an_anchor_that_is_off(tmp_path: Path) -> None:
    got = replicate(toy.write(tmp_path, two=2.1), out=tmp_path / "out", seeds=1)
    assert got["outcome"] == "anchor off" and "two" in got["reason"]
    nan = replicate(toy.write(tmp_path / "nan", two=float("nan")), out=tmp_path / "nan", seeds=1)
    assert nan["anchors"][0]["status"] == "off" and nan["anchors"][0]["found"] is None


def test_an_anchor_whose_extra_is_missing_is_skipped_with_the_reason(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    raising = (
        'def _two():\n    from demur.errors import MissingExtra\n    raise MissingExtra("x", "math")\n\n\n'
    )
    text = spec.read_text().replace('"two": float(WORLD.get("two", 2.0))', '"two": _two')
    spec.write_text(text.replace("SPEC = Spec(", raising + "SPEC = Spec("))
    got = replicate(spec, out=tmp_path / "out", seeds=1)
    assert got["anchors"][0]["status"] == "skipped" and "demur[math]" in got["anchors"][0]["why"]


def test_an_undefined_claim_is_not_met(tmp_path: Path) -> None:
    got = replicate(toy.write(tmp_path, nan=True), out=tmp_path / "out", seeds=1)
    assert got["claims"][0]["why"] == "undefined" and got["outcome"] == "not at this scale"


@pytest.mark.parametrize("key", ["held_in", "hits", "swapped", "always"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    spec = toy.write(tmp_path, drop=key)
    if key == "held_in":
        spec.write_text(
            spec.read_text()
            .replace('out = {"held_in"', 'out = {"other"')
            .replace('out["held_in"]', 'out["other"]')
        )
    with pytest.raises(InputError, match=f"no value for {key}"):
        replicate(spec, out=tmp_path / "out")
    assert not (tmp_path / "out" / "toy.json").exists()


def test_a_recount_without_an_anchor_is_named(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    spec.write_text(spec.read_text().replace('{"two": float', '{"tow": float'))
    with pytest.raises(InputError, match="no value for two"):
        replicate(spec, out=tmp_path / "out", seeds=1)


@pytest.mark.parametrize("number", [{"seeds": 0}, {"seeds": -2}, {"jobs": 0}])
def test_numbers_below_one(tmp_path: Path, number: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        replicate(toy.write(tmp_path), out=tmp_path, **number)  # type: ignore[arg-type]


# --- one fresh seed plus the stored ones ------------------------------------------------------------------------


def test_a_long_check_runs_one_seed_and_takes_the_stored_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy.write(tmp_path)
    spec.write_text(spec.read_text().replace("minutes=0.01", "minutes=4"))
    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    monkeypatch.setattr(store, "RESULTS", shipped)
    assert replicate(spec, out=mine)["seeds"] == [0], "nothing is stored yet: one fresh seed"
    replicate(spec, out=shipped, full=True)
    assert toy.runs(tmp_path) == {0: 2, 1: 1, 2: 1}
    got = replicate(spec, out=tmp_path / "other")
    assert toy.runs(tmp_path) == {0: 3, 1: 1, 2: 1}
    assert got["seeds"] == [0, 1, 2] and got["stored_seeds"] == [1, 2]
    more = replicate(spec, out=tmp_path / "other", seeds=4)
    assert more["stored_seeds"] == [1, 2] and toy.runs(tmp_path)[3] == 1, "the number that nobody has"
    (tmp_path / "recipe.txt").write_text("layers: 3\n")
    assert replicate(spec, out=tmp_path / "third")["seeds"] == [0], "stale seeds are not merged"


def test_short_checks_run_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy.write(tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path / "shipped")
    replicate(spec, out=tmp_path / "shipped")
    assert replicate(spec, out=tmp_path / "mine")["stored_seeds"] == []
    assert toy.runs(tmp_path) == {0: 2, 1: 2, 2: 2}


# --- what is kept -----------------------------------------------------------------------------------------------


def test_items_are_kept_up_to_2000() -> None:
    few = store.kept(Value.of([0.123456789123, 1.0]))
    assert few.items == (0.123456789, 1.0)
    many = store.kept(Value.of([0, 1] * 1001))
    assert many.items is None and many.n == 2002
    assert many.se == pytest.approx(0.5 / 2002**0.5, rel=1e-3)
    assert store.kept(replace(few, items=None, n=5)).n == 5


def test_a_seed_file_that_was_edited_is_measured_again(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    replicate(spec, out=tmp_path / "out", seeds=1)
    (tmp_path / "out" / "toy.json").unlink()
    store.seed_file(tmp_path / "out", "toy", 0).write_text("{")
    replicate(spec, out=tmp_path / "out", seeds=1)
    assert toy.runs(tmp_path) == {0: 2}


def test_the_example_in_the_docs_is_reproduced(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "replicate.md").read_text(encoding="utf-8")
    (tmp_path / "my_method.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    got = replicate(tmp_path / "my_method.py", out=tmp_path / "out")
    assert got["outcome"] == "reproduced" and got["baselines"][0]["status"] == "beaten"


def test_half_done_work_of_other_code_is_not_gone_on_from(tmp_path: Path) -> None:
    spec = toy.write(tmp_path)
    folders = []
    found = find(spec)
    for sources in ({"a": "1" * 16, "b": "1" * 16}, {"a": "1" * 16, "b": "2" * 16}):

        def run(context: Any) -> dict[str, Value]:
            folders.append(context.folder)
            raise RuntimeError("stopped")

        changed = replace(found, spec=replace(found.spec, run=run), sources=sources)
        with pytest.raises(RuntimeError):
            harness.run_seed(changed, 0, False, tmp_path / "out")
    assert folders[0] != folders[1] and all(f.is_dir() for f in folders)
