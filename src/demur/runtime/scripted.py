"""A runtime that answers from a script: for tests, examples and trying a flow without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from demur.errors import InputError
from demur.runtime.base import ControlTokens, Decide, Progress, Runtime
from demur.types import RESPOND, Condition, Prompt, Reply, Score

Line: TypeAlias = str | Reply | Score | Exception
Script: TypeAlias = Mapping[str, "Line | Mapping[str, float]"] | Callable[[Prompt, Condition, int], Line]


class ScriptedRuntime(Runtime):
    """Answers by rule, the same every time.

    Args:
        script: {prompt id or prompt text: answer}, or a function (prompt, condition, sample) -> answer. An
            answer is text, a whole `Reply`, a `Score`, or an exception, which becomes an error row. The key
            "*" serves all prompts that have no entry of their own.
        scores: {prompt id, text or "*": Score or probabilities}, or such a function of the prompt;
            probabilities are one number per control category, `p_refuse` is their sum without `respond`.
        control: refuse categories (ids 0, 1, ... are given and `respond` comes last), or `ControlTokens`.

        forced: {category: text} of the answer that follows when a decision rule forces that category's token;
            without an entry the text stays the scripted one.

    With control tokens and scores, a reply records the likeliest control token, or the one that `decide`
    forced.

    Example:
        >>> scores = {"*": {"safety": 0.2, "respond": 0.7}}
        >>> rt = ScriptedRuntime({"*": "Sure.", "Bad?": "I can't."}, scores=scores)
        >>> [r.content for r in rt.generate([Prompt.of("Bad?"), Prompt.of("Good?", id="g")])]
        ["I can't.", 'Sure.']
        >>> round(next(rt.score([Prompt.of("Bad?")])).off_control_mass, 2)
        0.1
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        scores: Mapping[str, Score | Mapping[str, float]]
        | Callable[[Prompt], Score | Mapping[str, float]]
        | None = None,
        control: ControlTokens | Iterable[str] | None = None,
        forced: Mapping[str, str] | None = None,
        name: str = "scripted",
    ) -> None:
        self.name = name
        self.fingerprint = f"scripted:{name}"
        self.deterministic = True
        self._script: Script = {} if script is None else script
        self._scores = scores
        self._forced = dict(forced or {})
        if control is not None and not isinstance(control, ControlTokens):
            names = [c for c in control if c != RESPOND]
            control = ControlTokens(ids={c: i for i, c in enumerate([*names, RESPOND])})
        self.control = control
        can_score = scores is not None or (
            isinstance(script, Mapping) and any(isinstance(v, Score) for v in script.values())
        )
        self.capabilities = frozenset({"generate", "score"} if can_score else {"generate"})

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Yield the scripted replies in input order."""
        condition = condition or Condition()
        if decide:
            self.require("score")
        done = 0
        for prompt in prompts:
            asked = prompt.with_system(condition.system)
            T = float(getattr(decide, "T", 1.0))
            score = (
                self._score_of(prompt, T, condition) if decide or (self.control and self._scores) else None
            )
            category = decide(prompt, score) if decide and score else None
            for sample in range(samples):
                reply = self._reply_of(asked, condition, sample)
                token = category or reply.control_token or (score.token if score else None)
                if category is not None:
                    reply = replace(
                        reply, content=self._forced.get(category, reply.content), control_forced=True
                    )
                yield replace(reply, control_token=token)
                done += 1
                if progress:
                    progress(done, None)

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """Yield the scripted scores in input order.

        Scripted probabilities are those at T = 1; another T rescales them over the control categories and the
        mass beside them (taken as one token).
        """
        self.require("score")
        for done, prompt in enumerate(prompts, 1):
            yield self._score_of(prompt, T, condition or Condition())
            if progress:
                progress(done, None)

    def _reply_of(self, prompt: Prompt, condition: Condition, sample: int) -> Reply:
        line = (
            self._script(prompt, condition, sample)
            if callable(self._script)
            else _find(self._script, prompt, "script")
        )
        base = Reply(prompt_id=prompt.id, condition=condition.name, sample=sample, finish_reason="stop")
        if isinstance(line, Exception):
            return replace(base, error=f"{type(line).__name__}: {line}", finish_reason="error")
        if isinstance(line, Reply):
            return replace(line, prompt_id=prompt.id, condition=condition.name, sample=sample)
        if isinstance(line, str):
            return replace(base, content=line)
        raise InputError(
            f"script gave {type(line).__name__} for prompt {prompt.id!r}; give text, a Reply or an exception"
        )

    def _score_of(self, prompt: Prompt, T: float, condition: Condition) -> Score:
        if callable(self._scores):
            found: object = self._scores(prompt)
        elif self._scores is not None:
            found = _find(self._scores, prompt, "scores")
        else:
            found = _find(self._script, prompt, "script")  # type: ignore[arg-type]
        if isinstance(found, Score):
            return replace(found, id=prompt.id, condition=condition.name)
        if not isinstance(found, Mapping):
            raise InputError(
                f"scores gave {type(found).__name__} for prompt {prompt.id!r}; give a Score or probabilities"
            )
        return _from_probabilities(prompt.id, {str(k): float(v) for k, v in found.items()}, T, condition.name)


def _find(table: Mapping[str, object], prompt: Prompt, what: str) -> object:
    for key in (prompt.id, prompt.text, "*"):
        if key in table:
            return table[key]
    raise InputError(
        f"{what} has no entry for prompt {prompt.id!r} ({prompt.text[:40]!r}) and no '*' for the rest"
    )


def _from_probabilities(id: str, p: dict[str, float], T: float, condition: str) -> Score:
    rest = 1.0 - math.fsum(p.values())
    if rest < -1e-9 or min(p.values(), default=0.0) < 0:
        raise InputError(f"probabilities of prompt {id!r} are negative or sum to more than 1: {p}")
    if T != 1.0:
        weights = {c: v ** (1 / T) for c, v in p.items()}
        off = max(rest, 0.0) ** (1 / T)
        total = math.fsum(weights.values()) + off
        p, rest = {c: w / total for c, w in weights.items()}, off / total
    best = max(p, key=p.__getitem__)
    return Score(
        id=id,
        p_refuse=math.fsum(v for c, v in p.items() if c != RESPOND),
        probabilities=p,
        off_control_mass=max(rest, 0.0),
        token=best if p[best] >= rest else None,
        T=T,
        condition=condition,
    )
