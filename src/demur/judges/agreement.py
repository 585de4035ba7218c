"""How far each judge agrees with people, per stratum, and the packaged table of it.

`agreement.json` is written by `demur judge --validate --out FILE` from the sets of `labelled_sets` and read by
`measured_error`; a test recomputes it wherever the sets are at hand. The rows of other files, say of a judge that
asks a model, are added for a while by `adding`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from demur import stats
from demur.errors import DataUnavailable, InputError
from demur.files import from_row, parse_json, read_text, write_atomic
from demur.judges.base import Judge, Progress, Scale, judge_all, positive
from demur.judges.labelled_sets import DECLINED, LABELLED_SETS, TUNED, LabelledReply, LabelledSet
from demur.types import (
    DECLINING,
    RESPOND,
    SCHEMA_VERSION,
    UNREADABLE,
    Label,
    Prompt,
    Rate,
    Reply,
    Table,
    Verdict,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One judge against people in one stratum; positive = any refusal, on the harm scale = harmful.

    Attributes:
        stratum: "all", or a part of the set: "safe", "unsafe", a model's name, "model, safe", a source.
        definition: what the people took for a refusal, or for harm.
        n_pos, n_neg: positives and negatives by the human label among the answers that the judge could read.
        unread: answers left out because the judge gave no readable label.
        dropped: answers missing in the set.
        sensitivity, specificity: with 95 % Wilson intervals; None where there is no such answer.
        kappa: Cohen's; None where people used one label only.
        macro_kappa: mean of the models' kappas, in the row "all" of a set of several models.
        items_per_second: of processor time, judging the whole set where the table was written, in the row "all".
        language: of the material. note: what else to know before quoting the row.
    """

    judge: str
    dataset: str
    stratum: str
    definition: str
    n_pos: int
    n_neg: int
    unread: int
    dropped: int
    sensitivity: float | None
    sensitivity_interval: tuple[float, float] | None
    specificity: float | None
    specificity_interval: tuple[float, float] | None
    accuracy: float | None
    kappa: float | None
    macro_kappa: float | None = None
    items_per_second: int | None = None
    language: str = "en"
    scale: Scale = "refusal"
    note: str = ""


def measure_agreement(
    judge: Judge,
    items: Iterable[LabelledReply],
    *,
    dataset: str,
    definition: str,
    note: str = "",
    scale: Scale = "refusal",
    refusals: frozenset[Label] = DECLINED,
    language: str = "en",
    clock: Callable[[], float] = time.process_time,
    progress: Progress | None = None,
) -> list[Agreement]:
    """Compare a judge with human labels, one row per stratum in order of first appearance.

    Args:
        items: prompts of one `group` are one draw for an interval.
        scale: what people labelled. refusals: labels of a judge of refusals that count as refusal.
        clock: seconds of what the speed counts; `time.perf_counter` for a judge that waits for an endpoint.

    Raises:
        InputError: a judge of the other scale.

    >>> from demur.judges import get
    >>> item = LabelledReply(Prompt.of("Hi"), Reply(prompt_id="prompt", content="Sorry, I can't."), True)
    >>> measure_agreement(get("rules/demur-v1"), [item], dataset="mine", definition="mine")[0].sensitivity
    1.0
    """
    every = list(items)
    pairs = [(i.prompt, i.reply) for i in every if i.reply is not None]
    start = clock()
    verdicts = judge_all(judge, pairs, progress)
    seconds = max(clock() - start, 1e-6)
    if other := next((v.scale for v in verdicts if v.scale != scale), None):
        raise InputError(f"{judge.id} judges {other}, and people labelled {scale} in {dataset}")
    given = iter(verdicts)
    found: dict[str, list[tuple[LabelledReply, bool | None]]] = {}
    for item in every:
        said = None if item.reply is None else _said(next(given), refusals)
        for stratum in item.strata:
            found.setdefault(stratum, []).append((item, said))
    about: dict[str, Any] = {
        "judge": judge.id,
        "dataset": dataset,
        "definition": definition,
        "language": language,
        "scale": scale,
        "note": note,
    }
    rows = {s: _row(about, s, of_one) for s, of_one in found.items()}
    kappas = [rows[m].kappa for m in {i.model for i in every if i.model is not None} if m in rows]
    if "all" in rows:
        speed = round(float(f"{len(pairs) / seconds:.2g}")) if pairs else None
        macro = [k for k in kappas if k is not None]
        mean = _rounded(sum(macro) / len(macro)) if len(macro) > 1 else None
        rows["all"] = dataclasses.replace(rows["all"], macro_kappa=mean, items_per_second=speed)
    return list(rows.values())


def _said(verdict: Verdict, refusals: frozenset[Label]) -> bool | None:
    """Yes or no of a verdict, None where it was not read; `refusals` is yes on the refusal scale."""
    if verdict.scale == "harm" or verdict.label in UNREADABLE:
        return positive(verdict)
    return verdict.label in refusals


def _row(
    about: dict[str, Any], stratum: str, found: Sequence[tuple[LabelledReply, bool | None]]
) -> Agreement:
    read = [(item, said) for item, said in found if said is not None]
    yes = [(said, item) for item, said in read if item.positive]
    no = [(not said, item) for item, said in read if not item.positive]
    se, sp = (_share([(right, i.prompt) for right, i in some]) for some in (yes, no))
    n_pos, n_neg = len(yes), len(no)
    # where people used one label only, kappa is 0 whatever the judge says: undefined rather than bad
    both = n_pos and n_neg
    kappa = stats.cohen_kappa([s for _, s in read], [i.positive for i, _ in read]) if both else None
    return Agreement(
        **about,
        stratum=stratum,
        n_pos=n_pos,
        n_neg=n_neg,
        unread=sum(said is None and item.reply is not None for item, said in found),
        dropped=sum(item.reply is None for item, _ in found),
        sensitivity=_rounded(se.value),
        sensitivity_interval=_interval(se),
        specificity=_rounded(sp.value),
        specificity_interval=_interval(sp),
        accuracy=_rounded((se.k + sp.k) / len(read) if read else None),
        kappa=_rounded(kappa),
    )


def _share(right: Sequence[tuple[bool, Prompt]]) -> Rate:
    hits = [hit for hit, _ in right]
    found = stats.rate(sum(hits), len(hits))
    if not any(p.group for _, p in right):
        return found
    clusters = [f"group:{p.group}" if p.group else f"id:{p.id}" for _, p in right]
    interval = stats.share_interval(hits, clusters)
    return found if interval is None else dataclasses.replace(found, low=interval[0], high=interval[1])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)


def _interval(r: Rate) -> tuple[float, float] | None:
    return None if r.low is None or r.high is None else (round(r.low, 4), round(r.high, 4))


def token_text_agreement(replies: Iterable[Reply], verdicts: Iterable[Verdict]) -> Rate:
    """Share of replies whose text does what their control token announced.

    A refuse category goes with a declining text, `respond` with any other.

    Replies without a control token are left out; a missing, blocked or unreadable verdict counts as `unread`.
    The verdicts must come from a judge of text, one per (prompt, condition, sample).
    """
    by_key = {(v.prompt_id, v.condition, v.sample): v for v in verdicts}
    agree = n = unread = 0
    for r in replies:
        if r.control_token is None:
            continue
        v = by_key.get((r.prompt_id, r.condition, r.sample))
        if v is None or v.label in UNREADABLE or v.label == Label.BLOCKED:
            unread += 1
            continue
        n += 1
        agree += (r.control_token != RESPOND) == (v.label in DECLINING)
    judges = sorted({v.judge for v in by_key.values()})
    return stats.rate(agree, n, judge=" + ".join(judges) or None, unread=unread)


# --- the packaged table, and rows beside it ---


def measured_error(judge_id: str, dataset: str | None = None) -> list[Agreement]:
    """The agreement of a judge with people: its rows per data set and stratum; [] where none was measured.

    Rows of `adding` stand before the packaged ones, and replace none of them.

    >>> measured_error("rules/demur-v1", "xstest")[0].stratum
    'all'
    """
    packaged = [r for r in _packaged() if r.judge == judge_id]
    known = {_key(r) for r in packaged}
    beside = [r for r in added() if r.judge == judge_id and _key(r) not in known]
    return [r for r in (*beside, *packaged) if dataset in (None, r.dataset)]


_added: ContextVar[tuple[Agreement, ...]] = ContextVar("added", default=())


@contextmanager
def adding(rows: Iterable[Agreement]) -> Iterator[None]:
    """Within the block `measured_error` knows these rows, too; of two blocks the outer one counts first.

    >>> mine = Agreement(judge="mine", dataset="d", stratum="all", definition="x", n_pos=9, n_neg=0, unread=0,
    ...     dropped=0, sensitivity=1.0, sensitivity_interval=(0.7, 1.0), specificity=None,
    ...     specificity_interval=None, accuracy=1.0, kappa=None)
    >>> with adding([mine]):
    ...     len(measured_error("mine"))
    1
    """
    both: dict[tuple[str, str, str], Agreement] = {}
    for row in (*added(), *rows):
        both.setdefault(_key(row), row)
    token = _added.set(tuple(both.values()))
    try:
        yield
    finally:
        _added.reset(token)


def added() -> tuple[Agreement, ...]:
    """The rows of all blocks of `adding` that are open."""
    return _added.get()


def others_added(judge_id: str) -> str:
    """Whose rows were added beside this judge's, to go with what is missing: " (the rows given are of ...)"."""
    names = ", ".join(sorted({r.judge for r in added()} - {judge_id}))
    return f" (the rows given are of {names})" if names else ""


def _key(row: Agreement) -> tuple[str, str, str]:
    return row.judge, row.dataset, row.stratum


@cache
def _packaged() -> tuple[Agreement, ...]:
    file = resources.files("demur.judges").joinpath("agreement.json")
    return tuple(_rows(json.loads(file.read_text("utf-8")), "agreement.json"))


_WRITTEN_BY = "It takes what demur judge --validate --judge ID --judge-model MODEL --out FILE writes"


def read(path: str | Path) -> list[Agreement]:
    """Rows that `write` wrote.

    Raises:
        InputError: no such file, another kind of file, no rows, or shares and counts that cannot be.
    """
    text = read_text(path)
    try:
        rows = _rows(parse_json(text, str(path)), str(path))
    except InputError as e:
        raise InputError(f"{e}. {_WRITTEN_BY}") from None
    if not rows:
        raise InputError(f"{path}: holds no rows: the judge read nothing of any set")
    return rows


def _rows(raw: Any, where: str) -> list[Agreement]:
    sets, rows = (raw.get("sets"), raw.get("rows")) if isinstance(raw, dict) else (None, None)
    if not isinstance(sets, dict) or not isinstance(rows, list):
        raise InputError(f"{where}: holds no measured agreement of judges (`sets` and `rows`)")
    version, found = {"schema_version": raw.get("schema_version", SCHEMA_VERSION)}, []
    for n, row in enumerate(rows, 1):
        here = f"{where}, row {n}"
        about = sets.get(str(row.get("dataset"))) if isinstance(row, dict) else None
        if not isinstance(about, dict):
            raise InputError(f"{here}: names none of the data sets in `sets`")
        found.append(from_row(Agreement, {**version, **about, **row}, here))
        _check_shares(found[-1], here)
    return found


def _check_shares(row: Agreement, where: str) -> None:
    """A share without answers, or answers without a share, would correct a rate by a made-up error."""
    for side, share, n in (
        ("sensitivity", row.sensitivity, row.n_pos),
        ("specificity", row.specificity, row.n_neg),
    ):
        if n < 0 or (share is None) != (n == 0) or not 0 <= (share or 0) <= 1:
            raise InputError(f"{where}: {side} {share} of {n} answers cannot be")


def validate(
    judges: Iterable[Judge],
    *,
    sets: Sequence[LabelledSet] = LABELLED_SETS,
    missing: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.process_time,
    progress: Progress | None = None,
) -> list[Agreement]:
    """Measure judges on the human-labelled sets of their scale; one that reads nothing of a set has no row there.

    `rules/demur-v1`, and the classifier that takes its phrases, are measured on the half of a set that it was not
    tuned on.

    Args:
        missing: receives the message about a set that is not at hand, which is then skipped; None raises.

    Raises:
        DataUnavailable: a set is not at hand (`DEMUR_DATA`, `demur data`), or none is.
    """
    loaded: list[tuple[LabelledSet, list[LabelledReply]]] = []
    for one in sets:
        try:
            loaded.append((one, list(one.items())))
        except DataUnavailable as e:
            if missing is None:
                raise
            missing(f"{one.name} is skipped: {e}")
    if not loaded:
        raise DataUnavailable("none of the human-labelled sets is at hand, so no judge can be measured")
    rows: list[Agreement] = []
    for judge in judges:
        scale = getattr(judge, "scale", "refusal")
        for one, items in loaded:
            if one.scale != scale:
                continue
            half = judge.id in TUNED and bool(one.tuned)
            found = measure_agreement(
                judge,
                [i for i in items if not (half and i.seen)],
                dataset=one.name,
                definition=one.definition,
                note="; ".join(filter(None, (one.tuned if half else "", one.note))),
                scale=scale,
                refusals=one.refusals,
                language=one.language,
                clock=clock,
                progress=progress,
            )
            rows += [r for r in found if r.n_pos + r.n_neg]
    return rows


def write(rows: Sequence[Agreement], path: str | Path) -> None:
    """Write rows as the JSON that `measured_error` reads."""
    shared, optional = ("definition", "language", "scale"), ("macro_kappa", "items_per_second", "note")
    sets = {r.dataset: {k: getattr(r, k) for k in shared} for r in rows}
    kept = [
        {k: v for k, v in dataclasses.asdict(r).items() if k not in shared and (v or k not in optional)}
        for r in rows
    ]
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in kept)
    head = json.dumps(sets, ensure_ascii=False, indent=1)
    write_atomic(path, f'{{"schema_version": {SCHEMA_VERSION}, "sets": {head}, "rows": [\n{lines}\n]}}\n')


_YES_NO: dict[Scale, tuple[str, str]] = {
    "refusal": ("refusals found", "answers found"),
    "harm": ("harmful found", "harmless found"),
}


def tables(rows: Sequence[Agreement]) -> tuple[Table, ...]:
    """Rows as tables for people, one for each scale."""
    by_scale = {scale: [r for r in rows if r.scale == scale] for scale in _YES_NO}
    return tuple(_table(some, _YES_NO[scale]) for scale, some in by_scale.items() if some)


def _table(rows: Sequence[Agreement], found: tuple[str, str]) -> Table:
    columns = ("judge", "set", "stratum", *found, "kappa", "macro", "unread", "no text", "per s")
    cells = tuple(
        (
            r.judge,
            r.dataset,
            r.stratum,
            _shown(r.sensitivity, r.sensitivity_interval, r.n_pos),
            _shown(r.specificity, r.specificity_interval, r.n_neg),
            r.kappa,
            r.macro_kappa,
            r.unread,
            r.dropped,
            r.items_per_second,
        )
        for r in rows
    )
    note = (
        "Shares of what people called so that the judge calls so too, with 95% intervals. No text: labelled "
        "answers that the set does not hold."
    )
    return Table("Agreement with people", columns, cells, note)


def _shown(value: float | None, interval: tuple[float, float] | None, n: int) -> str:
    if value is None or interval is None:
        return "–"
    return f"{value:.1%} [{100 * interval[0]:.1f}–{100 * interval[1]:.1f}] of {n}"


def material_warning(judge_id: str, prompts: Iterable[Prompt]) -> str | None:
    """What to say when a judge was measured on other material or another language than these prompts.

    None when it was measured on sets that the prompts come from, in their language.

    >>> material_warning("rules/demur-v1", [Prompt.of("Hi", source="xstest")]) is None
    True
    """
    rows = [r for r in measured_error(judge_id) if r.stratum == "all"]
    if not rows:
        others = others_added(judge_id)
        return f"{judge_id} has not been measured against people{others}, so nothing corrects its rates."
    every = list(prompts)
    known, languages = {r.dataset for r in rows}, {r.language for r in rows}
    spoken = Counter(p.language for p in every if p.language.split("-")[0] not in languages)
    other = Counter(p.source or "no source" for p in every if (p.source or "").split("/")[0] not in known)
    said = []
    if other:
        names = ", ".join(f"{n} from {name}" for name, n in other.most_common(3))
        rest = other.total() - sum(n for _, n in other.most_common(3))
        names += f", {rest} from others" if rest else ""
        said.append(
            f"{judge_id} was measured on {', '.join(r.dataset for r in rows)}, not on this material ({names})"
        )
    if spoken:
        names = ", ".join(f"{n} {name}" for name, n in spoken.most_common(5))
        said.append(f"it was measured in {', '.join(sorted(languages))} only, and these prompts hold {names}")
    if not said:
        return None
    return (
        "; ".join(said) + ". It may err differently here: label some answers (--sample-for-labels) to know."
    )
