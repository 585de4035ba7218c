"""The thread that owns the model: what waits, in which order it is done, and what happens when a pass fails."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from demur.control.any_depth import AnyDepth
from demur.control.latent_guard import LatentGuard
from demur.errors import DemurError, InputError, UpstreamError
from demur.runtime.lanes import Lanes
from demur.runtime.local import LocalRuntime
from demur.serve.base import Piece, Stop
from demur.serve.textstream import TextStream
from demur.types import Condition, Prompt

TURN = 512
"""Prompt tokens that are read, or that join, between two steps while answers are being written."""
AT_ONCE = 64
"""Calls that are taken up at once while nothing is being written."""


@dataclass(slots=True, eq=False)
class Job:
    """One call. Results go back to the event loop that asked; `gone` once nobody waits for them."""

    prompt: Prompt
    ids: list[int]
    loop: asyncio.AbstractEventLoop
    gone: bool = False
    at: float = field(default_factory=time.monotonic)

    def tell(self, what: Callable[..., Any], *args: Any) -> None:
        """Call back on the loop."""
        try:
            self.loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the loop has been closed
            self.gone = True

    def failed(self, error: Exception) -> None:
        """Tell why there is no result."""
        raise NotImplementedError


@dataclass(slots=True, eq=False, kw_only=True)
class Read(Job):
    """A score at softmax temperature `T`, or the guard's belief where T is None."""

    T: float | None
    future: asyncio.Future[Any]

    def settle(self, result: Any) -> None:
        """Hand over the result."""
        self.tell(_settle, self.future, result)

    def failed(self, error: Exception) -> None:
        """Hand over the error."""
        self.tell(_settle, self.future, error)


@dataclass(slots=True, eq=False, kw_only=True)
class Answer(Job):
    """An answer under way. `forced` is the category whose control token stands in front, if any.

    `bare`: the base writes it, without that token.
    """

    condition: Condition
    forced: str | None
    bare: bool = False
    text: TextStream
    pieces: asyncio.Queue[Piece | Exception]
    opened: str | None = None
    written: int = 0

    def put(self, piece: Piece | Exception) -> None:
        """Hand over a piece."""
        self.tell(self.pieces.put_nowait, piece)

    def failed(self, error: Exception) -> None:
        """Hand over the error; it ends the answer."""
        self.put(error)


AnyJob = TypeVar("AnyJob", bound=Job)


class Worker:
    """One thread and its queues; see `demur.serve.local.LocalUpstream` for the arguments.

    Each turn reads some, lets some join and writes one token in every row. A pass that fails fails the calls that
    were in it, and nothing else.
    """

    def __init__(
        self,
        runtime: LocalRuntime,
        answers: LocalRuntime,
        guard: LatentGuard | None,
        any_depth: AnyDepth | None,
        max_rows: int,
        max_wait: float,
        max_waiting: int,
    ) -> None:
        self.runtime, self.answers, self.guard, self.any_depth = runtime, answers, guard, any_depth
        self.max_rows, self.max_wait, self.max_waiting = max_rows, max_wait, max_waiting
        self.reads: deque[Read] = deque()
        self.waiting: deque[Answer] = deque()
        self.live: dict[tuple[bool, int], Answer] = {}
        """By whether the base writes it, and its row there."""
        self._empty()
        self.closing = False
        self.trouble: tuple[float, str] | None = None
        """When a pass failed and why; None once one has succeeded."""
        self.pass_began: float | None = None
        self._control = {i: c for c, i in (answers.control.ids if answers.control else {}).items()}
        self._news = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="demur-model", daemon=True)
        self.thread.start()

    def submit(self, job: Read | Answer) -> None:
        """Queue a call.

        Raises:
            UpstreamError: too many wait already, or the worker is closing.
        """
        with self._news:
            if self.closing:
                raise UpstreamError("the server is shutting down")
            if len(self.reads) + len(self.waiting) >= self.max_waiting:
                raise UpstreamError(f"{self.max_waiting} calls wait for the model already")
            queue: deque[Any] = self.reads if isinstance(job, Read) else self.waiting
            queue.append(job)
            self._news.notify()

    def drop(self, job: Job) -> None:
        """Nobody waits for this call any more."""
        job.gone = True
        with self._news:
            self._news.notify()

    def close(self) -> None:
        """End the thread after the pass it is in; every open call fails. Blocks."""
        with self._news:
            self.closing = True
            self._news.notify()
        self.thread.join()

    # --- the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            if reads := self._taken(self.reads, AT_ONCE):
                self._try(self._read, reads)
            if self.live:
                self._try(self._step, list(self.live.values()))
            if joining := self._taken(self.waiting, self.max_rows - len(self.live)):
                self._try(self._join, joining)
        for job in (*self.reads, *self.waiting, *self.live.values()):
            job.failed(UpstreamError("the server is shutting down"))
        self.reads.clear()
        self.waiting.clear()
        self._empty()

    def _wait(self) -> bool:
        """Sleep until there is something to do; a first read waits for company. False when closing."""
        with self._news:
            while not self.closing:
                if self.live or self.waiting:
                    return True
                left = self.reads[0].at + self.max_wait - time.monotonic() if self.reads else None
                if left is not None and (left <= 0 or len(self.reads) >= self.max_rows):
                    return True
                self._news.wait(left)
            return False

    def _taken(self, queue: deque[AnyJob], most: int) -> list[AnyJob]:
        """The next calls in order, fewer while answers are being written, so that those go on."""
        taken: list[AnyJob] = []
        with self._news:
            tokens = 0
            while queue and len(taken) < most:
                tokens += len(queue[0].ids)
                if self.live and taken and tokens > TURN:
                    break
                job = queue.popleft()
                if not job.gone:
                    taken.append(job)
        return taken

    def _empty(self) -> None:
        self.live.clear()
        self.lanes = Lanes(self.answers)
        self.bare = Lanes(self.answers.base) if self.answers.base is not None else None

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return self.lanes.bytes + (self.bare.bytes if self.bare is not None else 0)

    def _try(self, work: Callable[[list[Any]], None], jobs: list[Any]) -> None:
        """Do one pass; an error fails these calls (one by one, where one may be to blame) and is kept."""
        self.pass_began = time.monotonic()
        try:
            work(jobs)
            self.trouble = None
        except InputError as e:
            self._failed(work, jobs, e)
        except Exception as e:  # torch and hooks raise anything, and the thread has to go on
            logging.getLogger("demur.serve").exception("a pass over %d calls failed", len(jobs))
            why = f"a pass of the model failed: {type(e).__name__}: {e}"
            self.trouble = (time.monotonic(), why)
            self._failed(work, jobs, UpstreamError(why))
        finally:
            self.pass_began = None

    def _failed(self, work: Callable[[list[Any]], None], jobs: list[Any], error: DemurError) -> None:
        if len(jobs) > 1 and work != self._step:
            for job in jobs:
                self._try(work, [job])
            return
        for job in jobs:
            job.failed(error)
        if work == self._step:
            self._empty()

    def _read(self, jobs: list[Read]) -> None:
        for T in dict.fromkeys(job.T for job in jobs):
            same = [job for job in jobs if job.T == T]
            results: Sequence[Any]
            if T is None:
                assert self.guard is not None
                beliefs = self.guard.beliefs.score(self.runtime, [job.prompt for job in same])
                results = [belief.harmful for belief in beliefs]
            else:
                results = self.runtime.score_rows([(j.prompt, j.ids) for j in same], Condition(), T)
            for job, result in zip(same, results, strict=True):
                job.settle(result)

    def _join(self, jobs: list[Answer]) -> None:
        for lanes, bare in ((self.lanes, False), (self.bare, True)):
            rows, part = [], [job for job in jobs if job.bare is bare]
            for job in part:
                ids = job.ids
                if job.forced is not None and not bare and self.answers.control is not None:
                    ids = [*ids, self.answers.control.ids[job.forced]]
                rows.append((ids, job.condition, job.forced is not None))
            if lanes is not None and rows:
                keys = [(bare, key) for key in lanes.join_all(rows)]
                self.live.update(zip(keys, part, strict=True))

    def _step(self, _jobs: list[Answer]) -> None:
        """One token in every row, once the rows that nobody reads any more are free."""
        for lanes, bare in ((self.lanes, False), (self.bare, True)):
            if lanes is not None:
                self._step_in(lanes, {key: job for (at, key), job in self.live.items() if at is bare}, bare)

    def _step_in(self, lanes: Lanes, live: dict[int, Answer], bare: bool) -> None:
        def leave(keys: list[int]) -> None:
            lanes.leave(*keys)
            for key in keys:
                del self.live[bare, key], live[key]

        leave([key for key, job in live.items() if job.gone])
        tokens = lanes.step()
        for key in tokens:
            live[key].written += 1
        going = [
            key
            for key, token in tokens.items()
            if token not in lanes.ends and live[key].written < live[key].condition.max_new_tokens
        ]
        stops = self._checked(lanes, live, going)
        pieces = [
            (key, live[key], self._piece(lanes, live[key], token, key not in going, stops.get(key)))
            for key, token in tokens.items()
        ]
        leave([key for key, _, piece in pieces if piece is not None and piece.finish is not None])
        for _, job, piece in pieces:
            if piece is not None:
                job.put(piece)

    def _checked(self, lanes: Lanes, live: Mapping[int, Answer], keys: list[int]) -> dict[int, Stop]:
        """Answers that a check inside them ends now."""
        if self.any_depth is None or not keys:
            return {}
        written = {key: live[key].written for key in keys}
        found = self.any_depth.checks(lanes, keys, written)
        return {
            key: Stop(by=hit.by, at=hit.at, p=hit.p, threshold=hit.threshold)
            for key, hit in found.items()
            if hit is not None
        }

    def _piece(self, lanes: Lanes, job: Answer, token: int, last: bool, stop: Stop | None) -> Piece | None:
        """What one more token adds to an answer; None when there is nothing to show yet."""
        first, content, reasoning = job.written == 1, "", ""
        if first and job.forced is None and token in self._control:
            job.opened = self._control[token]
        elif token not in lanes.ends and stop is None:
            content, reasoning = job.text.add(token)
        finish: Any = None
        if stop is not None:
            finish = "content_filter"
        elif job.text.stopped:
            finish = "stop"
        elif last:
            finish = "stop" if token in lanes.ends else "length"
            more, thought = job.text.end()
            content, reasoning = content + more, reasoning + thought
        if finish is None:
            if not (first or content or reasoning):
                return None
            return Piece(text=content, reasoning=reasoning, control_token=job.opened)
        return Piece(
            text=content,
            reasoning=reasoning,
            finish=finish,
            control_token=job.opened,
            prompt_tokens=len(job.ids),
            completion_tokens=job.written + (job.forced is not None),
            stop=stop,
        )


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
