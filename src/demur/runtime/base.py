"""What a runtime is: where a model runs, and what it declares it can do.

Everything downstream (judges, measures, methods) knows this file and no engine. A steered or trained model is
a Runtime again, so `measure` never learns about interventions or adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from demur.errors import CapabilityError, InputError
from demur.types import RESPOND, Condition, OperatingPoint, Prompt, Reply, Score, Site

Capability = Literal["generate", "score", "prefill", "states", "intervene"]

REFUSAL_OPENINGS = ("I'm sorry", "I cannot", "I can't", "I apologize", "Sorry", "Unfortunately", "As an AI")
"""Openings whose first tokens make up `p_refuse` of a model without control tokens. Crude on purpose: "I"
also opens answers, and a refusal may open with anything. Use it to rank prompts of one model, not as a
rate."""

Decide = Callable[[Prompt, Score], str | None]
"""A decision rule at the first answer position: category to force, or None to leave the model's own choice."""


class Progress(Protocol):
    """Called with the number of items finished so far and the total when it is known."""

    def __call__(self, done: int, total: int | None) -> None:
        """Take in the state of a long job."""


class ScoreStream(Iterator[Score]):
    """Scores of prompts some of which may be blocked: `blocked` holds {prompt id: reason} as far as it was read."""

    def __init__(self, scores: Iterator[Score], blocked: Mapping[str, str]) -> None:
        self._scores, self.blocked = scores, blocked

    def __next__(self) -> Score:
        return next(self._scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTokens:
    """Category names and the one token id that stands for each.

    Our own control tokens are ids beyond the tokenizer's reach (`textless`), so no text can produce them.
    Published checkpoints have control tokens with text; then `textless` is False and every entrance sanitises.

    Attributes:
        ids: category -> id. `respond` announces an answer; every other name is a refuse category.
    """

    ids: Mapping[str, int]
    textless: bool = True

    def __post_init__(self) -> None:
        if RESPOND not in self.ids or len(self.ids) < 2:
            raise InputError(
                f"control tokens need {RESPOND!r} and at least one refuse category, got {list(self.ids)}"
            )
        if len(set(self.ids.values())) != len(self.ids):
            raise InputError(
                f"control tokens must have distinct ids, got {dict(self.ids)}; two names on one id make "
                "refusing and responding the same token (a token that was never added shows up like this)"
            )

    @property
    def refuse(self) -> tuple[str, ...]:
        """Refuse categories in id order."""
        return tuple(c for c, _ in sorted(self.ids.items(), key=lambda kv: kv[1]) if c != RESPOND)

    @property
    def names(self) -> tuple[str, ...]:
        """Refuse categories in id order, then `respond`: the column order of probability tables."""
        return (*self.refuse, RESPOND)


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one prompt. `vectors` has shape (len(sites), width), float32 numpy, in site order."""

    prompt_id: str
    vectors: Any


class Runtime(ABC):
    """A model somewhere. Subclasses are final; behaviour varies by wrapping, not by overriding.

    Attributes:
        name: what the user called it; fingerprint: identifies the bytes (None for remote models);
        dtype: "float32", "bfloat16", ... or None when unknown; control: its control tokens, if any.
        shipped_point: the operating point that came with its adapter, if any.
        base: the same model without its adapter, where that is at hand.
        request: fields that every request to an endpoint carries beside the condition's; they may change answers.
    """

    name: str
    fingerprint: str | None = None
    dtype: str | None = None
    control: ControlTokens | None = None
    shipped_point: OperatingPoint | None = None
    base: Runtime | None = None
    request: Mapping[str, Any] = MappingProxyType({})
    capabilities: frozenset[Capability] = frozenset()
    deterministic: bool = False
    """True when a rerun gives the same bytes (local and scripted runtimes)."""

    def require(self, *needed: Capability) -> None:
        """Raise `CapabilityError` unless all of `needed` are declared."""
        missing = [c for c in needed if c not in self.capabilities]
        if missing:
            raise CapabilityError(
                f"{type(self).__name__} for {self.name!r} cannot {', '.join(missing)} "
                f"(it can: {', '.join(sorted(self.capabilities)) or 'nothing'}). Use a local model for this method."
            )

    def problem(self, prompt: Prompt, condition: Condition | None = None) -> str | None:
        """Why this prompt cannot be asked here (longer than the context, say), or None. Computes nothing.

        Raises:
            InputError: no prompt at all can be asked (no chat template, say).
        """
        return None

    @abstractmethod
    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Yield one Reply per (prompt, sample), in input order; failures are Replies with `error` set."""

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """Yield first-position probabilities, one forward pass per prompt, in input order.

        Raises:
            Unscored: after the last score, when some prompts have none (endpoints only).
        """
        self.require("score")
        raise CapabilityError(f"{type(self).__name__} declares 'score' and does not implement it")

    def next_words(
        self,
        prompts: Iterable[Prompt],
        words: Sequence[str],
        template: str,
        *,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """How probable each of `words` is as the first word that follows, for models read as classifiers.

        Args:
            prompts: conversations; the last message may be the assistant's (the reply under judgement).
            words: the labels. A word's probability is that of the tokens that begin it, with or without a space.
            template: Jinja source over `messages` and `bos_token` that writes everything the model reads, in place
                of its own chat template. White space that the model puts first is passed over.

        Yields:
            One Reply per prompt, in input order: `logprobs` {word: natural log-probability}, without words of no
            (or unknown) mass; `error` where a prompt could not be read.
        """
        self.require("score")
        raise CapabilityError(f"{type(self).__name__} cannot read the probability of chosen words")

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Condition | None = None
    ) -> Iterator[States]:
        """Yield hidden states at `sites` for each prompt, in input order."""
        self.require("states")
        raise CapabilityError(f"{type(self).__name__} declares 'states' and does not implement it")


class Intervention(Protocol):
    """A reversible change of the forward pass. `with intervention.on(runtime) as steered:` always restores."""

    def on(self, runtime: Runtime) -> AbstractContextManager[Runtime]:
        """A runtime in which the change is in force; the given one stays as it was."""
        ...
