"""Checks while an answer is written: when they come due, what they say, and a runtime that stops answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from demur.control.any_depth.mass import RefuseMass
from demur.control.any_depth.probe import HeaderProbe
from demur.control.any_depth.rethink import ROWS, Rethink
from demur.errors import CapabilityError, InputError
from demur.runtime.base import Decide, Progress, Runtime
from demur.runtime.batching import windows
from demur.runtime.wrapped import WrappedRuntime
from demur.types import Condition, Prompt, Reply

if TYPE_CHECKING:
    from demur.runtime.lanes import Asked, Lanes
    from demur.runtime.local import LocalRuntime

Schedule = int | Literal["adaptive"] | tuple[int, ...]
REFUSAL = "I can't help with that."


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """A check that stops an answer: which one, after how many tokens, and what it said."""

    by: str
    at: int
    p: float
    threshold: float

    def __str__(self) -> str:
        return f"{self.by}: {self.p:.4f} >= {self.threshold:.4f} at token {self.at}"


@dataclass(frozen=True, slots=True)
class Watched:
    """A reply with what the checks said: {tokens written: p}, and the one that stopped it."""

    reply: Reply
    p: Mapping[int, float]
    halt: Halt | None = None


@dataclass(frozen=True, slots=True)
class AnyDepth:
    """Checks an answer at some depths and replaces it by a refusal when a check says so.

    Each check runs the assistant header behind what has been written, on the side: an answer that is not stopped
    is the same as without checks.

    Args:
        check: a fitted `HeaderProbe`, `RefuseMass`, or `Rethink`.
        every: tokens between checks; "adaptive" is every 25 up to 100, then every 100; or a tuple of depths.
        refusal: what stands in place of a stopped answer.

    >>> with AnyDepth(probe, every=32).on(runtime) as checked:  # doctest: +SKIP
    ...     reply = next(checked.generate([prompt]))
    >>> reply.finish_reason, reply.finish_reason_raw  # doctest: +SKIP
    ('content_filter', 'any-depth-probe: 0.9312 >= 0.7105 at token 64')
    """

    check: HeaderProbe | Rethink | RefuseMass
    every: Schedule = 32
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        steps = [self.every] if isinstance(self.every, int) else self.every
        fine = steps == "adaptive" or (
            not isinstance(steps, str) and len(steps) > 0 and all(type(d) is int and d > 0 for d in steps)
        )
        if not fine:
            raise InputError(
                f"every={self.every!r}: a number of tokens, 'adaptive', or a tuple of depths above 0"
            )

    def due(self, written: int) -> bool:
        """Whether a check belongs behind so many tokens of an answer.

        >>> [d for d in range(1, 401) if AnyDepth(Rethink(), "adaptive").due(d)]
        [25, 50, 75, 100, 200, 300, 400]
        """
        if isinstance(self.every, tuple):
            return written in self.every
        if self.every == "adaptive":
            return written > 0 and written % (25 if written <= 100 else 100) == 0
        return written > 0 and written % self.every == 0

    def reads(self, lanes: Lanes, keys: Sequence[int]) -> dict[int, float]:
        """What the check says of rows under way, whether it is due or not: {key: p}."""
        return dict(zip(keys, self.check.read(lanes, keys), strict=True)) if keys else {}

    def checks(self, lanes: Lanes, keys: Sequence[int], written: Mapping[int, int]) -> dict[int, Halt | None]:
        """Run the check on those of `keys` for which it is due.

        Args:
            lanes: the rows, between two steps. written: tokens of each row's answer so far.

        Returns:
            For every row of `keys` a `Halt` where it must be stopped, else None.
        """
        said = self.reads(lanes, [k for k in keys if self.due(written[k])])
        return {k: self.halt(said[k], written[k]) if k in said else None for k in keys}

    def halt(self, p: float, at: int) -> Halt | None:
        """The stop that p calls for, if any."""
        if p < self.check.threshold:
            return None
        return Halt(by=self.check.name, at=at, p=p, threshold=self.check.threshold)

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """A runtime whose answers are checked; scores and states stay.

        Raises:
            CapabilityError: no local model. MismatchError: a probe of another model or template.
        """
        yield self.checking(runtime)

    def checking(self, runtime: Runtime) -> Runtime:
        """As `on`, without a context: nothing has to be undone."""
        return _Checked(_local(runtime, self), self)

    def watch(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        stop: bool = True,
    ) -> Iterator[Watched]:
        """Answers with what the checks said; with stop=False they are only read (to calibrate on, say)."""
        inner = _local(runtime, self)
        for window in windows(prompts, 4 * ROWS):
            yield from _write(inner, self, window, condition or Condition(), samples, decide, stop)


def _local(runtime: Runtime, method: AnyDepth) -> LocalRuntime:
    from demur.runtime.local import LocalRuntime

    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(
            f"{runtime.name!r} is no local model: checks inside an answer need its cache. Put them on the local "
            "model first, and a guard or an operating point in front of the result"
        )
    method.check.fits(runtime)
    return runtime


class _Checked(WrappedRuntime):
    """The runtime behind its checks."""

    def __init__(self, inner: LocalRuntime, method: AnyDepth) -> None:
        super().__init__(inner, name=f"{inner.name}+{method.check.name}")
        self.method = method
        self.capabilities = inner.capabilities - {"intervene"}

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers; a stopped one is the stock refusal, with `finish_reason` "content_filter".

        `finish_reason_raw` then says which check stopped it, with what probability, and after how many tokens.
        """
        total = len(prompts) if isinstance(prompts, Sequence) else None
        found = self.method.watch(self.inner, prompts, condition, samples=samples, decide=decide)
        for n, watched in enumerate(found, 1):
            yield watched.reply
            if progress is not None and n % samples == 0:
                progress(n // samples, total)


@dataclass(slots=True)
class _Row:
    """One answer under way; `begun` by text of the caller's."""

    begun: bool = False
    ids: list[int] = field(default_factory=list)
    p: dict[int, float] = field(default_factory=dict)
    halt: Halt | None = None


def _write(
    runtime: LocalRuntime,
    method: AnyDepth,
    prompts: Sequence[Prompt],
    condition: Condition,
    samples: int,
    decide: Decide | None,
    stop: bool,
) -> Iterator[Watched]:
    """Replies to one window of prompts, in input order."""
    from demur.runtime import decode

    if decide is not None and runtime.control is None:
        raise InputError(f"{runtime.name!r} has no control tokens, so a decision rule has nothing to force")
    if samples < 1:
        raise InputError(f"samples={samples}: at least one answer per prompt")
    jobs = decode.decided(
        runtime, [decode.prepare(runtime, p, condition) for p in prompts], condition, decide
    )
    draws = 1 if condition.temperature == 0 else samples
    asked: list[tuple[Asked, _Row]] = []
    for job in jobs:
        begun = job.error is None and job.begun is not None
        for sample in range(draws if job.error is None else 0):
            seed = decode.seed_of(condition.seed, job.prompt.id, sample)
            own = dataclasses.replace(condition, seed=seed)
            ids = decode.with_control(runtime, job)
            asked.append(((ids, own, begun or job.forced is not None), _Row(begun)))
    for k in range(0, len(asked), ROWS):
        _side_by_side(runtime, method, asked[k : k + ROWS], stop)
    rows = (row for _, row in asked)
    ends = decode.end_ids(runtime)
    for job in jobs:
        mine = [next(rows) for _ in range(draws)] if job.error is None else [_Row()]
        for sample in range(samples):
            row = mine[sample % len(mine)]
            reply = decode.reply_of(runtime, job, condition, sample, row.ids, ends)
            if row.halt is not None:
                reply = dataclasses.replace(
                    reply,
                    content=method.refusal,
                    reasoning=None,
                    finish_reason="content_filter",
                    finish_reason_raw=str(row.halt),
                )
            yield Watched(reply, row.p, row.halt)


def _side_by_side(
    runtime: LocalRuntime, method: AnyDepth, asked: Sequence[tuple[Asked, _Row]], stop: bool
) -> None:
    """Write some answers together. One that the caller began is checked before its first token, too."""
    from demur.runtime.lanes import Lanes

    lanes = Lanes(runtime)
    keys = lanes.join_all([row for row, _ in asked])
    rows = {key: row for key, (_, row) in zip(keys, asked, strict=True)}
    most = {key: row[1].max_new_tokens for key, (row, _) in zip(keys, asked, strict=True)}
    while True:
        due = [k for k in lanes.keys if method.due(n := len(rows[k].ids)) or (rows[k].begun and n == 0)]
        for key, p in method.reads(lanes, due).items():
            row = rows[key]
            row.p[len(row.ids)] = p
            if stop and (halt := method.halt(p, len(row.ids))):
                row.halt = halt
                lanes.leave(key)
        if not len(lanes):
            return
        for key, token in lanes.step().items():
            rows[key].ids.append(token)
            if token in lanes.ends or len(rows[key].ids) == most[key]:
                lanes.leave(key)
