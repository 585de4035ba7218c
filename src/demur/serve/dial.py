"""Which operating point a request falls under, and what it decides there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from demur.control.refusal_tokens import RefusalTokens
from demur.errors import DemurError, InputError
from demur.serve.base import Ask, Decision
from demur.serve.pointfile import PointFile
from demur.serve.settings import Settings
from demur.types import RESPOND, OperatingPoint, Score

_FILE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Forbidden(DemurError):
    """A request names an operating point that the operator has not opened to requests: HTTP 403."""


@dataclass(frozen=True, slots=True)
class Pick:
    """The rule that one request falls under; fixed before its first call, whatever is reloaded meanwhile."""

    rule: RefusalTokens | None
    canary: bool = False

    @property
    def T(self) -> float:  # noqa: N802 - the symbol of the softmax temperature
        """The temperature that its scores must have."""
        return self.rule.T if self.rule is not None else 1.0


class Dial:
    """Decides requests by the operating points in force.

    Args:
        settings: canary share and overrides. main: the operating point; None leaves every answer to the model.
        canary: the one on trial. opened: makes the `PointFile` of a saved point that an override names.

    >>> dial = Dial(settings, main)  # doctest: +SKIP
    >>> dial.decide(ask, await upstream.read(ask)).category  # doctest: +SKIP
    'safety'
    """

    def __init__(
        self,
        settings: Settings,
        main: PointFile | None,
        canary: PointFile | None = None,
        *,
        opened: Callable[[Path], PointFile] | None = None,
    ) -> None:
        self.settings, self.main, self.canary = settings, main, canary
        self._opened, self._saved = opened, dict[str, PointFile]()
        self._shadow: tuple[OperatingPoint, RefusalTokens] | None = None

    @property
    def files(self) -> list[PointFile]:
        """Operating-point files to watch."""
        # a copy: a request may open another one while a second thread looks at them
        return [f for f in (self.main, self.canary, *tuple(self._saved.values())) if f is not None]

    def refresh(self) -> bool:
        """Look at every file again; True when one was taken up."""
        changed = [f.refresh() for f in self.files]
        return any(changed)

    def pick(self, request_id: str, override: str | None = None) -> Pick:
        """The operating point of a request.

        Raises:
            Forbidden: the request may not name this one. InputError: it cannot be read.
        """
        if override is not None:
            return Pick(self._named(override).rule)
        share = self.settings.canary.share if self.settings.canary is not None else 0.0
        if self.canary is not None and share_of(request_id) < share:
            return Pick(self.canary.rule, canary=True)
        return Pick(self.main.rule if self.main is not None else None)

    def decide(
        self, ask: Ask, score: Score | None, override: str | None = None, *, pick: Pick | None = None
    ) -> Decision:
        """What the operating point says about a scored request.

        A score that it cannot be applied to (another T, no control tokens) is a `problem` in the decision.

        Args:
            pick: from `pick`, so that nothing changes between scoring and deciding.
        """
        pick = pick or self.pick(ask.prompt.id, override)
        rule = pick.rule
        if rule is None or score is None:
            return Decision(score=score, category=None, enforced=False, point=None)
        decided = Decision(
            score=score, category=None, enforced=False, point=rule.point.id, canary=pick.canary
        )
        try:
            category, shadow = rule(ask.prompt, score), self._in_shadow(rule.point)
            unenforced = shadow(ask.prompt, score) if shadow is not None else None
        except DemurError as e:
            return replace(decided, score=None, problem=f"{type(e).__name__}: {e}")
        bare = category == RESPOND and rule.answers == "base"
        return replace(
            decided, category=category, enforced=category is not None, shadow=unenforced, bare=bare
        )

    def undecided(self, pick: Pick, problem: str) -> Decision:
        """The decision about a request whose probabilities could not be had."""
        point = pick.rule.point.id if pick.rule is not None else None
        return Decision(
            score=None, category=None, enforced=False, point=point, canary=pick.canary, problem=problem
        )

    def _named(self, id: str) -> PointFile:
        if id not in self.settings.overrides and "*" not in self.settings.overrides:
            raise Forbidden(
                f"operating point {id!r} may not be named by a request; the operator's settings decide which "
                "ones may (overrides)"
            )
        for file in self.files:
            if file.point.id == id:
                return file
        if self._opened is None or not _FILE_ID.fullmatch(id):
            raise InputError(f"no operating point {id!r} is loaded")
        path = self.settings.saved_points / f"{id}.yaml"
        if not path.is_file():
            raise InputError(f"there is no operating point {id!r} here")
        self._saved[id] = self._opened(path)
        return self._saved[id]

    def _in_shadow(self, point: OperatingPoint) -> RefusalTokens | None:
        """The rule as it would be with its shadow thresholds enforced; None where it has none."""
        if all(t.mode == "enforce" for t in point.thresholds.values()):
            return None
        if self._shadow is None or self._shadow[0] is not point:
            enforced = {c: replace(t, mode="enforce") for c, t in point.thresholds.items()}
            self._shadow = (point, RefusalTokens(replace(point, thresholds=enforced)))
        return self._shadow[1]


def share_of(request_id: str) -> float:
    """A number in [0, 1) that belongs to a request's id, the same in every process.

    >>> share_of("a") == share_of("a") and 0 <= share_of("a") < 1
    True
    """
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:6], "big") / 2**48
