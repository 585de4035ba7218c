"""The embedded model behind the gateway: simple dynamic batching in one worker thread, and no more.

Reads that arrive together are scored together; answers are rows of `demur.runtime.lanes.Lanes` that join between
steps and leave when they end or when their reader has gone. First come, first served: an answer waits until one
of `max_rows` rows is free and then gets a token at every step, however long its neighbours are. Reads need no row
and are never behind answers. Whoever needs paging or preemption puts the gateway before an engine that has them.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from demur.control.any_depth import AnyDepth
from demur.control.latent_guard import LatentGuard
from demur.errors import CapabilityError, InputError, UpstreamError
from demur.runtime.chat import ChatFormat
from demur.runtime.layers import text_config
from demur.runtime.local import LocalRuntime
from demur.serve.base import Ask, Piece
from demur.serve.textstream import TextStream
from demur.serve.worker import Answer, Read, Worker
from demur.types import Score

LOSSES = (
    "Tools are not offered to the model; tool messages of an earlier conversation are read.",
    "Answers are text: no response formats, no grammars, no images, no audio.",
    "One answer for each request (n = 1), without log-probabilities of its tokens.",
    "Penalties, top_k and logit_bias are not applied; temperature, top_p and seed are.",
)
STUCK_S = 120.0
"""Seconds in one pass after which the health route says so."""
TROUBLE_S = 30.0
"""Seconds for which the health route reports a failed pass."""


class LocalUpstream:
    """A local runtime as an engine of the gateway.

    Args:
        runtime: scores prompts and, unless `answers` is given, writes answers.
        answers: the runtime that writes instead, on the same weights: `base_view(runtime)` for mode "gate".
        guard: read by `guard`, before the model answers. any_depth: checks inside answers.
        max_rows: answers that are written side by side; more wait. max_wait_ms: how long a first read waits for
            others. max_waiting: calls that may wait for the worker; more are refused.

    Raises:
        CapabilityError: the model thinks before it answers, or its rows cannot come and go.
        MismatchError: a guard or a probe of another model.

    >>> upstream = LocalUpstream(load_runtime())  # doctest: +SKIP
    >>> score = await upstream.read(ask)  # doctest: +SKIP
    """

    losses = LOSSES

    def __init__(
        self,
        runtime: LocalRuntime,
        *,
        answers: LocalRuntime | None = None,
        guard: LatentGuard | None = None,
        any_depth: AnyDepth | None = None,
        max_rows: int = 8,
        max_wait_ms: float = 5.0,
        max_waiting: int = 256,
    ) -> None:
        if runtime.control is not None:
            runtime.chat.require_decision()
        if guard is not None:
            guard.beliefs.check(runtime)
        if any_depth is not None:
            any_depth.check.fits(answers or runtime)
        self.runtime, self.answers = runtime, answers or runtime
        self.name, self.fingerprint, self.dtype = runtime.name, runtime.fingerprint, runtime.dtype
        self.names: tuple[str, ...] = runtime.control.names if runtime.control else ()
        self.has_base = runtime.base is not None
        self._latent_guard = guard
        # a fast tokenizer is not for two threads at once: rendering has its own, the worker keeps the runtime's
        self._chats = {id(r): _own_chat(r) for r in (self.runtime, self.answers)}
        self._pen = ThreadPoolExecutor(1, thread_name_prefix="demur-render")
        self.worker = Worker(
            runtime, self.answers, guard, any_depth, max_rows, max_wait_ms / 1000, max_waiting
        )

    async def read(self, ask: Ask, T: float = 1.0) -> Score:
        """First-position probabilities; see `demur.serve.base.Upstream.read`."""
        try:
            self.runtime.chat.require_decision()
        except CapabilityError as e:
            raise UpstreamError(str(e)) from None
        if not T > 0:
            raise InputError(f"T={T}: the softmax temperature must be positive")
        score: Score = await self._asked(ask, T)
        return score

    async def guard(self, ask: Ask) -> Mapping[str, Any] | None:
        """What the input guard says: {"name", "p", "threshold", "stopped"}; None without a guard.

        Raises:
            InputError, UpstreamError: as `read`.
        """
        if self._latent_guard is None:
            return None
        belief: float = await self._asked(ask, None)
        at = self._latent_guard.at
        name = f"latent-guard-{self._latent_guard.id}"
        return {"name": name, "p": belief, "threshold": at, "stopped": belief >= at}

    async def answer(self, ask: Ask, category: str | None, *, bare: bool = False) -> AsyncIterator[Piece]:
        """Write the answer; see `demur.serve.base.Upstream.answer`. It ends at the latest where the context does.

        Checks inside answers read the model that writes, so with them the adapter answers although `bare`.

        Raises:
            InputError: no room for an answer, a category the model does not have. UpstreamError: a failed pass.
        """
        runtime, control = self.answers, self.answers.control
        if category is not None and control is not None and category not in control.ids:
            raise InputError(f"category {category!r}: {runtime.name!r} has {', '.join(control.names)}")
        forced = category if control is not None else None
        ids = await self._rendered(runtime, ask)
        job = Answer(
            prompt=ask.prompt,
            ids=ids,
            loop=asyncio.get_running_loop(),
            condition=replace(ask.condition, max_new_tokens=_room(runtime, ask, ids)),
            forced=forced,
            bare=bare and self.worker.bare is not None and self.worker.any_depth is None,
            text=TextStream(runtime.chat, ask.stop),
            pieces=asyncio.Queue(),
            opened=forced,
        )
        self.worker.submit(job)
        try:
            while True:
                piece = await job.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self.worker.drop(job)

    async def problem(self) -> str | None:
        """Why the model cannot answer now, or None."""
        worker = self.worker
        if worker.closing:
            return "shutting down"
        if not worker.thread.is_alive():
            return "the worker thread has ended"
        began = worker.pass_began
        if began is not None and time.monotonic() - began > STUCK_S:
            return f"the model has been in one pass for {time.monotonic() - began:.0f} s"
        # a failure long ago says nothing: were health red until the next success, a balancer would send none
        recent = worker.trouble is not None and time.monotonic() - worker.trouble[0] < TROUBLE_S
        return worker.trouble[1] if recent and worker.trouble is not None else None

    async def close(self) -> None:
        """Stop the worker after the pass it is in; answers under way fail."""
        await asyncio.to_thread(self.worker.close)
        self._pen.shutdown(wait=False)

    @property
    def busy(self) -> Mapping[str, int]:
        """Rows being written, answers and reads that wait, bytes of keys and values held."""
        worker = self.worker
        return {
            "rows": len(worker.live),
            "waiting": len(worker.waiting),
            "reads": len(worker.reads),
            "bytes": worker.bytes,
        }

    async def _asked(self, ask: Ask, T: float | None) -> Any:
        ids = await self._rendered(self.runtime, ask)
        _room(self.runtime, ask, ids)
        loop = asyncio.get_running_loop()
        prompt = ask.prompt.with_system(ask.condition.system)
        job = Read(prompt=prompt, ids=ids, loop=loop, T=T, future=loop.create_future())
        self.worker.submit(job)
        try:
            return await job.future
        finally:
            self.worker.drop(job)

    async def _rendered(self, runtime: LocalRuntime, ask: Ask) -> list[int]:
        if self.worker.closing:
            raise UpstreamError("the server is shutting down")
        prompt = ask.prompt.with_system(ask.condition.system)
        render = self._chats[id(runtime)].render
        return (await asyncio.get_running_loop().run_in_executor(self._pen, render, prompt)).ids


def base_view(runtime: LocalRuntime) -> LocalRuntime:
    """The untouched base model under an adapter's runtime: the same weights and lock, no edits, no control tokens.

    >>> base_view(load_runtime("demur-smollm2")).control is None  # doctest: +SKIP
    True
    """
    view = copy.copy(runtime)
    view.edits, view.control, view.notes, view.shipped_point, view.base = (), None, [], None, None
    view.name, view.fingerprint = f"{runtime.name} (base)", (runtime.fingerprint or "").split("+")[0] or None
    view.chat = _own_chat(runtime, ())
    return view


def _own_chat(runtime: LocalRuntime, control_ids: Any = None) -> ChatFormat:
    """The runtime's chat format over a tokenizer of its own."""
    chat = runtime.chat
    return ChatFormat(
        copy.deepcopy(runtime.tokenizer),
        template=chat.template,
        thinking=chat.thinking,
        control_ids=chat.control_ids if control_ids is None else control_ids,
    )


def _room(runtime: LocalRuntime, ask: Ask, ids: list[int]) -> int:
    """New tokens that the answer may have: what was asked for, or what the context leaves."""
    runtime.check_fits(ask.prompt, ids, 2)
    limit = getattr(text_config(runtime.model), "max_position_embeddings", None)
    asked = ask.condition.max_new_tokens
    return min(asked, limit - len(ids) - 1) if limit else asked
