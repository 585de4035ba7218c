"""Readers of hidden states: difference of means, logistic regression, cosine to two centres.

A probe is fitted on some rows, its threshold is set on others, and both facts travel with it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from demur.errors import InputError, MissingExtra, UnsupportedClaim
from demur.explain.artefact import (
    Direction,
    FloatArray,
    Place,
    data_hash,
    described,
    place,
    read_artefact,
    row_hashes,
    write_artefact,
)
from demur.stats.controls import labels
from demur.stats.intervals import upper_bound

Kind = Literal["mean_difference", "logistic", "cosine_centres"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A threshold and the rows it was set on: `k` of `n` negatives score at or above it.

    `target` is the false positive rate asked for; the true one exceeds `upper` with probability `delta`.
    """

    threshold: float
    target: float
    k: int
    n: int
    delta: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A fitted reader. A higher score means "more like the rows labelled True"; 0 is its own dividing line.

    Attributes:
        kind: "mean_difference": score = w.x - w.(m1 + m0)/2 with w = m1 - m0, the class means;
            "logistic": log-odds of a logistic regression on standardised states;
            "cosine_centres": cos(x, m1) - cos(x, m0), on the states as they are.
        vectors: (1, d) weights, for "cosine_centres" the (2, d) centres m1 and m0. bias: of the score.
        mean, scale: (d,) standardisation of the states: 0 and 1 where the kind has none.
        site: layer and position. fingerprint: of the model, None when unknown. C: of the logistic kind.
        n_positive, n_negative: rows fitted on. data_hash: of these rows; rows: a hash for each of them.
        cut: the threshold, if one was set.
    """

    kind: Kind
    vectors: FloatArray
    bias: float
    mean: FloatArray
    scale: FloatArray
    n_positive: int
    n_negative: int
    data_hash: str
    rows: npt.NDArray[np.uint64]
    C: float | None = None
    site: Place | None = None
    fingerprint: str | None = None
    cut: Cut | None = None

    def score(self, X: npt.ArrayLike) -> FloatArray:
        """Scores (n,) of states (n, d).

        Raises:
            InputError: another width, or numbers that are not finite.
        """
        H = (_states(X, self.mean.size) - self.mean) / self.scale
        if self.kind == "cosine_centres":
            return _cosines(H, self.vectors) @ np.array([1.0, -1.0])
        return np.asarray(H @ self.vectors[0] + self.bias, float)

    def flag(self, X: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each state (n, d) scores at or above the threshold."""
        if self.cut is None:
            raise InputError("this probe has no threshold; set one with `with_threshold` on rows of its own")
        return self.score(X) >= self.cut.threshold

    @property
    def threshold(self) -> float | None:
        """The threshold in force, None before `with_threshold`."""
        return None if self.cut is None else self.cut.threshold

    @property
    def direction(self) -> Direction:
        """What the probe looks along, in the units of the states: w, w / scale, or m1 - m0."""
        centres = self.kind == "cosine_centres"
        vector = self.vectors[0] - self.vectors[1] if centres else self.vectors[0] / self.scale
        return Direction(
            vector=vector,
            origin=self.kind,
            site=self.site,
            fingerprint=self.fingerprint,
            n=self.n_positive + self.n_negative,
            data_hash=self.data_hash,
        )

    def with_threshold(
        self,
        X: npt.ArrayLike,
        y: npt.ArrayLike,
        *,
        fpr: float = 0.01,
        delta: float | None = None,
        allow_repeats: bool = False,
    ) -> Probe:
        """The same probe with the lowest threshold whose false positive rate on these rows is at most `fpr`.

        With `delta` the promise is about new rows of the same kind: the exact (Clopper-Pearson) upper bound of
        the rate, which fails with probability `delta`, is at most `fpr`. Without it only these rows count, and
        `cut.upper` says at 5 % what may be expected of others.

        Args:
            X: states (n, d), none of which was fitted on. y: labels (n,); only negatives are used.
            allow_repeats: accept rows that equal a fitted row.

        Raises:
            InputError: rows that were fitted on, no negatives. UnsupportedClaim: too few negatives for `delta`.
        """
        if not 0 < fpr < 1 or (delta is not None and not 0 < delta < 1):
            raise InputError(f"fpr={fpr}, delta={delta}: both are shares between 0 and 1")
        H = _states(X, self.mean.size)
        negatives = H[~labels(y, len(H))]
        seen = int(np.isin(row_hashes(H), self.rows).sum())
        if seen and not allow_repeats:
            raise InputError(
                f"{seen} of {len(H)} rows were fitted on (or equal a fitted row): a probe scores those too well, "
                "so a threshold set on them would flag more than it says. Pass other rows"
            )
        n = len(negatives)
        if n == 0:
            raise InputError("no negative rows, so there is no false positive rate to set")
        ok = np.arange(n + 1) / n <= fpr if delta is None else upper_bound(np.arange(n + 1), n, delta) <= fpr
        if not ok.any():
            needed = math.ceil(math.log(delta or 1) / math.log1p(-fpr))
            raise UnsupportedClaim(
                f"{n} negatives cannot show a false positive rate of {fpr} with error {delta}: even none "
                f"flagged leaves an upper bound of {float(upper_bound(0, n, delta or 1)):.3f}. {needed} are needed"
            )
        most = int(np.flatnonzero(ok)[-1])  # at most so many negatives may be flagged; fewer on ties
        scores = np.sort(self.score(negatives))[::-1]
        threshold = float(np.nextafter(scores[most], np.inf))
        k = int((scores >= threshold).sum())
        risk = 0.05 if delta is None else delta
        bound = float(upper_bound(k, n, risk))
        cut = Cut(threshold=threshold, target=fpr, k=k, n=n, delta=risk, upper=bound)
        return dataclasses.replace(self, cut=cut)

    def save(self, path: str | Path) -> None:
        """Write the probe as one safetensors file with a JSON header, atomically.

        Raises:
            MissingExtra: safetensors is not installed.
        """
        names = ("kind", "bias", "C", "site", "fingerprint", "n_positive", "n_negative", "data_hash")
        about: dict[str, Any] = {name: getattr(self, name) for name in names}
        about["cut"] = None if self.cut is None else asdict(self.cut)
        tensors = {name: getattr(self, name) for name in ("vectors", "mean", "scale", "rows")}
        write_artefact(path, "probe", tensors, about)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> Probe:
        """Read a probe for the model with this fingerprint (`runtime.fingerprint`).

        Raises:
            MismatchError: it was fitted on another model, or one of the two is unknown and `allow_unknown`
                was not given. InputError: not a probe file. MissingExtra: safetensors is not installed.

        >>> probe = Probe.load("honesty.safetensors", fingerprint=runtime.fingerprint)  # doctest: +SKIP
        """
        t, about = read_artefact(path, "probe", fingerprint, allow_unknown)
        with described(path):
            width = t["mean"].shape
            two = 2 if about["kind"] == "cosine_centres" else 1
            if about["kind"] not in KINDS or t["vectors"].shape != (two, *width) or t["scale"].shape != width:
                raise ValueError(f"kind {about['kind']!r} with vectors of shape {t['vectors'].shape}")
            return cls(
                kind=about["kind"],
                vectors=t["vectors"].astype(float),
                bias=float(about["bias"]),
                mean=t["mean"].astype(float),
                scale=t["scale"].astype(float),
                n_positive=int(about["n_positive"]),
                n_negative=int(about["n_negative"]),
                data_hash=str(about["data_hash"]),
                rows=t["rows"],
                C=about["C"],
                site=place(about["site"]),
                fingerprint=about["fingerprint"],
                cut=None if about["cut"] is None else Cut(**about["cut"]),
            )


def fit_probe(
    X: npt.ArrayLike,
    y: npt.ArrayLike,
    kind: Kind = "logistic",
    C: float = 1.0,
    *,
    site: Place | None = None,
    fingerprint: str | None = None,
) -> Probe:
    """Fit a probe on states (n, d) and labels (n,).

    Args:
        kind: see `Probe`. C: inverse regularisation of the logistic kind, on standardised states.
        site, fingerprint: where the states come from; saved with the probe.

    Raises:
        InputError: shapes that clash, numbers that are not finite, one class only, an unknown kind.
        MissingExtra: the logistic kind without scikit-learn.

    >>> probe = fit_probe([[0.0, 1.0], [2.0, 1.0]], [False, True], "mean_difference")
    >>> probe.score([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]).tolist()  # w = (2, 0), half way at 1
    [-2.0, 0.0, 2.0]
    """
    H = _states(X)
    yes = labels(y, len(H))
    if yes.all() or not yes.any():
        raise InputError(f"all {len(yes)} rows are labelled {bool(yes[0])}; a probe needs both classes")
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}; probes are {', '.join(KINDS)}")
    if not C > 0:
        raise InputError(f"C={C}: the inverse regularisation is positive")
    mean, scale, bias = np.zeros(H.shape[1]), np.ones(H.shape[1]), 0.0
    m1, m0 = H[yes].mean(0), H[~yes].mean(0)
    if kind == "cosine_centres":
        vectors = np.stack([m1, m0])
    elif kind == "mean_difference":
        vectors = (m1 - m0)[None]
        bias = -float(vectors[0] @ (m1 + m0) / 2)
    else:
        mean, spread = H.mean(0), H.std(0)
        # a feature that does not vary but for rounding must not be blown up to unit size
        scale = np.where(spread > 1e-6 * np.abs(mean), spread, 1.0)
        vectors, bias = _logistic((H - mean) / scale, yes, C)
    hashes = row_hashes(H)
    return Probe(
        kind=kind,
        vectors=vectors,
        bias=bias,
        mean=mean,
        scale=scale,
        n_positive=int(yes.sum()),
        n_negative=int((~yes).sum()),
        data_hash=data_hash(hashes, yes),
        rows=hashes,
        C=C if kind == "logistic" else None,
        site=site,
        fingerprint=fingerprint,
    )


def _logistic(H: FloatArray, yes: npt.NDArray[np.bool_], C: float) -> tuple[FloatArray, float]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("A logistic probe", "local") from None
    model = LogisticRegression(C=C, max_iter=5000).fit(H, yes)
    return np.asarray(model.coef_, float), float(model.intercept_[0])


def _states(X: npt.ArrayLike, width: int | None = None) -> FloatArray:
    H = np.asarray(X, float)
    if H.ndim != 2 or not H.size or (width is not None and H.shape[1] != width):
        raise InputError(f"states of shape {H.shape}; needed is (n, {width or 'd'}), one row for each prompt")
    if not np.isfinite(H).all():
        bad = int((~np.isfinite(H).all(1)).sum())
        raise InputError(f"{bad} rows of states hold numbers that are not finite; collect them in float32")
    return H


def _cosines(H: FloatArray, centres: FloatArray) -> FloatArray:
    """Cosine of each row with each centre (n, k); 0 where one has no length."""
    lengths = np.linalg.norm(H, axis=1)[:, None] * np.linalg.norm(centres, axis=1)
    return np.divide(H @ centres.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)
