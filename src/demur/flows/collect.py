"""The collecting half of a card: ask what is not in the run folder yet, judge it, write it down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from demur.errors import CapabilityError, MissingExtra, Unscored
from demur.files import dumps_row, to_row, write_atomic
from demur.flows.runs import WINDOW, Key, RunFolder, stored_row
from demur.flows.settings import public_name
from demur.judges.base import Judge, judge_all
from demur.runtime.base import Decide, Progress, Runtime, ScoreStream
from demur.runtime.batching import windows
from demur.types import Condition, Prompt, PromptSet, Reply, Verdict

SCORE_SECONDS = 0.1
TEXT_SECONDS = 1.0
STATES_SECONDS = 0.06
"""Cost of one prompt on two cores with the 135M default: the unit of the card's time plan, not a promise."""

Tick = Callable[[float], None]
"""Told how many prompts of a stage are done so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One kind of collecting: which prompts, on which runtime, into which streams."""

    name: str
    title: str
    kind: Literal["scores", "texts", "states"]
    runtime: Runtime
    prompts: tuple[Prompt, ...]
    condition: Condition
    streams: tuple[str, ...]
    samples: int = 1
    T: float = 1.0
    decide: Decide | None = None
    read: Callable[[Progress], Mapping[str, Any]] | None = None
    passes: int = 0

    @property
    def seconds(self) -> float:
        """Estimated cost. `passes` counts those of kind "states", whose `read` gives the one row of the stream."""
        if self.kind == "states":
            return STATES_SECONDS * self.passes
        each = SCORE_SECONDS if self.kind == "scores" else TEXT_SECONDS * self.samples
        return each * len(self.prompts)


def collect(
    run: RunFolder,
    stages: Sequence[Stage],
    judge: Judge,
    *,
    keep_unsafe_text: bool = False,
    progress: bool = True,
) -> None:
    """Run all stages, resuming where an earlier process stopped.

    Scores that a model cannot give (a thinking model, an endpoint without log-probabilities) leave a note in
    the run instead of failing the card; a prompt that was blocked or failed is recorded as unscored, and failed
    ones are asked again by the next call. Answers that fail are rows with an error.
    """
    with meter(stages, progress) as start:
        for stage in stages:
            tick = start(stage)
            if stage.kind == "states":
                _states(run, stage, tick)
                continue
            if stage.kind == "scores":
                _scores(run, stage, tick)
            else:
                _texts(run, stage, judge, tick, keep_unsafe_text=keep_unsafe_text)
            run.settle(stage.streams, stage.prompts, samples=stage.samples)


def _scores(run: RunFolder, stage: Stage, tick: Tick) -> None:
    stream = stage.streams[0]
    lost = {i: why for i, why in run.unscored.get(stream, {}).items() if "blocked" in why}
    run.keep_unscored(stream, lost)

    def keep(how: str, found: Mapping[str, str]) -> None:
        if found.keys() - lost.keys():
            lost.update({i: {how: why} for i, why in found.items()})
            run.keep_unscored(stream, lost)

    try:
        for done, window in _open(run, stage, without=lost):
            tick(done)
            progress = _shift(tick, done, 1)
            rows = stage.runtime.score(window, stage.condition, T=stage.T, progress=progress)
            if stage.runtime.deterministic:
                run.commit({stream: [to_row(s) for s in rows]})
                continue
            try:
                for row in rows:  # paid for, so written down one by one
                    run.commit({stream: [to_row(row)]})
                    if isinstance(rows, ScoreStream):
                        keep("blocked", rows.blocked)
            except Unscored as e:
                keep("blocked", e.blocked)
                keep("failed", e.failed)
        run.note(stage.name, None)
    except CapabilityError as e:
        run.note(stage.name, str(e).replace(stage.runtime.name, public_name(stage.runtime.name)))


def _states(run: RunFolder, stage: Stage, tick: Tick) -> None:
    path = run.file(stage.streams[0])
    if path.exists() or stage.read is None:
        return

    def progress(done: int, total: int | None) -> None:
        tick(len(stage.prompts) * done / max(total or done, 1))

    try:
        write_atomic(path, dumps_row(stage.read(progress)) + "\n")
        run.note(stage.name, None)
    except (CapabilityError, MissingExtra) as e:
        run.note(stage.name, str(e).replace(stage.runtime.name, public_name(stage.runtime.name)))


def _texts(run: RunFolder, stage: Stage, judge: Judge, tick: Tick, *, keep_unsafe_text: bool) -> None:
    def commit(prompts: Mapping[str, Prompt], replies: Iterable[Reply]) -> None:
        run.commit(judged(stage.streams, prompts, replies, judge, keep_unsafe_text=keep_unsafe_text))

    k, calls = stage.samples, _calls(run, stage)
    unjudged = run.unjudged(stage.streams)  # of an earlier call: what fails now is for the next one
    done = k * len(stage.prompts) - sum(call.answers for call in calls)
    for call in calls:
        asked = {p.id: p for p in call.prompts}
        replies = call.replies(stage, _shift(tick, done / k, k))
        if stage.runtime.deterministic:
            commit(asked, replies)
        else:
            # One stream of questions keeps a server busy; each answered prompt is written at once.
            for _, some in groupby(replies, key=lambda r: r.prompt_id):
                commit(asked, some)
        done += call.answers
    if unjudged:
        _judge_again(run, stage, judge, unjudged, keep_unsafe_text=keep_unsafe_text)


@dataclass(frozen=True, slots=True)
class _Call:
    """Some prompts, and which of their samples to ask: `samples` of them from number `first` up."""

    prompts: Sequence[Prompt]
    first: int
    samples: int

    @property
    def answers(self) -> int:
        """How many answers it asks for."""
        return len(self.prompts) * self.samples

    def replies(self, stage: Stage, progress: Progress) -> Iterator[Reply]:
        """Ask. Sample i alone is the first sample at seed + i, at an endpoint the very same request."""
        condition = replace(stage.condition, seed=stage.condition.seed + self.first)
        replies = stage.runtime.generate(
            self.prompts, condition, samples=self.samples, decide=stage.decide, progress=progress
        )
        return (replace(r, sample=r.sample + self.first) for r in replies)


def _calls(run: RunFolder, stage: Stage) -> list[_Call]:
    """What is left to ask: whole windows, or of remote runtimes whole prompts and lone samples."""
    k = stage.samples
    if stage.runtime.deterministic:
        return [_Call(w, 0, k) for w in run.open_windows(stage.streams, stage.prompts, samples=k)]
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for prompt, jobs in groupby(run.open_samples(stage.streams, stage.prompts, samples=k), lambda j: j[0]):
        missing = [sample for _, sample in jobs]
        for part in [(0, k)] if len(missing) == k else [(sample, 1) for sample in missing]:
            groups.setdefault(part, []).append(prompt)
    return [_Call(prompts, first, n) for (first, n), prompts in groups.items()]


def _judge_again(
    run: RunFolder, stage: Stage, judge: Judge, unjudged: Mapping[Key, bool], *, keep_unsafe_text: bool
) -> None:
    """Judge answers that an earlier call left without a verdict. `settle` puts the new rows in place."""
    if stage.runtime.deterministic and (lost := sum(not kept for kept in unjudged.values())):
        logging.getLogger("demur").warning(
            "%d answers whose judge failed stay without a verdict: their text may answer what should be refused "
            "and was not kept. --fresh asks for all answers again",
            lost,
        )
    keys = {key for key, kept in unjudged.items() if kept}
    by_id = {p.id: p for p in stage.prompts}
    run.settle(stage.streams[:1], stage.prompts, samples=stage.samples)  # one row an answer
    for replies in windows(run.texts(stage.streams[0], keys), WINDOW):
        rows = judged(stage.streams, by_id, replies, judge, keep_unsafe_text=keep_unsafe_text)
        # the verdict may say that the text must go; a reply that stays is not written twice
        rows[stage.streams[0]] = [row for row in rows[stage.streams[0]] if "withheld" in row]
        run.commit({name: some for name, some in rows.items() if some})


class Given:
    """A judge that looks up verdicts that are there already."""

    id = "given"
    definition = "verdicts that came with the answers"

    def __init__(self, verdicts: Iterable[Verdict]) -> None:
        self._verdicts = {(v.prompt_id, v.sample): v for v in verdicts}

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
        """The verdict of one reply."""
        return self._verdicts[prompt.id, reply.sample]


def judged(
    streams: tuple[str, ...],
    prompts: Mapping[str, Prompt],
    replies: Iterable[Reply],
    judge: Judge,
    *,
    keep_unsafe_text: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Rows for the reply and verdict streams; a reason may quote the answer, so it goes where that goes."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in streams}
    pairs = [(prompts[reply.prompt_id], reply) for reply in replies]
    for (prompt, reply), verdict in zip(pairs, judge_all(judge, pairs), strict=True):
        row = stored_row(prompt, reply, verdict, keep_unsafe_text=keep_unsafe_text)
        rows[streams[0]].append(row)
        rows[streams[1]].append(to_row(replace(verdict, reason=None) if "withheld" in row else verdict))
    return rows


def _open(run: RunFolder, stage: Stage, without: Collection[str]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    """The scores left, with the number done before; ids in `without` are not asked a remote runtime."""
    if stage.runtime.deterministic:
        parts: Sequence[Sequence[Prompt]] = run.open_windows(stage.streams, stage.prompts)
    else:
        left = (p for p, _ in run.open_samples(stage.streams, stage.prompts) if p.id not in without)
        parts = list(windows(left, 4 * WINDOW))
    done = len(stage.prompts) - sum(len(part) for part in parts)
    for part in parts:
        yield done, part
        done += len(part)


def _shift(tick: Tick, before: float, samples: int) -> Progress:
    def progress(done: int, total: int | None) -> None:  # noqa: ARG001
        tick(before + done / samples)

    return progress


@contextmanager
def meter(stages: Sequence[Stage], show: bool) -> Iterator[Callable[[Stage], Tick]]:
    """A progress bar on stderr over all stages, weighted by their cost, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    total = sum(s.seconds for s in stages)
    with Bar(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task("starting", total=total)

        def start(stage: Stage) -> Tick:
            count = len(stage.prompts)
            if show and not console.is_terminal:
                console.print(f"{stage.title}: {count} prompts", highlight=False, markup=False)
            before = sum(s.seconds for s in stages[: stages.index(stage)])
            bar.update(task, description=stage.title, completed=before)

            def tick(done: float) -> None:
                bar.update(task, completed=before + stage.seconds * min(1.0, done / max(count, 1)))

            return tick

        yield start


def sources(stages: Sequence[Stage]) -> Mapping[str, Any]:
    """What the stages are, for run.json: prompts by hash, so that another sample is another run."""
    return {
        s.name: {
            "kind": s.kind,
            "n": len(s.prompts),
            "samples": s.samples,
            "prompts": PromptSet(s.name, s.prompts).hash,
            "condition": to_row(s.condition),
        }
        for s in stages
    }
