"""The linear probe at a re-injected header: fit, threshold for whole answers, file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demur.control.any_depth.answers import Answer, FloatArray, states_at
from demur.control.any_depth.header import Header, header_of
from demur.control.any_depth.threshold import answer_cut
from demur.errors import InputError, MismatchError, MissingExtra
from demur.explain.artefact import described, read_artefact, write_artefact
from demur.explain.probe import Cut
from demur.types import Site

if TYPE_CHECKING:
    from demur.runtime.lanes import Lanes
    from demur.runtime.local import LocalRuntime

WHAT = "header probe"
DEPTHS = tuple(range(25, 501, 25))
"""Depths that the published probes are fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeaderProbe:
    """Reads from the state at a header, put behind an unfinished answer, whether the answer should be stopped.

    p = sigmoid(w.x + b), where x is the residual stream after block `layer`, divided by its root mean square (the
    input of the next block, up to the weights of its norm).

    Attributes:
        header: token ids that are run behind the answer; the state at the last one is read.
        weights: (d,). bias: of the log-odds. layer: chosen on the selection answers.
        accuracy: layer -> share right at 0.5 on the selection answers, over all depths.
        threshold: an answer is stopped at p >= threshold. cut, guarantee: how it was found, what holds for it.
        depths: fitted on. n_harmful, n_benign: answers fitted on. data_hash: of them.
        fingerprint: of the model, None when unknown.
    """

    header: tuple[int, ...]
    layer: int
    weights: FloatArray
    bias: float
    depths: tuple[int, ...]
    n_harmful: int
    n_benign: int
    data_hash: str
    accuracy: Mapping[int, float] = field(default_factory=dict)
    fingerprint: str | None = None
    threshold: float = 0.5
    cut: Cut | None = None
    guarantee: str | None = None

    name = "any-depth-probe"

    @classmethod
    def fit(
        cls,
        runtime: LocalRuntime,
        answers: Sequence[Answer],
        *,
        select: Sequence[Answer],
        depths: Sequence[int] = DEPTHS,
        layers: Sequence[int] | None = None,
        header: Header | None = None,
        C: float = 1.0,
    ) -> HeaderProbe:
        """Fit one logistic regression for each layer and keep the one that is most often right on `select`.

        Args:
            answers: of both kinds; those shorter than a depth are left out there. select: others, to choose the
                layer on: most often right, on a tie the lowest log loss.
            layers: to try; all by default. header: default the template's own.
            C: inverse L2 penalty; classes weigh alike, as published.

        Raises:
            InputError: one class only, or answers that stand in both sets. MissingExtra: no scikit-learn.
        """
        if shared := _keys(answers) & _keys(select):
            raise InputError(
                f"{len(shared)} answers are in both sets; the layer is chosen on answers of its own"
            )
        header = header or header_of(runtime.chat)
        layers = range(_depth(runtime)) if layers is None else layers
        X, y = pairs(states_at(runtime, answers, depths, header.probe, layers), answers)
        Z, z = pairs(states_at(runtime, select, depths, header.probe, layers), select)
        best, weights, bias, right = fit_layers(X, y, Z, z, C)
        harmful = sum(a.harmful for a in answers)
        return cls(
            header=header.probe,
            layer=int(layers[best]),
            weights=weights,
            bias=bias,
            depths=tuple(depths),
            n_harmful=harmful,
            n_benign=len(answers) - harmful,
            data_hash=hashlib.sha256(repr(sorted(_keys(answers))).encode()).hexdigest()[:16],
            accuracy=dict(zip(map(int, layers), right, strict=True)),
            fingerprint=runtime.fingerprint,
        )

    # --- reading --------------------------------------------------------------------------------------------

    def p(self, states: npt.ArrayLike) -> FloatArray:
        """Probabilities (n,) of states (n, d) after block `layer`."""
        x = np.asarray(states, float)
        if x.ndim != 2 or x.shape[1] != self.weights.size:
            raise InputError(f"states of shape {x.shape}; the probe reads (n, {self.weights.size})")
        return np.asarray(1 / (1 + np.exp(-np.clip(odds(x, self.weights, self.bias), -500, 500))), float)

    def read(self, lanes: Lanes, keys: Sequence[int]) -> list[float]:
        """p of rows under way, in the order of `keys`."""
        states = lanes.peek(keys, self.header, [Site(layer=self.layer)])
        return list(map(float, self.p(states[:, 0]))) if len(keys) else []

    def scores(self, runtime: LocalRuntime, answers: Sequence[Answer], depths: Sequence[int]) -> FloatArray:
        """p of finished answers at some depths, (answers, depths); NaN where an answer is shorter."""
        self.fits(runtime)
        states = states_at(runtime, answers, depths, self.header, [self.layer])[:, :, 0]
        out = np.full(states.shape[:2], np.nan)
        there = np.isfinite(states[..., 0])
        out[there] = self.p(states[there])
        return out

    def fits(self, runtime: LocalRuntime) -> None:
        """Raise `MismatchError` unless the probe belongs to this model and its template."""
        theirs = runtime.fingerprint
        if self.fingerprint and theirs and self.fingerprint != theirs:
            raise MismatchError(
                f"this header probe was fitted on the model {self.fingerprint[:20]}, {runtime.name!r} is "
                f"{theirs[:20]}; states of one model mean nothing in another, so fit it anew"
            )
        ids = header_of(runtime.chat).ids
        if ids[: len(self.header)] != self.header:
            raise MismatchError(
                f"this header probe reads behind {runtime.tokenizer.decode(list(self.header))!r}, the template of "
                f"{runtime.name!r} writes {runtime.tokenizer.decode(list(ids))!r}; fit it with this template"
            )

    # --- threshold ------------------------------------------------------------------------------------------

    def calibrated(
        self,
        scores: npt.ArrayLike,
        harmful: npt.ArrayLike,
        *,
        fpr: float = 0.05,
        delta: float = 0.1,
        on: str | None = None,
    ) -> HeaderProbe:
        """The probe with the threshold that stops most and provably few harmless answers.

        A served answer faces every check: the false-stop rate is one per answer, not per check. Arguments and
        errors as in `answer_cut`.
        """
        cut, guarantee = answer_cut(scores, harmful, fpr=fpr, delta=delta, on=on)
        return dataclasses.replace(self, threshold=cut.threshold, cut=cut, guarantee=guarantee)

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the probe as one safetensors file with a JSON header, atomically."""
        names = (
            "layer",
            "bias",
            "n_harmful",
            "n_benign",
            "data_hash",
            "fingerprint",
            "threshold",
            "guarantee",
        )
        about: dict[str, Any] = {name: getattr(self, name) for name in names}
        about |= {"header": list(self.header), "depths": list(self.depths)}
        about |= {"accuracy": {str(k): v for k, v in self.accuracy.items()}}
        about |= {"cut": None if self.cut is None else asdict(self.cut)}
        write_artefact(path, WHAT, {"weights": self.weights}, about)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> HeaderProbe:
        """Read a probe for the model with this fingerprint; errors as in `demur.explain.Probe.load`."""
        tensors, about = read_artefact(path, WHAT, fingerprint, allow_unknown)
        with described(path):
            return cls(
                header=tuple(int(i) for i in about["header"]),
                layer=int(about["layer"]),
                weights=tensors["weights"].astype(float).reshape(-1),
                bias=float(about["bias"]),
                depths=tuple(int(d) for d in about["depths"]),
                n_harmful=int(about["n_harmful"]),
                n_benign=int(about["n_benign"]),
                data_hash=str(about["data_hash"]),
                accuracy={int(k): float(v) for k, v in about["accuracy"].items()},
                fingerprint=about["fingerprint"],
                threshold=float(about["threshold"]),
                cut=None if about["cut"] is None else Cut(**about["cut"]),
                guarantee=about["guarantee"],
            )


def pairs(
    states: npt.NDArray[np.float32], answers: Sequence[Answer]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """All (answer, depth) pairs there are, from `states_at`: states (n, layers, d) and labels (n,)."""
    there = np.isfinite(states[:, :, 0, 0])
    y = np.broadcast_to(np.array([a.harmful for a in answers])[:, None], there.shape)[there]
    return states[there], y


def fit_layers(
    X: npt.NDArray[Any],
    y: npt.NDArray[np.bool_],
    Z: npt.NDArray[Any],
    z: npt.NDArray[np.bool_],
    C: float = 1.0,
) -> tuple[int, FloatArray, float, list[float]]:
    """The layer (as an index) whose regression on X, y (n, layers, d) is right most often on Z, z.

    Returns:
        Index, weights (d,), bias, and the share right at 0.5 of every layer.

    Raises:
        InputError: one class only. MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("A header probe", "local") from None
    for labels_ in (y, z):
        if labels_.all() or not labels_.any():
            raise InputError(
                f"all {labels_.size} states are of one kind; a probe needs harmful and harmless answers"
            )
    tried = []
    for k in range(X.shape[1]):
        model = LogisticRegression(C=C, max_iter=1000, class_weight="balanced").fit(_unit(X[:, k]), y)
        w, b = np.asarray(model.coef_[0], float), float(model.intercept_[0])
        found = odds(Z[:, k], w, b)
        loss = np.logaddexp(0, np.where(z, -found, found)).mean()
        tried.append((float(((found >= 0) == z).mean()), float(loss), w, b))
    best = min(range(len(tried)), key=lambda k: (-tried[k][0], tried[k][1]))
    return best, tried[best][2], tried[best][3], [right for right, *_ in tried]


def odds(states: npt.NDArray[Any], weights: FloatArray, bias: float) -> FloatArray:
    """Log-odds of states (..., d)."""
    return np.asarray(_unit(states) @ weights + bias, float)


def _unit(x: npt.NDArray[Any]) -> FloatArray:
    """Rows divided by their root mean square."""
    x = np.asarray(x, float)
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12), float)


def _depth(runtime: LocalRuntime) -> int:
    from demur.runtime.layers import find_layers

    return len(find_layers(runtime.model))


def _keys(answers: Sequence[Answer]) -> set[tuple[str, str]]:
    return {(a.prompt.text, a.text) for a in answers}
