"""Two systems on the same prompts: exact McNemar test, paired bootstrap, and what n can detect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.errors import InputError
from demur.stats.intervals import FloatArray, proportion_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Result of `mcnemar`. `difference` is share(b) - share(a); None where undefined.

    `only_a`, `only_b` count the discordant items; `detectable` is the smallest difference that this n and
    this share of discordant items detect with 80 % power.
    """

    n: int
    only_a: int
    only_b: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float
    detectable: float | None


def mcnemar(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Exact two-sided McNemar test that yes/no outcomes a and b over the same items have one share.

    Under the null the discordant items split as Binomial(only_a + only_b, 1/2). The test takes items as
    independent; the interval is a paired bootstrap, over clusters when these are given.

    >>> mcnemar([0, 0, 0, 0, 1], [1, 1, 1, 1, 1]).p_value  # 2 * (1/2)**4
    0.125
    """
    x, y = np.asarray(a, bool), np.asarray(b, bool)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(
            f"paired outcomes of shapes {x.shape} and {y.shape}; both must be (n,) over the same items"
        )
    only_a, only_b = int((x & ~y).sum()), int((y & ~x).sum())
    split = only_a + only_b
    p = min(1.0, 2 * float(special.bdtr(min(only_a, only_b), split, 0.5))) if split else 1.0
    n = int(x.size)
    return PairedTest(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=(only_b - only_a) / n if n else None,
        interval=paired_interval(x, y, clusters=clusters, n_boot=n_boot, seed=seed, level=level),
        p_value=p,
        detectable=minimum_detectable_difference(n, split / n, level=level) if n and split else None,
    )


def paired_interval(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of mean(b - a) over items or clusters of items.

    None for no items, and for a single one of other than yes/no outcomes: one number has no spread.

    Where every item (or cluster) changes alike the bootstrap would claim certainty. Of yes/no outcomes Wilson's
    upper bound of the share that changes otherwise is then added on both sides: without a change
    +-z^2 / (n + z^2).

    Args:
        a, b: (n,) numbers or booleans over the same items. clusters: (n,) labels or None.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    d: FloatArray = y - x
    if d.size == 0:
        return None
    _, of = np.unique(np.arange(d.size) if clusters is None else np.asarray(clusters), return_inverse=True)
    size, total = np.bincount(of), np.bincount(of, weights=d)
    # clusters with one size and one total are interchangeable: draw how often each kind occurs
    kinds, count = np.unique(np.stack([size, total], axis=1), axis=0, return_counts=True)
    if np.ptp(kinds[:, 1] / kinds[:, 0]) == 0 and np.isin([x, y], (0, 1)).all():
        room = float(proportion_interval(0, len(size), level=level)[1])
        return max(float(d.mean()) - room, -1.0), min(float(d.mean()) + room, 1.0)
    if len(size) == 1:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    block = max(1, 4_000_000 // len(kinds))
    for start in range(0, n_boot, block):
        stop = min(start + block, n_boot)
        sums = rng.multinomial(len(size), count / count.sum(), size=stop - start) @ kinds
        means[start:stop] = sums[:, 1] / sums[:, 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def minimum_detectable_difference(
    n: int, discordant: float, *, power: float = 0.8, level: float = 0.95
) -> float | None:
    """Smallest true difference of two paired shares that a two-sided test at `level` finds with `power`.

    Solves d sqrt(n) = z_level sqrt(psi) + z_power sqrt(psi - d^2), psi being the share of discordant items
    (Connor 1987). None when even d = psi, the largest possible difference, would be missed.

    >>> round(minimum_detectable_difference(200, 0.1), 4)
    0.0623
    """
    if n < 1 or not 0 < discordant <= 1:
        raise InputError(f"n={n}, discordant={discordant}: needs n >= 1 and a share in (0, 1]")
    z, zp = float(special.ndtri((1 + level) / 2)), float(special.ndtri(power))
    linear = np.sqrt(n * discordant) * z
    root = linear**2 - (n + zp**2) * discordant * (z**2 - zp**2)
    d = float((linear + np.sqrt(root)) / (n + zp**2)) if root >= 0 else float("inf")
    return d if d <= discordant else None
