"""Built-in models on disk: built once, checked on every first use, never half there.

A build happens in a folder beside the final place and is moved in by one rename, under a lock that the
operating system releases when its holder dies. What is found is compared with the manifest byte by byte;
anything else than a match is built again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from demur.cachedir import cache_dir
from demur.errors import DataUnavailable
from demur.models.fingerprint import fingerprint_files, sha256_file, weight_files

Say = Callable[[str], None]
"""Called with one line on what is being done, so that a wait has a reason."""

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinRecipe:
    """How a built-in model comes about; the store knows nothing else about it.

    Attributes:
        version: raise it when the conversion changes, so that older caches are built again.
        fetch: (empty folder, say) -> source file, checked against its pinned checksum.
        convert: (source, target folder, say) writes a complete Hugging Face model folder.
        fingerprint: what the weights must come out as; None accepts any (tests).
        needs_bytes: free disk space that a build takes at its widest.
        made_with: returns the versions that the manifest records.
    """

    name: str
    version: int
    fetch: Callable[[Path, Say], Path]
    convert: Callable[[Path, Path, Say], None]
    fingerprint: str | None = None
    needs_bytes: int = 0
    made_with: Callable[[], Mapping[str, str]] = dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checked built-in model: its folder and the fingerprint of its weights."""

    path: Path
    fingerprint: str


_checked: dict[tuple[Any, ...], Stored] = {}  # full hashing once per process and state of the files


def place(recipe: BuiltinRecipe) -> Path:
    """The folder where the model stands once it is built."""
    return cache_dir() / "models" / recipe.name


def ensure(recipe: BuiltinRecipe, say: Say) -> Stored:
    """The built-in model, from the cache when it is whole there, built otherwise.

    A whole cache is used without lock and without network.

    Raises:
        DataUnavailable: the source cannot be had, is not what was pinned, or the disk cannot take it.
    """
    stored = _load(recipe)
    if stored is not None:
        return stored
    target = place(recipe)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{recipe.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that prepares {recipe.name}")
            lock.acquire()
        try:
            return _load(recipe) or _build(recipe, target, say)
        finally:
            lock.release()
    except OSError as e:
        raise DataUnavailable(
            f"cannot prepare {recipe.name} under {target.parent}: {e}. Free some space there or set "
            "DEMUR_CACHE to "
            "a folder that can be written"
        ) from e


def problems(recipe: BuiltinRecipe) -> list[str]:
    """What is wrong with the cached model, one line each; empty when every byte is as the manifest says."""
    folder = place(recipe)
    if not folder.is_dir():
        return ["not there"]
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        built_as = (manifest["recipe"], manifest["version"], manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is missing or broken"]
    if built_as[:2] != (recipe.name, recipe.version):
        return [f"made by recipe {built_as[0]} version {built_as[1]}, current is version {recipe.version}"]
    if recipe.fingerprint not in (None, built_as[2]):
        return ["the manifest names other weights"]
    found = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {MANIFEST}
    out = [f"{name}: does not belong here" for name in sorted(found - set(files))]
    for name, (size, digest) in sorted(files.items()):
        path = folder / name
        if name not in found:
            out.append(f"{name}: missing")
        elif path.stat().st_size != size:
            out.append(f"{name}: {path.stat().st_size} bytes, expected {size}")
        elif sha256_file(path) != digest:
            out.append(f"{name}: checksum differs")
    return out


def _load(recipe: BuiltinRecipe) -> Stored | None:
    folder = place(recipe)
    try:
        stats = [(p.name, p.stat()) for p in sorted(folder.iterdir())]
    except OSError:
        return None
    key = (str(folder), recipe, *((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats))
    if key not in _checked:
        if problems(recipe):
            return None
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        _checked[key] = Stored(path=folder, fingerprint=manifest["fingerprint"])
    return _checked[key]


def _build(recipe: BuiltinRecipe, target: Path, say: Say) -> Stored:
    if target.exists():
        say(f"{recipe.name} in the cache is not usable ({problems(recipe)[0]}); building it again")
    _sweep(recipe, target)
    free = shutil.disk_usage(target.parent).free
    if free < recipe.needs_bytes:
        raise DataUnavailable(
            f"{recipe.name} needs {recipe.needs_bytes / 1e6:.0f} MB free under {target.parent} while it "
            "is built, "
            f"{free / 1e6:.0f} MB are. Free some space or set DEMUR_CACHE to another disk"
        )
    work = Path(tempfile.mkdtemp(prefix=f".{recipe.name}.", suffix=".tmp", dir=target.parent))
    try:
        source_dir, made = work / "source", work / "model"
        source_dir.mkdir()
        made.mkdir()
        recipe.convert(recipe.fetch(source_dir, say), made, say)
        fingerprint = fingerprint_files(weight_files(made))
        if recipe.fingerprint not in (None, fingerprint):
            raise DataUnavailable(
                f"{recipe.name} came out with fingerprint {fingerprint[:16]}, expected {recipe.fingerprint}; "
                f"converted with {dict(recipe.made_with())}. Install the versions of constraints.txt and "
                "try again"
            )
        _write_manifest(recipe, made, fingerprint)
        if target.exists():
            target.rename(work / "old")
        made.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Stored(path=target, fingerprint=fingerprint)


def _write_manifest(recipe: BuiltinRecipe, made: Path, fingerprint: str) -> None:
    files = {}
    for path in sorted(made.iterdir()):
        path.chmod(0o644)
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {
        "recipe": recipe.name,
        "version": recipe.version,
        "fingerprint": fingerprint,
        "made_with": dict(recipe.made_with()),
        "files": files,
    }
    path = made / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with suppress(OSError):  # folders cannot be synced everywhere; the checksums catch what that loses
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _sweep(recipe: BuiltinRecipe, target: Path) -> None:
    """Remove what a killed build left behind; the caller holds the lock, so nobody works there."""
    for left in target.parent.glob(f".{recipe.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def remove(recipe: BuiltinRecipe) -> int:
    """Delete the cached model and leftovers of builds; returns the bytes freed (0 when nothing was there)."""
    target = place(recipe)
    if not target.parent.is_dir():
        return 0
    with FileLock(target.parent / f".{recipe.name}.lock"):
        _sweep(recipe, target)
        if not target.is_dir():
            return 0
        freed = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
        shutil.rmtree(target)
    return freed
