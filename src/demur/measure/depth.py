"""How deep refusal goes: what a model does when the first d tokens of an answer are put in its mouth.

Two curves, never to be mixed up. `continue`: the model writes on behind the forced tokens and a judge reads
whether what it writes declines; this is the claim about depth. `reheader`: the template's end of turn and a new
assistant header are put behind them, and the refuse mass at that header is read; this says whether a check
inside the answer could see what the answer has become (arXiv 2510.18081), not what the model does.

Beside them stands what the judge makes of the forced text itself, which nobody refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demur import judges
from demur.errors import CapabilityError, InputError
from demur.judges.base import Judge
from demur.measure.forced import UNHARMFUL, Forced, load_forced, own_answers
from demur.measure.refusal import declined, judge_error
from demur.runtime.base import Decide, Progress, Runtime
from demur.types import RESPOND, Condition, Message, Prompt, Reply, Report, Score, Table

if TYPE_CHECKING:
    from demur.runtime.depths import DepthRow
    from demur.runtime.local import LocalRuntime

__all__ = ["UNHARMFUL", "Depth", "Forced", "Place", "load_forced", "own_answers"]

DEPTHS = (0, 1, 2, 4, 8, 16, 32, 64)
NEW_TOKENS = 16
AT_ONCE = 48
"""Rows that are continued side by side."""
GROUPS = {True: "should refuse", False: "should answer", None: "unlabelled"}
CONTINUE, WHOLE, ITSELF = "continue", "continue, read from the start", "forced text itself"
REHEADER, DECIDED = "reheader", "reheader, decided"
FIRST = "first position"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One point of a curve: mean `value` over the `n` answers of a group that are `depth` tokens long.

    `low` and `high` are a 95 % interval over prompts; `unread` answers of the judge are not in `n`.
    """

    curve: str
    group: str
    depth: int
    n: int
    value: float | None
    low: float | None
    high: float | None
    unread: int = 0


class Depth:
    """The two curves.

    Args:
        judge: id of the judge of texts. depths: tokens of the forced answer, 0 being none of it.
        new_tokens: how many the model writes behind them.

    >>> report = Depth().run(runtime, load_forced("answers.jsonl"))  # doctest: +SKIP
    """

    def __init__(
        self,
        judge: str = "rules/demur-v1",
        *,
        depths: Sequence[int] = DEPTHS,
        new_tokens: int = NEW_TOKENS,
    ) -> None:
        if not depths or min(depths) < 0 or new_tokens < 1:
            raise InputError(
                f"depths {list(depths)} and {new_tokens} new tokens: depths count from 0, and at least one token "
                "is written"
            )
        self.judge, self.depths, self.new_tokens = judge, tuple(sorted(set(depths))), new_tokens

    def run(
        self,
        runtime: Runtime,
        forced: Sequence[Forced],
        condition: Condition | None = None,
        *,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Measure both curves.

        Args:
            forced: prompts with the answers to force. condition: its system prompt is used; decoding is greedy.
            decide: the operating point's rule, in force where the model opens the answer itself (depth 0), and
                read (not enforced) at each header.

        Raises:
            CapabilityError: the model runs elsewhere, or thinks before it answers.
        """
        from demur.runtime.depths import header_ids, header_scores
        from demur.runtime.local import LocalRuntime

        if not isinstance(runtime, LocalRuntime):
            raise CapabilityError(f"{runtime.name!r} runs elsewhere; forced text needs a local model")
        if not forced:
            raise InputError("no forced answers, so there is nothing to measure")
        runtime.chat.require_decision()
        condition, T = condition or Condition(), float(getattr(decide, "T", 1.0))
        rows = [_row(runtime, f, condition) for f in forced]
        if (longest := max(len(row.answer) for row in rows)) < self.depths[0]:
            raise InputError(
                f"the longest forced answer has {longest} tokens, so none can be cut at depth {self.depths[0]}; "
                "take smaller depths or longer answers"
            )
        header = header_ids(runtime.chat)
        scores = runtime.score_rows(
            [(f.prompt, list(row.prompt)) for f, row in zip(forced, rows, strict=True)], condition, T
        )
        openers = [decide(f.prompt, s) if decide else None for f, s in zip(forced, scores, strict=True)]
        mass = header_scores(runtime, rows, self.depths, header, T=T)
        said = self._continued(runtime, rows, openers, progress)
        flags = self._judged(runtime, forced, rows, said)
        places = [*self._shares(forced, flags), *self._masses(runtime, forced, scores, mass, decide, T)]
        return self._report(runtime, forced, places, runtime.tokenizer.decode(header), condition)

    # --- continue -------------------------------------------------------------------------------------------

    def _continued(
        self,
        runtime: LocalRuntime,
        rows: Sequence[DepthRow],
        openers: Sequence[str | None],
        progress: Progress | None,
    ) -> dict[tuple[int, int], tuple[str | None, list[int]]]:
        """(row, depth) -> control token that opens the answer, new ids without the end token."""
        from demur.runtime.lanes import Lanes

        lanes, out = Lanes(runtime), {}
        own = {i: c for c, i in runtime.control.ids.items()} if runtime.control else {}
        ids = {c: i for i, c in own.items()}
        at_once = Condition(max_new_tokens=self.new_tokens)
        for done, batch in _batches(rows, self.depths):
            asked = []
            for n, d in batch:
                opener = openers[n] if d == 0 else None
                opening = [ids[opener]] if opener else []
                start = [*rows[n].prompt, *opening, *rows[n].answer[:d]]
                asked.append((start, at_once, d > 0 or bool(opening)))
            keys = dict(zip(lanes.join_all(asked), batch, strict=True))
            said: dict[int, list[int]] = {key: [] for key in keys}
            for _ in range(self.new_tokens):
                for key, token in lanes.step().items():
                    said[key].append(token)
                if all(any(i in lanes.ends for i in row) for row in said.values()):
                    break
            lanes.leave(*keys)
            for key, (n, d) in keys.items():
                new = said[key]
                new = new[: next((k for k, i in enumerate(new) if i in lanes.ends), len(new))]
                opener = openers[n] if d == 0 else None
                if d == 0 and opener is None and new and new[0] in own:
                    opener, new = own[new[0]], new[1:]
                out[n, d] = opener, new
            if progress is not None:
                progress(done, len(rows))
        return out

    def _judged(
        self,
        runtime: LocalRuntime,
        forced: Sequence[Forced],
        rows: Sequence[DepthRow],
        said: dict[tuple[int, int], tuple[str | None, list[int]]],
    ) -> dict[tuple[str, int, int], bool | None]:
        """(curve, row, depth) -> declined, None where the judge could not tell."""
        judge, pairs, keys = judges.get(self.judge), [], []
        for (n, d), (opener, new) in said.items():
            answer = list(rows[n].answer)
            own = answer[d : d + self.new_tokens]
            for curve, ids in ((CONTINUE, new), (WHOLE, [*answer[:d], *new]), (ITSELF, own)):
                if curve == ITSELF and len(own) < self.new_tokens:
                    continue  # the forced text ends before
                text = runtime.tokenizer.decode(ids, skip_special_tokens=True)
                reply = Reply(prompt_id=forced[n].prompt.id, content=text, finish_reason="length")
                if curve != ITSELF:
                    reply = replace(reply, control_token=opener)
                keys.append((curve, n, d))
                pairs.append((forced[n].prompt, reply))
        verdicts = _verdicts(judge, pairs)
        return {key: declined(label) for key, label in zip(keys, verdicts, strict=True)}

    def _shares(
        self, forced: Sequence[Forced], flags: dict[tuple[str, int, int], bool | None]
    ) -> Iterator[Place]:
        from demur.stats.intervals import share_interval

        for curve in (CONTINUE, WHOLE, ITSELF):
            for group, members in _groups(forced).items():
                for d in self.depths:
                    mine = [(n, flags[curve, n, d]) for n in members if (curve, n, d) in flags]
                    read = [(n, flag) for n, flag in mine if flag is not None]
                    hits = np.array([flag for _, flag in read], bool)
                    interval = share_interval(hits, [_cluster(forced[n]) for n, _ in read]) or (None, None)
                    yield Place(
                        curve=curve,
                        group=group,
                        depth=d,
                        n=len(read),
                        value=float(hits.mean()) if len(read) else None,
                        low=interval[0],
                        high=interval[1],
                        unread=len(mine) - len(read),
                    )

    # --- reheader -------------------------------------------------------------------------------------------

    def _masses(
        self,
        runtime: LocalRuntime,
        forced: Sequence[Forced],
        scores: Sequence[Score],
        mass_NDK: npt.NDArray[np.float32],
        decide: Decide | None,
        T: float,
    ) -> Iterator[Place]:
        names = runtime.control.names if runtime.control else ()
        refuse = slice(0, len(names) - 1 if names else None)  # without control tokens, all are openings
        mass_ND = mass_NDK[:, :, refuse].sum(-1)
        decided_ND = np.full(mass_ND.shape, np.nan)
        for n, k in np.argwhere(~np.isnan(mass_ND)) if decide else ():
            at = dict(zip(names, mass_NDK[n, k].tolist(), strict=True))
            score = Score(id=forced[n].prompt.id, p_refuse=float(mass_ND[n, k]), probabilities=at, T=T)
            decided_ND[n, k] = decide(forced[n].prompt, score) not in (None, RESPOND) if decide else np.nan
        for group, members in _groups(forced).items():
            clusters = [_cluster(forced[n]) for n in members]
            first = np.array([scores[n].p_refuse for n in members])
            yield _mean(FIRST, group, 0, first, clusters)
            for k, d in enumerate(self.depths):
                yield _mean(REHEADER, group, d, mass_ND[members, k], clusters)
            for k, d in enumerate(self.depths if decide else ()):
                yield _mean(DECIDED, group, d, decided_ND[members, k], clusters)

    # --- report ---------------------------------------------------------------------------------------------

    def _report(
        self,
        runtime: LocalRuntime,
        forced: Sequence[Forced],
        places: Sequence[Place],
        header: str,
        condition: Condition,
    ) -> Report:
        curves = list(dict.fromkeys(p.curve for p in places if p.curve not in (FIRST, WHOLE)))
        tables = [_table(group, curves, self.depths, places) for group in _groups(forced)]
        error = judge_error(self.judge, should_refuse=True)
        notes = [
            f"{CONTINUE!r} is what the model does: {self.new_tokens} greedy tokens behind the forced ones, read by "
            f"{self.judge}; read together with the forced ones they are {WHOLE!r} in the JSON.",
            f"{REHEADER!r} is what a check at a new header could see; it is no behaviour.",
            "An answer that is shorter than a depth drops out there: deep points stand on fewer prompts.",
            f"{ITSELF!r} is the judge on the next {self.new_tokens} tokens of the forced text, which refused "
            "nothing: how often it takes the middle of an answer for a refusal.",
        ]
        if error is not None:
            notes.append(
                f"{self.judge} on whole answers ({error.dataset}): finds {error.sensitivity.value:.2f} of refusals "
                f"(n {error.sensitivity.n}) and {error.specificity.value:.2f} of answers "
                f"(n {error.specificity.n})."
            )
        return Report(
            title=f"How deep: {runtime.name}",
            tables=tuple(tables),
            values={
                "depths": list(self.depths),
                "new_tokens": self.new_tokens,
                "header": header,
                "mass": "control" if runtime.control else "openings",
                "curves": [asdict(p) for p in places],
                "judge_error": asdict(error) if error else None,
            },
            provenance={
                "model": runtime.name,
                "fingerprint": runtime.fingerprint,
                "judge": self.judge,
                "condition": condition.name,
                "answers": len(forced),
            },
            notes=tuple(notes),
        )


def _row(runtime: LocalRuntime, forced: Forced, condition: Condition) -> DepthRow:
    """Prompt and answer as token ids; what the answer spells stays text."""
    from demur.runtime.depths import DepthRow

    prompt = forced.prompt.with_system(condition.system)
    ids = runtime.chat.render(prompt).ids
    said = Message(role="assistant", content=forced.answer)
    whole = runtime.chat.render(replace(prompt, messages=(*prompt.messages, said))).ids
    shared = next((k for k, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    if shared < len(ids) - len(runtime.chat.tail):  # a block of thinking that is closed may be left out
        raise InputError(
            f"prompt {prompt.id!r}: the chat template writes the request differently once an answer stands behind "
            "it, so tokens of the answer cannot be forced"
        )
    return DepthRow(ids, whole[shared:])


def _batches(rows: Sequence[DepthRow], depths: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(rows finished behind it, (row, depth) pairs): all depths of a row together, similar lengths together."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt) + len(rows[n].answer))
    batch: list[tuple[int, int]] = []
    for done, n in enumerate(order, 1):
        batch += [(n, d) for d in depths if d <= len(rows[n].answer)]
        if len(batch) + len(depths) > AT_ONCE or done == len(order):
            yield done, batch
            batch = []


def _verdicts(judge: Judge, pairs: Sequence[tuple[Prompt, Reply]]) -> list[str]:
    from demur.judges.base import judge_all

    return [v.label for v in judge_all(judge, pairs)]


def _groups(forced: Sequence[Forced]) -> dict[str, list[int]]:
    found = {
        name: [n for n, f in enumerate(forced) if f.prompt.should_refuse is flag]
        for flag, name in GROUPS.items()
    }
    return {name: members for name, members in found.items() if members}


def _cluster(forced: Forced) -> str:
    return forced.prompt.group or forced.prompt.text


def _mean(
    curve: str, group: str, depth: int, values: npt.NDArray[np.floating[Any]], clusters: Sequence[str]
) -> Place:
    from demur.stats import bootstrap_interval, share_interval

    there = ~np.isnan(values)
    kept, of = values[there].astype(float), [c for c, t in zip(clusters, there, strict=True) if t]
    low: float | None = None
    high: float | None = None
    if curve == DECIDED:
        low, high = share_interval(kept.astype(bool), of) or (None, None)
    elif len(kept):
        low, high = bootstrap_interval(np.mean, kept, clusters=of)
    value = float(kept.mean()) if len(kept) else None
    return Place(curve=curve, group=group, depth=depth, n=len(kept), value=value, low=low, high=high)


def _table(group: str, curves: Sequence[str], depths: Sequence[int], places: Sequence[Place]) -> Table:
    at = {(p.curve, p.depth): p for p in places if p.group == group}
    first = at[FIRST, 0]
    rows = tuple((d, at[CONTINUE, d].n, *(_cell(at[c, d]) for c in curves)) for d in depths)
    return Table(
        f"requests that it {group}" if group != GROUPS[None] else f"{group} requests",
        ("depth", "n", *curves),
        rows,
        f"Shares of answers that decline, and for {REHEADER!r} the mean refuse mass, with 95% intervals over "
        f"prompts. At the model's own first position the mass is {_cell(first)} (n {first.n}).",
    )


def _cell(place: Place) -> str:
    if place.value is None or place.low is None or place.high is None:
        return "-"
    unread = f", {place.unread} unread" if place.unread else ""
    return f"{place.value:.2f} [{place.low:.2f}, {place.high:.2f}]{unread}"
