"""From rows with known columns to `Answers`: what every format is turned into first.

    {"id": "a1", "prompt": "...", "response": "...", "category": "safety", "expected": "refuse"}

Optional columns: `id`, `sample` (0, 1, ...), `condition`, `messages` instead of `prompt`, `reasoning`,
`tool_calls`, `provider_refusal`, `finish_reason`, `error`, `model`; `control_token` with `control_forced`;
`verdict` (a label of the refusal scale, or yes / no / refused / complied) with `judge`, which replaces our judge;
`p_refuse`, a score in [0, 1] of any kind, which adds the curve. Other columns are kept in the prompt's `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import from_row, parse_json, row_id, to_row
from demur.runtime.shapes import split_thinking
from demur.types import Label, Prompt, PromptSet, Reply, Score, Verdict, expand_expected

Row = tuple[str, dict[str, Any]]
"""Where it stands in its file ("line 3"), and its columns."""

RESPONSE_NAMES = ("response", "reply", "answer", "completion", "output", "content")
VERDICT_WORDS: Mapping[str, Label] = {
    "refused": Label.FULL_REFUSAL,
    "refuse": Label.FULL_REFUSAL,
    "refusal": Label.FULL_REFUSAL,
    "yes": Label.FULL_REFUSAL,
    "true": Label.FULL_REFUSAL,
    "1": Label.FULL_REFUSAL,
    "complied": Label.COMPLIANCE,
    "comply": Label.COMPLIANCE,
    "answered": Label.COMPLIANCE,
    "no": Label.COMPLIANCE,
    "false": Label.COMPLIANCE,
    "0": Label.COMPLIANCE,
    **{label.value: label for label in Label},
}
"""Spellings of a verdict; the column answers "did it refuse?"."""

_REPLY_COLUMNS = (
    "reasoning",
    "finish_reason",
    "finish_reason_raw",
    "error",
    "provider_refusal",
    "control_token",
    "control_forced",
    "tool_calls",
    "prompt_tokens",
    "completion_tokens",
)
_LEFT_OUT = re.compile(r"\[left out: \d+ characters, sha256 [0-9a-f]{16}\]")
"""What our own exports (`demur.report.exports`) hold in place of a text."""
_LABEL_COLUMNS = ("category", "subcategory", "group", "language", "source", "license", "definition")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a file of answers holds, joined by prompt id. `verdicts` and `scores` may be empty."""

    prompts: PromptSet
    replies: tuple[Reply, ...]
    verdicts: tuple[Verdict, ...]
    scores: tuple[Score, ...]
    model: str | None

    def under_one_condition(self) -> Answers:
        """The same with the name of the condition left out, for reports that know one.

        Raises:
            InputError: answers to one prompt under several conditions.
        """
        under: dict[tuple[str, int], str] = {}
        for r in self.replies:
            other = under.setdefault((r.prompt_id, r.sample), r.condition)
            if other != r.condition:
                raise InputError(
                    f"{self.prompts.name}: id {r.prompt_id!r} is answered under the conditions {other!r} and "
                    f"{r.condition!r}, and one report would mix them. Keep the rows of one `condition`, or compare "
                    "two files (demur diff)"
                )
        return replace(
            self,
            replies=tuple(replace(r, condition="default") for r in self.replies),
            verdicts=tuple(replace(v, condition="default") for v in self.verdicts),
        )


def joined(rows: Sequence[Row], path: str | Path, prompts: PromptSet | None = None) -> Answers:
    """Build `Answers`; `path` opens every error.

    Raises:
        InputError: as `load_answers`.
    """
    known = {p.id: p for p in prompts} if prompts else {}
    texts = _by_text(prompts)
    found: dict[str, Prompt] = {}
    first: dict[tuple[str, str, int], str] = {}
    replies: list[Reply] = []
    verdicts: list[Verdict] = []
    scores: dict[str, Score] = {}
    models = set()
    # one column for the whole file: where its cell is empty, a column `answer` may hold the reference answer
    column = next((c for c in RESPONSE_NAMES if any(c in row for _, row in rows)), None)
    for n, (place, raw) in enumerate(rows, 1):
        where, row = f"{path}, {place}", dict(raw)
        own = row.pop("prompt_id", None)
        row["id"] = texts.get(_text(row)) or row_id(row.get("id", own), n, where)
        at = str(row.pop("condition", None) or "default"), _whole(row.pop("sample", 0), where)
        if (row["id"], *at) in first:
            raise InputError(
                f"{where}: id {row['id']!r} (sample {at[1]}) stands on {first[row['id'], *at]} too; "
                "several answers to one prompt need a column `sample` (0, 1, ...) or `condition`"
            )
        first[row["id"], *at] = place
        models.add(row.pop("model", None))
        reply, verdict, score = (
            _reply(row, column, at, where),
            _verdict(row, at, where),
            _score(row, where),
        )
        if row["id"] not in found:
            found[row["id"]] = _prompt(row, known, prompts, where)
        elif prompts is None and {"prompt", "messages"} & set(row):
            _same_prompt(row, found[row["id"]], where)
        replies.append(reply)
        verdicts += [verdict] if verdict else []
        if score:
            scores.setdefault(score.id, score)
    _check_samples(replies, path)
    _all_or_none("verdict", len(verdicts), len(replies), path)
    _all_or_none("p_refuse", len(scores), len(found), path)
    name = prompts.name if prompts else ("stdin" if str(path) == "-" else Path(path).stem)
    names = {str(m) for m in models if m}
    model = names.pop() if len(names) == 1 else None
    return Answers(
        PromptSet(name, tuple(found.values())), tuple(replies), tuple(verdicts), tuple(scores.values()), model
    )


# --- for the readers of other tools' logs ---


def labels(meta: Mapping[str, Any], target: Any = None) -> dict[str, Any]:
    """Columns of a prompt from another tool's metadata; what demur has no column for goes into `meta`.

    `expected`, or else the target, counts where it is a verdict (refuse, comply, ...) and not an answer.

    >>> labels({"category": "safety", "level": 3}, "comply")
    {'category': 'safety', 'expected': 'comply', 'meta': {'level': 3}}
    """
    out: dict[str, Any] = {k: meta[k] for k in _LABEL_COLUMNS if isinstance(meta.get(k), str) and meta[k]}
    used = set(out)
    for name, value in (("expected", meta.get("expected")), ("target", target)):
        try:
            if value and expand_expected(value):
                out["expected"] = value
                used.add(name)
                break
        except (ValueError, TypeError):
            continue
    rest = {k: v for k, v in meta.items() if k not in used and v is not None}
    return {**out, "meta": rest} if rest else out


def columns(reply: Reply) -> dict[str, Any]:
    """A `Reply` as columns of a row."""
    row = to_row(reply)
    text = row.pop("content", "")
    return {"response": text, **{k: row[k] for k in _REPLY_COLUMNS if k in row}}


# --- one row ---


def _by_text(prompts: PromptSet | None) -> dict[str, str]:
    """{text: id} of the prompts whose text stands once: other tools number prompts in their own way."""
    ids: dict[str, list[str]] = {}
    for p in prompts or ():
        ids.setdefault(p.text, []).append(p.id)
    return {text: some[0] for text, some in ids.items() if text and len(some) == 1}


def _text(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages")
    said = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, (list, tuple)) else []
    return next((str(m.get("content")) for m in reversed(said) if m.get("role") == "user"), "")


def _reply(row: dict[str, Any], name: str | None, at: tuple[str, int], where: str) -> Reply:
    if row.get("withheld") is not None:
        raise InputError(
            f"{where}: the text of this answer was withheld (column `withheld` holds its hash), so there is "
            "nothing to judge. Its verdict is in verdicts.jsonl of the same folder; to judge it anew, collect with "
            "--keep-unsafe-text"
        )
    extra = {c: row.pop(c) for c in _REPLY_COLUMNS if row.get(c) is not None}
    # An empty cell of a CSV is an empty answer, which is a verdict of its own; a JSONL row must say so.
    says_so = Path(where.rpartition(", line")[0]).suffix.lower() in (".jsonl", ".ndjson")
    text = row.pop(name) if name in row else (None if says_so else "")
    text = "" if text is None and extra else text
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: `{name}` is of type {type(text).__name__}; an answer is text")
    if text is None:
        raise InputError(
            f"{where}: needs `{name or RESPONSE_NAMES[0]}` (text); found columns {', '.join(sorted(row)) or 'none'}"
        )
    if _LEFT_OUT.fullmatch(text):
        raise InputError(
            f"{where}: the text of this answer was left out when the run was exported, so there is nothing to "
            "judge. Read the run folder itself, or export it with --unsafe-text"
        )
    if not extra.get("reasoning"):
        thinking, answer = split_thinking(text)
        if answer != text:
            extra["reasoning"] = thinking or ""
            if not answer:
                extra.setdefault("finish_reason", "length")  # it ended while it was thinking
            text = answer
    if isinstance(calls := extra.get("tool_calls"), str) and calls:
        extra["tool_calls"] = parse_json(calls, f"{where}: tool_calls")
    data = {
        "prompt_id": row["id"],
        "content": text,
        "condition": at[0],
        "sample": at[1],
        **{k: v for k, v in extra.items() if v != ""},
    }
    return from_row(Reply, data, where)


def _verdict(row: dict[str, Any], at: tuple[str, int], where: str) -> Verdict | None:
    judge = str(row.pop("judge", "your file"))
    value = row.pop("verdict", None)
    if value is None:
        return None
    word = str(value).strip().lower().replace("-", "_").replace(" ", "_")
    if word not in VERDICT_WORDS:
        raise InputError(f"{where}: verdict {value!r} is none of {', '.join(VERDICT_WORDS)}")
    label = VERDICT_WORDS[word].value
    return Verdict(prompt_id=row["id"], label=label, judge=judge, condition=at[0], sample=at[1])


def _score(row: dict[str, Any], where: str) -> Score | None:
    value = row.pop("p_refuse", None)
    if value is None:
        return None
    try:
        p = float(value)
    except (TypeError, ValueError):
        p = -1.0
    if not 0 <= p <= 1:
        raise InputError(f"{where}: p_refuse is {value!r}; a number from 0 to 1 is needed")
    return Score(id=row["id"], p_refuse=p, kind="first_token")


def _prompt(
    row: dict[str, Any], known: Mapping[str, Prompt], prompts: PromptSet | None, where: str
) -> Prompt:
    if prompts is None:
        return from_row(Prompt, row, where)
    if row["id"] not in known:
        raise InputError(f"{where}: id {row['id']!r} is not in the prompt set {prompts.name!r}")
    return known[row["id"]]


def _check_samples(replies: list[Reply], path: str | Path) -> None:
    """Samples of a prompt are 0, 1, ...: without a first one a prompt would drop out of every rate."""
    found: dict[tuple[str, str], list[int]] = {}
    for r in replies:
        found.setdefault((r.prompt_id, r.condition), []).append(r.sample)
    for (i, _), samples in found.items():
        if sorted(samples) != list(range(len(samples))):
            raise InputError(
                f"{path}: id {i!r} has the samples {', '.join(map(str, sorted(samples)))}; number them 0, 1, ..."
            )


def _same_prompt(row: dict[str, Any], first: Prompt, where: str) -> None:
    if from_row(Prompt, row, where).messages != first.messages:
        raise InputError(f"{where}: id {first.id!r} has another prompt here than on an earlier line")


def _whole(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: sample is {value!r}; a whole number is needed") from None


def _all_or_none(column: str, have: int, total: int, path: str | Path) -> None:
    if have not in (0, total):
        raise InputError(
            f"{path}: {have} of {total} rows have `{column}`; fill it for all or leave it out, "
            "since a part would bias every rate"
        )
