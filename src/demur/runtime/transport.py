"""Many HTTP requests at once behind a plain iterator: event loop, bounded window, obedient waits."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
from tenacity import RetryCallState, wait_random_exponential

LONGEST_WAIT = 120.0
"""Seconds; a longer Retry-After is cut to this."""

In = TypeVar("In")
Out = TypeVar("Out")


class TransientError(Exception):
    """Worth another try; `retry_after` is what the server asked for, in seconds."""

    def __init__(self, message: str, *, retry_after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.unreachable = retry_after, unreachable


def ordered(
    ask: Callable[[httpx.AsyncClient, In], Coroutine[Any, Any, Out]],
    jobs: Iterable[In],
    *,
    concurrency: int,
    timeout: float,
    headers: Mapping[str, str],
) -> Generator[Out, None, None]:
    """Run `ask` over jobs, `concurrency` at a time, and yield results in job order as they come.

    Jobs are read at most 4 x concurrency ahead, so neither input nor output piles up behind a slow request.
    Closing the iterator cancels what is in flight.
    """

    async def gated(client: httpx.AsyncClient, job: In) -> Out:
        async with gate:
            return await ask(client, job)

    async def shut(client: httpx.AsyncClient) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await client.aclose()

    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with background_loop() as submit:
        client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        window: deque[Future[Out]] = deque()
        queue = iter(jobs)
        try:
            while True:
                room = 4 * concurrency - len(window)
                window.extend(submit(gated(client, job)) for job in islice(queue, room))
                if not window:
                    return
                yield window.popleft().result()
        finally:
            submit(shut(client)).result()


@contextmanager
def background_loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Future[Any]]]:
    """An event loop in a thread of its own: works in scripts and inside a running loop (notebooks)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="demur-http", daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait(backoff: float) -> Callable[[RetryCallState], float]:
    """Seconds before the next try: the server's Retry-After, else random and growing from `backoff` up."""
    grow = wait_random_exponential(multiplier=backoff, max=LONGEST_WAIT / 2)

    def seconds_to_wait(state: RetryCallState) -> float:
        failed = state.outcome.exception() if state.outcome else None
        if isinstance(failed, TransientError) and failed.retry_after is not None:
            return min(failed.retry_after, LONGEST_WAIT)
        return float(grow(state))

    return seconds_to_wait


def seconds(header: str | None) -> float | None:
    """Retry-After as seconds: a number or an HTTP date; None when absent or unreadable.

    >>> seconds("2.5")
    2.5
    """
    if not header:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


def public(url: str) -> str:
    """The address without user, password, query or fragment.

    >>> public("https://me:secret@host/v1?key=1")
    'https://host/v1'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
