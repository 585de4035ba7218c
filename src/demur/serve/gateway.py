"""One request from end to end: guard, read, decide, answer. HTTP is elsewhere (`demur.serve.app`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

from demur.errors import InputError, UpstreamError
from demur.flows.evaluation import Evaluation
from demur.serve.api import Asked, Written
from demur.serve.base import Ask, Decision, Piece, Upstream
from demur.serve.dial import Dial
from demur.serve.drift import Drift
from demur.serve.metrics import Metrics
from demur.serve.settings import Settings
from demur.types import RESPOND

HEALTH_KEPT = 1.0
"""Seconds an answer about the engine's health is good for: the health route is open to everybody."""
MODEL, OPERATOR = "model", "operator"
Result = TypeVar("Result")


class Gateway:
    """An upstream behind a dial.

    Args:
        settings: the operator's. upstream: reads and writes. dial: decides. metrics: counts.
        evaluation: stored scores, for the playground.

    >>> decision = await gateway.decide(asked)  # doctest: +SKIP
    >>> async for piece in gateway.answer(asked, decision): ...  # doctest: +SKIP
    """

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        dial: Dial,
        metrics: Metrics,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.settings, self.upstream, self.dial = settings, upstream, dial
        self.metrics, self.evaluation = metrics, evaluation
        self.started = int(time.time())
        self._health: tuple[float, str | None] = (0.0, None)

    @property
    def drift(self) -> Drift | None:
        """The test of served scores against the stored ones."""
        return self.metrics.drift

    async def decide(self, asked: Asked) -> Decision:
        """What the guard and the operating point say. A failed reading is a `problem`, not an exception.

        Raises:
            InputError: the request cannot be asked. Forbidden: it names an operating point it may not name.
        """
        ask, pick = asked.ask, self.dial.pick(asked.request_id, asked.override)
        said: Mapping[str, Any] | None = None
        try:
            guard: Callable[[Ask], Awaitable[Mapping[str, Any] | None]] | None
            if (guard := getattr(self.upstream, "guard", None)) is not None:
                said = await _by(asked.deadline, guard(ask))
            score = (
                await _by(asked.deadline, self.upstream.read(ask, pick.T)) if self.upstream.names else None
            )
        except UpstreamError as e:
            self.metrics.failed("upstream")
            decision = self.dial.undecided(pick, str(e))
        else:
            decision = self.dial.decide(ask, score, pick=pick)
        decision = replace(decision, guard=said)
        self.metrics.decided(decision)
        return decision

    def refuses(self, decision: Decision) -> str | None:
        """The category of the operator's own words, where they stand in for the model's answer, else None."""
        if decision.guard is not None and decision.guard.get("stopped"):
            return "safety"
        if decision.problem is not None and self.settings.on_error == "closed":
            return "error"
        if self.settings.mode == "gate" and decision.category not in (None, RESPOND):
            return decision.category
        return None

    async def answer(self, asked: Asked, decision: Decision) -> AsyncGenerator[Piece]:
        """The pieces of an answer; the last one has `finish`. Closing the iterator frees the engine.

        A piece with `stop` holds the operator's text, which replaces what was written before it.

        Raises:
            InputError: no room for an answer. UpstreamError: the engine failed or the time is over.
        """
        if (category := self.refuses(decision)) is not None:
            yield Piece(text=self.settings.refusal_text(category), finish="content_filter")
            return
        forced, bare = (decision.category, decision.bare) if self.settings.mode == "token" else (None, False)
        pieces: Any = self.upstream.answer(asked.ask, forced, bare=bare)
        async with aclosing(pieces):
            while True:
                piece: Piece | None = await _by(asked.deadline, anext(pieces, None))
                if piece is None:
                    raise UpstreamError("the answer ended without a reason")
                if piece.stop is not None:
                    piece = replace(piece, text=self.settings.refusal_text("safety"), finish="content_filter")
                yield piece
                if piece.finish is not None:
                    return

    def note(self, asked: Asked, decision: Decision, written: Written, seconds: float) -> None:
        """Count a finished answer; write its texts where the operator wants them."""
        assert written.last is not None
        self.metrics.answered(seconds, replace(written.last, control_token=written.control_token))
        _log().info(
            "%s %s decision=%s enforced=%s point=%s finish=%s tokens=%s+%s %.3fs",
            asked.request_id,
            asked.ask.prompt.id,
            decision.category,
            decision.enforced,
            decision.point,
            written.last.finish,
            written.last.prompt_tokens,
            written.last.completion_tokens,
            seconds,
        )
        if self.settings.texts is not None:
            _append(self.settings.texts, _texts(asked, decision, written, seconds))

    async def health(self) -> dict[str, Any]:
        """What /health says; `status` is "ok", "degraded" (answers, with something to look at) or "down"."""
        now = time.monotonic()
        if now - self._health[0] > HEALTH_KEPT:
            self._health = (now, await self.upstream.problem())
        down = self._health[1]
        points = {
            role: {"id": file.point.id, "problem": file.problem}
            for role, file in (("main", self.dial.main), ("canary", self.dial.canary))
            if file is not None
        }
        alarm = self.drift is not None and self.drift.alarm
        worse = alarm or any(p["problem"] for p in points.values())
        return {
            "status": "down" if down else "degraded" if worse else "ok",
            "upstream": down,
            "operating_points": points,
            "drift_alarm": alarm,
        }

    def about(self) -> dict[str, Any]:
        """What /demur/about says: the dial, what is promised, and what this server cannot do."""
        settings, main = self.settings, self.dial.main
        point = main.point if main is not None else None
        return {
            "model": self.upstream.name,
            "categories": list(self.upstream.names),
            "mode": settings.mode,
            "on_error": settings.on_error,
            "operating_point": None
            if point is None
            else {
                "id": point.id,
                "rule": point.rule,
                "goal": point.goal,
                "guarantee": point.guarantee,
                "calibrated_on": point.calibrated_on,
                "thresholds": {c: {"tau": t.tau, "mode": t.mode} for c, t in point.thresholds.items()},
            },
            "canary": None if settings.canary is None else settings.canary.share,
            "overrides": list(settings.overrides),
            "losses": list(self.upstream.losses),
            "passed_on": sorted(getattr(self.upstream, "passes", ())),
            "cautions": settings.cautions(self.upstream.names),
        }


async def _by(deadline: float, work: Awaitable[Result]) -> Result:
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
            return await work
    except TimeoutError:
        raise UpstreamError("the engine took longer than this server waits (limits.timeout_s)") from None


def _texts(asked: Asked, decision: Decision, written: Written, seconds: float) -> dict[str, Any]:
    return {
        "time": round(time.time(), 3),
        "request": asked.request_id,
        "messages": [{"role": m.role, "content": m.content} for m in asked.ask.prompt.messages],
        "answer": written.text,
        "finish": written.last.finish if written.last is not None else None,
        "decision": decision.category,
        "enforced": decision.enforced,
        "p_refuse": decision.score.p_refuse if decision.score is not None else None,
        "operating_point": decision.point,
        "seconds": round(seconds, 3),
    }


def writable(path: Path) -> None:
    """Raise `InputError` unless lines can be written to a file that only its owner may read."""
    try:
        _opened(path).close()
    except OSError as e:
        raise InputError(f"texts {path}: {e.strerror}; name a file that can be written") from None


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """One line at the end; a full disk costs the line, not the answer."""
    try:
        with _opened(path) as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as e:
        _log().error("texts could not be written: %s", e.strerror)


def _opened(path: Path) -> TextIO:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    return os.fdopen(fd, "a", encoding="utf-8")


def _log() -> logging.Logger:
    return logging.getLogger("demur.serve")
