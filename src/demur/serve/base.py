"""The nouns of the gateway: what is asked, what was decided, what comes back, and what an upstream can do.

The gateway knows no engine. An upstream reads the first position and writes answers; between the two the
operating point decides (`demur.serve.dial`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from demur.types import Condition, Prompt, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One validated request.

    Attributes:
        prompt: its messages; `prompt.id` is the request's id. condition: sampling settings and `max_new_tokens`.
        stop: texts that end the answer and are not part of it.
        passed: fields of the request that demur does not read and an upstream may hand on (tools, say).
    """

    prompt: Prompt
    condition: Condition
    stop: tuple[str, ...] = ()
    passed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the operating point says about one request.

    Attributes:
        score: first-position probabilities; None where they could not be had (`problem` says why).
        category: the control token that the rule names, "respond" or a refuse category; None leaves the model's
            own choice.
        enforced: False in shadow mode, and where `category` is None: the answer is then the model's own.
        shadow: what the thresholds in shadow mode would have decided, None where there are none.
        point: id of the operating point; canary: it is the one under trial.
        bare: the base model answers (the point says `answers: base`).
        guard: what an input guard said ({"name", "p", "threshold", "stopped"}), if one is switched on.
    """

    score: Score | None
    category: str | None
    enforced: bool
    point: str | None
    shadow: str | None = None
    canary: bool = False
    bare: bool = False
    problem: str | None = None
    guard: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A check inside the answer that ended it: `by` (method), `at` (tokens written), `p`, `threshold`."""

    by: str
    at: int
    p: float
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer. The last one has `finish`; counts of tokens are known then.

    `finish` is OpenAI's finish_reason. `control_token` is the category that opens the answer, forced or the
    model's own; it is never part of `text`. A `stop` replaces what was written: clients are told, and the
    gateway sends the operator's refusal text behind it.
    """

    text: str = ""
    reasoning: str = ""
    finish: Literal["stop", "length", "tool_calls", "content_filter"] | None = None
    control_token: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    stop: Stop | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Upstream(Protocol):
    """An engine behind the gateway.

    Attributes:
        name: shown in the models list. names: refuse categories, then "respond" (empty: no control tokens).
        fingerprint, dtype: of the model where known, else None.
        losses: chat features that do not survive this upstream, one sentence each (docs and /demur/about).
        has_base: whether the model without its adapter can answer, too.
    """

    name: str
    names: tuple[str, ...]
    fingerprint: str | None
    dtype: str | None
    losses: tuple[str, ...]
    has_base: bool

    async def read(self, ask: Ask, T: float = 1.0) -> Score:
        """First-position probabilities of one request.

        Raises:
            InputError: the request cannot be asked (too long, roles the template does not know): HTTP 400.
            UpstreamError: the engine failed or timed out: the operator's fail-open or fail-closed decides.
        """
        ...

    def answer(self, ask: Ask, category: str | None, *, bare: bool = False) -> AsyncIterator[Piece]:
        """Write the answer behind the control token of `category` (None: the model's own choice).

        With `bare` the model without its adapter writes it, to the bare prompt; `category` is only told.
        Closing the iterator early cancels the work upstream and frees its memory.
        """
        ...

    async def problem(self) -> str | None:
        """Why the engine cannot answer now, or None; for the health route, so it must be quick."""
        ...

    async def close(self) -> None:
        """Free what is held. Answers under way end first or are cancelled."""
        ...
