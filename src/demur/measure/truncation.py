"""What is left of refusing when a model's thinking is cut short: the score before the answer, and the answers.

The start of the thinking is kept, up to a boundary of its tokens, and closed with the model's own marks. Behind it
the model answers greedily, and a judge reads whether the answer declines. Each share is compared with the full
thinking, prompt by prompt; harmful and harmless prompts stand apart, for a model that refuses all is no safer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import expit

from demur import judges
from demur.errors import CapabilityError, InputError
from demur.explain.refusal_cliff.text import Encoded, Markup, Thought, cut, encode, states
from demur.explain.refusal_cliff.tracing import CliffProbes, check_model
from demur.judges.base import Judge, judge_all
from demur.measure.paired import compare
from demur.measure.refusal import clustered, declined, judge_error
from demur.runtime import batching
from demur.runtime.base import Progress, Runtime
from demur.runtime.shapes import split_thinking
from demur.stats.paired import paired_interval
from demur.types import Condition, Rate, Reply, Report, Table

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
NEW_TOKENS = 64
GROUPS = {True: "harmful", False: "harmless", None: "unlabelled"}
Share = float | None
"""Of the thinking that is kept, from 0 (closed at once) to 1; None is the header without any marks of thinking."""
Estimate = tuple[float | None, float | None, float | None]
"""A value and its 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One thought, cut.

    Attributes:
        group: of `GROUPS`. cluster: what moves together (rows of one prompt). kept: tokens of the thinking.
        score: probability of refusing that the probe reads at the last token before the answer.
        refused: whether the answer declines; None where it could not be read.
    """

    id: str
    group: str
    cluster: str
    share: Share
    kept: int
    score: float
    refused: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One point of the curve of a group.

    Attributes:
        kept: mean number of thinking tokens. score: mean over thoughts. refused: answers that decline.
        score_change, refused_change: less those of the full thinking, thought by thought; None at the latter.
        pairs: answers that could be read both here and behind the full thinking.
    """

    group: str
    share: Share
    n: int
    kept: float
    score: Estimate
    refused: Rate
    score_change: Estimate | None
    refused_change: Estimate | None
    pairs: int


class Truncation:
    """The curve over the share of the thinking that is kept.

    Args:
        shares: of the thinking; 1 is always measured, since all others are compared with it. None: see `Share`.
        judge: id of `demur.judges.available()`, or a judge. max_new_tokens: of an answer.

    >>> report = Truncation([1, 0.5, 0]).run(runtime, probes, thoughts)  # doctest: +SKIP
    """

    def __init__(
        self,
        shares: Sequence[Share] = SHARES,
        *,
        judge: str | Judge = "rules/demur-v1",
        max_new_tokens: int = NEW_TOKENS,
    ) -> None:
        if bad := [s for s in shares if s is not None and not 0 <= s <= 1]:
            raise InputError(
                f"share {bad[0]} of the thinking: shares go from 0 (closed at once) to 1 (all of it)"
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}: an answer needs at least one token")
        self.shares: tuple[Share, ...] = tuple(sorted({1.0, *(float(s) for s in shares if s is not None)}))[
            ::-1
        ]
        self.shares += (None,) if None in shares else ()
        self.judge = judges.get(judge) if isinstance(judge, str) else judge
        self.max_new_tokens = max_new_tokens
        harm = getattr(self.judge, "scale", "refusal") != "refusal"
        if harm or self.judge.id.startswith(judges.human.PREFIX):
            raise InputError(
                f"judge {self.judge.id!r} "
                + ("reads harm" if harm else "has one label for each prompt")
                + "; answers behind cut thinking need a judge that reads each of them for a refusal"
            )

    def run(
        self,
        runtime: Runtime,
        probes: CliffProbes,
        thoughts: Sequence[Thought],
        condition: Condition | None = None,
        *,
        progress: Progress | None = None,
    ) -> Report:
        """Cut, read, answer, judge and report; see `collect`."""
        found = self.collect(runtime, probes, thoughts, condition, progress=progress)
        return self.score(found, model=runtime.name)

    def collect(
        self,
        runtime: Runtime,
        probes: CliffProbes,
        thoughts: Sequence[Thought],
        condition: Condition | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Cut]:
        """One `Cut` for each share and thought. Answers that the rows hold are not used.

        Args:
            probes: only that of the last token before the answer is read. thoughts: others than it was fitted on.
            condition: its system prompt is used; decoding is greedy, without control tokens.

        Raises:
            InputError: no thoughts, an id twice, a row without thinking, or no room for it and an answer.
            CapabilityError: the model runs elsewhere; None is asked for and the header opens the thinking itself.
            MismatchError: the probes were fitted on another model.
        """
        from demur.runtime.local import LocalRuntime

        if not isinstance(runtime, LocalRuntime):
            raise CapabilityError(f"{runtime.name!r} runs elsewhere; cut thinking needs a local model")
        check_model(runtime, probes)
        cuts = self.encoded(runtime, thoughts, probes.markup, condition)
        keys, rows = list(cuts), list(cuts.values())
        ends = (H[0, -1] for H in states(runtime, rows, [probes.layer]))
        scores = expit(probes.final.score(np.stack(list(ends)).astype(float)))
        said = _answers(runtime, rows, self.max_new_tokens, progress)
        pairs = []
        for (share, n), row, (ids, stopped) in zip(keys, rows, said, strict=True):
            pairs.append((thoughts[n].prompt, _reply(runtime, row.id, share, ids, stopped)))
        verdicts = judge_all(self.judge, pairs)
        return [
            Cut(
                id=thoughts[n].id,
                group=GROUPS[thoughts[n].harmful],
                cluster=thoughts[n].prompt.group or thoughts[n].prompt.text,
                share=share,
                kept=row.spans.count("thinking"),
                score=float(score),
                refused=declined(v.label),
            )
            for (share, n), row, score, v in zip(keys, rows, scores, verdicts, strict=True)
        ]

    def encoded(
        self,
        runtime: LocalRuntime,
        thoughts: Sequence[Thought],
        markup: Markup,
        condition: Condition | None = None,
    ) -> dict[tuple[Share, int], Encoded]:
        """(share, index of the thought) -> tokens up to the answer. Errors as of `collect`; nothing is computed."""
        if not thoughts or len({t.id for t in thoughts}) < len(thoughts):
            raise InputError(f"{len(thoughts)} thoughts: at least one is needed, each with an id of its own")
        if None in self.shares and runtime.chat.opens_thinking:
            raise CapabilityError(
                f"the chat template of {runtime.name!r} opens the thinking in its header, so there is no header "
                "without marks of thinking; take share 0, which closes it at once"
            )
        full = [encode(runtime, t, markup, condition) for t in thoughts]
        for t, row in zip(thoughts, full, strict=True):
            runtime.check_fits(t.prompt, cut(row).ids, self.max_new_tokens)
        unopened = replace(markup, open="")
        bare = [encode(runtime, t, unopened, condition) for t in thoughts] if None in self.shares else []
        return {
            (share, n): cut(row, share)
            for share in self.shares
            for n, row in enumerate(bare if share is None else full)
        }

    def score(self, found: Sequence[Cut], *, model: str | None = None) -> Report:
        """Report on cuts that are judged already."""
        places = list(places_of(found, self.judge.id))
        error = judge_error(self.judge.id, should_refuse=True)
        notes = [
            "Changes are against the full thinking, thought by thought; intervals are 95 % each, not corrected for "
            "the number of shares."
        ]
        if None in self.shares:
            notes.append(
                "The probe was fitted behind closed thinking; at a bare header its score is a guess."
            )
        if error is not None:
            notes.append(
                f"{self.judge.id} on answers to unsafe prompts ({error.dataset}): finds "
                f"{error.sensitivity.value:.2f} of refusals (n {error.sensitivity.n}) and "
                f"{error.specificity.value:.2f} of answers (n {error.specificity.n})."
            )
        return Report(
            title="Thinking cut short" + (f": {model}" if model else ""),
            tables=tuple(
                _table(g, [p for p in places if p.group == g]) for g in dict.fromkeys(p.group for p in places)
            ),
            values={"places": [asdict(p) for p in places], "cuts": [_row(c) for c in found]},
            provenance={"model": model, "judge": self.judge.id, "max_new_tokens": self.max_new_tokens},
            notes=tuple(notes),
        )


def places_of(found: Sequence[Cut], judge: str | None = None) -> list[Place]:
    """The points of all curves: groups as in `GROUPS`, shares in the order of `found`.

    Raises:
        InputError: nothing was measured at the full thinking.
    """
    out = []
    for group in (g for g in GROUPS.values() if any(c.group == g for c in found)):
        mine = [c for c in found if c.group == group]
        full = {c.id: c for c in mine if c.share == 1.0}
        for share in dict.fromkeys(c.share for c in mine):
            here = [c for c in mine if c.share == share]
            if missing := [c.id for c in here if c.id not in full]:
                raise InputError(
                    f"{missing[0]!r} was not measured with its full thinking, so nothing can be paired"
                )
            out.append(_place(group, share, here, [full[c.id] for c in here], judge))
    return out


def _place(group: str, share: Share, here: Sequence[Cut], full: Sequence[Cut], judge: str | None) -> Place:
    clusters = [c.cluster for c in here]
    refused = clustered(((c.refused, c.cluster) for c in here), judge)
    both = [(a, b) for a, b in zip(full, here, strict=True) if None not in (a.refused, b.refused)]
    paired = compare(
        [bool(a.refused) for a, _ in both], [bool(b.refused) for _, b in both], [b.cluster for _, b in both]
    )
    moved = [c.score - a.score for c, a in zip(here, full, strict=True)]
    return Place(
        group=group,
        share=share,
        n=len(here),
        kept=float(np.mean([c.kept for c in here])),
        score=_mean([c.score for c in here], clusters),
        refused=refused,
        score_change=None if share == 1.0 else _mean(moved, clusters),
        refused_change=None if share == 1.0 else (paired.difference, *(paired.interval or (None, None))),
        pairs=paired.n,
    )


def _mean(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    low, high = paired_interval(np.zeros(len(values)), values, clusters=clusters) or (None, None)
    return float(np.mean(values)), low, high


def _answers(
    runtime: LocalRuntime, rows: Sequence[Encoded], new: int, progress: Progress | None
) -> list[tuple[list[int], bool]]:
    """Greedy new ids behind each row, without the end token, and whether there was one."""
    from demur.runtime.lanes import Lanes

    lanes, asked = Lanes(runtime), Condition(max_new_tokens=new)
    out: dict[int, tuple[list[int], bool]] = {}
    for batch in batching.plan([len(row.ids) + new for row in rows], runtime.budget(new)):
        keys = lanes.join_all([(rows[n].ids, asked, True) for n in batch])
        said: dict[int, list[int]] = {key: [] for key in keys}
        for _ in range(new):
            ended = [key for key, token in lanes.step().items() if _take(said[key], token, lanes.ends)]
            lanes.leave(*ended)
            if not len(lanes):
                break
        stopped = [key not in lanes for key in keys]
        lanes.leave(*keys)
        out |= dict(zip(batch, zip(said.values(), stopped, strict=True), strict=True))
        if progress is not None:
            progress(len(out), len(rows))
    return [out[n] for n in range(len(rows))]


def _take(said: list[int], token: int, ends: Sequence[int]) -> bool:
    """Put a token to what was said, unless it ends it; whether it does."""
    if token not in ends:
        said.append(token)
    return token in ends


def _reply(runtime: LocalRuntime, id: str, share: Share, ids: list[int], stopped: bool) -> Reply:
    """The answer. A model may think anew, most of all behind a bare header; that is no part of its answer."""
    if share is None:
        content, reasoning = runtime.chat.split(ids)
    else:
        reasoning, content = split_thinking(runtime.tokenizer.decode(ids, skip_special_tokens=True))
    return Reply(
        prompt_id=id,
        content=content,
        reasoning=reasoning,
        finish_reason="stop" if stopped else "length",
        completion_tokens=len(ids) + stopped,
    )


def _table(group: str, places: Sequence[Place]) -> Table:
    columns = (
        "kept",
        "tokens",
        "score",
        "answers that refuse",
        "unread",
        "change of score",
        "of refusals",
        "pairs",
    )
    rows = tuple(
        (
            "no marks" if p.share is None else f"{p.share:g}",
            f"{p.kept:.1f}",
            _shown(p.score),
            p.refused,
            p.refused.unread,
            _shown(p.score_change),
            _shown(p.refused_change),
            p.pairs,
        )
        for p in places
    )
    return Table(f"thinking cut short, {group} ({places[0].n})", columns, rows)


def _shown(estimate: Estimate | None) -> str | None:
    value, low, high = estimate or (None, None, None)
    if value is None or low is None or high is None:
        return None if value is None else f"{value:.2f} [no interval]"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _row(found: Cut) -> dict[str, Any]:
    return {k: v for k, v in asdict(found).items() if k != "cluster"}
