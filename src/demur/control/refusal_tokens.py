"""The dial: an operating point in front of a model with refusal tokens.

Score the first position, decide by the operating point (`demur.calibrate.decide`, the rules of arXiv
2412.06748 and its code), force that control token, let the model write on. Nothing is retrained and the
runtime stays as it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from demur.calibrate.decide import cuts, decide, is_steered
from demur.errors import InputError, MismatchError, RefusalLowering
from demur.runtime.base import Decide, Progress, Runtime
from demur.runtime.wrapped import WrappedRuntime
from demur.types import RESPOND, Condition, OperatingPoint, Prompt, Reply, Score, Threshold

SAFETY = "safety"
"""The category whose thresholds may not be loosened past the shipped ones without consent."""


class RefusalTokens:
    """Decide every answer's control token by an operating point.

    Args:
        point: thresholds and rule; under "compare" without thresholds every category is steered.
        shipped: the operating point that came with the model, if any.
        allow_refusal_lowering: consent to refusing less in category "safety" than `shipped`; it is logged.

    `lowers` says why the point may refuse less than the shipped one, where somebody consented to that.

    Raises:
        RefusalLowering: the point refuses less in category "safety" than the shipped one and nobody
            consented.
        InputError: a bias and a tau that contradict each other.

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
        self.point, self.T, self.answers = point, point.T, point.answers
        self._cuts = cuts(point)
        self._allowed = allow_refusal_lowering
        self.lowers: str | None = None
        self._check_lowering(shipped)

    def _check_lowering(self, shipped: OperatingPoint | None) -> None:
        why = _lowers_safety(self.point, shipped) if shipped is not None else None
        if why is None or why == self.lowers:
            return
        if not self._allowed:
            raise RefusalLowering(
                f"{why}. If that is what you want, say so: allow_refusal_lowering=True, or on the command line "
                "--allow-refusal-lowering; it is logged"
            )
        self.lowers = why
        logging.getLogger("demur").warning("allowed: %s", why)

    def __call__(self, _prompt: Prompt, score: Score) -> str | None:
        """The control token to force, or None where the model's own choice stands (c* is not steered).

        Raises:
            InputError: the score has no control probabilities. MismatchError: it is at another T.
        """
        if RESPOND not in score.probabilities:
            raise InputError(
                f"the score of {score.id!r} (kind {score.kind!r}) has no probabilities of control tokens, so "
                "there is nothing to decide by"
            )
        _check_temperature(self.point, score.T)
        names = [*(n for n in score.probabilities if n != RESPOND), RESPOND]
        row = np.array([[score.probabilities[n] for n in names]])
        steered = self.cuts(names)
        if not bool(is_steered(row, names, steered)[0]):
            return None
        return names[int(decide(row, names, steered, self.point.rule)[0])]

    def cuts(self, names: Sequence[str]) -> dict[str, float]:
        """Threshold by steered category, as `demur.calibrate.decide` takes them; `names` end in `respond`."""
        if self.point.rule == "compare" and not self.point.thresholds:
            return dict.fromkeys(names[:-1], -1.0)
        return self._cuts

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """`with RefusalTokens(point).on(runtime) as dialled:` answers under the operating point.

        Raises:
            InputError: the runtime has no control tokens, or lacks a steered category or the base that answers.
            MismatchError: the operating point was calibrated on another model.
            RefusalLowering: as above, against the point that came with the runtime's adapter.
        """
        check_point(self.point, runtime)
        self._check_lowering(runtime.shipped_point)
        yield _Dialled(runtime, self, self.point.id)


class _Dialled(WrappedRuntime):
    """The runtime under a decision rule; probabilities and states do not depend on it."""

    def __init__(self, inner: Runtime, rule: Decide, point_id: str) -> None:
        super().__init__(inner)
        self.rule, self.point_id = rule, point_id

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


def check_point(point: OperatingPoint, runtime: Runtime, T: float | None = None) -> None:
    """Refuse an operating point that was made for something else; warn when only the dtype differs.

    Raises:
        InputError: no control tokens, a category the model does not have, no base model for `answers: base`.
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
    if point.answers == "base" and runtime.base is None:
        raise InputError(
            f"operating point {point.id!r} lets the base model answer (answers: base), and {runtime.name!r} has "
            "none at hand: its adapter is merged, or it has none. Take the base with the adapter on it, serve it "
            "with a base model (demur serve --base-model), or set `answers: model` and measure again"
        )
    if point.model_fingerprint and runtime.fingerprint and point.model_fingerprint != runtime.fingerprint:
        raise MismatchError(
            f"operating point {point.id!r} was calibrated on the model {point.model_fingerprint[:20]}, "
            f"{runtime.name!r} is {runtime.fingerprint[:20]}; calibrate again (demur calibrate)"
        )
    if T is not None:
        _check_temperature(point, T)
    if point.dtype and runtime.dtype and point.dtype != runtime.dtype:
        warnings.warn(
            f"operating point {point.id!r} was calibrated in {point.dtype}, {runtime.name!r} runs in "
            f"{runtime.dtype}: probabilities shift a little, so the stated guarantee no longer holds exactly",
            stacklevel=2,
        )


def _check_temperature(point: OperatingPoint, T: float) -> None:
    if point.T != T:
        raise MismatchError(
            f"operating point {point.id!r} is for T={point.T:g} and the scores are at T={T:g}; use one T"
        )


def _lowers_safety(point: OperatingPoint, shipped: OperatingPoint) -> str | None:
    """Why `point` may refuse less in category safety than `shipped`; None when it cannot.

    A category without a threshold falls back to the model's own choice, which is close to tau 0.5 on its own mass.
    """
    ours, theirs = point.thresholds.get(SAFETY), shipped.thresholds.get(SAFETY)
    if theirs is None or theirs.mode == "shadow":
        return None
    summed = shipped.rule == "total_mass"  # a comparison may answer although the sum is above 0.5
    if ours is None and theirs.tau >= 0.5 and not summed:
        return None
    missing = set(cuts(shipped)) - set(cuts(point)) if point.rule == "total_mass" else set()
    comparable = point.rule == shipped.rule and point.T == shipped.T and not missing
    compares = ours is not None and ours.tau < 0 <= theirs.tau
    if ours is not None and comparable and not _looser(ours, theirs) and not (summed and compares):
        return None
    return (
        f"operating point {point.id!r} may refuse less in category {SAFETY!r} than the shipped "
        f"{shipped.id!r}: {_brief(point)} against {_brief(shipped)}"
    )


def _looser(ours: Threshold, theirs: Threshold) -> bool:
    """A higher tau refuses less; a negative one compares and refuses at least all that tau 0.5 does.

    The same calibration on another processor moves a tau by rounding alone, hence the tolerance.
    """
    if ours.mode == "shadow":
        return True
    if ours.tau < 0 and theirs.tau < 0:
        return False
    return (0.5 if ours.tau < 0 else ours.tau) > max(theirs.tau, 0.0) + 1e-4


def _brief(point: OperatingPoint) -> str:
    t = point.thresholds.get(SAFETY)
    cut = "no threshold" if t is None else f"tau {t.tau:.3g} ({t.mode})"
    return f"{cut}, rule {point.rule}, T={point.T:g}, steering {', '.join(sorted(cuts(point))) or 'nothing'}"
