"""OpenAI's chat completions as this gateway speaks them: what a request may say, and what goes back.

Fields are read, handed on, refused or ignored, and the lists are here: `ChatRequest` holds what is read, an
upstream's `passes` what is handed on, `REFUSED` what is not; everything else is ignored and named in the answer.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demur.errors import InputError
from demur.serve.base import Ask, Decision, Piece
from demur.serve.settings import explained
from demur.types import Condition, Message, Prompt

_INT64 = 2**63
_SHOWN = 20
PASSABLE: Mapping[str, str] = {
    "tools": "tool definitions",
    "response_format": "response formats",
    "frequency_penalty": "a frequency penalty",
    "presence_penalty": "a presence penalty",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "a repetition penalty",
}
"""Fields that change the answer: handed on where the upstream can, else refused unless they ask for nothing."""
NEUTRAL: Mapping[str, Any] = {
    "tools": [],
    "response_format": {"type": "text"},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
}
REFUSED: Mapping[str, str] = {
    "logit_bias": "it could name control tokens",
    "functions": "use tools",
    "function_call": "use tools",
    "audio": "text only",
    "prompt": "chat completions take messages",
}
"""Fields that are refused whatever the upstream is, with the reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class TextPart(_Strict):
    """A part of a message; others than text are refused."""

    type: Literal["text"]
    text: str


class Called(_Strict):
    """The function of a tool call; `arguments` is a JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A tool call in an earlier answer. Keys beyond these are dropped, so none can reach a chat template."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class ChatMessage(_Strict):
    """One message. `name` is accepted and not used: chat templates have no place for it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def noun(self) -> Message:
        """As demur's own message; parts are joined, "developer" is "system"."""
        content = (
            self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        )
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=content,
            tool_calls=tuple(call.model_dump() for call in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the counts of tokens."""

    include_usage: bool = False


class Wish(_Strict):
    """The request's side of the extension field."""

    model_config = ConfigDict(extra="forbid")
    operating_point: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    n: int | None = 1
    logprobs: bool | None = None
    top_logprobs: int | None = None
    demur: Wish | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request on its way: what goes upstream, and what the answer's form needs.

    `deadline` is on `time.monotonic()`: everything ends there.
    """

    ask: Ask
    request_id: str
    model: str
    stream: bool
    include_usage: bool
    override: str | None
    ignored: tuple[str, ...] = ()
    deadline: float = math.inf
    created: int = field(default_factory=lambda: int(time.time()))


def read_request(body: bytes) -> ChatRequest:
    """A checked request.

    Raises:
        InputError: no JSON, a missing or unknown thing; the message names the place and not the value.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["loc"][:1] == ("messages",) and "content" in first["loc"]:
            raise InputError(
                f"{'.'.join(map(str, first['loc'][:2]))}: content must be text or parts of type text; images, "
                "audio and files are not read here"
            ) from None
        raise InputError(explained(e)) from None


def asked(
    request: ChatRequest,
    request_id: str,
    *,
    most: int,
    seconds: float = math.inf,
    passes: frozenset[str] = frozenset(),
) -> Asked:
    """What a request asks for.

    Args:
        request_id: from the client or made here. most: tokens an answer may have. seconds: time until it is whole.
        passes: fields that the upstream hands on.

    Raises:
        InputError: something that cannot be done here, with the reason.
    """
    messages = tuple(m.noun() for m in request.messages)
    if messages[-1].role == "assistant":
        raise InputError(
            "messages: the last one is the assistant's. An answer that is already begun has no first position to "
            "decide at; end with a message of the user or a tool"
        )
    if request.n not in (None, 1):
        raise InputError(f"n={request.n}: one answer to a request; send several requests")
    if request.logprobs or request.top_logprobs:
        raise InputError(
            "logprobs: not returned here; the probabilities of the decision are in the field 'demur' of each answer"
        )
    wanted = request.max_completion_tokens or request.max_tokens
    if wanted is not None and wanted > most:
        raise InputError(f"max_tokens={wanted}: this server writes at most {most} tokens")
    passed, ignored = _others(request.model_extra or {}, passes)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    id = f"chatcmpl-{secrets.token_hex(12)}"
    ask = Ask(
        prompt=Prompt(id=id, messages=messages),
        condition=Condition(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            max_new_tokens=wanted or most,
            seed=secrets.randbits(31) if request.seed is None else request.seed,
        ),
        stop=stop,
        passed=passed,
    )
    return Asked(
        ask=ask,
        request_id=request_id,
        model=request.model,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        override=request.demur.operating_point if request.demur is not None else None,
        ignored=ignored,
        deadline=time.monotonic() + seconds,
    )


def _others(extra: Mapping[str, Any], passes: frozenset[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    passed, ignored = {}, []
    for name, value in extra.items():
        if value is None:
            continue
        if name in REFUSED:
            raise InputError(f"{name}: not taken here; {REFUSED[name]}")
        if name in passes:
            passed[name] = value
        elif name in PASSABLE and value != NEUTRAL[name]:
            raise InputError(f"{name}: {PASSABLE[name]} cannot be handed on to this server's model")
        else:
            ignored.append(name[:40])
    return passed, tuple(sorted(ignored)[:_SHOWN])


# --- what goes back -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Written:
    """An answer as it grows: takes pieces, knows what the client has seen."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    control_token: str | None = None
    last: Piece | None = None

    def take(self, piece: Piece) -> None:
        """Add a piece; one with a `stop` replaces the text."""
        if piece.stop is not None:
            self.text, self.reasoning, self.calls = "", "", []
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.control_token = piece.control_token or self.control_token
        for part in piece.extra.get("tool_calls", ()):
            _merge(self.calls, part)
        if piece.finish is not None:
            self.last = piece


def completion(asked: Asked, decision: Decision, written: Written, source: str) -> dict[str, Any]:
    """The whole answer of a request that does not stream."""
    last = written.last
    assert last is not None
    message: dict[str, Any] = {"role": "assistant", "content": written.text, "refusal": None}
    if written.reasoning:
        message["reasoning_content"] = written.reasoning
    if written.calls:
        message |= {"tool_calls": written.calls, "content": written.text or None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish}
    return {
        **_head(asked, "chat.completion"),
        "choices": [choice],
        "usage": usage(last),
        "demur": extension(asked, decision, written, source),
    }


def first_chunk(asked: Asked, decision: Decision, written: Written, source: str) -> dict[str, Any]:
    """The chunk that opens a stream: the role and the decision."""
    return _chunk(asked, {"role": "assistant", "content": ""}) | {
        "demur": extension(asked, decision, written, source)
    }


def chunk(asked: Asked, piece: Piece, *, shown: bool = False) -> dict[str, Any] | None:
    """A part of a stream; None for a piece that shows nothing. What replaces text already `shown` stands apart."""
    delta: dict[str, Any] = {}
    if piece.text:
        delta["content"] = f"\n\n{piece.text}" if shown and piece.stop is not None else piece.text
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    if piece.extra.get("tool_calls"):
        delta["tool_calls"] = piece.extra["tool_calls"]
    return _chunk(asked, delta) if delta else None


def last_chunk(asked: Asked, decision: Decision, written: Written, source: str) -> dict[str, Any]:
    """The chunk that ends the answer, with the reason and the extension field as it is now."""
    assert written.last is not None
    return _chunk(asked, {}, written.last.finish) | {"demur": extension(asked, decision, written, source)}


def usage_chunk(asked: Asked, last: Piece) -> dict[str, Any]:
    """The chunk behind the last one, for `stream_options.include_usage`."""
    return {**_head(asked, "chat.completion.chunk"), "choices": [], "usage": usage(last)}


def usage(last: Piece) -> dict[str, int]:
    """Counts of tokens."""
    read, wrote = last.prompt_tokens or 0, last.completion_tokens or 0
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


def extension(asked: Asked, decision: Decision, written: Written, source: str) -> dict[str, Any]:
    """The field "demur" of an answer. `source` is "model", or "operator" for the operator's own words."""
    score, last = decision.score, written.last
    return {
        "probabilities": dict(score.probabilities) if score is not None else {},
        "p_refuse": score.p_refuse if score is not None else None,
        "decision": decision.category,
        "enforced": decision.enforced,
        "shadow": decision.shadow,
        "operating_point": decision.point,
        "canary": decision.canary,
        "problem": decision.problem,
        "guard": dict(decision.guard) if decision.guard is not None else None,
        "control_token": written.control_token,
        "stopped": asdict(last.stop) if last is not None and last.stop is not None else None,
        "source": source,
        "ignored": list(asked.ignored),
    }


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    return {"id": asked.ask.prompt.id, "object": kind, "created": asked.created, "model": asked.model}


def _chunk(asked: Asked, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    counts = {"usage": None} if asked.include_usage else {}
    return {**_head(asked, "chat.completion.chunk"), "choices": [choice], **counts}


def _merge(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """Put a streamed part of a tool call to the others."""
    at = part.get("index", len(calls))
    while len(calls) <= at:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, told = calls[at], part.get("function") or {}
    call["id"] = part.get("id") or call["id"]
    for key in ("name", "arguments"):
        call["function"][key] += told.get(key) or ""


def request_schema() -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON Schema of a request for OpenAPI, and the components it refers to."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema, schema.pop("$defs", {})


def listed(models: Sequence[str], created: int) -> dict[str, Any]:
    """The answer of GET /v1/models."""
    rows = [{"id": m, "object": "model", "created": created, "owned_by": "demur"} for m in models]
    return {"object": "list", "data": rows}
