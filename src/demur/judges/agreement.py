"""How far each judge agrees with people, per stratum, and the packaged table of it.

`agreement.json` is written by `write()` from human-labelled public sets and read by `measured_error`; a
test recomputes it wherever the sets are at hand. `rules/demur-v1` was tuned on the XSTest answers whose id
hashes to an even byte; every judge is reported on the other half, so the figures are comparable and its own
are unseen. On the second set (gpt-3.5 answers of 2023) single errors were looked at in the even half, but
the totals of both halves were watched while tuning: its rows say so in `note`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from demur import data, stats
from demur.files import iter_jsonl, write_atomic
from demur.judges.base import Judge
from demur.types import DECLINING, RESPOND, SCHEMA_VERSION, UNREADABLE, Label, Prompt, Rate, Reply, Verdict

DECLINED = DECLINING | {Label.BLOCKED}
"""Labels that count as "any refusal" when a judge is compared with a two-way human label."""

XSTEST_MODELS = ("gpt4", "llama2new", "mistralinstruct")
XSTEST_DEFINITION = (
    "XSTest, final human label: full or partial refusal against full compliance; arguing against a harmful "
    "premise is a refusal; completions to unsafe requests that were not fully refused are not in our copy"
)
BLACKBOX_DEFINITION = "hand labels of gpt-3.5 answers: rejected against complied; tones between are left out"
BLACKBOX_NOTE = "totals over this half, too, were watched while rules/demur-v1 was tuned"


@dataclass(frozen=True, slots=True)
class Agreement:
    """One judge against people in one stratum; positive = any refusal.

    Attributes:
        stratum: "all", "safe", "unsafe", a model's name, or "model, safe".
        definition: what the people took for a refusal.
        n_pos, n_neg: refusals and compliances by the human label among the answers that the judge could read.
        unread: answers left out because the judge gave no readable label.
        dropped: answers missing in the set.
        sensitivity, specificity: with 95 % Wilson intervals; None where there is no such answer.
        kappa: Cohen's; None where people used one label only.
        note: what else to know before quoting the row.
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
    note: str = ""


@dataclass(frozen=True, slots=True)
class LabelledReply:
    """A reply that a person has labelled; None where the set dropped its text (counted, not judged)."""

    prompt: Prompt
    reply: Reply | None
    declined: bool
    strata: tuple[str, ...] = ("all",)


def measure_agreement(
    judge: Judge, items: Iterable[LabelledReply], *, dataset: str, definition: str, note: str = ""
) -> list[Agreement]:
    """Compare a judge with human labels, one row per stratum in order of first appearance.

    >>> from demur.judges import get
    >>> item = LabelledReply(Prompt.of("Hi"), Reply(prompt_id="prompt", content="Sorry, I can't."), True)
    >>> measure_agreement(get("rules/demur-v1"), [item], dataset="mine", definition="mine")[0].sensitivity
    1.0
    """
    pairs: dict[str, list[tuple[bool | None, bool]]] = {}
    dropped: dict[str, int] = {}
    for item in items:
        label = judge.judge(item.prompt, item.reply).label if item.reply else None
        said = None if label in UNREADABLE else label in DECLINED
        for stratum in item.strata:
            pairs.setdefault(stratum, [])
            dropped[stratum] = dropped.get(stratum, 0) + (item.reply is None)
            if item.reply is not None:
                pairs[stratum].append((said, item.declined))
    rows = [_row(judge.id, dataset, s, definition, p, dropped[s]) for s, p in pairs.items()]
    return [dataclasses.replace(r, note=note) for r in rows]


def _row(
    judge: str,
    dataset: str,
    stratum: str,
    definition: str,
    pairs: Sequence[tuple[bool | None, bool]],
    dropped: int,
) -> Agreement:
    read = [(said, true) for said, true in pairs if said is not None]
    n_pos = sum(true for _, true in read)
    n_neg = len(read) - n_pos
    se = stats.rate(sum(said and true for said, true in read), n_pos)
    sp = stats.rate(sum(not said and not true for said, true in read), n_neg)
    # where people used one label only, kappa is 0 whatever the judge says: undefined rather than bad
    kappa = (
        stats.cohen_kappa([said for said, _ in read], [true for _, true in read]) if n_pos and n_neg else None
    )
    return Agreement(
        judge=judge,
        dataset=dataset,
        stratum=stratum,
        definition=definition,
        n_pos=n_pos,
        n_neg=n_neg,
        unread=len(pairs) - len(read),
        dropped=dropped,
        sensitivity=_rounded(se.value),
        sensitivity_interval=_interval(se),
        specificity=_rounded(sp.value),
        specificity_interval=_interval(sp),
        accuracy=_rounded((se.k + sp.k) / len(read) if read else None),
        kappa=_rounded(kappa),
    )


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


def measured_error(judge_id: str, dataset: str | None = None) -> list[Agreement]:
    """The packaged agreement of a judge with people: its rows per data set and stratum; [] where none was
    measured.

    >>> measured_error("rules/demur-v1", "xstest")[0].stratum
    'all'
    """
    raw = json.loads(resources.files("demur.judges").joinpath("agreement.json").read_text("utf-8"))
    rows = (_from_json(row) for row in raw["rows"])
    return [r for r in rows if r.judge == judge_id and dataset in (None, r.dataset)]


def _from_json(row: dict[str, Any]) -> Agreement:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Agreement(**fields)


def validate() -> list[Agreement]:
    """Recompute the packaged table from the human-labelled sets (`DEMUR_DATA`).

    Raises:
        DataUnavailable: a set is not at hand.
    """
    from demur.judges.rules import CyberSecEvalRule, DemurRule, XSTestRule

    xstest, blackbox = list(xstest_items()), list(blackbox_items())
    rows = []
    for judge in (CyberSecEvalRule(), DemurRule(), XSTestRule()):
        note = BLACKBOX_NOTE if isinstance(judge, DemurRule) else ""
        rows += measure_agreement(judge, xstest, dataset="xstest", definition=XSTEST_DEFINITION)
        rows += measure_agreement(
            judge, blackbox, dataset="blackbox-refusal", definition=BLACKBOX_DEFINITION, note=note
        )
    return rows


def write(path: str | Path) -> None:
    """Write `validate()` as the JSON that `measured_error` reads."""
    rows = ",\n".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in validate())
    write_atomic(path, f'{{"schema_version": {SCHEMA_VERSION}, "rows": [\n{rows}\n]}}\n')


def held_out(id: str) -> bool:
    """Whether an item is in the half that no rule was tuned on: first byte of sha256(id) is odd."""
    return hashlib.sha256(id.encode()).digest()[0] % 2 == 1


def xstest_items(models: Sequence[str] = XSTEST_MODELS) -> Iterator[LabelledReply]:
    """Held-out human-labelled XSTest answers, stratified by request (safe, unsafe) and model."""
    for model in models:
        for row in iter_jsonl(data.get("xstest", f"human_labels_{model}.jsonl")):
            if held_out(row["id"]):
                kind = "unsafe" if row["request_is_unsafe"] else "safe"
                yield _item(
                    f"{model}/{row['id']}",
                    row["prompt"],
                    row["completion"],
                    declined=not row["final_label"].startswith("1_"),
                    strata=("all", kind, model, f"{model}, {kind}"),
                )


def blackbox_items() -> Iterator[LabelledReply]:
    """Held-out hand-labelled gpt-3.5 answers, rejected or complied, stratified by source."""
    for row in iter_jsonl(data.get("blackbox-refusal", "all_hand_labeled_redacted.jsonl")):
        if held_out(str(row["row"])) and row["tone"] in ("rejected", "complied"):
            yield _item(
                str(row["row"]),
                row["prompt"] or "",
                row["response"] or None,
                declined=row["tone"] == "rejected",
                strata=("all", row["source"]),
            )


def _item(
    id: str, text: str, content: str | None, *, declined: bool, strata: tuple[str, ...]
) -> LabelledReply:
    reply = None if content is None else Reply(prompt_id=id, content=content, finish_reason="stop")
    return LabelledReply(Prompt.of(text, id=id), reply, declined, strata)
