"""One model fitted for explanations: what `demur.flows.explain_fit` makes, keeps and reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.explain.artefact import described, read_artefact, write_artefact
from demur.explain.harmfulness import Axis, Beliefs

FloatArray = npt.NDArray[np.float64]
WHAT = "fit of explanations"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What one belief is worth on prompts of core/test, on which nothing was fitted or chosen.

    Harmfulness is tested on harmful requests against harmless ones that resemble them, refusal on what the model
    declines against what it answers.
    `auroc` with its interval; `words` is that of a bag of words fitted on the same prompts and labels, `gain` the
    difference with its paired interval; `random` the mean over readers fitted on permuted labels, and their
    middle 95 %.
    """

    axis: str
    positive: int
    negative: int
    auroc: float
    low: float
    high: float
    words: float
    gain: float
    gain_low: float
    gain_high: float
    random: float
    random_low: float
    random_high: float

    @property
    def beats_words(self) -> bool:
        """Whether the interval of the gain over the bag of words lies above 0."""
        return self.gain_low > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """One model, fitted.

    Attributes:
        beliefs: centres, windows, cuts.
        scale: (axis, L, 3) of leanings at each layer, and own: (axis, 3) of the beliefs themselves: mean of the
            fitted prompts on the yes-side and on the no-side, and their standard deviation within a side.
        fitted: ids in core/train. declined: (n,) 1 where the model declines, 0 where it answers, -1 unknown.
        tested, tested_declined: the same of core/test. tested_leanings: (axis, prompts, L) there.
        near: (n, d) states at `near_layer` and `t_inst`, for nearest prompts.
        maps: "harmful t_inst" ... -> AUROC by layer of a reader at that layer and position, tested as in `Worth`.
        worth: of each belief.
        labels: "behaviour" or, where only harmfulness was fitted, why.
    """

    beliefs: Beliefs
    scale: FloatArray
    own: FloatArray
    fitted: tuple[str, ...]
    declined: npt.NDArray[np.int8]
    tested: tuple[str, ...]
    tested_declined: npt.NDArray[np.int8]
    tested_leanings: FloatArray
    near: npt.NDArray[np.float32]
    near_layer: int
    maps: Mapping[str, tuple[float, ...]]
    worth: tuple[Worth, ...]
    labels: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Beliefs that were fitted."""
        return ("harmful",) if self.beliefs.refuse is None else ("harmful", "refuse")

    def axis(self, name: str) -> Axis:
        """One of the beliefs."""
        found: Axis = getattr(self.beliefs, name)
        return found

    def relative(self, name: str, leanings: npt.ArrayLike) -> FloatArray:
        """Leanings (..., L) in standard deviations from the middle between the two sides."""
        return _standard(np.asarray(leanings, float), self.scale[self.axes.index(name)])

    def belief(self, name: str, value: float) -> float:
        """A belief in the same unit."""
        return float(_standard(np.asarray(value, float), self.own[self.axes.index(name)]))

    def usual(self, name: str) -> tuple[float, float]:
        """Mean belief about the fitted prompts of the yes-side and of the no-side, in the same unit."""
        yes, no, _ = self.own[self.axes.index(name)]
        return self.belief(name, yes), self.belief(name, no)

    def save(self, path: Path) -> None:
        """Write the fit, atomically."""
        tensors, about = self.beliefs.plain()
        extra: dict[str, npt.NDArray[Any]] = {
            "scale": self.scale,
            "own": self.own,
            "declined": self.declined,
            "tested_declined": self.tested_declined,
            "tested_leanings": self.tested_leanings,
            "near": self.near.astype(np.float16),
        }
        more = {
            "fitted": self.fitted,
            "tested": self.tested,
            "near_layer": self.near_layer,
            "maps": self.maps,
            "worth": [asdict(w) for w in self.worth],
            "labels": self.labels,
        }
        write_artefact(path, WHAT, {**tensors, **extra}, {**about, "fit": more})

    @classmethod
    def load(cls, path: Path, fingerprint: str | None) -> Fit:
        """Read a fit for the model with this fingerprint; errors as in `demur.explain.Probe.load`."""
        tensors, about = read_artefact(path, WHAT, fingerprint, False)
        with described(path):
            more = about["fit"]
            return cls(
                beliefs=Beliefs.from_plain(tensors, about),
                scale=tensors["scale"].astype(float),
                own=tensors["own"].astype(float),
                fitted=tuple(more["fitted"]),
                declined=tensors["declined"],
                tested=tuple(more["tested"]),
                tested_declined=tensors["tested_declined"],
                tested_leanings=tensors["tested_leanings"].astype(float),
                near=tensors["near"].astype(np.float32),
                near_layer=int(more["near_layer"]),
                maps={k: tuple(v) for k, v in more["maps"].items()},
                worth=tuple(Worth(**w) for w in more["worth"]),
                labels=more["labels"],
            )


def _standard(values: FloatArray, scale: FloatArray) -> FloatArray:
    yes, no, spread = scale[..., 0], scale[..., 1], scale[..., 2]
    shape = np.broadcast_shapes(values.shape, spread.shape)
    return np.divide(values - (yes + no) / 2, spread, out=np.zeros(shape), where=spread > 1e-9)
