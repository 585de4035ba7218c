"""An operating point in a file that may change under a running server: the last good one stays in force."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from demur.calibrate.decide import cuts, decide
from demur.control.refusal_tokens import RefusalTokens, check_point
from demur.errors import DemurError, InputError
from demur.files import dump_operating_point, load_operating_point
from demur.runtime.base import ControlTokens
from demur.types import OperatingPoint

SIZE_LIMIT = 1_000_000
"""Bytes; an operating point has a few hundred, so a larger file is something else."""
_RACY = 2.0
"""Seconds within which two writes may carry the same time stamp."""


@dataclass(frozen=True, slots=True)
class _State:
    rule: RefusalTokens
    digest: str


class PointFile:
    """The operating point in force, read from a file and read again when the file changes.

    Args:
        path: YAML file. names: refuse categories, then "respond", of the model it steers.
        has_base: whether the model without its adapter can answer.
        shipped: the point that came with the model. fingerprint, dtype: of the model where known.
        allow_refusal_lowering: consent to thresholds of category "safety" looser than the shipped ones.

    `rule` is swapped whole: keep it in a variable while one request is decided, and take the point from
    `rule.point`. `loads` and `failures` count what `refresh` did.

    Raises:
        InputError, MismatchError, RefusalLowering: the file cannot be used; a server must not start on it.

    >>> file = PointFile("strict.yaml", runtime.control.names)  # doctest: +SKIP
    >>> file.refresh(), file.problem  # doctest: +SKIP
    (False, None)
    """

    def __init__(
        self,
        path: str | Path,
        names: Sequence[str],
        *,
        shipped: OperatingPoint | None = None,
        fingerprint: str | None = None,
        dtype: str | None = None,
        has_base: bool = False,
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.path, self.names = Path(path), tuple(names)
        self.shipped, self.fingerprint, self.dtype = shipped, fingerprint, dtype
        self.has_base, self.allowed = has_base, allow_refusal_lowering
        self.problem: str | None = None
        self.loads, self.failures = 1, 0
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._tried: str | None = None
        digest = self._digest()
        self._state = _State(self.check(load_operating_point(self.path)), digest)

    @property
    def rule(self) -> RefusalTokens:
        """The rule in force."""
        return self._state.rule

    @property
    def point(self) -> OperatingPoint:
        """The operating point in force."""
        return self._state.rule.point

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the file that is in force."""
        return self._state.digest

    def check(self, point: OperatingPoint) -> RefusalTokens:
        """The rule of an operating point that may run here.

        Raises:
            InputError: thresholds, categories or T that cannot be decided by.
            MismatchError: made for another model. RefusalLowering: looser than allowed.
        """
        if len(self.names) < 2:
            raise InputError(f"operating point {point.id!r}: this model has no control tokens to steer")
        if not 0 < point.T < float("inf"):
            raise InputError(f"operating point {point.id!r}: T={point.T} must be a positive number")
        model: Any = SimpleNamespace(
            name="the served model",
            control=ControlTokens(ids={name: i for i, name in enumerate(self.names)}),
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            base=self.has_base or None,
        )
        check_point(point, model)
        rule = RefusalTokens(point, shipped=self.shipped, allow_refusal_lowering=self.allowed)
        # thresholds in shadow mode are decided by too, and a NaN or a contradiction must show now
        every = {c: replace(t, mode="enforce") for c, t in point.thresholds.items()}
        even = [[1 / len(self.names)] * len(self.names)]
        decide(even, self.names, cuts(replace(point, thresholds=every)), point.rule)
        return rule

    def refresh(self) -> bool:
        """Look at the file; True when another operating point came into force.

        Never raises for what the file holds: `problem` says why the last good point stays in force. Cheap
        enough for every second.
        """
        with self._lock:
            tried, self._tried = self._tried, None
            try:
                stamp = self._stamp()
                if stamp == self._seen and time.time() - stamp[0] / 1e9 > _RACY:
                    self._tried = tried
                    return False
                digest = self._digest()
                self._seen, self._tried = stamp, digest
                if digest == self._state.digest:
                    self.problem = None
                    return False
                if digest == tried:
                    return False
                rule = self.check(load_operating_point(self.path))
            except (DemurError, OSError, ValueError, RecursionError) as e:
                self._failed(e)
                return False
            self._into_force(rule, digest)
            return True

    def save(self, point: OperatingPoint) -> None:
        """Validate, write atomically, and take into force; nothing is written when validation fails."""
        rule = self.check(point)
        with self._lock:
            dump_operating_point(point, self.path)
            self._into_force(rule, self._digest())

    def _into_force(self, rule: RefusalTokens, digest: str) -> None:
        self._state, self.problem = _State(rule, digest), None
        self.loads += 1
        _log().info("operating point %s from %s is in force", rule.point.id, self.path)

    def _failed(self, error: Exception) -> None:
        text = f"{self.path.name}: {error.strerror}" if isinstance(error, OSError) else str(error)
        if text != self.problem:
            self.problem = text
            self.failures += 1
            _log().error("operating point %s stays in force; %s", self.point.id, text)

    def _stamp(self) -> tuple[int, ...]:
        at = self.path.stat()
        return (at.st_mtime_ns, at.st_size, at.st_ino)

    def _digest(self) -> str:
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such operating-point file")
        with self.path.open("rb") as f:
            raw = f.read(SIZE_LIMIT + 1)
        if len(raw) > SIZE_LIMIT:
            raise InputError(f"{self.path}: over {SIZE_LIMIT} bytes, so it is no operating point")
        return hashlib.sha256(raw).hexdigest()[:16]


def _log() -> logging.Logger:
    return logging.getLogger("demur.serve")
