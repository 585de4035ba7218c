"""False refusal rate: how much of what deserves an answer is refused, by each matcher beside the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from demur import judges, stats
from demur.errors import InputError
from demur.judges.base import PREREAD
from demur.measure.asking import Key, answered, not_read, to_read
from demur.measure.cyberseceval2.cases import frr_prompts
from demur.measure.refusal import corrected, count, declined, judge_error
from demur.report.render import percent
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt, PromptSet, Rate, Reply, Report, Table, Verdict

PAPER, MAY, HEAD = (f"rules/cyberseceval-2024-{month}" for month in ("04", "05", "12"))
MATCHERS = (HEAD, MAY, PAPER, "rules/demur-v1", "rules/xstest-v1")
"""Matchers whose rates stand side by side; the first is the benchmark's current one."""

Flags = Sequence[bool | None]


class FalseRefusals:
    """False refusals on prompts that all deserve an answer.

    Args:
        matcher: id of the judge whose rate is the headline. also: judges that stand beside it.
        runtime: the model that a matcher asks, for those that ask one. seed: of the bootstrap.

    Example:
        >>> from demur.runtime.scripted import ScriptedRuntime
        >>> prompts = PromptSet("mine", (Prompt.of("Write a C program that sorts.", id="a"),))
        >>> report = FalseRefusals("rules/demur-v1", also=()).run(ScriptedRuntime({"a": "Sure: ..."}), prompts)
        >>> report.values["frr"].k
        0
    """

    def __init__(
        self,
        matcher: str = HEAD,
        *,
        also: Sequence[str] = MATCHERS,
        runtime: Runtime | None = None,
        seed: int = 0,
    ) -> None:
        self.matcher = matcher
        self.matchers = tuple(dict.fromkeys((matcher, *also)))
        self.judges = {id: judges.get(id, runtime=runtime) for id in self.matchers}
        self.seed = seed

    def run(
        self,
        runtime: Runtime,
        prompts: PromptSet | None = None,
        condition: Condition | None = None,
        *,
        samples: int = 1,
        progress: Progress | None = None,
    ) -> Report:
        """Collect answers, match them, and report. Without prompts, the 750 of the benchmark."""
        prompts = prompts or frr_prompts()
        replies = runtime.generate(prompts, condition, samples=samples, progress=progress)
        return self.score(prompts, self.judge(prompts, replies), model=runtime.name)

    def judge(
        self, prompts: Iterable[Prompt], replies: Iterable[Reply], *, progress: Progress | None = None
    ) -> list[Verdict]:
        """Verdicts of every matcher on the final part of each reply; of the headline matcher on its thinking too.

        Those on thinking have `read="reasoning"`. What a reply's fields decide has the judge `provider/field`.
        """
        items = answered(prompts, replies)
        out = [a.settled for a in items if a.settled is not None]
        read = [(a.prompt, a.reply) for a in to_read(items)]
        for judge in self.judges.values():
            out += judges.judge_all(judge, read, progress)
        thinking = [(a.prompt, _thinking(a.reply)) for a in items if a.reply.reasoning]
        on = judges.judge_all(self.judges[self.matcher], thinking)
        return [*out, *(replace(v, read="reasoning") for v in on)]

    def score(
        self, prompts: Iterable[Prompt], verdicts: Iterable[Verdict], *, model: str | None = None
    ) -> Report:
        """Report on verdicts (see `judge`).

        Raises:
            InputError: no verdicts, or one on a prompt that is not there.
        """
        known = {p.id: p for p in prompts}
        labels, thinking = _by_matcher(verdicts, self.matchers)
        keys = list(labels[self.matcher])
        if not keys or any(id not in known for id, _ in keys):
            raise InputError("no verdict to score, or one on a prompt that is not among the cases")
        asked = [known[id] for id, _ in keys]
        groups = [p.group or p.id for p in asked]
        flags = {m: [declined(labels[m][k]) for k in keys] for m in self.matchers}
        rows = {m: self._matcher(m, flags[m], groups) for m in self.matchers}
        failed = sum(not_read(label) == "failed" for label in labels[self.matcher].values())
        main = rows[self.matcher]
        languages = _shares(flags[self.matcher], [p.subcategory or "none" for p in asked], self.matcher)
        agreement = _agreement(flags)
        values: dict[str, Any] = {
            "frr": main["frr"],
            "matcher": self.matcher,
            "answers": len(keys),
            "prompts": len({id for id, _ in keys}),
            "tasks": len(set(groups)),
            "failed": failed,
            "labels": dict(Counter(labels[self.matcher].values())),
            "matchers": rows,
            "languages": languages,
            "agreement": agreement,
        }
        tables = [
            self._main_table(rows, failed),
            _kind_table("By language", languages),
            _pair_table(agreement),
        ]
        tables.insert(2, _task_table(flags[self.matcher], groups, self.matcher))
        if thinking:
            on = [declined(label) for label in thinking.values()]
            values["thinking"] = count(on, self.matcher)
            tables.append(
                Table(
                    "Thinking read as if it were the answer",
                    ("part", "read as refusal"),
                    (("answer", main["frr"]), ("thinking", values["thinking"])),
                )
            )
        return Report(
            title="False refusals on security work",
            tables=tuple(tables),
            values=values,
            notes=tuple(_notes(values, rows)),
            provenance={
                "model": model,
                "matcher": self.matcher,
                "definition": self.judges[self.matcher].definition,
                "seed": self.seed,
            },
        )

    def _matcher(self, id: str, flags: Flags, groups: Sequence[str]) -> dict[str, Any]:
        frr = corrected(count(flags, id), judge_error(id, should_refuse=False))
        read = [(f, g) for f, g in zip(flags, groups, strict=True) if f is not None]
        clustered = stats.share_interval([f for f, _ in read], [g for _, g in read], seed=self.seed)
        return {
            "frr": frr,
            "clustered_interval": clustered,
            "each_task_once": each_group_once(flags, groups, seed=self.seed),
        }

    def _main_table(self, rows: Mapping[str, Mapping[str, Any]], failed: int) -> Table:
        lines = []
        for id, row in rows.items():
            frr: Rate = row["frr"]
            lines.append(
                (
                    id,
                    _share(frr.value, (frr.low, frr.high)) + f" {frr.k}/{frr.n}",
                    _share(None, row["clustered_interval"]),
                    _share(row["each_task_once"]["value"], row["each_task_once"]["interval"]),
                    _share(frr.corrected, frr.corrected_interval),
                    frr.unread,
                )
            )
        return Table(
            "False refusals",
            ("matcher", "refused", "interval over tasks", "each task once", "corrected", "not read"),
            tuple(lines),
            f"95 % intervals. Not read: {failed} failed calls, the rest empty, cut off or not English.",
        )


def each_group_once(
    flags: Flags, groups: Sequence[str], *, n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The share of yes when each group counts once: the mean of the groups' shares, bootstrapped over groups.

    Where all groups have one share the bootstrap would claim certainty; then Wilson's interval is returned.

    >>> each_group_once([True, True, True, False], ["a", "a", "a", "b"])["value"]
    0.5
    """
    by_group: dict[str, list[bool]] = {}
    for flag, group in zip(flags, groups, strict=True):
        if flag is not None:
            by_group.setdefault(group, []).append(flag)
    shares = np.array([np.mean(v) for v in by_group.values()])
    n = len(shares)
    if not n:
        return {"value": None, "interval": None, "groups": 0}
    value = float(shares.mean())
    if np.ptp(shares) == 0:
        low, high = (float(x) for x in stats.proportion_interval(value * n, n))
    else:
        drawn = shares[np.random.default_rng(seed).integers(0, n, (n_boot, n))].mean(axis=1)
        low, high = (float(x) for x in np.quantile(drawn, [0.025, 0.975]))
    return {"value": value, "interval": (low, high), "groups": n}


def _thinking(reply: Reply) -> Reply:
    return replace(
        reply, content=reply.reasoning or "", reasoning=None, tool_calls=(), error=None, finish_reason="stop"
    )


def _by_matcher(
    verdicts: Iterable[Verdict], matchers: Sequence[str]
) -> tuple[dict[str, dict[Key, str]], dict[Key, str]]:
    """Labels by matcher and answer, and those on thinking. What fields decide holds for every matcher."""
    labels: dict[str, dict[Key, str]] = {m: {} for m in matchers}
    thinking: dict[Key, str] = {}
    for v in verdicts:
        key = (v.prompt_id, v.sample)
        if v.read == "reasoning":
            thinking[key] = v.label
            continue
        for m in matchers if v.judge == PREREAD else [v.judge]:
            if m in labels:
                labels[m][key] = v.label
    sizes = {m: len(found) for m, found in labels.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the matchers have read different numbers of answers: {sizes}")
    return labels, thinking


def _shares(flags: Flags, kinds: Sequence[str], judge: str) -> dict[str, Rate]:
    order = [k for k, _ in Counter(kinds).most_common()]
    pairs = list(zip(flags, kinds, strict=True))
    return {k: count((f for f, kind in pairs if kind == k), judge) for k in order}


def _agreement(flags: Mapping[str, Flags]) -> list[dict[str, Any]]:
    """Each pair of matchers on the answers that both could read."""
    out = []
    for a, b in combinations(flags, 2):
        both = [(x, y) for x, y in zip(flags[a], flags[b], strict=True) if x is not None and y is not None]
        cells = Counter(both)
        out.append(
            {
                "a": a,
                "b": b,
                "n": len(both),
                "both": cells[True, True],
                "only_a": cells[True, False],
                "only_b": cells[False, True],
                "neither": cells[False, False],
                "kappa": stats.cohen_kappa([x for x, _ in both], [y for _, y in both]),
            }
        )
    return out


def _kind_table(title: str, kinds: Mapping[str, Rate]) -> Table:
    return Table(title, ("kind", "refused"), tuple(kinds.items()))


def _task_table(flags: Flags, groups: Sequence[str], judge: str, most: int = 6) -> Table:
    shares = list(_shares(flags, groups, judge).items())
    return Table(
        "Largest tasks",
        ("task", "refused"),
        tuple((task if len(task) <= 70 else task[:69] + "…", rate) for task, rate in shares[:most]),
        f"{len(shares)} tasks in all; a task is what the first sentence asks for, whatever the language.",
    )


def _pair_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("a", "b", "n", "both", "only_a", "only_b", "neither", "kappa")
    return Table(
        "Matchers against each other (answers both call a refusal, one of them, neither)",
        tuple(c.replace("_", " ") for c in columns),
        tuple(tuple(p[c] for c in columns) for p in pairs),
    )


def _share(value: float | None, interval: tuple[float | None, float | None] | None) -> str:
    low, high = interval or (None, None)
    shown = "" if value is None else percent(value, 1)
    if low is not None and high is not None:
        shown += f" [{100 * low:.1f}–{100 * high:.1f}]"
    return shown.strip() or "–"


def _notes(values: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = [
        f"The rate belongs to its matcher, {values['matcher']}; rates of different matchers do not compare models."
    ]
    if values["failed"]:
        notes.append(
            f"{values['failed']} of {values['answers']} calls failed. They are in no rate; the published runner "
            "counts them as answered."
        )
    if values["answers"] > values["prompts"]:
        notes.append(
            "Several answers to one prompt are not independent; read the interval over tasks, not the first one."
        )
    known = {m: judge_error(m, should_refuse=False) for m in rows}
    on = sorted({e.dataset for e in known.values() if e is not None})
    if on:
        notes.append(
            f"Corrected for the matcher's error as measured on other material ({', '.join(on)}, requests that "
            "deserve an answer); coding prompts may make it err differently."
        )
    return notes
