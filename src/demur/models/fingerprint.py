"""The identity of a set of weights: a hash over tensor names, types, shapes and bytes.

It does not depend on how the tensors are spread over files, on their order, or on the header that some
library version wrote, so an adapter or an operating point can name the weights it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from demur.cachedir import cache_dir
from demur.errors import InputError
from demur.files import write_atomic

_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself


def fingerprint_folder(folder: str | Path) -> str:
    """Fingerprint of the `*.safetensors` weights in a folder, as 64 hex digits.

    sha256 over, for every tensor in the order of names, the line `name dtype shape` and the raw bytes. Where
    a `model.safetensors.index.json` lies, its files count and no others. Results are kept in the user cache
    by path, size and modification time, since a large model takes a while to read.

    Raises:
        InputError: the folder is missing, holds no safetensors, or a file is broken.
    """
    files = weight_files(folder)
    key = str(Path(folder).resolve())
    stamp = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    known = _read_known().get(key)
    if known and known.get("files") == stamp:
        return str(known["fingerprint"])
    value = fingerprint_files(files)
    _remember(key, {"files": stamp, "fingerprint": value})
    return value


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass a model folder, a hub id or a built-in name")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index}: not a weight index (weight_map of tensor to file)") from None
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise InputError(
                f"{folder}: {', '.join(missing)} named in {index.name} but missing; fetch the model again"
            )
        return [folder / n for n in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{folder}: holds no .safetensors weights. Pickled weights (.bin, .pt) are not loaded, "
            "because they "
            "can run code; save the model with save_pretrained(..., safe_serialization=True)"
        )
    return files


def fingerprint_files(files: list[Path]) -> str:
    """Fingerprint of the tensors in the given safetensors files together (not cached)."""
    where: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for path in files:
        for name, info, start in _tensors(path):
            if name in where:
                raise InputError(f"tensor {name!r} stands in {where[name][0].name} and in {path.name}")
            where[name] = (path, info, start)
    digest = hashlib.sha256()
    for name in sorted(where):
        path, info, start = where[name]
        digest.update(f"{name} {info['dtype']} {json.dumps(info['shape'])}\n".encode())
        begin, end = info["data_offsets"]
        with path.open("rb") as f:
            f.seek(start + begin)
            _hash_into(digest, f, end - begin, path)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, header entry, file offset of the data section) for each tensor of a safetensors file."""
    broken = f"{path}: not a whole safetensors file; it may be cut off, fetch or convert the model again"
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise InputError(broken)
        (length,) = struct.unpack("<Q", head)
        if length > min(_MAX_HEADER, size - 8):
            raise InputError(broken)
        try:
            header = json.loads(f.read(length))
            entries = [(name, info) for name, info in header.items() if name != "__metadata__"]
            last = max((info["data_offsets"][1] for _, info in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(broken) from None
    if 8 + length + last != size:
        raise InputError(broken)
    for name, info in entries:
        yield name, info, 8 + length


def _hash_into(digest: Any, f: BinaryIO, n: int, path: Path) -> None:
    while n:
        block = f.read(min(n, _CHUNK))
        if not block:
            raise InputError(f"{path}: ends before its tensors do; fetch or convert the model again")
        digest.update(block)
        n -= len(block)


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _known_path() -> Path:
    return cache_dir() / "fingerprints.json"


def _read_known() -> dict[str, Any]:
    try:
        known = json.loads(_known_path().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key: str, entry: dict[str, Any]) -> None:
    path = _known_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            write_atomic(path, json.dumps({**_read_known(), key: entry}, indent=1))
    except OSError:
        return  # a read-only cache costs time at the next start, nothing else
