"""What all calibrators share: one yes/no problem per category in, an operating point out.

For category c and any threshold tau, refuse_c is emitted iff c is the likeliest refuse category and the
rule's score is at least tau. Prompts whose likeliest category is another get the score -inf ("never
refused as c"), which leaves a one-dimensional problem: the should-refuse prompts of c against its
look-alike benign ones.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.calibrate.decide import FloatArray, Rule, check_table, steering_score, tau_to_bias
from demur.errors import InputError, UnsupportedClaim
from demur.stats import share_interval
from demur.types import RESPOND, OperatingPoint, Threshold

GENERAL = frozenset({"", "general", RESPOND})
"""Categories of benign prompts that look like no refuse category in particular (None counts too)."""

CONTROL_CLAIM = "the share of {kind} benign prompts of category c answered with refuse_c"


class CalibrationWarning(UserWarning):
    """The calibration differs from what was asked for in a way that the operating point also states."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One category's problem: refuse iff score >= tau.

    `refuse` (n_r,) are scores of should-refuse prompts, `benign` (n_b,) of benign ones, -inf where the
    category cannot be emitted; `*_groups` are cluster labels or None. `general` says that `benign` are not
    look-alikes. `ordinary` (n_o,) are scores as this category of benign prompts that resemble none.
    """

    name: str
    refuse: FloatArray
    benign: FloatArray
    refuse_groups: npt.NDArray[Any] | None = None
    benign_groups: npt.NDArray[Any] | None = None
    general: bool = False
    ordinary: FloatArray = field(default_factory=lambda: np.zeros(0))
    ordinary_groups: npt.NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A calibrator's answer for one slice; `bound` limits the false refusal rate if anything does."""

    tau: float
    bound: float | None = None


@dataclass(frozen=True)
class Calibrator(ABC):
    """Scores, expectations and categories in, an `OperatingPoint` out. Settings here, data in `fit`.

    Attributes:
        rule: decision rule that the thresholds are for (`demur.calibrate.decide`). By default the share of a
            category against `respond`: where a request could be refused for two reasons, neither probability is
            high and both shares are.
        steer: categories to set thresholds for; None means every refuse category.
        missing: what to do for a category without look-alike benign prompts: fall back to the "general"
            benign ones, saying so, or raise an "error".
        level, n_boot, seed: of the bootstrap interval of the achieved refusal rate.
    """

    _: KW_ONLY
    rule: Rule = "bias"
    steer: tuple[str, ...] | None = None
    missing: Literal["general", "error"] = "general"
    level: float = 0.95
    n_boot: int = 2000
    seed: int = 0

    @property
    @abstractmethod
    def goal(self) -> str:
        """How thresholds are chosen, as written into the operating point."""

    @abstractmethod
    def choose(self, slices: Sequence[Slice]) -> list[Choice]:
        """One choice per slice. Raises `UnsupportedClaim` when the data cannot carry the goal."""

    def guarantee(self, slices: Sequence[Slice], where: str, claim: str) -> str | None:  # noqa: ARG002
        """What holds for the chosen thresholds, in words; None when nothing is guaranteed."""
        return None

    def fit(
        self,
        scores: npt.ArrayLike,
        expected: npt.ArrayLike,
        category: Sequence[str | None] | npt.NDArray[Any] | None,
        group: Sequence[Any] | npt.NDArray[Any] | None = None,
        *,
        names: Sequence[str],
        calibrated_on: str | None = None,
        T: float = 1.0,
    ) -> OperatingPoint:
        """Choose one threshold per steered category.

        Args:
            scores: (n, K+1) probabilities, columns `names`: refuse categories, then "respond".
            expected: (n,) booleans, True = should refuse.
            category: (n,) names; benign look-alikes carry the category they resemble, general benign prompts
                None, "", "general" or "respond". None for all when there is a single refuse token.
            group: (n,) labels of prompts that share a source; one group counts as one draw, and a prompt
                without (None) is one of its own.
            calibrated_on: the set's name, for the wording. T: softmax temperature of `scores`.

        Returns:
            The point; add the model with `dataclasses.replace(point, model_fingerprint=..., dtype=...)`.

        Raises:
            InputError: shapes, NaN, unknown category. UnsupportedClaim: too few prompts for the goal.
        """
        if self.rule == "compare":
            raise InputError(
                "rule='compare' has no threshold to calibrate; use 'threshold', 'total_mass' or 'bias'"
            )
        slices = make_slices(
            scores,
            expected,
            category,
            group,
            names=names,
            rule=self.rule,
            steer=self.steer,
            missing=self.missing,
        )
        digest = data_hash(np.asarray(scores, float), np.asarray(expected, bool), category)
        return self.fit_slices(slices, digest=digest, calibrated_on=calibrated_on, T=T)

    def fit_slices(
        self,
        slices: Sequence[Slice],
        *,
        digest: str,
        calibrated_on: str | None = None,
        T: float = 1.0,
        claim: str = CONTROL_CLAIM,
    ) -> OperatingPoint:
        """`fit` for problems that are already cut into slices (`calibrate_table` cuts its own)."""
        empty = [s.name for s in slices if not s.refuse.size]
        if empty or not slices:
            raise InputError(
                f"no should-refuse prompts for {', '.join(empty) or 'any category'}; add some, or steer only "
                "the categories that have them (steer=(...))"
            )
        for s in (s for s in slices if s.general):
            warnings.warn(
                f"category {s.name!r} has no look-alike benign prompts; {s.benign.size} general benign ones "
                "are used instead, so its false refusals of look-alikes are not bounded",
                CalibrationWarning,
                stacklevel=3,
            )
        choices = self.choose(slices)
        where = f"prompts drawn like set {calibrated_on or digest}"
        return OperatingPoint(
            id=f"{type(self).__name__}-{digest[:8]}",
            thresholds={s.name: self._threshold(s, c) for s, c in zip(slices, choices, strict=True)},
            rule=self.rule,
            goal=self.goal,
            alpha=getattr(self, "alpha", None),
            delta=getattr(self, "delta", None),
            guarantee=self.guarantee(slices, where, claim),
            calibrated_on=calibrated_on,
            calibration_hash=digest,
            T=T,
        )

    def _threshold(self, s: Slice, choice: Choice) -> Threshold:
        hits = s.refuse >= choice.tau
        bias = tau_to_bias(choice.tau) if self.rule == "bias" else None
        return Threshold(
            tau=choice.tau,
            bias=bias if bias is not None and np.isfinite(bias) else None,
            refusal_rate=float(hits.mean()),
            refusal_interval=share_interval(
                hits, s.refuse_groups, n_boot=self.n_boot, seed=self.seed, level=self.level
            ),
            n_refuse=int(s.refuse.size),
            n_benign=int(s.benign.size),
            benign_errors=int((s.benign >= choice.tau).sum()),
            bound=choice.bound,
        )


def make_slices(
    scores: npt.ArrayLike,
    expected: npt.ArrayLike,
    category: Sequence[str | None] | npt.NDArray[Any] | None,
    group: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    names: Sequence[str],
    rule: Rule = "threshold",
    steer: Sequence[str] | None = None,
    missing: Literal["general", "error", "empty"] = "general",
) -> list[Slice]:
    """Cut (n, K+1) probabilities into one `Slice` per steered category (default: all), in `names` order.

    `missing` as in `Calibrator`; "empty" is "general" that lets a slice be empty where there are no general ones.
    """
    P = check_table(scores, names)
    refuse, kind, cluster = _check_labels(len(P), expected, category, group, names)
    steered = tuple(names[:-1]) if steer is None else tuple(steer)
    unknown = set(steered) - set(names[:-1])
    if unknown:
        raise InputError(
            f"cannot steer {', '.join(sorted(unknown))}; the refuse categories are {', '.join(names[:-1])}"
        )
    best, score = steering_score(P, names, steered, rule)
    plain = ~refuse & np.isin(kind, list(GENERAL))
    out = []
    for column, name in enumerate(names[:-1]):
        if name not in steered:
            continue
        s = np.where(best == column, score, -np.inf)
        yes, no = refuse & (kind == name), ~refuse & (kind == name)
        general = not no.any()
        if general:
            no = plain
            if missing == "error" or (missing == "general" and not no.any()):
                raise UnsupportedClaim(
                    f"category {name!r} has no look-alike benign prompts"
                    + ("" if missing == "error" else " and there are no general benign ones to fall back to")
                    + "; add benign prompts that resemble it, or leave it out of `steer`"
                )
        groups = (None,) * 3 if cluster is None else (cluster[yes], cluster[no], cluster[plain])
        out.append(Slice(name, s[yes], s[no], groups[0], groups[1], general, s[plain], groups[2]))
    return out


def candidates(s: Slice, taus: Sequence[float] | None = None) -> FloatArray:
    """Thresholds to try, from the safest (refuses nothing) downwards, shape (m,).

    By default the midpoints between neighbouring scores, which give every outcome that the data can tell
    apart and lie as far from any prompt's score as they can; else the given grid.
    """
    seen = np.unique(np.concatenate([s.refuse, s.benign]))
    seen = seen[np.isfinite(seen)]
    # for probabilities 1.01 is never reached; of other scores it can only be said that none seen reaches it
    top = 1.01
    if seen.size and (seen[0] < 0 or seen[-1] > 1):
        top = float(seen[-1] + max(0.01 * np.ptp(seen), 1e-9 * abs(seen[-1])))
    if taus is not None:
        grid = np.asarray(taus, float)
    else:
        middle = (seen[1:] + seen[:-1]) / 2
        grid = np.concatenate([seen[:1], np.where(middle > seen[:-1], middle, seen[1:])])
    return np.append(np.unique(grid[grid < top]), top)[::-1]


def count_at_least(scores: FloatArray, taus: FloatArray) -> npt.NDArray[np.intp]:
    """How many of `scores` are >= each tau, shape of `taus`."""
    return np.asarray(scores.size - np.searchsorted(np.sort(scores), taus, side="left"), dtype=np.intp)


def data_hash(*parts: Any) -> str:
    """sha256 (16 hex digits) of calibration data, so that a held-out check can tell its own apart.

    It is `calibration_hash` of a point, and not `PromptSet.hash`: other scores of the same prompts have another.
    """
    h = hashlib.sha256()
    for part in parts:
        numeric = isinstance(part, np.ndarray) and part.dtype.kind in "bfiu"
        h.update(part.tobytes() if numeric else repr(_plain(part)).encode())
    return h.hexdigest()[:16]


def _plain(part: Any) -> Any:
    return None if part is None else [None if x is None else str(x) for x in part]


def _check_labels(
    n: int,
    expected: npt.ArrayLike,
    category: Sequence[str | None] | npt.NDArray[Any] | None,
    group: Sequence[Any] | npt.NDArray[Any] | None,
    names: Sequence[str],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.str_], npt.NDArray[Any] | None]:
    raw = np.asarray(expected)
    if raw.shape != (n,) or not np.isin(raw, (0, 1)).all():
        raise InputError(
            f"expected must be {n} booleans (True = should refuse), got shape {raw.shape}, "
            f"dtype {raw.dtype}; drop prompts whose expectation is unknown"
        )
    refuse = raw.astype(bool)
    if category is None:
        if len(names) != 2:
            raise InputError("category=None works with a single refuse token; pass one category per row")
        category = [names[0]] * n
    for what, column in (("categories", category), ("groups", group)):
        if column is not None and len(column) != n:
            raise InputError(f"{n} score rows, {len(column)} {what}; every row needs one")
    kind = np.array(["" if c is None else str(c) for c in category], dtype=np.str_)
    strange = ~np.isin(kind, list(names[:-1])) & (refuse | ~np.isin(kind, list(GENERAL)))
    if strange.any():
        row = int(strange.argmax())
        side = "should-refuse" if refuse[row] else "benign"
        raise InputError(
            f"row {row}: category {str(kind[row])!r} of a {side} prompt is none of {', '.join(names[:-1])}. "
            f"Map your taxonomy to the model's categories, or drop these {int(strange.sum())} rows"
        )
    if group is None:
        return refuse, kind, None
    return refuse, kind, np.array([f"row {i}" if g is None else f"group {g}" for i, g in enumerate(group)])
