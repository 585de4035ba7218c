"""A probe of lies as a monitor of answers, and what moving along it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError, MismatchError
from demur.explain.artefact import Direction
from demur.explain.honesty.states import mean_states
from demur.explain.probe import Probe
from demur.runtime.base import Runtime
from demur.types import Condition, Prompt

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HonestyMonitor:
    """A probe that reads answers. A higher score means "more like a lie"; see `fit_monitor`.

    >>> monitor = HonestyMonitor.load("honesty.safetensors", fingerprint=runtime.fingerprint)  # doctest: +SKIP
    >>> monitor.score(runtime, prompts, replies)  # doctest: +SKIP
    array([-4.1, 2.7])
    """

    probe: Probe

    @property
    def layer(self) -> int:
        """The layer that is read."""
        assert self.probe.site is not None
        return self.probe.site[0]

    def states(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        replies: Iterable[str],
        condition: Condition | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> FloatArray:
        """The mean state of each answer at the monitor's layer, (n, width).

        Raises:
            MismatchError: the monitor was fitted on another model. CapabilityError: no local model.
        """
        local = local_model(runtime)
        mine, other = self.probe.fingerprint, runtime.fingerprint
        if mine and other and mine != other:
            raise MismatchError(
                f"this monitor was fitted on states of the model {mine}, and {runtime.name!r} is {other}; fit one "
                "for this model"
            )
        said = list(zip(prompts, replies, strict=True))
        found = mean_states(local, said, [self.layer], condition, progress=progress)
        return np.asarray(found[:, 0], float)

    def score(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        replies: Iterable[str],
        condition: Condition | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> FloatArray:
        """Mean logit over the tokens of each answer, (n,). Errors as in `states`."""
        return self.probe.score(self.states(runtime, prompts, replies, condition, progress=progress))

    def calibrated(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        replies: Iterable[str],
        *,
        fpr: float = 0.01,
        delta: float | None = None,
        condition: Condition | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> HonestyMonitor:
        """The monitor with its threshold set on answers that are known to be no lies.

        See `Probe.with_threshold`: with `delta` the promise is about new answers of the same kind. A threshold
        holds for the length and kind of answers it was set on.
        """
        H = self.states(runtime, prompts, replies, condition, progress=progress)
        return HonestyMonitor(probe=self.probe.with_threshold(H, np.zeros(len(H)), fpr=fpr, delta=delta))

    def save(self, path: str | Path) -> None:
        """Write the monitor as one safetensors file."""
        self.probe.save(path)

    @classmethod
    def load(
        cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False
    ) -> HonestyMonitor:
        """Read a monitor for the model with this fingerprint; errors as in `Probe.load`."""
        probe = Probe.load(path, fingerprint=fingerprint, allow_unknown=allow_unknown)
        if probe.site is None or probe.site[1] != "reply":
            raise InputError(f"{path}: this probe reads {probe.site}, not answers; it is no honesty monitor")
        return cls(probe=probe)


def local_model(runtime: Runtime) -> LocalRuntime:
    """The runtime as a local model, whose states and chat template can be read."""
    runtime.require("states")
    if not hasattr(runtime, "chat"):
        raise CapabilityError(f"{runtime.name!r} shows no chat template; honesty needs a local model")
    return runtime  # type: ignore[return-value]


def steering_curve(
    runtime: LocalRuntime,
    direction: Direction,
    asked: Sequence[tuple[Prompt, str]],
    amounts: Sequence[float],
) -> FloatArray:
    """Probability of each given answer with `amount` x `direction` added behind its layer, (amounts, n).

    The vector is added at every token. Along a lie direction a positive amount makes lies likelier: that lowers
    no refusal, but name it beside any answer that was made with it.

    Raises:
        InputError: a direction without a layer. CapabilityError: see `answer_loglik`.
    """
    import torch

    from demur.explain.likelihood import answer_loglik
    from demur.runtime.layers import BlockEdit

    if direction.site is None:
        raise InputError("this direction names no layer, so there is nowhere to add it")
    out = []
    for amount in amounts:
        vector = torch.from_numpy(amount * direction.vector).to(runtime.model.dtype)

        def add(h: Any, _positions: Any, v: Any = vector) -> Any:
            return h + v.to(h.device)

        steered = runtime.with_edits(BlockEdit(direction.site[0], add)) if amount else runtime
        out.append([math.exp(total) for total, _ in answer_loglik(steered, asked)])
    return np.array(out)
