"""Patch maps compared: the paper's 20 bins, Pearson with a ceiling and a null, largest differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.post_training.results import Likeness, Role

FloatArray = npt.NDArray[np.float64]
BINS = 20
HALVES = 100
DRAWS = 200


def binned(values: npt.ArrayLike) -> FloatArray:
    """The paper's normalisation: 20 equal bins from minimum to maximum; 1-10 become 0, 11-20 become 0.1 to 1.

    >>> binned([[0.0, 9.9, 10.0, 14.0, 20.0]]).tolist()
    [[0.0, 0.0, 0.1, 0.5, 1.0]]
    """
    x = np.asarray(values, float)
    low, spread = x.min(), np.ptp(x)
    if not spread > 0:
        return np.zeros_like(x)
    bins = np.minimum(np.floor((x - low) / spread * BINS), BINS - 1)
    return np.asarray(np.maximum(bins - (BINS // 2 - 1), 0) / (BINS // 2), float)


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Pearson correlation over all cells; None where one of the two is flat."""
    x, y = np.ravel(np.asarray(a, float)), np.ravel(np.asarray(b, float))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / scale if scale > 0 else None


def split_half(cells: npt.ArrayLike, *, halves: int = HALVES, seed: int = 0) -> float | None:
    """Mean Pearson of the binned mean maps of two random halves of the pairs (n, layers, columns).

    Two models cannot be told apart better than a model from itself, so this is the ceiling of a correlation.
    """
    x, rng = np.asarray(cells, float), np.random.default_rng(seed)
    found = []
    for _ in range(halves):
        order = rng.permutation(len(x))
        a, b = (x[part].mean(0) for part in np.array_split(order, 2))
        found.append(pearson(binned(a), binned(b)))
    known = [r for r in found if r is not None]
    return float(np.mean(known)) if known else None


def shuffled(a: npt.ArrayLike, b: npt.ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> float | None:
    """Mean |Pearson| of two binned maps when the cells of one are dealt out anew."""
    x, y, rng = binned(a), binned(b), np.random.default_rng(seed)
    found = [pearson(x, rng.permutation(y.ravel())) for _ in range(draws)]
    known = [abs(r) for r in found if r is not None]
    return float(np.mean(known)) if known else None


def likeness(a: npt.ArrayLike, b: npt.ArrayLike, roles: Sequence[Role], *, seed: int = 0) -> Likeness:
    """Compare the maps of two models on the same pairs: cells (n, layers, columns) each.

    Raises:
        InputError: shapes that differ, or fewer roles than columns.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.shape != y.shape or x.ndim != 3 or x.shape[-1] != len(roles):
        raise InputError(
            f"maps of shapes {x.shape} and {y.shape} for {len(roles)} columns; both need (pairs, layers, columns)"
        )
    key = np.array([r != "other" for r in roles])
    mx, my = x.mean(0), y.mean(0)
    gap = np.abs(binned(mx) - binned(my))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = rng.integers(0, len(x), len(x))
        drawn.append(pearson(x[rows].mean(0), y[rows].mean(0)))
    known = [r for r in drawn if r is not None]
    ends = np.quantile(known, [0.025, 0.975]).tolist() if known else (None, None)
    ceilings = [r for r in (split_half(x, seed=seed), split_half(y, seed=seed)) if r is not None]
    return Likeness(
        pearson=pearson(mx, my),
        low=ends[0],
        high=ends[1],
        pearson_binned=pearson(binned(mx), binned(my)),
        difference=float(gap.max()),
        difference_key=float(gap[:, key].max()) if key.any() else 0.0,
        spans=(float(np.ptp(mx)), float(np.ptp(my))),
        ceiling=min(ceilings) if len(ceilings) == 2 else None,
        shuffled=shuffled(mx, my, seed=seed),
    )
