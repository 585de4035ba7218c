"""Any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp server, Ollama, hosted services.

Requests run concurrently in a background event loop, so callers need none; replies come back in input order.
A request that fails after its retries is a Reply with `error` set: no row is ever dropped. A prompt that cannot
be scored is named by `Unscored` once all others have their scores.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from demur.errors import CapabilityError, InputError, Unscored
from demur.runtime import next_words
from demur.runtime.base import REFUSAL_OPENINGS, ControlTokens, Decide, Progress, Runtime, ScoreStream
from demur.runtime.shapes import reply_from_error, reply_from_openai
from demur.runtime.transport import TransientError, ordered, public, seconds, wait
from demur.types import RESPOND, Condition, Prompt, Reply, Score

FIRST_WORDS = tuple(dict.fromkeys(opening.split()[0] for opening in REFUSAL_OPENINGS))

_SECRET = re.compile(
    r"key|(.*[_-])?(api[_-]?key|authorization|password|secret|(access|auth)[_-]?token|credentials?)", re.I
)
_BUSY = frozenset({408, 409, 425, 429})
In = TypeVar("In")
Out = TypeVar("Out")


def unforgeable(value: Any, texts: Collection[str]) -> Any:
    """A message's content, or a tool call as JSON, with the texts of control tokens broken up by a space.

    >>> unforgeable({"name": "[respond]", "n": 1}, ["[respond]"])
    {'name': '[ respond]', 'n': 1}
    """
    if isinstance(value, str):
        for text in texts:
            value = value.replace(text, f"{text[:1]} {text[1:]}")
        return value
    if isinstance(value, Mapping):
        return {unforgeable(k, texts): unforgeable(v, texts) for k, v in value.items()}
    return [unforgeable(v, texts) for v in value] if isinstance(value, (list, tuple)) else value


class OpenAIRuntime(Runtime):
    """A model behind `POST {base_url}/chat/completions`.

    Args:
        base_url: up to and including the version, e.g. "http://localhost:8000/v1".
        model: its name on that server.
        api_key: else the environment's DEMUR_API_KEY, else OPENAI_API_KEY. Never shown, stored or logged.
        concurrency: requests in flight. timeout: seconds per try. retries: further tries after HTTP 408, 409,
            425, 429, 5xx, timeouts, lost connections and unreadable bodies, with random exponential waits
            from `backoff` seconds up; the server's Retry-After is followed up to 120 s.
        top_logprobs: how many log-probabilities to ask for. Services cap it, most at 20: what is not listed
            is unknown, so `score()` takes it as 0 and its sums are lower bounds. When given, `generate()`
            also asks for them and fills `Reply.logprobs` at the decision position; by default only `score()`
            asks (20).
        control_text: {category: text of its control token}, with "respond", for checkpoints whose control
            tokens have text. Such text inside prompts is broken up by a space, so that no prompt can forge a
            token.
        extra_body: merged into every request; a value of None removes a field, e.g.
            {"max_tokens": None, "max_completion_tokens": 128}. Stored with runs, so it may hold no keys.

    Raises:
        InputError: a base_url without scheme or host, a key that is no plain text, an extra_body that is no JSON
            or holds a key.
        CapabilityError: HTTP 401 or 404 at any time, or nothing listening at first; scoring without
            log-probabilities or behind a thinking block, or where the server has gone silent.

    Example:
        >>> rt = OpenAIRuntime("http://localhost:8000/v1", "my-model", api_key="secret")
        >>> rt
        OpenAIRuntime('http://localhost:8000/v1#my-model')
    """

    capabilities = frozenset({"generate", "score"})

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        top_logprobs: int | None = None,
        control_text: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            url = urlsplit(base_url)
            whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # brackets or a port that are none
            whole = False
        if not whole:
            shown = base_url.partition("?")[0].rpartition("@")[2]
            raise InputError(f"base_url={shown!r}: give the full address, e.g. http://localhost:8000/v1")
        if concurrency < 1 or retries < 0 or not 0 < timeout < math.inf:
            raise InputError(
                f"concurrency={concurrency}, retries={retries}, timeout={timeout}: need >= 1, >= 0, > 0"
            )
        if top_logprobs is not None and top_logprobs < 1:
            raise InputError(f"top_logprobs={top_logprobs}: ask for at least 1, or leave it out")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.name = f"{public(self.base_url)}#{model}"
        key = api_key or os.environ.get("DEMUR_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
        self._key = key.strip()  # a key read from a file ends in a line break
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("the API key holds characters that no HTTP header can carry; copy it again")
        self._concurrency, self._timeout, self._retries, self._backoff = (
            concurrency,
            timeout,
            retries,
            backoff,
        )
        self._top = top_logprobs
        self._text = dict(control_text or {})
        # the server's own ids are not known here: positions stand for them and only their order is used
        self.control = (
            ControlTokens(ids={c: i for i, c in enumerate(self._text)}, textless=False)
            if self._text
            else None
        )
        self._extra = dict(extra_body or {})
        _check_storable(self._extra, self._key)
        self.request = {**self._extra, **({"top_logprobs": top_logprobs} if top_logprobs else {})}
        self._answered = False
        self._failed_in_a_row = 0

    def __repr__(self) -> str:
        return f"OpenAIRuntime({self.name!r})"

    # --- public ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Yield one Reply per (prompt, sample), in input order, while later requests run.

        Sample i is asked for with the condition's seed + i.

        Raises:
            CapabilityError: `decide` is given; a decision rule needs a local model.
        """
        if decide is not None:
            raise CapabilityError(
                f"{self.name}: a decision rule must put its token before the answer, which chat completions "
                f"do not "
                "offer. Run the model locally, or generate without an operating point."
            )
        where = condition or Condition()

        async def ask(client: httpx.AsyncClient, job: tuple[Prompt, int]) -> Reply:
            return await self._reply(client, job[0], where, job[1])

        return self._run(ask, ((p, i) for p in prompts for i in range(samples)), progress)

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """Yield first-position probabilities from one-token calls with `top_logprobs`.

        With `control_text`: the categories' probabilities (0 where a token is not among the top ones).
        Without: the mass of the first words of common refusals, `kind` "first_token".

        Raises:
            InputError: T other than 1; a truncated list of probabilities cannot be re-tempered.
            CapabilityError: no log-probabilities, a model that thinks first, or a server that answers none of many
                requests in a row.
            Unscored: after the last score, when some prompts were blocked or failed.
        """
        if T != 1.0:
            raise InputError(
                f"T={T}: an endpoint shows its top tokens only, which cannot be brought to another T"
            )
        where = condition or Condition()

        async def ask(client: httpx.AsyncClient, prompt: Prompt) -> Score | Reply:
            return await self._score(client, prompt, where)

        blocked: dict[str, str] = {}
        return ScoreStream(_scored(self._run(ask, prompts, progress), blocked), blocked)

    def next_words(
        self,
        prompts: Iterable[Prompt],
        words: Sequence[str],
        template: str,
        *,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Probabilities of words from `POST {base_url}/completions`, which takes the text as it is.

        vLLM, SGLang, llama.cpp and others have it; services that offer chat alone have not. A word that is not
        among the listed tokens (20, or `top_logprobs`) is left out. See the base class.
        """

        async def ask(client: httpx.AsyncClient, prompt: Prompt) -> Reply:
            return await self._words(client, prompt, words, template)

        return self._run(ask, prompts, progress)

    # --- one request ----------------------------------------------------------------------------------------

    async def _reply(
        self,
        client: httpx.AsyncClient,
        prompt: Prompt,
        condition: Condition,
        sample: int,
        *,
        one_token: bool = False,
    ) -> Reply:
        body: Mapping[str, Any] = {}
        try:
            payload = self._payload(prompt, condition, sample)
            if one_token or self._top:
                payload |= {"logprobs": True, "top_logprobs": self._top or 20}
            if one_token:
                # temperature 1: some servers report log-probabilities after dividing by it
                payload |= {"temperature": 1.0, "top_p": 1.0}
                payload["max_completion_tokens" if "max_completion_tokens" in payload else "max_tokens"] = 1
            status, body = await self._post(client, payload)
            if status == 200:
                reply = reply_from_openai(body, prompt.id, condition=condition.name, sample=sample)
            else:
                reply = reply_from_error(status, body, prompt.id, condition=condition.name, sample=sample)
            reply = replace(reply, logprobs=decision_logprobs(body, thinks=reply.reasoning is not None))
        except (TransientError, ValueError, TypeError, AttributeError, LookupError) as e:
            # the last four: a body that is JSON but of no known shape, or a prompt that cannot be sent
            if isinstance(e, TransientError) and e.unreachable and not self._answered:
                raise CapabilityError(
                    f"{self.name}: nothing answers there ({e}); is the server running?"
                ) from None
            said = (
                str(e)
                if isinstance(e, (TransientError, InputError))
                else f"unreadable answer ({type(e).__name__}: {e})"
            )
            reply = Reply(
                prompt_id=prompt.id,
                condition=condition.name,
                sample=sample,
                finish_reason="error",
                error=said,
            )
        if reply.error and self._key:
            reply = replace(reply, error=reply.error.replace(self._key, "***"))
        return self._with_control(reply)

    async def _score(self, client: httpx.AsyncClient, prompt: Prompt, condition: Condition) -> Score | Reply:
        """The score, or the Reply that says why this one prompt has none."""
        reply = await self._reply(client, prompt, condition, 0, one_token=True)
        top = reply.logprobs
        if reply.error is not None:
            if "logprob" in reply.error:
                raise CapabilityError(
                    f"{self.name} gives no log-probabilities ({reply.error}); use generated text and a text judge"
                )
            if self._failed_in_a_row >= max(8, 4 * self._concurrency):
                raise CapabilityError(
                    f"{self.name}: the last {self._failed_in_a_row} requests failed in spite of their retries; the "
                    f"last: {reply.error}"
                )
            return reply
        if reply.reasoning is not None or (
            top and max(top, key=top.__getitem__).strip().startswith("<think")
        ):
            raise CapabilityError(
                f"{self.name} thinks before it answers, so its first token decides nothing; use generated text "
                "and a text judge, or turn thinking off with extra_body (--request)"
            )
        if not top:
            if reply.finish_reason == "content_filter" or reply.provider_refusal is not None:
                return reply
            if not reply.content:
                return replace(reply, error="an empty answer, without log-probabilities")
            raise CapabilityError(
                f"{self.name} returns no log-probabilities; use generated text and a text judge"
            )
        return self._to_score(prompt.id, condition.name, {t: math.exp(min(v, 0.0)) for t, v in top.items()})

    async def _words(
        self, client: httpx.AsyncClient, prompt: Prompt, words: Sequence[str], template: str
    ) -> Reply:
        payload = {
            "model": self.model,
            "prompt": next_words.written(template, prompt),
            "max_tokens": next_words.LOOK,
            "temperature": 0.0,
            "logprobs": self._top or 20,
        }
        try:
            status, body = await self._post(client, payload, "completions")
            top = next_words.first_listed(body["choices"][0]) if status == 200 else {}
            error = (
                None if status == 200 else reply_from_error(status, body, prompt.id).error or f"HTTP {status}"
            )
            if status == 200 and not top:
                error = "the server lists no log-probabilities"
        except (TransientError, ValueError, TypeError, AttributeError, LookupError) as e:
            top, error = {}, f"{type(e).__name__}: {e}"
        if error is not None:
            return Reply(prompt_id=prompt.id, error=error, finish_reason="error")
        return Reply(prompt_id=prompt.id, logprobs=next_words.masses(top, words))

    def _to_score(self, id: str, condition: str, p: Mapping[str, float]) -> Score:
        if not self._text:
            mass = math.fsum(v for t, v in p.items() if _opens_refusal(t))
            return Score(id=id, p_refuse=min(mass, 1.0), kind="first_token", condition=condition)
        by_name = {
            c: math.fsum(v for t, v in p.items() if t.strip() == text) for c, text in self._text.items()
        }
        first = max(p, key=p.__getitem__).strip()
        return Score(
            id=id,
            p_refuse=min(math.fsum(v for c, v in by_name.items() if c != RESPOND), 1.0),
            probabilities=by_name,
            off_control_mass=max(1.0 - math.fsum(by_name.values()), 0.0),
            token=next((c for c, text in self._text.items() if text == first), None),
            condition=condition,
        )

    def _payload(self, prompt: Prompt, condition: Condition, sample: int) -> dict[str, Any]:
        if prompt.images:
            raise InputError(f"prompt {prompt.id!r} has images, which this runtime does not send")
        messages = []
        for m in prompt.with_system(condition.system).messages:
            row: dict[str, Any] = {"role": m.role, "content": unforgeable(m.content, self._text.values())}
            if m.tool_calls:
                row["tool_calls"] = [unforgeable(dict(c), self._text.values()) for c in m.tool_calls]
            if m.tool_call_id:
                row["tool_call_id"] = unforgeable(m.tool_call_id, self._text.values())
            messages.append(row)
        payload = {
            "model": self.model,
            "messages": messages,
            "temperature": condition.temperature,
            "top_p": condition.top_p,
            "max_tokens": condition.max_new_tokens,
            "seed": condition.seed + sample,
            **({"skip_special_tokens": False} if self._text else {}),
            **self._extra,
        }
        return {k: v for k, v in payload.items() if v is not None}

    def _with_control(self, reply: Reply) -> Reply:
        body = reply.content.lstrip()
        for category, text in self._text.items():
            if body.startswith(text):
                return replace(reply, content=body.removeprefix(text).lstrip(), control_token=category)
        return reply

    # --- transport ------------------------------------------------------------------------------------------

    async def _post(
        self, client: httpx.AsyncClient, payload: Mapping[str, Any], path: str = "chat/completions"
    ) -> tuple[int, dict[str, Any]]:
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._retries + 1),
            wait=wait(self._backoff),
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )
        try:
            answer: tuple[int, dict[str, Any]] = await retrying(self._once, client, payload, path)
        except TransientError:
            self._failed_in_a_row += 1
            raise
        self._failed_in_a_row = 0
        return answer

    async def _once(
        self, client: httpx.AsyncClient, payload: Mapping[str, Any], path: str
    ) -> tuple[int, dict[str, Any]]:
        url = urlsplit(self.base_url)
        url = url._replace(
            path=f"{url.path.rstrip('/')}/{path}", fragment=""
        )  # a query stays behind the path
        try:
            r = await client.post(urlunsplit(url), json=payload)
        except httpx.ConnectError as e:
            raise TransientError(f"no connection ({e})", unreachable=True) from None
        except (httpx.TransportError, httpx.DecodingError) as e:
            raise TransientError(
                f"{type(e).__name__} after {self._timeout:g} s" if not str(e) else str(e)
            ) from None
        self._answered = True
        if r.status_code in (401, 404):
            hint = {
                401: "set DEMUR_API_KEY",
                404: "check the address (it usually ends in /v1) and the model's name",
            }
            raise CapabilityError(f"{self.name}: HTTP {r.status_code}; {hint[r.status_code]}")
        if r.status_code in _BUSY or r.status_code >= 500:
            after = seconds(r.headers.get("retry-after"))
            raise TransientError(f"HTTP {r.status_code}: {r.text[:300]}", retry_after=after)
        try:
            body = r.json()
        except ValueError:
            body = None
        if isinstance(body, dict):
            return r.status_code, body
        if r.status_code == 200:
            raise TransientError(f"HTTP 200 without a JSON object: {r.text[:120]!r}")
        return r.status_code, {"error": {"message": r.text[:300]}}

    def _run(
        self,
        ask: Callable[[httpx.AsyncClient, In], Coroutine[Any, Any, Out]],
        jobs: Iterable[In],
        progress: Progress | None,
    ) -> Generator[Out, None, None]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        results = ordered(ask, jobs, concurrency=self._concurrency, timeout=self._timeout, headers=headers)
        with closing(results):
            for done, result in enumerate(results, 1):
                if progress:
                    progress(done, None)
                yield result


def _scored(results: Generator[Score | Reply, None, None], blocked: dict[str, str]) -> Iterator[Score]:
    """The scores among the results; in the end `Unscored`, if there are replies. Fills `blocked` on the way."""
    failed: dict[str, str] = {}
    n = 0
    with closing(results):
        for one in results:
            n += 1
            if isinstance(one, Score):
                yield one
            elif one.error is None:
                said = one.finish_reason_raw if one.finish_reason == "content_filter" else None
                blocked[one.prompt_id] = said or "refused by the provider"
            else:
                failed[one.prompt_id] = one.error
    if blocked or failed:
        raise Unscored(blocked, failed, n)


def _check_storable(fields: Any, key: str) -> None:
    """Raise InputError unless fields of a request are JSON and hold no key: they are stored with the run."""
    try:
        text = json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise InputError(f"extra_body: {e}; a request carries JSON values only") from None
    # local servers take any key, so a short one ("x") may stand in a field by chance
    if (name := _secret(fields)) is not None or (len(key) >= 6 and key in text):
        where = f"field {name!r}" if name else "a value"
        raise InputError(
            f"extra_body: {where} holds a key, and these fields are stored with the run. Keys of endpoints go into "
            "the environment: DEMUR_API_KEY"
        )


def _secret(value: Any) -> str | None:
    """The first field whose name is that of a key and whose value is text, at any depth."""
    if isinstance(value, Mapping):
        named = (k for k, v in value.items() if isinstance(v, str) and _SECRET.fullmatch(str(k)))
        return next(named, None) or _secret(list(value.values()))
    if isinstance(value, (list, tuple)):
        return next((name for v in value if (name := _secret(v)) is not None), None)
    return None


def decision_logprobs(body: Mapping[str, Any], *, thinks: bool) -> dict[str, float]:
    """{token: log-probability} at the first token of the final answer, as far as the server listed them.

    Behind a thinking block that is the first non-blank token after `</think>`; {} when it cannot be found.
    """
    choices = body.get("choices") or [{}]
    tokens = ((choices[0] or {}).get("logprobs") or {}).get("content") or []
    if thinks:
        ends = [i for i, t in enumerate(tokens) if "</think>" in t.get("token", "")]
        tokens = [t for t in tokens[ends[-1] + 1 :] if t.get("token", "").strip()] if ends else []
    if not tokens:
        return {}
    top = tokens[0].get("top_logprobs") or [tokens[0]]
    return {str(t["token"]): float(t["logprob"]) for t in top}


def _opens_refusal(token: str) -> bool:
    word = token.strip().replace("\u2019", "'")
    return word in FIRST_WORDS or (len(word) >= 3 and any(w.startswith(word) for w in FIRST_WORDS))
