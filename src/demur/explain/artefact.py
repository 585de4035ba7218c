"""Probes and directions on disk: one safetensors file with a JSON header, tied to the model it was read from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError, MismatchError, MissingExtra
from demur.files import write_atomic

FloatArray = npt.NDArray[np.float64]
Place = tuple[int, int | str]
"""A layer and a position: a token index counted from the end, or a name such as `t_inst`."""
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """A vector in the residual stream of one model.

    Attributes:
        vector: (d,) float64, in the units of the states, not scaled to length 1.
        site: layer and position it was read at. fingerprint: of the model, None when unknown.
        origin: what made it, e.g. "mean_difference". n: rows behind it. data_hash: of these rows.

    >>> d = Direction(vector=np.array([3.0, 4.0]), origin="by hand")
    >>> d.scaled(10).vector.tolist()
    [6.0, 8.0]
    """

    vector: FloatArray
    origin: str
    site: Place | None = None
    fingerprint: str | None = None
    n: int = 0
    data_hash: str | None = None

    def scaled(self, norm: float) -> Direction:
        """The same direction with length `norm`."""
        length = float(np.linalg.norm(self.vector))
        if not length > 0:
            raise InputError("a direction of length 0 points nowhere and cannot be scaled")
        return dataclasses.replace(self, vector=self.vector * (norm / length))

    def save(self, path: str | Path) -> None:
        """Write the direction, atomically."""
        names = ("origin", "site", "fingerprint", "n", "data_hash")
        about = {name: getattr(self, name) for name in names}
        write_artefact(path, "direction", {"vector": self.vector}, about)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> Direction:
        """Read a direction for the model with this fingerprint; errors as in `Probe.load`."""
        tensors, about = read_artefact(path, "direction", fingerprint, allow_unknown)
        with described(path):
            return cls(
                vector=tensors["vector"].astype(float),
                origin=str(about["origin"]),
                site=place(about["site"]),
                fingerprint=about["fingerprint"],
                n=int(about["n"]),
                data_hash=about["data_hash"],
            )


@contextmanager
def described(path: str | Path) -> Iterator[None]:
    """Turn a missing or odd entry of a file into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: its header or tensors are not whole ({e}); save it again") from None


def write_artefact(
    path: str | Path, what: str, tensors: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]
) -> None:
    """Write tensors with `about` as JSON in the file's header, atomically; bytes depend on content only."""
    try:
        from safetensors.numpy import save
    except ImportError:
        raise MissingExtra(f"Saving a {what}", "local") from None
    header = json.dumps({"schema_version": VERSION, "what": what, **about}, sort_keys=True, allow_nan=False)
    write_atomic(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"demur": header}))


def read_artefact(
    path: str | Path, what: str, fingerprint: str | None, allow_unknown: bool
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Tensors and header of a file that `write_artefact` wrote, after checking that it belongs to the model.

    Raises:
        InputError: no such file, another kind of file. MismatchError: another model, or an unknown one.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtra(f"Loading a {what}", "local") from None
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; it should hold a {what} saved by demur")
    try:
        with safe_open(str(path), framework="numpy") as f:
            about = json.loads((f.metadata() or {}).get("demur", "null"))
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e})") from None
    if not isinstance(about, dict) or about.get("what") != what:
        raise InputError(f"{path}: holds no {what} saved by demur")
    if about.get("schema_version") != VERSION:
        raise InputError(
            f"{path}: schema_version {about.get('schema_version')!r}; this demur reads {VERSION}"
        )
    _check_model(path, what, about.get("fingerprint"), fingerprint, allow_unknown)
    return tensors, about


def _check_model(
    path: str | Path, what: str, stored: str | None, given: str | None, allow_unknown: bool
) -> None:
    if stored and given and stored != given:
        raise MismatchError(
            f"{path}: this {what} was fitted on states of the model {stored}, the model here is {given}. "
            "The axes of one network mean nothing in another, a fine-tuned copy included; fit it anew here"
        )
    if not (stored and given) and not allow_unknown:
        whose = "the model it was fitted on" if not stored else "the model here"
        raise MismatchError(
            f"{path}: {whose} has no fingerprint, so nobody can tell whether this {what} belongs to it. "
            "Pass allow_unknown=True if you know that it does"
        )


def place(value: Any) -> Place | None:
    """A site from its JSON form."""
    if value is None:
        return None
    layer, position = value
    return int(layer), position if isinstance(position, str) else int(position)


def row_hashes(X: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash for each row (n, d), taken in float32 so that the width of storage does not matter."""
    rows = np.ascontiguousarray(X, dtype=np.float32)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def data_hash(hashes: npt.NDArray[np.uint64], y: npt.NDArray[np.bool_]) -> str:
    """One hash of all rows and their labels, in order."""
    return hashlib.sha256(hashes.astype("<u8").tobytes() + y.tobytes()).hexdigest()[:16]
