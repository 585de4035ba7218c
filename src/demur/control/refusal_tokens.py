"""The dial: an operating point in front of a model with refusal tokens.

Score the first position, decide by the operating point (`demur.calibrate.decide`, the rules of arXiv 2412.06748 and
its code), force that control token, let the model write on. Nothing is retrained and the runtime stays as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from demur.calibrate.decide import cuts, decide, is_steered
from demur.errors import InputError, MismatchError, RefusalLowering
from demur.runtime.base import Decide, Progress, Runtime, States
from demur.types import Condition, OperatingPoint, Prompt, Reply, Score, Site, Threshold

SAFETY = "safety"
"""The category whose thresholds may not be loosened past the shipped ones without consent."""


class RefusalTokens:
    """Decide every answer's control token by an operating point.

    Args:
        point: thresholds and rule. shipped: the operating point that came with the model, if any.
        allow_refusal_lowering: consent to a safety threshold looser than the shipped one.

    Raises:
        RefusalLowering: the safety threshold is looser than the shipped one and nobody consented.

    >>> point = OperatingPoint(id="strict", thresholds={"safety": Threshold(tau=0.2)})
    >>> rule = RefusalTokens(point)
    >>> rule(Prompt.of("x"), Score(id="x", p_refuse=0.3, probabilities={"safety": 0.3, "respond": 0.6}))
    'safety'
    """

    def __init__(
        self,
        point: OperatingPoint,
        *,
        shipped: OperatingPoint | None = None,
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.point, self.T = point, point.T
        self._cuts = cuts(point)
        if shipped is not None and not allow_refusal_lowering:
            _guard_safety(point, shipped)

    def __call__(self, prompt: Prompt, score: Score) -> str | None:
        """The control token to force, or None where the model's own choice stands (c* is not steered)."""
        names = [*(n for n in score.probabilities if n != "respond"), "respond"]
        row = np.array([[score.probabilities[n] for n in names]])
        if self.point.rule != "compare" and not bool(is_steered(row, names, self._cuts)[0]):
            return None
        return names[int(decide(row, names, self._steer(names), self.point.rule)[0])]

    def _steer(self, names: Sequence[str]) -> dict[str, float]:
        if self.point.rule == "compare" and not self._cuts:
            return dict.fromkeys(names[:-1], -1.0)
        return self._cuts

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """`with RefusalTokens(point).on(runtime) as dialled:` answers under the operating point.

        Raises:
            InputError: the runtime has no control tokens, or lacks a steered category.
            MismatchError: the operating point was calibrated on another model.
        """
        check_point(self.point, runtime)
        yield _Dialled(runtime, self, self.point.id)


class _Dialled(Runtime):
    """The runtime under a decision rule; scores and states are the inner runtime's own."""

    def __init__(self, inner: Runtime, rule: Decide, point_id: str) -> None:
        self.inner, self.rule, self.point_id = inner, rule, point_id
        self.name, self.fingerprint, self.dtype = inner.name, inner.fingerprint, inner.dtype
        self.control, self.capabilities, self.deterministic = inner.control, inner.capabilities, inner.deterministic

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers whose control token the operating point decided; another `decide` would contradict it."""
        if decide is not None:
            raise InputError("this runtime already decides by an operating point; pass one rule or the other")
        condition = replace(condition or Condition(), operating_point=self.point_id)
        return self.inner.generate(prompts, condition, samples=samples, decide=self.rule, progress=progress)

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """Probabilities do not depend on the operating point."""
        return self.inner.score(prompts, condition, T=T, progress=progress)

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Condition | None = None
    ) -> Iterator[States]:
        """The inner runtime's states."""
        return self.inner.states(prompts, sites, condition)


def check_point(point: OperatingPoint, runtime: Runtime, T: float | None = None) -> None:
    """Refuse an operating point that was made for something else; warn when only the dtype differs.

    Raises:
        InputError: no control tokens, or a category the model does not have.
        MismatchError: another model's fingerprint, or scores at another softmax temperature.
    """
    if runtime.control is None:
        raise InputError(
            f"operating point {point.id!r} steers control tokens, and {runtime.name!r} has none; "
            "train them (demur train refusal-tokens) or take a model that has them"
        )
    unknown = sorted(set(point.thresholds) - set(runtime.control.refuse))
    if unknown:
        raise InputError(
            f"operating point {point.id!r} has thresholds for {', '.join(unknown)}; "
            f"{runtime.name!r} knows {', '.join(runtime.control.refuse)}"
        )
    if point.model_fingerprint and runtime.fingerprint and point.model_fingerprint != runtime.fingerprint:
        raise MismatchError(
            f"operating point {point.id!r} was calibrated on the model {point.model_fingerprint[:20]}, "
            f"{runtime.name!r} is {runtime.fingerprint[:20]}; calibrate again (demur calibrate)"
        )
    if T is not None and point.T != T:
        raise MismatchError(
            f"operating point {point.id!r} is for T={point.T:g} and the scores are at T={T:g}; use one T"
        )
    if point.dtype and runtime.dtype and point.dtype != runtime.dtype:
        warnings.warn(
            f"operating point {point.id!r} was calibrated in {point.dtype}, {runtime.name!r} runs in {runtime.dtype}: "
            "probabilities shift a little, so the stated guarantee no longer holds exactly",
            stacklevel=2,
        )


def _guard_safety(point: OperatingPoint, shipped: OperatingPoint) -> None:
    """A higher tau refuses less; a category without a threshold falls back to the model's own choice."""
    ours, theirs = point.thresholds.get(SAFETY), shipped.thresholds.get(SAFETY)
    if theirs is None or (ours is None and theirs.tau >= 0.5):
        return
    if ours is None or _looser(ours, theirs) or point.rule != shipped.rule:
        raise RefusalLowering(
            f"operating point {point.id!r} would refuse less in category {SAFETY!r} than the shipped one "
            f"(tau {ours.tau if ours else 'none'} against {theirs.tau:.3g}, rule {point.rule} against {shipped.rule}). If that is what you want, "
            "say so: --allow-refusal-lowering (Python: allow_refusal_lowering=True); it is logged"
        )


def _looser(ours: Threshold, theirs: Threshold) -> bool:
    return ours.tau > theirs.tau + 1e-9 or ours.mode == "shadow"
