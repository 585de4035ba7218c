"""A runtime in front of another: what it does not change is the inner one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from demur.runtime.base import Progress, Runtime, States
from demur.types import Condition, Prompt, Reply, Score, Site


class WrappedRuntime(Runtime):
    """Base of runtimes that change how another one answers; `generate` is theirs, the rest is handed on.

    Edits go on the inner runtime, before it is wrapped.

    Args:
        inner: the runtime behind. name: default the inner one's.
    """

    def __init__(self, inner: Runtime, *, name: str | None = None) -> None:
        self.inner, self.name = inner, name or inner.name
        self.fingerprint, self.dtype, self.control = inner.fingerprint, inner.dtype, inner.control
        self.capabilities, self.deterministic = inner.capabilities - {"intervene"}, inner.deterministic
        self.shipped_point, self.base, self.request = inner.shipped_point, inner.base, inner.request

    def problem(self, prompt: Prompt, condition: Condition | None = None) -> str | None:
        """As the inner runtime says."""
        return self.inner.problem(prompt, condition)

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """The inner runtime's probabilities."""
        return self.inner.score(prompts, condition, T=T, progress=progress)

    def next_words(
        self,
        prompts: Iterable[Prompt],
        words: Sequence[str],
        template: str,
        *,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """The inner runtime's probabilities of words."""
        return self.inner.next_words(prompts, words, template, progress=progress)

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Condition | None = None
    ) -> Iterator[States]:
        """The inner runtime's states."""
        return self.inner.states(prompts, sites, condition)
