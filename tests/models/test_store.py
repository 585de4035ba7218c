"""A built-in is whole or rebuilt: truncation, flipped bytes, killed builds, stale locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock

from demur.errors import DataUnavailable
from demur.models import store
from demur.models.fingerprint import fingerprint_folder
from tests.models.builtin import TENSORS, Builder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    store._checked.clear()
    return tmp_path / "cache"


@pytest.fixture
def builder() -> Builder:
    return Builder()


def again(builder: Builder) -> store.Stored:
    """As a new process would see it: nothing remembered."""
    store._checked.clear()
    return store.ensure(builder.recipe(), builder.said.append)


def test_builds_once_and_then_needs_nothing(builder: Builder) -> None:
    first = store.ensure(builder.recipe(), builder.said.append)
    assert (first.path / "model.safetensors").is_file()
    assert first.fingerprint == fingerprint_folder(first.path)
    assert again(builder) == first
    assert builder.fetched == 1
    assert store.problems(builder.recipe()) == []


def test_no_leftovers_after_a_build(builder: Builder, cache: Path) -> None:
    store.ensure(builder.recipe(), print)
    assert {p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"} == {"tiny"}


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "flip_same_time", "delete", "extra", "manifest", "no_manifest"]
)
def test_damage_is_found_and_repaired(builder: Builder, damage: str) -> None:
    path = store.ensure(builder.recipe(), print).path
    weights, manifest = path / "model.safetensors", path / "manifest.json"
    raw, stat = weights.read_bytes(), weights.stat()
    if damage == "truncate":
        weights.write_bytes(raw[:-4])
    elif damage.startswith("flip"):
        weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "delete":
        weights.unlink()
    elif damage == "extra":
        (path / "model-2.safetensors").write_bytes(raw)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.unlink()
    if damage == "flip_same_time":
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.problems(builder.recipe())
    fixed = again(builder)
    assert builder.fetched == 2
    assert (fixed.path / "model.safetensors").read_bytes() == raw
    assert {p.name for p in fixed.path.iterdir()} == {"config.json", "manifest.json", "model.safetensors"}
    assert any("building it again" in line for line in builder.said)


def test_damage_within_one_process_is_found_too(builder: Builder) -> None:
    path = store.ensure(builder.recipe(), print).path
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    store.ensure(builder.recipe(), print)
    assert builder.fetched == 2


def test_an_interrupted_build_leaves_nothing_that_is_used(builder: Builder, cache: Path) -> None:
    builder.fail_at = "convert"
    with pytest.raises(KeyboardInterrupt):
        store.ensure(builder.recipe(), print)
    assert not (cache / "models" / "tiny").exists()
    builder.fail_at = None
    assert again(builder).path.is_dir()


def test_a_failed_rebuild_keeps_no_damaged_model_in_use(builder: Builder) -> None:
    path = store.ensure(builder.recipe(), print).path
    (path / "model.safetensors").write_bytes(b"")
    builder.fail_at = "convert"
    with pytest.raises(KeyboardInterrupt):
        again(builder)
    assert store.problems(builder.recipe())


def test_leftovers_of_a_killed_build_and_a_stale_lock(builder: Builder, cache: Path) -> None:
    models = cache / "models"
    half = models / ".tiny.abc123.tmp" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (models / ".tiny.lock").write_text("")  # the lock's owner is long gone
    other = models / ".tiny2.xyz.tmp"
    other.mkdir()
    assert again(builder).path.is_dir()
    assert not half.exists()
    assert other.exists()  # another model's build is not ours to sweep


def test_kill_in_the_middle_of_a_build(builder: Builder, cache: Path) -> None:
    code = """
        import time, sys
        from tests.models.builtin import Builder
        from demur.models import store
        class Slow(Builder):
            def convert(self, source, target, say):
                super().convert(source, target, say)
                print("converting", flush=True)
                time.sleep(60)
        store.ensure(Slow().recipe(), lambda line: None)
    """
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env, cwd=root
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "converting"
        child.kill()
    assert list((cache / "models").glob(".tiny.*.tmp"))
    assert not (cache / "models" / "tiny").exists()
    started = time.monotonic()
    assert store.problems(builder.recipe()) == ["not there"]
    assert again(builder).path.is_dir()
    assert time.monotonic() - started < 10  # the dead process' lock does not block
    assert not list((cache / "models").glob(".tiny.*.tmp"))


def test_a_second_process_waits_and_uses_the_first_ones_result(builder: Builder, cache: Path) -> None:
    import threading

    other, done = Builder(), []
    (cache / "models").mkdir(parents=True)
    lock = FileLock(cache / "models" / ".tiny.lock")
    lock.acquire()
    thread = threading.Thread(target=lambda: done.append(store.ensure(other.recipe(), other.said.append)))
    thread.start()
    while not other.said:
        time.sleep(0.01)
    assert "waiting" in other.said[0]
    store._build(builder.recipe(), store.place(builder.recipe()), print)
    lock.release()
    thread.join(10)
    assert len(done) == 1
    assert other.fetched == 0


def test_other_weights_than_pinned_are_refused(builder: Builder, cache: Path) -> None:
    with pytest.raises(DataUnavailable, match="fingerprint"):
        store.ensure(builder.recipe(fingerprint="0" * 64), print)
    assert not (cache / "models" / "tiny").exists()


def test_a_newer_recipe_is_built_again(builder: Builder) -> None:
    store.ensure(builder.recipe(), print)
    store.ensure(builder.recipe(version=2), print)
    assert builder.fetched == 2


def test_full_disk_is_said_beforehand(builder: Builder) -> None:
    with pytest.raises(DataUnavailable, match="MB free"):
        store.ensure(builder.recipe(needs_bytes=10**18), print)
    assert builder.fetched == 0


def test_a_cache_that_cannot_be_written_is_explained(builder: Builder, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataUnavailable, match="DEMUR_CACHE"):
        store.ensure(builder.recipe(), print)


def test_remove(builder: Builder) -> None:
    path = store.ensure(builder.recipe(), print).path
    assert store.remove(builder.recipe()) > 4 * sum(t.size for t in TENSORS.values())
    assert not path.exists()
    assert store.remove(builder.recipe()) == 0


def test_manifest_says_how_it_was_made(builder: Builder) -> None:
    path = store.ensure(builder.recipe(made_with=lambda: {"gguf": "1.2"}), print).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["made_with"] == {"gguf": "1.2"}
    assert manifest["recipe"] == "tiny"
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
