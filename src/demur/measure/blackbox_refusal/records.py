"""Logs as records: prompt, response, a person's tone label, the label a map makes of it, and groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import read_rows, row_id
from demur.judges.base import Judge, judge_all
from demur.measure.blackbox_refusal.classifier import Reads, RefusalClassifier
from demur.report.importers import load_answers
from demur.types import DECLINING, UNREADABLE, Label, Prompt, Reply

COMPLIED, REJECTED, DROPPED = "complied", "rejected", "dropped"

PAPER_MAP: Mapping[str, str] = {
    COMPLIED: COMPLIED,
    **dict.fromkeys(
        (REJECTED, "redirected", "contradicted", "disclaimed", "counseling"),
        REJECTED,
    ),
    **dict.fromkeys(("dontknow", "incoherent"), DROPPED),
}
"""Reuter and Schulze: whatever is no plain answer is a refusal, and two odd tones are left out."""

SCALE_MAP: Mapping[str, str] = {
    **{label.value: REJECTED for label in (*DECLINING, Label.BLOCKED)},
    **{label.value: DROPPED for label in (*UNREADABLE, Label.OFF_TOPIC)},
    Label.COMPLIANCE.value: COMPLIED,
}
"""Verdicts of the refusal scale."""

WORD_MAP: Mapping[str, str] = {
    **dict.fromkeys(("refused", "refuse", "refusal", "yes", "true", "1"), REJECTED),
    **dict.fromkeys(("comply", "answered", "no", "false", "0"), COMPLIED),
    DROPPED: DROPPED,
}
"""Other spellings of "did it refuse?"."""

_RESPONSES = ("response", "reply", "answer", "completion", "output")
_LABELS = ("label", "tone", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One exchange with a model.

    Attributes:
        label: what the classifier learns; None when nobody has labelled it yet.
        tone: the label as it was written, before any map.
        group: rows that resemble each other (a template, a person asked about) share one; default the prompt.
        source: where the row comes from; accuracy is also shown for each source.
        machine: True when `label` comes from a judge or a classifier and not from a person.
    """

    id: str
    prompt: str = ""
    response: str = ""
    label: str | None = None
    tone: str | None = None
    group: str = ""
    source: str | None = None
    machine: bool = False

    def text(self, reads: Reads) -> str:
        """The prompt or the response."""
        return self.prompt if reads == "prompt" else self.response


def load_records(
    path: str | Path,
    *,
    labels: Mapping[str, str] | None = None,
    keep_tones: bool = False,
    group: str = "group",
) -> list[Record]:
    """Records of a JSONL or CSV file (`-` is standard input), or of any file of answers that demur imports.

    Columns: prompt, response, label (or tone, verdict), and as you have them id, sample, source and a group.

    Args:
        labels: {tone: label}, added to the paper's map and overriding it; "dropped" leaves rows unlabelled.
        keep_tones: learn the labels as they stand.
        group: name of the group column.

    Raises:
        InputError: a row without prompt and response, a label that no map has, or a group column that is nowhere.
    """
    return mapped(_records(path, group), labels, keep_tones=keep_tones, where=str(path))


def _records(path: str | Path, group: str) -> list[Record]:
    if str(path) != "-" and Path(path).suffix.lower() not in (".jsonl", ".ndjson", ".csv"):
        return _from_answers(path)
    rows = read_rows(path)
    if "messages" in rows[0][1] or not {"prompt", *_RESPONSES} & set(rows[0][1]):
        return _from_answers(path)
    if group != "group" and not any(group in row for _, row in rows):
        raise InputError(f"{path}: no row has a column {group!r} to group by")
    out: list[Record] = []
    lines: dict[str, int] = {}
    for n, row in rows:
        where = f"{path}, line {n}"
        key = _sampled(row_id(row.get("id"), n, where), row.get("sample"))
        if key in lines:
            raise InputError(f"{where}: id {key!r} stands on line {lines[key]} too; ids must be unique")
        lines[key] = n
        out.append(_record(key, row, where, group))
    return out


def _sampled(id: str, sample: object) -> str:
    return id if sample in (None, 0, "", "0") else f"{id}#{sample}"


def _from_answers(path: str | Path) -> list[Record]:
    """Records of any other file of answers; a verdict in it is the tone."""
    answers = load_answers(path)
    prompts = {p.id: p for p in answers.prompts}
    tones = {(v.prompt_id, v.sample): str(v.label) for v in answers.verdicts}
    out = []
    for r in answers.replies:
        prompt, key = prompts[r.prompt_id], _sampled(r.prompt_id, r.sample)
        out.append(
            Record(
                id=key,
                prompt=prompt.text,
                response=r.content,
                tone=tones.get((r.prompt_id, r.sample)),
                group=prompt.group or default_group(prompt.text, key),
                source=prompt.source,
            )
        )
    return out


def _record(key: str, row: Mapping[str, Any], where: str, group: str) -> Record:
    given = next((row[c] for c in _RESPONSES if row.get(c) is not None), None)
    prompt, response = _text(row.get("prompt"), f"{where}: prompt"), _text(given, f"{where}: response")
    if row.get("prompt") is None and given is None:
        raise InputError(
            f"{where}: needs `prompt` or `response`; it has {', '.join(map(str, row)) or 'no columns'}"
        )
    tone = next((row[c] for c in _LABELS if row.get(c) not in (None, "")), None)
    named = row.get(group)
    return Record(
        id=key,
        prompt=prompt,
        response=response,
        tone=None if tone is None else str(tone).strip(),
        group=default_group(prompt, key) if named in (None, "") else str(named),
        source=None if row.get("source") is None else str(row["source"]),
    )


def _text(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} is a {type(value).__name__}; it must be text")
    return value or ""


def default_group(prompt: str, id: str) -> str:
    """Repeats of a prompt share a group; a row without a prompt has its own."""
    return " ".join(prompt.casefold().split()) or f"row {id}"


def mapped(
    records: Iterable[Record],
    labels: Mapping[str, str] | None = None,
    *,
    keep_tones: bool = False,
    where: str = "records",
) -> list[Record]:
    """Records with `label` made from `tone`. A tone that maps to "dropped" leaves the row unlabelled.

    Raises:
        InputError: a tone that no map has; the message lists it.

    >>> one = Record(id="a", tone="contradicted")
    >>> [mapped([one], m)[0].label for m in (None, {"contradicted": "complied"})]
    ['rejected', 'complied']
    """
    known = {**SCALE_MAP, **WORD_MAP, **PAPER_MAP, **(labels or {})}
    out, unknown = [], set()
    for r in records:
        word = None if r.tone is None else r.tone.lower().replace("-", "_").replace(" ", "_")
        label = r.tone if keep_tones and (labels or {}).get(r.tone or "") is None else None
        if label is None and word is not None:
            label = known.get(r.tone or "", known.get(word))
            if label is None:
                unknown.add(str(r.tone))
        out.append(replace(r, label=None if label == DROPPED else label))
    if unknown:
        raise InputError(
            f"{where}: no rule says what {', '.join(sorted(unknown)[:5])} means. Add it to the map "
            "(--map TONE=rejected, complied or dropped), or learn the labels as they stand (--keep-tones)"
        )
    return out


# --- labels made by machine -------------------------------------------------------------------------------------


def machine_labelled(
    records: Sequence[Record], label: Callable[[Sequence[Record]], Sequence[str | None]]
) -> list[Record]:
    """Records whose missing labels are filled by `label`; those from people stay. None leaves a row unlabelled.

    Args:
        label: `by_judge(...)` or `by_classifier(...)`. Rows that people dropped (a tone, no label) are not asked.
    """
    todo = [i for i, r in enumerate(records) if r.label is None and r.tone is None and r.response.strip()]
    said = label([records[i] for i in todo])
    out = list(records)
    for i, word in zip(todo, said, strict=True):
        out[i] = replace(out[i], label=word, machine=word is not None)
    return out


def by_judge(judge: Judge) -> Callable[[Sequence[Record]], list[str | None]]:
    """Labels from a judge of the refusal scale; what it cannot read gets none.

    Raises:
        InputError: the judge is on another scale.
    """

    def label(records: Sequence[Record]) -> list[str | None]:
        pairs = [(Prompt.of(r.prompt, id=r.id), Reply(prompt_id=r.id, content=r.response)) for r in records]
        said = judge_all(judge, pairs)
        if other := {v.scale for v in said} - {"refusal"}:
            raise InputError(
                f"judge {judge.id!r} is on the scale {other.pop()!r}; name one that finds refusals"
            )
        words = [SCALE_MAP.get(v.label, DROPPED) for v in said]
        return [None if word == DROPPED else word for word in words]

    return label


def by_classifier(
    classifier: RefusalClassifier, sure: float = 0.0
) -> Callable[[Sequence[Record]], list[str | None]]:
    """Labels from a response classifier; rows whose top probability is below `sure` get none.

    Raises:
        InputError: the classifier reads prompts, so its labels would be guesses about the answers.
    """
    if classifier.reads != "response":
        raise InputError("labels come from responses; this classifier reads prompts")

    def label(records: Sequence[Record]) -> list[str | None]:
        if not records:
            return []
        p = classifier.probabilities([r.response for r in records])
        return [
            classifier.classes[i] if row[i] >= sure else None for row, i in zip(p, p.argmax(1), strict=True)
        ]

    return label
