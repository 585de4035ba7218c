"""From what single seeds measured to intervals, met claims, silent controls and one outcome.

The interval of a value is a bootstrap over two levels. Items are resampled within each seed; seeds, of which there
are too few to resample, get Gaussian weights (a multiplier bootstrap with variance s^2 / S). The width is then that
of Student's t with Satterthwaite's degrees of freedom, at most twice those of the seeds, as seeds that agree by
chance would look like many. With seeds alone this is the t interval; with one seed it is over items.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from demur.replicate.spec import Claim, Control, Spec, Value
from demur.stats import proportion_interval, silent

FloatArray = npt.NDArray[np.float64]
N_BOOT = 4000
LEVEL = 0.95
_KINDS = 64


class Measured:
    """One key over the fit seeds.

    Attributes:
        shares: all items are 0 or 1, so that intervals end at 0 and 1.
        value: mean over seeds; None when a seed left it undefined.
        over: what the interval is over, in words; None when there is none (one seed without items).
    """

    def __init__(self, key: str, seeds: Sequence[Value]) -> None:
        self.key, self.seeds = key, seeds
        self.undefined = [i for i, v in enumerate(seeds) if v.value is None]
        self.value: float | None = None
        self.over: str | None = None
        if not seeds or self.undefined:
            return
        self.points = np.array([v.value for v in seeds], float)
        self.value = float(self.points.mean())
        self.same = any(v.same_items for v in seeds)
        self.shares = all(v.items is not None and set(v.items) <= {0.0, 1.0} for v in seeds)
        has_items = all(v.items is not None or v.se is not None for v in seeds)
        self.over = _over(seeds, has_items, self.same)
        self.seed_part = _draw_seeds(self.points)
        self.item_part = np.zeros(N_BOOT)
        if has_items:
            rng = np.random.default_rng([1, zlib.crc32(key.encode())])
            self.item_part = (_draw_same_items if self.same else _draw_items)(seeds, rng)
        self.freedom = self._freedom()

    def _freedom(self) -> float:
        s = len(self.points)
        of_seeds = float(self.points.var(ddof=1)) / s if s > 1 else 0.0
        of_items = float(self.item_part.var())
        ns = [v.n for v in self.seeds if v.n]
        n = (min(ns) if self.same else sum(ns)) if ns else 0
        parts = (of_seeds**2 / (s - 1) if s > 1 else 0.0) + (of_items**2 / (n - 1) if n > 1 else 0.0)
        freedom = (of_seeds + of_items) ** 2 / parts if parts > 0 else math.inf
        return min(freedom, 2 * (s - 1)) if s > 1 and of_seeds > 0 else freedom

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """The two-sided interval at a level, or None."""
        if self.value is None or self.over is None:
            return None
        if (share := self._certain()) is not None:
            low, high = proportion_interval(*share, level=level)
            return float(low), float(high)
        wide = _interval(self.value, self.seed_part + self.item_part, self.freedom, level)
        lowest, highest = (0.0, 1.0) if self.shares else self.seeds[0].bounds or (-math.inf, math.inf)
        return max(lowest, wide[0]), min(highest, wide[1])

    def _certain(self) -> tuple[float, int] | None:
        """(k, n) where every item of every seed came out alike: a bootstrap would claim certainty."""
        if self.value not in (0.0, 1.0) or not all(_all(self.value, v) for v in self.seeds):
            return None
        sizes = [v.n or 0 for v in self.seeds]
        n = min(sizes) if self.same else sum(sizes)
        return float(self.value or 0) * n, n

    def less(self, other: Measured) -> tuple[float, float, float] | None:
        """(difference, low, high) of this value less another one, seeds drawn together; None if unknown."""
        if self.value is None or other.value is None or self.over is None or other.over is None:
            return None
        gap = self.value - other.value
        draws = self.seed_part - other.seed_part + self.item_part - other.item_part
        low, high = _interval(gap, draws, min(self.freedom, other.freedom), LEVEL)
        if self._certain() is not None or other._certain() is not None:  # at least as wide as Newcombe's
            (a, b), (c, d) = (m.interval() or (0.0, 0.0) for m in (self, other))
            low = min(low, gap - math.hypot(self.value - a, d - other.value))
            high = max(high, gap + math.hypot(b - self.value, other.value - c))
        return gap, low, high


def _all(end: float, v: Value) -> bool:
    """Whether all items of a value are at 0, or all at 1; those that are not kept leave a standard error of 0."""
    if v.items is not None:
        return set(v.items) == {end}
    return v.value == end and v.se == 0 and bool(v.n) and v.bounds == (0.0, 1.0)


def _interval(value: float, draws: FloatArray, freedom: float, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    wider = special.stdtrit(freedom, 1 - tail) / special.ndtri(1 - tail) if math.isfinite(freedom) else 1.0
    return float(value + wider * low), float(value + wider * high)


def _over(seeds: Sequence[Value], has_items: bool, same: bool) -> str | None:
    if not has_items:
        return f"{len(seeds)} seeds" if len(seeds) > 1 else None
    ns = sorted({v.n for v in seeds if v.n})
    size = " to ".join(str(n) for n in dict.fromkeys((ns[0], ns[-1]))) + " " if ns else ""
    if len(seeds) == 1:
        return f"1 seed, {size}items"
    return f"{len(seeds)} seeds, " + (f"the same {size}items" if same else f"{size}items each")


def _draw_seeds(points: FloatArray) -> FloatArray:
    s = len(points)
    # one fixed stream, so that all keys of a spec draw the same seeds and differences are paired
    weights = np.random.default_rng(0).standard_normal((N_BOOT, s))
    part: FloatArray = weights @ (points - points.mean()) / math.sqrt(s * max(s - 1, 1))
    return part


def _draw_items(seeds: Sequence[Value], rng: np.random.Generator) -> FloatArray:
    parts: FloatArray = np.mean([_item_means(v.items, v.se, rng) for v in seeds], axis=0)
    return parts


def _draw_same_items(seeds: Sequence[Value], rng: np.random.Generator) -> FloatArray:
    """Items shared by all seeds are drawn once for each resample, not once for each seed."""
    rows = [v.items for v in seeds]
    if any(r is None for r in rows) or len({len(r or ()) for r in rows}) > 1:
        return rng.normal(0.0, max(_standard_error(v.items, v.se) for v in seeds), N_BOOT)
    return _item_means(tuple(np.mean(np.array(rows, float), axis=0)), None, rng)


def _item_means(items: Sequence[float] | None, se: float | None, rng: np.random.Generator) -> FloatArray:
    """Bootstrap means of one seed's items, less their own mean; normal draws where items are of many kinds."""
    kinds, count = np.unique(np.asarray(items or (), float), return_counts=True)
    if items is None or len(kinds) > _KINDS:
        return rng.normal(0.0, _standard_error(items, se), N_BOOT)
    drawn = rng.multinomial(len(items), count / len(items), size=N_BOOT) @ kinds / len(items)
    centred: FloatArray = drawn - np.mean(items)
    return centred


def _standard_error(items: Sequence[float] | None, se: float | None) -> float:
    if items is None:
        return se or 0.0
    return float(np.std(items, ddof=1) / math.sqrt(len(items))) if len(items) > 1 else 0.0


# --- what follows from it ---------------------------------------------------------------------------------------


def unfit(spec: Spec, values: Mapping[str, Value]) -> str | None:
    """Why a seed's organism is unfit, or None."""
    for claim in spec.entry:
        value = values[claim.key].value
        if value is None or not claim.reached(value):
            return f"{claim.text}: {'undefined' if value is None else f'{value:.3g}'}, needs {claim.goal}"
    return None


def conclude(
    spec: Spec, seeds: Mapping[int, Mapping[str, Value]], anchors: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that a result says: rows for claims, controls, baselines and entry conditions, and the outcome.

    Args:
        seeds: what `run` returned, by seed. anchors: rows with a `status` (exact, off or skipped).
    """
    why = {s: unfit(spec, values) for s, values in seeds.items()}
    fit = [s for s in sorted(seeds) if why[s] is None]
    got = {k: Measured(k, [seeds[s][k] for s in fit]) for k in spec.keys}
    rows: dict[str, Any] = {
        "entry": [_entry_row(c, seeds) for c in spec.entry],
        "claims": [_claim_row(c, got[c.key]) for c in spec.claims],
        "controls": _control_rows(spec, got),
        "baselines": _baseline_rows(spec, got),
        "anchors": [dict(a) for a in anchors],
    }
    unfit_seeds = {str(s): reason for s, reason in sorted(why.items()) if reason is not None}
    outcome, reason = _outcome(rows, len(seeds), len(fit))
    return {"outcome": outcome, "reason": reason, "unfit": unfit_seeds, **rows}


def _entry_row(claim: Claim, seeds: Mapping[int, Mapping[str, Value]]) -> dict[str, Any]:
    values = [seeds[s][claim.key].value for s in sorted(seeds)]
    met = sum(v is not None and claim.reached(v) for v in values)
    row = {"key": claim.key, "text": claim.text, "goal": claim.goal, "values": values}
    return {**row, "status": f"met in {met} of {len(values)} seeds"}


def _row(got: Measured, level: float = LEVEL) -> dict[str, Any]:
    interval = got.interval(level)
    return {
        "value": got.value,
        "interval": None if interval is None else list(interval),
        "level": round(level, 6),
        "over": got.over,
    }


def _claim_row(claim: Claim, got: Measured) -> dict[str, Any]:
    row = {"key": claim.key, "text": claim.text, "goal": claim.goal, "null": claim.null, **_row(got)}
    interval = row["interval"]
    if got.value is None:
        why = "undefined" if got.seeds else "no fit seed"
    elif not claim.reached(got.value):
        why = (
            "below the goal"
            if claim.at_least is not None and got.value < claim.at_least
            else "above the goal"
        )
    elif claim.null is not None and interval is None:
        why = "no interval: one seed without items"
    elif claim.null is not None and interval[0] <= claim.null <= interval[1]:
        why = f"the interval holds {claim.null:g}, the value without effect"
    else:
        why = ""
    return {**row, "status": "not met" if why else "met", "why": why}


def _control_rows(spec: Spec, got: Mapping[str, Measured]) -> list[dict[str, Any]]:
    found = silent({c.key: (got[c.key].interval, c.null, c.margin) for c in spec.controls}, level=LEVEL)
    rows = []
    for control in spec.controls:
        row: dict[str, Any] = {"key": control.key, "text": control.text}
        row |= {"null": control.null, "margin": control.margin}
        row |= _row(got[control.key], found[control.key].level)
        quiet = bool(found[control.key].silent)
        why = "" if quiet else _loud(control, row["value"], row["interval"])
        rows.append({**row, "status": "silent" if quiet else "not silent", "why": why})
    return rows


def _loud(control: Control, value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "undefined"
    if abs(value - control.null) > control.margin:
        return "its value lies outside the margin"
    if interval is None:
        return "no interval: one seed without items"
    return "its interval is wider than the margin"


def _baseline_rows(spec: Spec, got: Mapping[str, Measured]) -> list[dict[str, Any]]:
    rows = []
    claims = {c.key: c for c in spec.claims}
    for baseline in spec.baselines:
        claim = claims[baseline.against]
        gap = got[claim.key].less(got[baseline.key])
        beaten = gap is not None and (gap[1] > 0 if claim.at_least is not None else gap[2] < 0)
        row = {"key": baseline.key, "text": baseline.text, "against": claim.key, **_row(got[baseline.key])}
        row["difference"] = None if gap is None else list(gap)
        why = "no interval of the difference" if gap is None else ""
        rows.append({**row, "status": "beaten" if beaten else "not beaten", "why": why})
    return rows


def _outcome(rows: Mapping[str, Any], seeds: int, fit: int) -> tuple[str, str]:
    def count(part: str, status: str) -> tuple[int, int]:
        return sum(r["status"] == status for r in rows[part]), len(rows[part])

    met, claims = count("claims", "met")
    silent, controls = count("controls", "silent")
    off, anchors = count("anchors", "off")
    exact, skipped = count("anchors", "exact")[0], count("anchors", "skipped")[0]
    beaten, baselines = count("baselines", "beaten")
    parts = [
        f"{met} of {claims} claims met" if claims else "",
        f"{silent} of {controls} controls silent" if controls else "",
        f"{beaten} of {baselines} baselines beaten" if baselines else "",
        f"{exact} of {anchors} anchors exact" + (f", {skipped} skipped" if skipped else "")
        if anchors
        else "",
    ]
    if claims and fit < seeds:
        parts.insert(0, f"the organism was fit in {fit} of {seeds} seeds")
    reason = "; ".join(filter(None, parts))
    if off:
        names = ", ".join(r["key"] for r in rows["anchors"] if r["status"] == "off")
        return "anchor off", f"recounted otherwise than published: {names}; {reason}"
    if claims and not met:
        return "not at this scale", reason
    if met == claims and silent == controls:
        return ("reproduced" if claims or exact else "not checked"), reason
    return "partly", reason
