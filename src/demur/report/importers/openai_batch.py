"""OpenAI batch files, also as vLLM's `run-batch` writes them: the requests, and the output for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import from_row, read_rows
from demur.report.importers.joining import Row, columns
from demur.types import Prompt, PromptSet, Reply

SEPARATOR = "/"


def custom_id(prompt_id: str, condition: str = "default", sample: int = 0) -> str:
    """The `custom_id` of a request that demur writes; condition names hold no slash.

    >>> custom_id("xstest/1", "default", 2)
    'default/2/xstest/1'
    """
    return SEPARATOR.join((condition, str(sample), prompt_id))


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a JSONL row is a line of a batch output or error file."""
    return "custom_id" in row and ("response" in row or "error" in row)


def is_request(row: Mapping[str, Any]) -> bool:
    """Whether a JSONL row is a request of a batch input file."""
    return "custom_id" in row and "body" in row


def load_requests(path: str | Path) -> PromptSet:
    """The prompts of a batch input file, by their `custom_id` (ids of demur's own requests are taken apart).

    Several samples and conditions of one prompt are one prompt. Categories and expectations are not in such a
    file; pass the prompts themselves where you have them.

    Raises:
        InputError: a line that is no chat request, or one id with two conversations.
    """
    found: dict[str, Prompt] = {}
    for n, row in read_rows(path, "jsonl"):
        where = f"{path}, line {n}"
        body = row.get("body")
        if not is_request(row) or not isinstance(body, Mapping) or "messages" not in body:
            raise InputError(f"{where}: no chat request (`custom_id`, and `body` with `messages`)")
        id, _ = parse_id(str(row["custom_id"]), None)
        prompt = from_row(Prompt, {"id": id, "messages": body["messages"]}, where)
        if found.setdefault(id, prompt).text != prompt.text:
            raise InputError(f"{where}: id {id!r} has another prompt here than on an earlier line")
    return PromptSet(Path(path).stem, tuple(found.values()))


def parse_id(text: str, known: set[str] | None) -> tuple[str, int]:
    """(prompt id, sample) of a `custom_id`: itself where it is a prompt's id, else as demur writes it."""
    if known is not None and text in known:
        return text, 0
    parts = text.split(SEPARATOR, 2)
    if len(parts) == 3 and parts[1].isdigit():
        return parts[2], int(parts[1])
    return text, 0


def reply_of(row: Mapping[str, Any], prompt_id: str, *, condition: str = "default", sample: int = 0) -> Reply:
    """The reply of one output line; whatever went wrong with it becomes its `error`."""
    from demur.runtime.shapes import reply_from_error, reply_from_openai

    where: dict[str, Any] = {"condition": condition, "sample": sample}
    response = row.get("response")
    body = response.get("body") if isinstance(response, Mapping) else None
    try:
        status = int(response.get("status_code") or 0) if isinstance(response, Mapping) else 0
        if isinstance(body, Mapping) and status == 200 and not row.get("error"):
            if "choices" in body or body.get("error"):
                return reply_from_openai(body, prompt_id, **where)
            said = f"no chat completion ({body.get('object') or 'unknown object'})"
            return Reply(prompt_id=prompt_id, finish_reason="error", error=said, **where)
        wrong = body if isinstance(body, Mapping) and body.get("error") else {"error": row.get("error")}
        return reply_from_error(status or 500, wrong, prompt_id, **where)
    except (ValueError, TypeError, AttributeError, LookupError) as e:
        said = f"unreadable answer ({type(e).__name__}: {e})"
        return Reply(prompt_id=prompt_id, finish_reason="error", error=said, **where)


def rows(found: Sequence[Row], path: str, prompts: PromptSet | None) -> list[Row]:
    """One row per output line. The output repeats no prompt, so `prompts` must be given.

    Raises:
        InputError: no prompts, or a line without `custom_id`.
    """
    if prompts is None:
        raise InputError(
            f"{path}: a batch output holds answers without their prompts; pass --prompts with the prompts, or with "
            "the batch input file"
        )
    known = {p.id for p in prompts}
    out: list[Row] = []
    for place, row in found:
        if not isinstance(row.get("custom_id"), str):
            raise InputError(f"{path}, {place}: no `custom_id`, which says what was asked")
        id, sample = parse_id(row["custom_id"], known)
        response = row.get("response")
        body = response.get("body") if isinstance(response, Mapping) else None
        model = body.get("model") if isinstance(body, Mapping) else None
        out.append((place, {"id": id, "sample": sample, "model": model, **columns(reply_of(row, id))}))
    return out
