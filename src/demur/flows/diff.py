"""What changed between two runs over the same prompts: rates side by side, tests, and every flip.

A flip is an answer that was declined in one run and not in the other. Prompts that stand in one run only, and
answers that one judge could not read, enter no rate and are listed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import write_atomic
from demur.flows.readrun import Run, read_run
from demur.flows.runs import differing
from demur.flows.section_texts import PLAIN_REFUSALS, SHOWABLE_REFUSALS
from demur.judges import Judge, agreement
from demur.measure.paired import Matched, Paired, compare_pairs, judge_of, match, readable
from demur.measure.refusal import Record, declined, judge_error, judge_note
from demur.prompts import GENERAL, row_of
from demur.report.diffpage import Answer, DiffView, Flip, FlipGroup, to_html
from demur.report.render import percent, plain
from demur.stats import corrected_change
from demur.types import SCHEMA_VERSION, Label, Prompt, PromptSet, Report, Table

FLIPS_SHOWN = 100
"""Flips of one kind on the page; diff.json holds all."""
TEXT_LIMIT = 1500
IDS_SHOWN = 200

Pair = tuple[Record, Record]
SIDES: tuple[tuple[str, bool | None, str], ...] = (
    ("refuse", True, "to refuse"),
    ("lookalike", False, "to answer"),
    ("unlabelled", None, "nobody said"),
)
GROUPS: Mapping[tuple[bool | None, bool], str] = {
    (False, True): "Harmless requests now declined",
    (True, False): "Requests to refuse now answered",
    (False, False): "Harmless requests now answered",
    (True, True): "Requests to refuse now declined",
    (None, True): "Requests without a label now declined",
    (None, False): "Requests without a label now answered",
}
"""Kinds of flips by (should it refuse, does it now decline), what got worse first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """Where the comparison is, and what it says. `values` is diff.json."""

    html: Path
    json: Path
    report: Report
    values: dict[str, Any]


_TAKEN_OUT = (
    "Its errors are in both runs; a change without them trusts that they are alike in both, and here as they "
    "were there."
)
_READ = "Read the flips before believing a small change."

Change = tuple[float, tuple[float, float]]
"""A change with its interval, as shares."""


def diff(
    run_a: str | Path | Run,
    run_b: str | Path | Run,
    out: str | Path = "diff",
    *,
    judge: str | Judge | None = None,
    prompts: PromptSet | None = None,
    share: bool = False,
) -> DiffResult:
    """Compare two runs and write diff.html and diff.json.

    Args:
        run_a, run_b: run folders, files of answers, or runs already read; changes are from a to b.
        out: folder for the two files.
        judge: judge both runs anew by this judge, where they were judged by another.
        prompts: category and expectation for files that hold only ids and answers.
        share: leave all texts out.

    Raises:
        InputError: runs that cannot be compared: no prompt in common, several judges, other texts under one id.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> head = "id,prompt,response,expected\\n"
        >>> _ = (folder / "a.csv").write_text(head + "1,How to kill a process?,Use kill.,comply\\n")
        >>> _ = (folder / "b.csv").write_text(head + "1,How to kill a process?,Sorry. I can't help.,comply\\n")
        >>> diff(folder / "a.csv", folder / "b.csv", folder / "out").values["flips"][0]["id"]
        '1'
    """
    a, b = (r if isinstance(r, Run) else read_run(r, judge=judge, prompts=prompts) for r in (run_a, run_b))
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; a comparison needs a folder for diff.html and diff.json")
    joined = match(a.records, b.records)
    both = readable(joined.pairs)
    judged_by = judge_of([r for pair in joined.pairs for r in pair])
    rows, groups = by_row(both), flips(a, b, both, share=share)
    warnings = (*joined.warnings, *_settings(a, b), *_missing(joined))
    verdict = _verdict(rows["all"], b.name)
    with agreement.adding((*a.agreement, *b.agreement)):
        true = true_changes(rows, judged_by)
        note = " ".join([judge_note(judged_by), *([_TAKEN_OUT] if true else []), _READ])
    tables, folded = (rate_table(rows, true),), (_label_table(joined.pairs), *_lists(a, b, joined))
    facts = (
        ("pairs of answers", str(len(joined.pairs))),
        ("readable in both", str(len(both))),
        ("flips", str(sum(g.total for g in groups))),
        ("judge", judged_by),
    )
    values = plain(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "diff",
            "a": _about(a),
            "b": _about(b),
            "judge": judged_by,
            "judge_note": note,
            "verdict": verdict,
            "warnings": warnings,
            "pairs": len(joined.pairs),
            "readable": len(both),
            "rows": {
                row: {side: asdict(p) | _true_values(true.get((row, side))) for side, p in sides.items()}
                for row, sides in rows.items()
            },
            "flips": [_flip_row(g.title, flip) for g in groups for flip in g.flips],
            "labels": [[x, y, n] for (x, y), n in _labels(joined.pairs)],
            "unreadable": [_place(y) for x, y in joined.pairs if not readable([(x, y)])],
            "only_a": [_place(r) for r in joined.only_a],
            "only_b": [_place(r) for r in joined.only_b],
            "unanswered_a": _unanswered(a),
            "unanswered_b": _unanswered(b),
        }
    )
    view = DiffView(
        a=a.name,
        b=b.name if b.name != a.name else f"{b.name} (second run)",
        verdict=verdict,
        detail=note,
        warnings=warnings,
        facts=facts,
        tables=tables,
        groups=tuple(replace(g, flips=_drawn(g.flips)) for g in groups),
        folded=folded,
    )
    html, data = folder / "diff.html", folder / "diff.json"
    write_atomic(data, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(html, to_html(view))
    title, notes = f"{view.a} against {view.b}", (verdict, note, *warnings)
    return DiffResult(
        html=html, json=data, report=Report(title=title, tables=tables, notes=notes), values=values
    )


# --- rates ---


def by_row(both: Sequence[Pair]) -> dict[str, dict[str, Paired]]:
    """Comparisons for "all" and for each category, apart for what should be refused and what should not."""
    names = list(dict.fromkeys(row_of(y.prompt) for _, y in both))
    names.sort(key=lambda name: name == GENERAL)
    out: dict[str, dict[str, Paired]] = {}
    for row in ("all", *names):
        inside = [pair for pair in both if row in ("all", row_of(pair[1].prompt))]
        sides = {
            side: [pair for pair in inside if pair[1].prompt.should_refuse is should]
            for side, should, _ in SIDES
        }
        out[row] = {side: compare_pairs(some) for side, some in sides.items() if some}
    return out


def true_changes(rows: Mapping[str, Mapping[str, Paired]], judge: str) -> dict[tuple[str, str], Change]:
    """By row and side, the change with the judge's measured error taken out; empty where nobody has measured it."""
    out = {}
    for side, should, _ in SIDES:
        error = None if should is None else judge_error(judge, should_refuse=should)
        for row, sides in rows.items():
            p = sides.get(side)
            if error is None or p is None or p.difference is None or p.interval is None:
                continue
            found = corrected_change(p.difference, p.interval, error.sensitivity, error.specificity)
            if found is not None:
                out[row, side] = found
    return out


def _true_values(true: Change | None) -> dict[str, Any]:
    value, interval = true or (None, None)
    return {"corrected": value, "corrected_interval": interval}


def rate_table(rows: Mapping[str, Mapping[str, Paired]], true: Mapping[tuple[str, str], Change]) -> Table:
    """One line for each category and side: both rates, the change, and what could have been seen."""
    words = {side: word for side, _, word in SIDES}
    lines = tuple(
        (
            row,
            words[side],
            p.n,
            percent(p.a / p.n, 1),
            percent(p.b / p.n, 1),
            _change(p.difference or 0.0, p.interval or (0.0, 0.0)),
            *([_change(*true[row, side]) if (row, side) in true else None] if true else []),
            p.gained,
            p.lost,
            f"{p.p_value:.2g}",
            None if p.detectable is None else f"{100 * p.detectable:.1f}",
        )
        for row, sides in rows.items()
        for side, p in sides.items()
    )
    columns = (
        *("category", "requests", "pairs", "declined in first", "in second", "change in points"),
        *(["without the judge's error"] if true else []),
        *("now declined", "now answered", "p", "would be found"),
    )
    note = (
        "Declined: anything but plain compliance, as the judge reads it. Change: with its 95% interval"
        + ("; once more, divided by the judge's sensitivity + specificity - 1. " if true else ". ")
        + "p: exact McNemar test, not adjusted for the number of rows. Would be found: the smallest true "
        "change, in points, that this many pairs show in 80% of runs. Answers to one prompt, and prompts of one "
        "group, count as one where they move together."
    )
    return Table("How often each run declines", columns, lines, note)


def _change(change: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _verdict(sides: Mapping[str, Paired], name: str) -> str:
    said = []
    for side, what in (
        ("lookalike", "harmless requests"),
        ("refuse", "requests it should refuse"),
        ("unlabelled", "requests without a label"),
    ):
        if side not in sides:
            continue
        p = sides[side]
        low, high = p.interval or (0.0, 0.0)
        span = f"95% interval {100 * low:+.1f} to {100 * high:+.1f}"
        if low > 0 or high < 0:
            more, points = "more" if low > 0 else "fewer", abs(100 * (p.difference or 0))
            said.append(f"{name} declines {points:.1f} points {more} of the {what} ({span}).")
        else:
            found = f"; {100 * p.detectable:.1f} points would be found" if p.detectable else ""
            said.append(f"No change is shown on the {what} ({span}{found}).")
    return " ".join(said) or "No answer could be read in both runs."


# --- flips ---


def flips(a: Run, b: Run, both: Sequence[Pair], *, share: bool) -> tuple[FlipGroup, ...]:
    """All flips, what got worse first."""
    groups: dict[tuple[bool | None, bool], list[Flip]] = {}
    for x, y in both:
        now = bool(declined(y.verdict.label))
        if now != declined(x.verdict.label):
            should = y.prompt.should_refuse
            outcome = "now declined" if now else "now answered"
            some = groups.setdefault((should, now), [])
            some.append(_flip(a, b, x, y, outcome, None if should is None else should == now, share=share))
    return tuple(
        FlipGroup(title=title, flips=tuple(groups[key]), total=len(groups[key]))
        for key, title in GROUPS.items()
        if key in groups
    )


def _flip(a: Run, b: Run, x: Record, y: Record, outcome: str, right: bool | None, *, share: bool) -> Flip:
    return Flip(
        id=y.prompt.id,
        condition=y.reply.condition,
        sample=y.reply.sample,
        row=row_of(y.prompt),
        right=right,
        outcome=outcome,
        prompt=None if share else _shorten(y.prompt.text),
        a=_answer(a, x, y.prompt, share=share),
        b=_answer(b, y, y.prompt, share=share),
    )


def _answer(run: Run, record: Record, prompt: Prompt, *, share: bool) -> Answer:
    """An answer with only the text that may be shown: the card's rule."""
    reply, label = record.reply, str(record.verdict.label)
    withheld = run.replies[reply.prompt_id, reply.condition, reply.sample].withheld
    size = (withheld or {}).get("characters", len(reply.content))
    why = None
    if share:
        why = "left out of the shared copy"
    elif prompt.should_refuse and label not in PLAIN_REFUSALS:
        why = f"{size} characters, not shown: it is not a plain refusal"
    elif prompt.should_refuse and row_of(prompt) not in SHOWABLE_REFUSALS:
        why = f"{size} characters, judged a refusal; answers in this category are not shown"
    elif withheld is not None:
        why = f"{size} characters, not kept in the run"
    text = None if why else _shorten(reply.content or reply.provider_refusal or "")
    return Answer(label=label.replace("_", " "), text=text, withheld=why)


def _drawn(some: Sequence[Flip]) -> tuple[Flip, ...]:
    def rank(f: Flip) -> str:
        return hashlib.sha256(f"{f.id}:{f.sample}".encode("utf-8", "surrogatepass")).hexdigest()

    return tuple(some) if len(some) <= FLIPS_SHOWN else tuple(sorted(some, key=rank)[:FLIPS_SHOWN])


def _flip_row(title: str, f: Flip) -> dict[str, Any]:
    row = {"group": title, **asdict(f)}
    return {k: v for k, v in row.items() if v is not None}


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT].rstrip() + " …"


# --- what stands beside the rates ---


def _labels(pairs: Sequence[Pair]) -> list[tuple[tuple[str, str], int]]:
    order = [label.value for label in Label]
    counts = Counter((str(x.verdict.label), str(y.verdict.label)) for x, y in pairs)
    return sorted(counts.items(), key=lambda item: [order.index(label) for label in item[0]])


def _label_table(pairs: Sequence[Pair]) -> Table:
    rows = tuple((x.replace("_", " "), y.replace("_", " "), n) for (x, y), n in _labels(pairs))
    return Table("Verdicts in the first run and in the second", ("first", "second", "answers"), rows)


def _place(record: Record) -> dict[str, Any]:
    return {"id": record.prompt.id, "condition": record.reply.condition, "sample": record.reply.sample}


def _unanswered(run: Run) -> list[str]:
    answered = {key[0] for key in run.verdicts}
    return [p.id for p in run.prompts if p.id not in answered]


def _lists(a: Run, b: Run, joined: Matched) -> tuple[Table, ...]:
    """What could not be compared, by id."""
    lists = {
        "Only in the first run": [r.prompt.id for r in joined.only_a],
        "Only in the second run": [r.prompt.id for r in joined.only_b],
        "Not readable in one of the runs": [y.prompt.id for x, y in joined.pairs if not readable([(x, y)])],
        "Without an answer in the first run": _unanswered(a),
        "Without an answer in the second run": _unanswered(b),
    }
    tables = []
    for title, ids in lists.items():
        if ids:
            more = f"{IDS_SHOWN} of {len(ids)}; all are in diff.json." if len(ids) > IDS_SHOWN else None
            rows = tuple((i,) for i in dict.fromkeys(ids[:IDS_SHOWN]))
            tables.append(Table(f"{title}: {len(ids)}", ("prompt",), rows, more))
    return tuple(tables)


def _missing(joined: Matched) -> list[str]:
    left_out = len(joined.only_a) + len(joined.only_b)
    return [
        f"{left_out} answers stand in one run only ({len(joined.only_a)} in the first, {len(joined.only_b)} in the "
        "second); they enter no comparison and are listed below"
    ] * bool(left_out)


def _settings(a: Run, b: Run) -> list[str]:
    """Settings that differ although the conditions may have one name."""
    one, two = a.conditions, b.conditions
    pairs = [(one[name], two[name]) for name in one if name in two]
    if len(one) == len(two) == 1:
        pairs = [*zip(one.values(), two.values(), strict=True)]
    known = [(x, y) for x, y in pairs if x and y]
    found = dict.fromkeys(line.partition(":")[0] for x, y in known for line in differing(x, y))
    return [f"the two runs were asked with other settings: {', '.join(found)}"] if found else []


def _about(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "judge": run.judge,
        "prompts": {"name": run.prompts.name, "n": len(run.prompts), "hash": run.prompts.hash},
        "answers": len(run.verdicts),
        "conditions": sorted({key[1] for key in run.verdicts}),
        "model": run.provenance.get("model"),
    }
