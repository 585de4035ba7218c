"""Safety Alignment Margin: how far the modes of a switchable model lie apart at a position of the answer.

Points are logit vectors, one for each prompt under each mode; clusters are the modes; the margin is the mean
silhouette (Rousseeuw 1987): s = (b - a) / max(a, b), a the mean distance to the other points of the same mode, b
the smallest mean distance to the points of another. Which prompt it is usually moves logits more than the mode
does, so beside it stand the margin once each prompt's mean over modes is taken out, the margin with modes permuted
within each prompt, and the mean over pairs of modes, which does not depend on how many there are.

It works for any model that can be told to behave differently: by tokens, or by system messages.

Reference: Si et al. 2025, arXiv 2508.14904.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.types import Condition, Prompt, PromptSet, Report, Table

if TYPE_CHECKING:
    from demur.runtime.base import Runtime

Metric = Literal["cosine", "euclidean"]
FloatArray = npt.NDArray[np.float64]
Progress = Callable[[str, int, int | None], None]
MAX_BYTES = 2**31
"""Largest table of logits: 3600 prompts under three modes with 49152 logits each. More than some hundreds change
nothing but the interval."""
_COLUMNS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How far modes lie apart.

    Attributes:
        sam: mean silhouette over all prompts and modes. low, high: 95 % bootstrap interval over prompts, the
            distances to all points held fixed.
        per_mode: mean silhouette of each mode's points. per_prompt: (n,) mean over modes.
        pairs: mean over pairs of modes of the margin of these two alone.
        null, null_low, null_high: margins with modes permuted within each prompt: mean and middle 95 %.
        null_pairs: mean of `pairs` under the same permutations. p_value: share of permutations at least as large.
        n, metric, centred, position: prompts, distance, whether prompts' means were taken out, answer position.
    """

    sam: float
    low: float
    high: float
    per_mode: Mapping[str, float]
    per_prompt: FloatArray
    pairs: float
    null: float
    null_low: float
    null_high: float
    null_pairs: float
    p_value: float
    n: int
    metric: Metric
    centred: bool
    position: int = 0

    @property
    def rise(self) -> float:
        """Margin above that of permuted modes."""
        return self.sam - self.null


def logit_table(
    views: Mapping[str, tuple[Runtime, Condition]],
    prompts: Sequence[Prompt] | PromptSet,
    *,
    position: int = 0,
    said: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Next-token logits (n, modes, V) of every prompt under every mode.

    Args:
        views: mode -> (local runtime, condition): views of one model, or one runtime under several system messages.
        position: answer tokens that stand before the one predicted. said: prompt id -> ids of an answer of at
            least that length, the same under all modes; only needed for position > 0.

    Raises:
        InputError: fewer than two modes, a table above `MAX_BYTES`, answers that are missing or short.
        CapabilityError: a runtime without logits, a model that thinks first, vocabularies of different size.
    """
    from demur.runtime import forward

    if len(views) < 2 or len(prompts) < 2:
        raise InputError(
            f"{len(views)} modes and {len(prompts)} prompts: a margin needs at least two of each"
        )
    before = {p.id: list((said or {}).get(p.id, ()))[:position] for p in prompts}
    if short := [i for i, ids in before.items() if len(ids) < position]:
        raise InputError(
            f"position {position}: {len(short)} prompts ({short[0]!r} first) have no answer of that length; "
            "leave them out"
        )
    columns = []
    for m, (name, (runtime, condition)) in enumerate(views.items()):
        local: Any = runtime
        if not hasattr(runtime, "batched"):
            raise CapabilityError(f"{runtime.name!r} gives no logits; the margin needs a local model")
        local.chat.require_decision()
        rows = [local.chat.render(p.with_system(condition.system)).ids + before[p.id] for p in prompts]
        for p, ids in zip(prompts, rows, strict=True):
            local.check_fits(p, ids, 0)

        def work(batch: list[int], prefix: Any, local: Any = local, rows: Any = rows) -> list[Any]:
            start = prefix.length if prefix else 0
            cache = prefix.expanded(len(batch)) if prefix else None
            logits = forward.run(local.model, [rows[i][start:] for i in batch], cache=cache)
            assert logits is not None
            _check_size(len(rows), len(views), logits.shape[-1])
            return list(logits.float().cpu().numpy())

        columns.append(np.stack(local.batched(rows, work)))
        if columns[0].shape != columns[-1].shape:
            raise CapabilityError(
                f"mode {name!r} has {columns[-1].shape[1]} logits, the first has {columns[0].shape[1]}: the "
                "views are of different models"
            )
        if progress is not None:
            progress("logits", m + 1, len(views))
    return np.stack(columns, axis=1)


def _check_size(n: int, modes: int, width: int) -> None:
    if 4 * n * modes * width > MAX_BYTES:
        raise InputError(
            f"{n} prompts under {modes} modes with {width} logits each need "
            f"{4 * n * modes * width / 2**30:.1f} GiB; take at most {MAX_BYTES // (4 * modes * width)} prompts"
        )


def separation(
    table: npt.ArrayLike,
    modes: Sequence[str],
    *,
    metric: Metric = "cosine",
    centred: bool = False,
    draws: int = 200,
    position: int = 0,
    seed: int = 0,
) -> Separation:
    """The margin of logits (n, modes, V), with its null.

    Raises:
        InputError: another shape, numbers that are not finite, an unknown metric.

    >>> rng = np.random.default_rng(0)
    >>> apart = rng.normal(size=(20, 2, 8)) + 50 * np.eye(2, 8)
    >>> separation(apart, ["pos", "rej"]).sam > 0.9
    True
    """
    x = np.asarray(table)
    if x.ndim != 3 or x.shape[1] != len(modes) or x.shape[0] < 2 or len(modes) < 2:
        raise InputError(
            f"logits of shape {x.shape} for {len(modes)} modes; give (prompts, modes, vocabulary)"
        )
    if not np.isfinite(x).all():
        raise InputError("logits that are not finite; a distance between them means nothing")
    if metric not in ("cosine", "euclidean"):
        raise InputError(f"metric={metric!r}; use cosine or euclidean")
    n, m = x.shape[:2]
    D = distances(x, metric, centred)
    labels = np.tile(np.arange(m), n)
    s = silhouettes(D, labels).reshape(n, m)
    rng = np.random.default_rng(seed)
    drawn, drawn_pairs = [], []
    for _ in range(draws):
        mixed = rng.permuted(labels.reshape(n, m), axis=1).ravel()
        drawn.append(float(silhouettes(D, mixed).mean()))
        drawn_pairs.append(drawn[-1] if m == 2 else _pairs(D, mixed))
    sam, null = float(s.mean()), np.array(drawn)
    boot = s.mean(1)[rng.integers(0, n, (1000, n))].mean(1)
    return Separation(
        sam=sam,
        low=float(np.quantile(boot, 0.025)),
        high=float(np.quantile(boot, 0.975)),
        per_mode={name: float(v) for name, v in zip(modes, s.mean(0), strict=True)},
        per_prompt=s.mean(1),
        pairs=_pairs(D, labels),
        null=float(null.mean()),
        null_low=float(np.quantile(null, 0.025)),
        null_high=float(np.quantile(null, 0.975)),
        null_pairs=float(np.mean(drawn_pairs)),
        p_value=float((1 + (null >= sam - 1e-12).sum()) / (1 + draws)),
        n=n,
        metric=metric,
        centred=centred,
        position=position,
    )


def distances(table: npt.NDArray[Any], metric: Metric, centred: bool = False) -> FloatArray:
    """Distances (n * m, n * m) between all points of a table (n, m, V), prompt by prompt.

    Products are summed in double precision over a few thousand columns at a time, so that memory stays flat.
    """
    n, m, width = table.shape
    G = np.zeros((n * m, n * m))
    whole = np.zeros(n * m)
    for start in range(0, width, _COLUMNS):
        part = table[:, :, start : start + _COLUMNS].astype(float)
        whole += (part**2).sum(-1).ravel()
        if centred:
            part -= part.mean(1, keepdims=True)
        part = part.reshape(n * m, -1)
        G += part @ part.T
    square = np.diag(G).copy()
    if metric == "euclidean":
        D = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * G, 0.0))
    else:
        nothing = square <= 1e-12 * whole  # all that is left of it is rounding: at distance 1 from all
        norm = np.sqrt(np.where(nothing, 1.0, square))
        cosine = G / norm[:, None] / norm[None]
        cosine[nothing] = cosine[:, nothing] = 0.0
        D = np.maximum(1 - cosine, 0.0)
    noise = 1e-7 * float(D.max())  # what is left of equal points is rounding
    D[noise > D] = 0.0
    np.fill_diagonal(D, 0.0)
    return np.asarray(D)


def silhouettes(D: FloatArray, labels: npt.ArrayLike) -> FloatArray:
    """Silhouette (N,) of each point from distances (N, N) and cluster labels (N,); 0 for a cluster of one.

    >>> D = np.array([[0.0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]])
    >>> silhouettes(D, [0, 0, 1, 1]).round(3).tolist()
    [0.889, 0.889, 0.889, 0.889]
    """
    of = np.unique(np.asarray(labels), return_inverse=True)[1]
    member = np.eye(of.max() + 1)[of]
    size = member.sum(0)
    total = D @ member
    rows = np.arange(len(of))
    a = total[rows, of] / np.maximum(size[of] - 1, 1)
    mean = total / size
    mean[rows, of] = np.inf
    b = mean.min(1)
    scale = np.maximum(a, b)
    s = np.divide(b - a, scale, out=np.zeros_like(a), where=scale > 0)
    return np.asarray(np.where(size[of] > 1, s, 0.0), float)


def _pairs(D: FloatArray, labels: npt.NDArray[Any]) -> float:
    out = []
    for pair in combinations(range(int(labels.max()) + 1), 2):
        keep = np.isin(labels, pair)
        out.append(float(silhouettes(D[np.ix_(keep, keep)], labels[keep]).mean()))
    return float(np.mean(out))


def report(found: Sequence[Separation], name: str, prompts: str) -> Report:
    """Margins as a table: one row for each distance, position, and with or without prompts' means."""
    modes = list(found[0].per_mode)
    columns = (
        "position",
        "distance",
        "prompts' means",
        "margin",
        "low",
        "high",
        "permuted",
        "its middle 95 %",
    )
    rows = []
    for s in found:
        flat = f"{s.null_low:.3f} to {s.null_high:.3f}"
        means = "taken out" if s.centred else "kept"
        head = (s.position, s.metric, means, s.sam, s.low, s.high, s.null, flat)
        rows.append((*head, s.pairs, *(s.per_mode[m] for m in modes), s.n))
    return Report(
        title=f"Safety Alignment Margin of {name}",
        tables=(Table("margins", (*columns, "mean of pairs", *modes, "prompts"), tuple(rows)),),
        values={
            "margins": [
                {
                    **{k: getattr(s, k) for k in _PLAIN},
                    "per_mode": dict(s.per_mode),
                }
                for s in found
            ]
        },
        provenance={"model": name, "prompts": prompts, "modes": modes},
        notes=(
            "One answer position says nothing about the rest of an answer. With fewer modes a margin is larger for "
            "the same model; compare the mean of pairs.",
        ),
    )


_PLAIN = (
    "position", "metric", "centred", "sam", "low", "high", "pairs", "null", "null_low", "null_high",
    "null_pairs", "p_value", "n",
)  # fmt: skip
