"""lm-eval `samples_<task>_<date>.jsonl` (written with --log_samples)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from demur.errors import InputError
from demur.report.importers.joining import Row, labels

_PROMPT_FIELDS = ("prompt", "question", "input", "query", "instruction", "text")


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a JSONL row is a logged sample."""
    return "resps" in row and ("doc" in row or "doc_id" in row)


def rows(found: Sequence[Row], path: str) -> list[Row]:
    """One row per response, as the model gave it (`resps`, before any filter).

    lm-eval writes each document once per filter; only those of the first filter are read.

    Raises:
        InputError: a task that scores given answers, so that no text was generated.
    """
    out: list[Row] = []
    filters = {row.get("filter") for _, row in found}
    keep = found[0][1].get("filter")
    for place, row in found:
        if row.get("filter") != keep and len(filters) > 1:
            continue
        where, doc = f"{path}, {place}", row.get("doc")
        doc = doc if isinstance(doc, Mapping) else {}
        resps = row.get("resps")
        responses = resps[0] if isinstance(resps, list) and len(resps) == 1 else None
        responses = [responses] if isinstance(responses, str) else responses
        if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
            raise InputError(
                f"{where}: `resps` holds {len(resps or ())} scored continuations and no generated text; only "
                "tasks with output_type generate_until have answers to judge"
            )
        identity = {k: v for k, v in (("id", doc.get("id", row.get("doc_id"))),) if v is not None}
        for sample, text in enumerate(responses):
            asked = _asked(doc, row.get("arguments"), where)
            out.append(
                (
                    place,
                    {
                        **identity,
                        "sample": sample,
                        **asked,
                        "response": text,
                        **labels(_rest(doc), row.get("target")),
                    },
                )
            )
    return out


def _rest(doc: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in doc.items() if k != "id" and k not in _PROMPT_FIELDS}


def _asked(doc: Mapping[str, Any], arguments: Any, where: str) -> dict[str, Any]:
    """The document's own prompt field, else the first argument: text, or a chat history written as JSON."""
    for name in _PROMPT_FIELDS:
        if isinstance(doc.get(name), str) and doc[name].strip():
            return {"prompt": doc[name]}
    first: Any = arguments
    while isinstance(first, (list, Mapping)) and first:
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if not isinstance(first, str):
        raise InputError(f"{where}: neither `doc` nor `arguments` holds a prompt; pass --prompts")
    try:
        history = json.loads(first)
    except ValueError:
        history = None
    if isinstance(history, list) and all(isinstance(m, Mapping) and "role" in m for m in history):
        return {"messages": [{"role": m["role"], "content": m.get("content") or ""} for m in history]}
    return {"prompt": first}
