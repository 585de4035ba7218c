"""garak `*.report.jsonl`: its attempts, each a prompt with one or more outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from demur.errors import InputError
from demur.report.importers.joining import Row


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a JSONL row is an entry of a garak report."""
    return "entry_type" in row


def rows(found: Sequence[Row], path: str) -> list[Row]:
    """One row per output. An attempt stands in the report before and after its evaluation; it is read once.

    The probe becomes the category, unless `prompts` knows better. An output that never came is an error.

    Raises:
        InputError: no attempt with outputs in the report.
    """
    attempts: dict[str, Row] = {}
    model = None
    for place, row in found:
        if row.get("entry_type") == "start_run setup":
            model = row.get("plugins.target_name") or row.get("plugins.model_name")
        if row.get("entry_type") == "attempt" and row.get("status") in (1, 2):
            attempts[str(row.get("uuid"))] = (place, row)
    out: list[Row] = []
    seen: Counter[str] = Counter()
    for place, row in attempts.values():
        probe = str(row.get("probe_classname") or "probe")
        base = {
            "id": f"{probe}/{seen[probe]}",
            "messages": _messages(row.get("prompt"), f"{path}, {place}"),
            "category": probe,
            "meta": {k: row[k] for k in ("goal", "seq", "uuid") if row.get(k) is not None},
            "model": model,
        }
        seen[probe] += 1
        for sample, output in enumerate(row.get("outputs") or [None]):
            text = output.get("text") if isinstance(output, Mapping) else output
            said: dict[str, Any] = {"response": text if isinstance(text, str) else ""}
            if not isinstance(text, str):
                said |= {"error": "garak has no output for this attempt", "finish_reason": "error"}
            out.append((place, {**base, **said, "sample": sample}))
    if not out:
        raise InputError(f"{path}: the garak report holds no attempt that was sent to the model")
    return out


def _messages(prompt: Any, where: str) -> list[dict[str, Any]]:
    """The conversation asked: turns, or plain text in older reports."""
    turns = prompt.get("turns") if isinstance(prompt, Mapping) else None
    if turns is None:
        turns = [{"role": "user", "content": prompt}]
    said = []
    for turn in turns:
        turn = turn if isinstance(turn, Mapping) else {}
        content = turn.get("content")
        text = content.get("text") if isinstance(content, Mapping) else content
        if not isinstance(text, str):
            raise InputError(f"{where}: a prompt without text (garak notes an image or audio file, say)")
        said.append({"role": turn.get("role", "user"), "content": text})
    return said
