"""From the answer shapes of real services to one `Reply`: OpenAI and compatible servers, Azure, Anthropic,
Gemini.

Pure functions of parsed JSON. They keep what the service said about itself (refusal field, filter, stop
reason) so that `demur.judges.base.preread` can give each shape exactly one label without reading text.

| shape | where it says so | label |
|---|---|---|
| OpenAI refusal | `message.refusal` or a `refusal` content part | full_refusal |
| Azure filter on the prompt | HTTP 400, `error.code` or `innererror` | blocked |
| filter on the answer | `finish_reason: content_filter` | blocked |
| Anthropic | `stop_reason: refusal` (its safety classifiers ended the answer) | blocked |
| Gemini | `promptFeedback.blockReason`, `finishReason: SAFETY` and kin | blocked |
| tool call without text | `tool_calls`, `tool_use`, `functionCall` | compliance |
| budget gone inside the thinking | stop reason length, reasoning and no text | truncated |
| nothing | no text, no tool call | empty |
| text | | read by a judge |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from demur.types import FinishReason, Reply

_FINISH: Mapping[str, FinishReason] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "STOP"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_context_window_exceeded", "MAX_TOKENS"), "length"),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use", "pause_turn"), "tool_calls"),
    **dict.fromkeys(("content_filter", "refusal", "SAFETY", "IMAGE_SAFETY", "BLOCKLIST"), "content_filter"),
    **dict.fromkeys(("PROHIBITED_CONTENT", "RECITATION", "SPII"), "content_filter"),
    **dict.fromkeys(("error", "MALFORMED_FUNCTION_CALL"), "error"),
}
_FILTER_CODES = (
    "content_filter",
    "content_policy_violation",
    "moderation_blocked",
    "ResponsibleAIPolicyViolation",
)


def reply_from_openai(
    body: Mapping[str, Any], prompt_id: str, *, condition: str = "default", sample: int = 0
) -> Reply:
    """A chat completion of the OpenAI form (OpenAI, Azure, vLLM, SGLang, llama.cpp, Ollama, OpenRouter, ...).

    Reasoning is taken from `reasoning_content`, `reasoning` or a leading `<think>` block. An `error` object
    in a body with status 200 is handled like an error status.

    >>> r = reply_from_openai({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}, "a")
    >>> r.content, r.finish_reason
    ('Hi', 'stop')
    """
    if body.get("error"):
        return reply_from_error(200, body, prompt_id, condition=condition, sample=sample)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    message = choice.get("message") or {}
    text, refusal = _openai_parts(message.get("content"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or None
    if reasoning is None:
        reasoning, text = split_thinking(text)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    usage = body.get("usage") or {}
    return Reply(
        prompt_id=prompt_id,
        condition=condition,
        sample=sample,
        content=text,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        tool_calls=tuple(calls),
        provider_refusal=message.get("refusal") or refusal or None,
        **_finish(choice.get("finish_reason")),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def reply_from_error(
    status: int, body: Mapping[str, Any] | str, prompt_id: str, *, condition: str = "default", sample: int = 0
) -> Reply:
    """An HTTP error: a provider's content filter becomes `content_filter` (blocked), all else an error row.

    >>> result = {"hate": {"filtered": True}}
    >>> azure = {"error": {"code": "content_filter", "innererror": {"content_filter_result": result}}}
    >>> reply_from_error(400, azure, "a").finish_reason_raw
    'content_filter: hate'
    """
    error = body.get("error") if isinstance(body, Mapping) else body
    detail: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": str(error or "")}
    inner = detail.get("innererror") if isinstance(detail.get("innererror"), Mapping) else {}
    moderated = (
        isinstance(detail.get("metadata"), Mapping) and "flagged_input" in detail["metadata"]
    )  # OpenRouter
    codes = {str(detail.get("code")), str(detail.get("type")), str((inner or {}).get("code"))}
    message = str(detail.get("message") or "")
    flagged = "invalid_prompt" in codes and "usage polic" in message
    if codes & set(_FILTER_CODES) or flagged or moderated or (inner or {}).get("content_filter_result"):
        results = (inner or {}).get("content_filter_result") or {}
        hit = sorted(
            k
            for k, v in results.items()
            if isinstance(v, Mapping) and (v.get("filtered") or v.get("detected"))
        )
        raw = "content_filter" + (f": {', '.join(hit)}" if hit else "")
        return Reply(
            prompt_id=prompt_id,
            condition=condition,
            sample=sample,
            finish_reason="content_filter",
            finish_reason_raw=raw,
        )
    said = message or (json.dumps(body)[:300] if isinstance(body, Mapping) else str(body)[:300])
    return Reply(
        prompt_id=prompt_id,
        condition=condition,
        sample=sample,
        finish_reason="error",
        error=f"HTTP {status}: {said[:500]}" if status != 200 else f"server error: {said[:500]}",
    )


def reply_from_anthropic(
    body: Mapping[str, Any], prompt_id: str, *, condition: str = "default", sample: int = 0
) -> Reply:
    """An Anthropic message; `stop_reason` "refusal" means that its safety classifiers ended the answer."""
    if body.get("type") == "error":
        return reply_from_error(200, body, prompt_id, condition=condition, sample=sample)
    blocks = body.get("content") or []
    usage = body.get("usage") or {}
    return Reply(
        prompt_id=prompt_id,
        condition=condition,
        sample=sample,
        content="".join(b.get("text") or "" for b in blocks if b.get("type") == "text"),
        reasoning="".join(b.get("thinking") or "" for b in blocks if b.get("type") == "thinking") or None,
        tool_calls=tuple(b for b in blocks if b.get("type") in ("tool_use", "server_tool_use")),
        **_finish(body.get("stop_reason")),
        prompt_tokens=usage.get("input_tokens"),
        completion_tokens=usage.get("output_tokens"),
    )


def reply_from_gemini(
    body: Mapping[str, Any], prompt_id: str, *, condition: str = "default", sample: int = 0
) -> Reply:
    """A Gemini answer; a blocked prompt has `promptFeedback.blockReason` and no candidate."""
    if body.get("error"):
        return reply_from_error(200, body, prompt_id, condition=condition, sample=sample)
    blocked = (body.get("promptFeedback") or {}).get("blockReason")
    candidates = body.get("candidates") or [{}]
    parts = (candidates[0].get("content") or {}).get("parts") or []
    usage = body.get("usageMetadata") or {}
    finish = {"finish_reason": "content_filter", "finish_reason_raw": blocked} if blocked else None
    return Reply(
        prompt_id=prompt_id,
        condition=condition,
        sample=sample,
        content="".join(p.get("text") or "" for p in parts if not p.get("thought")),
        reasoning="".join(p.get("text") or "" for p in parts if p.get("thought")) or None,
        tool_calls=tuple(p["functionCall"] for p in parts if p.get("functionCall")),
        **(finish or _finish(candidates[0].get("finishReason"))),
        prompt_tokens=usage.get("promptTokenCount"),
        completion_tokens=usage.get("candidatesTokenCount"),
    )


def split_thinking(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of a text with a `<think>` block; an unclosed block is all reasoning.

    A text that closes a block it never opened (templates that open it in the prompt) is split there.

    >>> split_thinking("<think>hm</think>Yes.")
    ('hm', 'Yes.')
    >>> split_thinking("<think>hm")
    ('hm', '')
    """
    body = text.lstrip()
    opened = body.startswith("<think>")
    if not opened and ("</think>" not in body or "<think>" in body):
        return None, text
    reasoning, _, answer = body.removeprefix("<think>").partition("</think>")
    return reasoning.strip() or None, answer.lstrip()


def _openai_parts(content: Any) -> tuple[str, str | None]:
    if isinstance(content, list):
        parts = [p for p in content if isinstance(p, Mapping)]
        text = "".join(p.get("text") or "" for p in parts)
        return text, "".join(p.get("refusal") or "" for p in parts) or None
    return (content if isinstance(content, str) else ""), None


def _finish(raw: Any) -> dict[str, Any]:
    if raw is None:
        return {"finish_reason": "unknown"}
    own = {name: name for name in get_args(FinishReason)}
    return {"finish_reason": {**own, **_FINISH}.get(str(raw), "unknown"), "finish_reason_raw": str(raw)}
