"""States on disk: one memory-mapped array that a stopped collection goes on filling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.artefact import Place
from demur.files import write_atomic
from demur.runtime.base import Runtime
from demur.runtime.batching import WINDOW
from demur.types import Condition, Prompt

VERSION = 1


class StateStore:
    """A folder with `states.npy`, shape (sites, n, width), and `states.json`: what they are, how many are there.

    Whole windows of the runtime's batch plan are counted as done, so that a collection that was stopped ends
    with the same bytes as one that was not.
    """

    def __init__(
        self,
        folder: str | Path,
        runtime: Runtime,
        prompts: Sequence[Prompt],
        sites: Sequence[Place],
        condition: Condition | None,
        part: str,
        dtype: str,
    ) -> None:
        self.folder, self.shape, self.dtype = Path(folder), (len(sites), len(prompts)), dtype
        asked = [p.with_system(condition.system if condition else None) for p in prompts]
        rows = [[p.id, [[m.role, m.content] for m in p.messages]] for p in asked]
        self.about = {
            "schema_version": VERSION,
            "model": runtime.name,
            "fingerprint": runtime.fingerprint,
            "model_dtype": runtime.dtype,
            "edits": len(getattr(runtime, "edits", ())),
            "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
            "sites": [list(site) for site in sites],
            "part": part,
            "dtype": dtype,
        }

    def open(self) -> tuple[npt.NDArray[Any] | None, int]:
        """The array of an earlier collection and the number of prompts in it; (None, 0) where there is none.

        Raises:
            InputError: the folder holds states of something else.
        """
        head = self.folder / "states.json"
        if not head.is_file():
            return None, 0
        try:
            found = json.loads(head.read_text(encoding="utf-8"))
            other = [key for key, value in self.about.items() if found.get(key) != value]
            array = np.lib.format.open_memmap(self.folder / "states.npy", mode="r+")
        except (OSError, ValueError, AttributeError) as e:
            raise InputError(f"{self.folder}: no whole store of states ({e}); name another folder") from None
        if other:
            raise InputError(
                f"{self.folder}: holds states of another collection (other {', '.join(other)}); name another folder"
            )
        return array, int(found["done"])

    def create(self, width: int) -> npt.NDArray[Any]:
        """A new array on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "states.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=(*self.shape, width))

    def commit(self, array: Any, done: int) -> None:
        """Record that the first `done` prompts are on disk, at the end of a window or of the job."""
        if done % WINDOW and done != self.shape[1]:
            return
        array.flush()
        write_atomic(self.folder / "states.json", json.dumps({**self.about, "done": done}, indent=2) + "\n")
