"""An engine that already runs, behind its OpenAI-compatible HTTP interface.

With the model's tokenizer (vLLM) the gateway writes token ids itself: no text can become a control token, a call
of one token reads the control tokens' log-probabilities, and a second call writes on behind the token that was
decided, with a warm prefix. Without it, chat completions are used: what the engine lists of its top
log-probabilities is all that is known, and the engine's own reading of special tokens in user text stands.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from demur.errors import InputError, UpstreamError
from demur.runtime.base import ControlTokens
from demur.runtime.chat import ChatFormat
from demur.runtime.openai import decision_logprobs, unforgeable
from demur.runtime.transport import public
from demur.serve.base import Ask, Piece
from demur.serve.engine import control_of, export_of, load_tokenizer, texts_of
from demur.serve.settings import Engine
from demur.serve.wire import Wire
from demur.types import RESPOND, Prompt, Score

SAMPLING = frozenset({"frequency_penalty", "presence_penalty", "top_k", "min_p", "repetition_penalty"})
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
_KEPT = 4096
_FINISH = frozenset({"stop", "length", "tool_calls", "content_filter"})


@dataclass(frozen=True, slots=True)
class _Seen:
    """What reading a request has shown: its token ids and the control token the model itself would open with."""

    prompt: Prompt
    ids: list[int]
    own: str | None


class RemoteUpstream:
    """Reads and writes through an engine's HTTP interface.

    Args:
        url: up to and including the version, e.g. "http://localhost:8000/v1". model: its name there.
        key: the engine's API key; never shown or logged.
        chat: the model's chat format: prompts go out as token ids (`/completions`). Without it `/chat/completions`.
        control: ids of the control tokens, with `chat`. control_text: {category: text}, without.
        base_model: the untouched model. It writes `bare` answers; with `gate` it writes all, and nothing is forced.
        rows_in_base: it holds the control tokens' rows too, and without the LoRA would open with one: they are
            forbidden then.
        timeout_s: seconds between two signs of life of the engine. top_logprobs: how many it lists, without `chat`.
        fingerprint: of the checkpoint it serves, where known; what the engine computes in is not (`dtype` None).

    >>> engine = RemoteUpstream("http://localhost:8000/v1", "tuned", chat=chat, control=control)  # doctest: +SKIP
    >>> (await engine.read(ask)).probabilities["safety"]  # doctest: +SKIP
    0.93
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        chat: ChatFormat | None = None,
        control: ControlTokens | None = None,
        control_text: Mapping[str, str] | None = None,
        base_model: str | None = None,
        gate: bool = False,
        rows_in_base: bool = False,
        timeout_s: float = 120.0,
        top_logprobs: int = 20,
        fingerprint: str | None = None,
    ) -> None:
        self.name = self.model = model
        self.base_model, self.gate, self.rows_in_base = base_model, gate, rows_in_base
        self.has_base = base_model is not None
        self.fingerprint = fingerprint
        self.dtype: str | None = None
        self.chat, self.control, self.text = chat, control, dict(control_text or {})
        if (control is None) != (chat is None):
            raise InputError("a chat format and control token ids belong together; give both or neither")
        self.names: tuple[str, ...] = control.names if control is not None else _names(self.text)
        self.passes = SAMPLING if chat is not None else SAMPLING | TOOLS
        self.losses = _losses(chat is not None, bool(self.text), gate, top_logprobs)
        self._top, self.wire = top_logprobs, Wire(url, key, timeout_s)
        # a tokenizer is not safe to use from several threads, and a long prompt must not hold up the others
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="demur-render")
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        if chat is not None:
            chat.require_decision()

    @classmethod
    def of(cls, engine: Engine, *, gate: bool = False, timeout_s: float = 120.0) -> RemoteUpstream:
        """The upstream that the settings describe.

        Raises:
            InputError: no such key, tokenizer or control tokens. MissingExtra: transformers is not installed.
        """
        key = os.environ.get(engine.key_env) if engine.key_env else None
        if engine.key_env and not key:
            raise InputError(f"upstream.key_env: the environment variable {engine.key_env} is not set")
        chat = control = fingerprint = None
        rows_in_base = False
        text: dict[str, str] = {}
        if engine.tokenizer is not None:
            tokenizer = load_tokenizer(engine.tokenizer)
            control = control_of(engine.tokenizer, tokenizer, engine.control_tokens)
            fingerprint, _, rows_in_base = export_of(engine.tokenizer)
            chat = ChatFormat(tokenizer, control_ids=control.ids.values())
            if chat.thinks:
                chat = ChatFormat(tokenizer, thinking=False, control_ids=control.ids.values())
        elif engine.control_tokens is not None:
            text = texts_of(engine.control_tokens)
        return cls(
            engine.url,
            engine.model,
            key=key,
            chat=chat,
            control=control,
            control_text=text,
            base_model=engine.base_model,
            gate=gate,
            rows_in_base=rows_in_base,
            timeout_s=timeout_s,
            top_logprobs=engine.top_logprobs,
            fingerprint=fingerprint,
        )

    def __repr__(self) -> str:
        return f"RemoteUpstream({public(self.wire.url)!r}, {self.model!r})"

    # --- the upstream -----------------------------------------------------------------------------------------

    async def read(self, ask: Ask, T: float = 1.0) -> Score:
        """First-position probabilities from a call of one token. See `demur.serve.base.Upstream`."""
        if T != 1.0:
            raise UpstreamError(
                f"the operating point is for T={T:g}; an engine shows probabilities at T=1 only"
            )
        if self.chat is None or self.control is None:
            return await self._read_listed(ask)
        ids = await self._ids(ask.prompt)
        wanted = [self.control.ids[name] for name in self.names]
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": len(wanted),
            "logprob_token_ids": wanted,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }
        listed, top = _listed(await self.wire.post("completions", body, retry=True))
        if missing := [name for name in self.names if self.control.ids[name] not in listed]:
            raise UpstreamError(
                f"the engine gives no log-probabilities of the control tokens {', '.join(missing)}; it must know "
                "logprob_token_ids (vLLM) and hold the checkpoint that the tokenizer folder belongs to"
            )
        p = {name: math.exp(min(listed[self.control.ids[name]], 0.0)) for name in self.names}
        own = next((name for name in self.names if self.control.ids[name] == top), None)
        self._remember(_Seen(ask.prompt, ids, own))
        return _score(ask.prompt.id, p, own)

    async def answer(self, ask: Ask, category: str | None, *, bare: bool = False) -> AsyncIterator[Piece]:
        """Write the answer behind the control token. See `demur.serve.base.Upstream`."""
        bare = self.base_model is not None and (bare or self.gate)
        if self.chat is None or self.control is None:
            async for piece in self._answer_chat(ask, category, bare):
                yield piece
            return
        seen = self._seen.pop(ask.prompt.id, None)
        if seen is None or seen.prompt is not ask.prompt:
            ids = await self._ids(ask.prompt)
            own = None if category or bare else await self._own(ids)
            seen = _Seen(ask.prompt, ids, own)
        body = {"model": self._writer_of(bare), "prompt": seen.ids, "add_special_tokens": False}
        opened = category if bare else category or seen.own
        if not bare:
            body["prompt"] = [*seen.ids, self.control.ids[opened]] if opened else seen.ids
        if not bare or self.rows_in_base:
            body["logit_bias"] = {str(i): -100.0 for i in self.control.ids.values()}
        usage: Mapping[str, Any] = {}
        finish: str | None = None
        async with self.wire.stream("completions", body | self._sampling(ask)) as events:
            yield Piece(control_token=opened)
            async for event in events:
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    if choice.get("text"):
                        yield Piece(text=choice["text"])
        written = int(usage.get("completion_tokens") or 0)
        yield _last(finish, len(seen.ids), written + (opened is not None))

    def _writer_of(self, bare: bool) -> str:
        return (self.base_model if bare else None) or self.model

    async def problem(self) -> str | None:
        """Why the engine cannot answer now, within two seconds."""
        try:
            here = await self.wire.models()
        except UpstreamError as e:
            return str(e)
        asked = dict.fromkeys(filter(None, (self.model, self.base_model)))
        missing = [m for m in asked if here and m not in here]
        return f"the engine does not serve {', '.join(missing)}" if missing else None

    async def close(self) -> None:
        """Close the connections."""
        await self.wire.close()
        self._writer.shutdown(wait=False, cancel_futures=True)

    # --- token ids --------------------------------------------------------------------------------------------

    async def _ids(self, prompt: Prompt) -> list[int]:
        chat = self.chat
        assert chat is not None
        return await asyncio.get_running_loop().run_in_executor(self._writer, lambda: chat.render(prompt).ids)

    async def _own(self, ids: Sequence[int]) -> str | None:
        """The control token that the model itself would open with."""
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }
        _, top = _listed(await self.wire.post("completions", body))
        assert self.control is not None
        return next((name for name, i in self.control.ids.items() if i == top), None)

    def _remember(self, seen: _Seen) -> None:
        self._seen[seen.prompt.id] = seen
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)

    def _sampling(self, ask: Ask) -> dict[str, Any]:
        return {
            **{k: v for k, v in ask.passed.items() if k in self.passes},
            "temperature": ask.condition.temperature,
            "top_p": ask.condition.top_p,
            "max_tokens": ask.condition.max_new_tokens,
            "seed": ask.condition.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"stop": list(ask.stop)} if ask.stop else {}),
        }

    # --- chat completions ---------------------------------------------------------------------------------------

    async def _read_listed(self, ask: Ask) -> Score:
        if not self.text:
            raise UpstreamError("this engine's control tokens are not known, so nothing can be read")
        body = {
            "model": self.model,
            "messages": self._messages(ask.prompt),
            "max_tokens": 1,
            "temperature": 1.0,  # some servers report log-probabilities after dividing by it
            "top_p": 1.0,
            "logprobs": True,
            "top_logprobs": self._top,
            "skip_special_tokens": False,
        }
        top = decision_logprobs(await self.wire.post("chat/completions", body, retry=True), thinks=False)
        if not top:
            raise UpstreamError("the engine returns no log-probabilities")
        p = {
            name: math.fsum(math.exp(min(v, 0.0)) for t, v in top.items() if t.strip() == self.text[name])
            for name in self.names
        }
        first = max(top, key=top.__getitem__).strip()
        return _score(ask.prompt.id, p, next((n for n in self.names if self.text[n] == first), None))

    async def _answer_chat(self, ask: Ask, category: str | None, bare: bool) -> AsyncIterator[Piece]:
        messages = self._messages(ask.prompt)
        forced = None if bare else self.text.get(category or "")
        body: dict[str, Any] = {"model": self._writer_of(bare), "messages": messages}
        if forced is not None:
            messages.append({"role": "assistant", "content": forced})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        opening = _Opening({} if bare else self.text, category if forced or bare else None)
        usage: Mapping[str, Any] = {}
        finish: str | None = None
        async with self.wire.stream("chat/completions", body | self._sampling(ask)) as events:
            async for event in events:
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    delta = choice.get("delta") or {}
                    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
                    extra = {"tool_calls": delta["tool_calls"]} if delta.get("tool_calls") else {}
                    text = opening.take(delta.get("content") or "")
                    if text or reasoning or extra:
                        yield Piece(
                            text=text, reasoning=reasoning, extra=extra, control_token=opening.category
                        )
        if rest := opening.rest():
            yield Piece(text=rest, control_token=opening.category)
        yield _last(finish, usage.get("prompt_tokens"), usage.get("completion_tokens"), opening.category)

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        rows = []
        for m in prompt.messages:
            row: dict[str, Any] = {"role": m.role, "content": self._broken(m.content)}
            if m.tool_calls:
                row["tool_calls"] = [self._broken(dict(call)) for call in m.tool_calls]
            if m.tool_call_id:
                row["tool_call_id"] = self._broken(m.tool_call_id)
            rows.append(row)
        return rows

    def _broken(self, value: Any) -> Any:
        return unforgeable(value, self.text.values())


class _Opening:
    """Takes a control token's text off the beginning of an answer that arrives in parts."""

    def __init__(self, texts: Mapping[str, str], category: str | None) -> None:
        self.texts, self.category = texts, category
        self.held: str | None = None if category is not None or not texts else ""

    def take(self, text: str) -> str:
        """What of the answer can be shown now."""
        if self.held is None:
            return text
        self.held += text
        seen = self.held.lstrip()
        if any(t.startswith(seen) and t != seen for t in self.texts.values()):
            return ""  # may still become a control token
        return self.rest()

    def rest(self) -> str:
        """What is held back, without the control token."""
        text, self.held = self.held or "", None
        for category, token in self.texts.items():
            if text.lstrip().startswith(token):
                self.category = category
                return text.lstrip().removeprefix(token).lstrip()
        return text


def _listed(body: Mapping[str, Any]) -> tuple[dict[int, float], int | None]:
    """{token id: log-probability} at the first position, and the id that was written."""
    try:
        told = body["choices"][0]["logprobs"]
        rows = {_token_id(t): float(v) for t, v in (told["top_logprobs"][0] or {}).items()}
        return {i: v for i, v in rows.items() if i is not None}, _token_id(told["tokens"][0])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UpstreamError("the engine's answer holds no log-probabilities by token id") from None


def _token_id(token: str) -> int | None:
    digits = token.removeprefix("token_id:")
    return int(digits) if digits != token and digits.isdecimal() else None


def _score(id: str, p: Mapping[str, float], own: str | None) -> Score:
    refuse = math.fsum(v for name, v in p.items() if name != RESPOND)
    return Score(
        id=id,
        p_refuse=min(refuse, 1.0),
        probabilities=p,
        off_control_mass=max(1.0 - math.fsum(p.values()), 0.0),
        token=own,
    )


def _last(finish: str | None, prompt: int | None, written: int | None, opened: str | None = None) -> Piece:
    if finish is None:
        raise UpstreamError("the engine's answer ended without a reason")
    known: Any = finish if finish in _FINISH else "stop"
    return Piece(finish=known, prompt_tokens=prompt, completion_tokens=written, control_token=opened)


def _names(text: Mapping[str, str]) -> tuple[str, ...]:
    return (*(c for c in text if c != RESPOND), RESPOND) if text else ()


def _losses(ids: bool, text: bool, gate: bool, top: int) -> tuple[str, ...]:
    found = [
        "images and other parts that are not text",
        "several answers to one request (n > 1)",
        "log-probabilities",
    ]
    if ids:
        found += [
            "tool definitions and response formats: the gateway writes the prompt and the engine continues tokens",
            "reasoning parsers of the engine: the answer is returned as it was written",
        ]
    elif text:
        found += [
            f"probabilities of control tokens that are not among the engine's top {top}: they count as 0",
            "special tokens in user text other than the control tokens: the engine decides what they mean",
        ]
        if not gate:
            found.append("engines without continue_final_message cannot be made to open with a control token")
    return tuple(found)
