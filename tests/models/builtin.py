"""A built-in model of a few bytes, made the way the real one is: fetched, converted, stored, checked."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from demur.models.store import BuiltinRecipe, Say

TENSORS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, dtype=np.float32)}


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """The format by hand, in the order given, so that tests do not rest on the library's choices."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, t in tensors.items():
        raw = t.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(t.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


@dataclass
class Builder:
    """Counts its calls; `fail_at` makes the conversion die half way."""

    fetched: int = 0
    fail_at: str | None = None
    said: list[str] = field(default_factory=list)

    def fetch(self, into: Path, say: Say) -> Path:
        self.fetched += 1
        source = into / "source.bin"
        source.write_bytes(b"source")
        return source

    def convert(self, source: Path, target: Path, say: Say) -> None:
        assert source.read_bytes() == b"source"
        (target / "config.json").write_text("{}")
        if self.fail_at == "convert":
            raise KeyboardInterrupt
        write_safetensors(target / "model.safetensors", TENSORS)

    def recipe(self, name: str = "tiny", version: int = 1, **changes: object) -> BuiltinRecipe:
        return BuiltinRecipe(name=name, version=version, fetch=self.fetch, convert=self.convert, **changes)  # type: ignore[arg-type]
