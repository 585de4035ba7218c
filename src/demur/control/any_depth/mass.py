"""What the control tokens say behind a re-injected header: a check without fitting, for models that have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demur.control.any_depth.answers import Answer, FloatArray, encoded
from demur.control.any_depth.header import header_of
from demur.control.any_depth.threshold import answer_cut
from demur.errors import InputError
from demur.explain.probe import Cut

if TYPE_CHECKING:
    from demur.runtime.base import ControlTokens
    from demur.runtime.lanes import Lanes
    from demur.runtime.local import LocalRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseMass:
    """Stops an answer by the probability that its continuation, started over, would open with a refuse token.

    p is the mass of all refuse categories at the header: `Score.p_refuse`, read again with the answer in view.

    Attributes:
        threshold: an answer is stopped at p >= threshold. cut, guarantee: how it was found, what holds for it.

    >>> check = RefuseMass().calibrated(scores, harmful)  # doctest: +SKIP
    """

    threshold: float = 0.5
    cut: Cut | None = None
    guarantee: str | None = None

    name = "any-depth-mass"

    def fits(self, runtime: LocalRuntime) -> None:
        """Raise `InputError` unless the model has control tokens and its template a header to put."""
        _control(runtime)
        header_of(runtime.chat)

    def read(self, lanes: Lanes, keys: Sequence[int]) -> list[float]:
        """p of rows under way, in the order of `keys`."""
        runtime = lanes.runtime
        control = _control(runtime)
        masses = lanes.masses(keys, header_of(runtime.chat).ids, [control.ids[c] for c in control.refuse])
        return [float(p) for p in masses.sum(1)]

    def scores(self, runtime: LocalRuntime, answers: Sequence[Answer], depths: Sequence[int]) -> FloatArray:
        """p of finished answers at some depths, (answers, depths); NaN where an answer is shorter."""
        from demur.runtime.depths import DepthRow, header_scores

        control = _control(runtime)
        rows = [DepthRow(*encoded(runtime, a)) for a in answers]
        ids = [control.ids[c] for c in control.refuse]
        masses = header_scores(runtime, rows, depths, header_of(runtime.chat).ids, ids)
        return np.asarray(masses.sum(-1), float)

    def calibrated(
        self,
        scores: npt.ArrayLike,
        harmful: npt.ArrayLike,
        *,
        fpr: float = 0.05,
        delta: float = 0.1,
        on: str | None = None,
    ) -> RefuseMass:
        """The check with a threshold for whole answers; arguments and errors as in `answer_cut`."""
        cut, guarantee = answer_cut(scores, harmful, fpr=fpr, delta=delta, on=on)
        return dataclasses.replace(self, threshold=cut.threshold, cut=cut, guarantee=guarantee)


def _control(runtime: LocalRuntime) -> ControlTokens:
    if runtime.control is None:
        raise InputError(
            f"{runtime.name!r} has no control tokens, so there is no refuse mass to read behind its header; take a "
            "model that has them, a fitted probe, or the look ahead"
        )
    return runtime.control
