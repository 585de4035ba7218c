"""Probes over layers and positions, with the choice, the test and the controls kept apart.

Every reader is fitted on the rows `fit`. The site and the kind are chosen on the rows `select`, and only the
chosen one ever sees the rows `test`. Beside it stand the rules and nulls of `demur.stats.controls`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.artefact import FloatArray, Place
from demur.explain.positions import collect
from demur.explain.probe import KINDS, Kind, Probe, fit_probe
from demur.explain.sweep_report import sweep_report
from demur.report.render import to_text
from demur.stats import controls, rate
from demur.stats.controls import BoolArray, Null
from demur.stats.curves import auroc, auroc_interval
from demur.stats.intervals import bootstrap_interval
from demur.types import Rate, Report

__all__ = ["Baseline", "Cell", "Sweep", "collect", "split_rows", "sweep"]

Rows = npt.NDArray[np.intp]
FEWEST = 20
"""Rows below which no sweep is run: with five rows to test on, an AUROC of 0.5 and one of 0.95 look alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A rule that sees the texts only, fitted on the same rows and tested on the same rows.

    For `naive_liar` it is the chosen probe itself, reading the naive rows in place of the positive test rows.
    `gain` is the probe's AUROC minus this one's, with its paired bootstrap interval `gain_low` to `gain_high`
    (NaN where too many resamples hold one class only).
    """

    auroc: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float

    @property
    def beaten(self) -> bool:
        """Whether the interval of the probe's gain lies above 0."""
        return self.gain_low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One site and kind: AUROC on the select rows."""

    layer: int
    position: int | str
    kind: Kind
    auroc: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """The result of `sweep`.

    Attributes:
        probe: the chosen probe (its `site` and `kind`), with a threshold if `fpr` was asked for.
        select_auroc: what it was chosen by; optimistic. auroc, low, high: on the test rows, with 95 % interval.
        n_positive, n_negative: test rows. scores: (n_test,) of the chosen probe, in the order of `test`.
        accuracy: of "score >= 0" on the test rows; majority: of always giving the more frequent fit label.
        fpr, tpr: shares of negative and positive test rows at or above the threshold, or None.
        cells: select AUROC of every site and kind, in the order tried.
        controls: `random_labels`, `shuffled`, `random_direction` (Null), `bag_of_words`, `length`, `topic_only`
            (Baseline, or None where no texts or topics were given); `naive_liar` (Baseline) where it was asked for.
        notes: what a reader should know.
    """

    probe: Probe
    select_auroc: float
    auroc: float
    low: float
    high: float
    n_positive: int
    n_negative: int
    scores: FloatArray
    test: Rows
    accuracy: Rate
    majority: Rate
    fpr: Rate | None
    tpr: Rate | None
    cells: tuple[Cell, ...]
    controls: Mapping[str, Null | Baseline | None]
    notes: tuple[str, ...]

    @property
    def site(self) -> Place:
        """Layer and position of the chosen probe."""
        assert self.probe.site is not None
        return self.probe.site

    @property
    def kind(self) -> Kind:
        """Kind of the chosen probe."""
        return self.probe.kind

    def report(self, title: str = "Probe") -> Report:
        """The result beside its controls, ready for `demur.report`; `sweep_report` makes it of a saved result."""
        return sweep_report(self.to_dict(), title)

    def __str__(self) -> str:
        """The report as text."""
        return to_text(self.report())

    def heat_map(self, kind: Kind) -> tuple[list[int], list[int | str], FloatArray]:
        """Layers, positions and select AUROC (layers, positions) of one kind; NaN for sites not swept."""
        mine = [c for c in self.cells if c.kind == kind]
        layers = sorted({c.layer for c in mine})
        positions = list(dict.fromkeys(c.position for c in mine))
        out = np.full((len(layers), len(positions)), np.nan)
        for c in mine:
            out[layers.index(c.layer), positions.index(c.position)] = c.auroc
        return layers, positions, out

    def to_dict(self) -> dict[str, Any]:
        """Everything but the probe's tensors and the scores, ready for JSON; what is undefined is None."""
        plain = ("select_auroc", "auroc", "low", "high", "n_positive", "n_negative", "notes")
        rates = ("accuracy", "majority", "fpr", "tpr")
        return {
            "site": list(self.site),
            "kind": self.kind,
            **{name: getattr(self, name) for name in plain},
            **{name: None if (r := getattr(self, name)) is None else asdict(r) for name in rates},
            "cut": None if self.probe.cut is None else asdict(self.probe.cut),
            "controls": {k: None if c is None else _known(asdict(c)) for k, c in self.controls.items()},
            "cells": [asdict(c) for c in self.cells],
        }


def split_rows(
    y: npt.ArrayLike,
    shares: Mapping[str, float] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, Rows]:
    """Disjoint rows for fitting, selecting and testing, with about the same share of positives in each.

    Args:
        y: labels (n,). shares: part -> share, default fit 0.6, select 0.2, test 0.2.
        groups: (n,) topics, sources or texts; a group goes into one part as a whole.

    >>> parts = split_rows([0, 1] * 50)
    >>> {name: len(rows) for name, rows in parts.items()}
    {'fit': 60, 'select': 20, 'test': 20}
    """
    yes = controls.labels(y)
    shares = {"fit": 0.6, "select": 0.2, "test": 0.2} if shares is None else shares
    if any(not s > 0 for s in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise InputError(f"shares {dict(shares)}; each must be positive and their sum 1")
    keys = list(range(len(yes))) if groups is None else list(groups)
    if len(keys) != len(yes):
        raise InputError(f"{len(keys)} groups for {len(yes)} labels; give one per row")
    members: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    blocks = [np.array(m, np.intp) for m in members.values()]
    rng = np.random.default_rng(seed)
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    blocks.sort(key=lambda rows: -len(rows))  # large groups first, while there is room for them
    total = np.array([(~yes).sum(), yes.sum()], float)
    names, out = list(shares), {name: [np.empty(0, np.intp)] for name in shares}
    left = np.outer([shares[name] for name in names], total)  # rows of each class a part still wants
    for rows in blocks:
        counts = np.array([(~yes[rows]).sum(), yes[rows].sum()], float)
        want = (left / np.maximum(np.outer([shares[n] for n in names], total), 1)) @ (counts / counts.sum())
        best = int(np.argmax(want))
        left[best] -= counts
        out[names[best]].append(rows)
    return {name: np.sort(np.concatenate(rows)) for name, rows in out.items()}


def sweep(
    states: Mapping[Place, npt.ArrayLike],
    y: npt.ArrayLike,
    parts: Mapping[str, npt.ArrayLike],
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
    *,
    texts: Sequence[str] | None = None,
    topics: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    C: float = 1.0,
    fpr: float | None = None,
    draws: int = 20,
    fingerprint: str | None = None,
    allow_repeats: bool = False,
    naive: Mapping[Place, npt.ArrayLike] | None = None,
) -> Sweep:
    """Fit every kind at every site, choose on the select rows, and test the chosen one beside its controls.

    Args:
        states: (layer, position) -> (n, d), as `collect` gives them. y: labels (n,).
        parts: row indices (or masks) `fit`, `select`, `test` and maybe `calibrate`, without a row in common.
        texts: (n,) what the model read, for bag of words and length. topics: (n,) for the topic-only rule.
        clusters: (n,) sources of rows; none may be in two parts, and intervals resample whole clusters.
        fpr: sets the probe's threshold at this false positive rate on `calibrate`, or else on `select`.
        draws: refits on permuted labels. C: of the logistic kind. seed: of nulls and bootstraps.
        fingerprint: of the model, saved with the probe.
        allow_repeats: accept a text that occurs in two parts.
        naive: for probes of deceit, states (m, d) at the same sites of texts that are false although nothing in
            the model knows better (a naive liar). A probe of knowing deceit scores them like the negatives, so
            `controls["naive_liar"].auroc` belongs near 0.5; one that reads falsehood or theme does not.

    Raises:
        InputError: fewer than 20 rows, parts that share rows, clusters or texts, a part with fewer than two rows
            of a class.
        MissingExtra: scikit-learn is not installed.

    >>> rng = np.random.default_rng(0)
    >>> y = rng.random(200) < 0.5
    >>> noise = rng.normal(size=(200, 4))
    >>> states = {(0, "t_post"): noise, (1, "t_post"): noise + 3 * y[:, None]}
    >>> found = sweep(states, y, split_rows(y), ["mean_difference"])
    >>> found.site, found.auroc > 0.99
    ((1, 't_post'), True)
    """
    yes = controls.labels(y)
    if len(yes) < FEWEST:
        raise InputError(
            f"{len(yes)} labelled rows: a sweep fits, chooses and tests on different ones and needs at least "
            f"{FEWEST} in all; below that every AUROC is compatible with chance. Add prompts"
        )
    rows = _check_parts(parts, yes)
    _check_leaks(rows, texts, topics, clusters, len(yes), allow_repeats)
    if not states or not kinds:
        raise InputError(f"{len(states)} sites and {len(kinds)} kinds; a sweep needs at least one of each")
    fit, select, test = rows["fit"], rows["select"], rows["test"]
    probe, best, cells = None, -1.0, []
    for site, values in states.items():
        X = np.asarray(values)
        if X.ndim != 2 or len(X) != len(yes):
            raise InputError(
                f"states at {site} have shape {X.shape}; needed is ({len(yes)}, d), as the labels"
            )
        for kind in kinds:
            tried = fit_probe(X[fit], yes[fit], kind, C, site=site, fingerprint=fingerprint)
            area = auroc(tried.score(X[select]), yes[select])
            assert area is not None
            cells.append(Cell(layer=site[0], position=site[1], kind=kind, auroc=area))
            if area > best:  # the first of equals
                probe, best = tried, area
    assert probe is not None and probe.site is not None
    X, notes = np.asarray(states[probe.site]), []
    if fpr is not None:
        of = "calibrate" if "calibrate" in rows else "select"
        probe = probe.with_threshold(X[rows[of]], yes[rows[of]], fpr=fpr, allow_repeats=True)
        if of == "select":
            notes.append(
                "the threshold was set on the rows that chose the probe, so it is a little optimistic"
            )
    scores, y_test = probe.score(X[test]), yes[test]
    group = _group(clusters, test)
    area = auroc(scores, y_test)
    interval = auroc_interval(scores, y_test, clusters=group, seed=seed)
    assert area is not None and interval is not None
    if naive is not None and not states.keys() <= naive.keys():
        raise InputError("naive states are needed at every site of the sweep, since any may be chosen")
    beside, more = _controls(probe, X, yes, rows, scores, area, texts, topics, clusters, C, draws, seed)
    if naive is not None and probe.site is not None:
        beside["naive_liar"] = _naive(scores, probe.score(naive[probe.site]), y_test, area, seed)
    flagged = None if fpr is None else scores >= (probe.threshold or 0.0)
    return Sweep(
        probe=probe,
        select_auroc=best,
        auroc=area,
        low=interval[0],
        high=interval[1],
        n_positive=int(y_test.sum()),
        n_negative=int((~y_test).sum()),
        scores=scores,
        test=test,
        accuracy=_share((scores >= 0) == y_test),
        majority=_share(controls.majority(yes[fit], len(test)) == y_test),
        fpr=None if flagged is None else _share(flagged[~y_test]),
        tpr=None if flagged is None else _share(flagged[y_test]),
        cells=tuple(cells),
        controls=beside,
        notes=(*notes, *more),
    )


def _controls(
    probe: Probe,
    X: npt.NDArray[Any],
    yes: BoolArray,
    rows: Mapping[str, Rows],
    scores: FloatArray,
    area: float,
    texts: Sequence[str] | None,
    topics: Sequence[Hashable] | None,
    clusters: Sequence[Hashable] | None,
    C: float,
    draws: int,
    seed: int,
) -> tuple[dict[str, Null | Baseline | None], list[str]]:
    fit, test = rows["fit"], rows["test"]
    of_fit, of_test = (None if clusters is None else [clusters[i] for i in r] for r in (fit, test))
    group = _group(clusters, test)

    def refit(drawn: BoolArray) -> FloatArray:
        return fit_probe(X[fit], drawn, probe.kind, C).score(X[test])

    def beside(rule: Callable[..., FloatArray], column: Sequence[Any] | None) -> Baseline | None:
        if column is None:
            return None
        other = rule([column[i] for i in fit], yes[fit], [column[i] for i in test])
        return _baseline(scores, other, yes[test], area, group, seed)

    out: dict[str, Null | Baseline | None] = {
        "random_labels": controls.random_labels(
            refit, yes[fit], yes[test], area, clusters=of_fit, draws=draws, seed=seed
        ),
        "shuffled": controls.shuffled(scores, yes[test], area, clusters=of_test, seed=seed),
        "random_direction": controls.random_direction(X[fit], X[test], yes[test], area, seed=seed),
        "bag_of_words": beside(controls.bag_of_words, texts),
        "length": beside(controls.length_rule, texts),
        "topic_only": beside(controls.topic_only, topics),
    }
    notes = []
    if clusters is not None and controls.cluster_labels(yes, clusters) is None:
        notes.append(
            "some clusters hold both labels, so the nulls moved single rows; where rows of a cluster resemble "
            "each other, they are too narrow"
        )
    if texts is None:
        notes.append("no texts were given, so bag of words and length were not compared")
    if topics is None:
        notes.append("no topics were given, so the topic-only rule was not compared")
    return out, notes


def _baseline(
    probe: FloatArray, rule: FloatArray, y: BoolArray, area: float, group: npt.NDArray[Any] | None, seed: int
) -> Baseline:
    def gain(a: FloatArray, b: FloatArray, labels: BoolArray) -> float:
        first, second = auroc(a, labels), auroc(b, labels)
        return float("nan") if first is None or second is None else first - second

    own, interval = auroc(rule, y), auroc_interval(rule, y, clusters=group, seed=seed)
    assert own is not None and interval is not None
    low, high = bootstrap_interval(gain, probe, rule, y, clusters=group, n_boot=1000, seed=seed)
    return Baseline(
        auroc=own, low=interval[0], high=interval[1], gain=area - own, gain_low=low, gain_high=high
    )


def _naive(probe: FloatArray, naive: FloatArray, y: BoolArray, area: float, seed: int) -> Baseline:
    """How far the probe tells naive rows from negatives, beside how far it tells positives from them."""
    scores = np.concatenate([probe, naive])
    kind = np.concatenate([y.astype(int), np.full(len(naive), 2)])

    def of(s: FloatArray, k: npt.NDArray[Any], which: int) -> float:
        mine = (k == 0) | (k == which)
        found = auroc(s[mine], k[mine] == which)
        return float("nan") if found is None else found

    def gain(s: FloatArray, k: npt.NDArray[Any]) -> float:
        return of(s, k, 1) - of(s, k, 2)

    mine = kind != 1
    own, interval = of(scores, kind, 2), auroc_interval(scores[mine], kind[mine] == 2, seed=seed)
    assert interval is not None
    low, high = bootstrap_interval(gain, scores, kind, n_boot=1000, seed=seed)
    return Baseline(
        auroc=own, low=interval[0], high=interval[1], gain=area - own, gain_low=low, gain_high=high
    )


def _group(clusters: Sequence[Hashable] | None, rows: Rows) -> npt.NDArray[Any] | None:
    if clusters is None:
        return None
    number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
    return np.array([number[clusters[i]] for i in rows])


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v != v else v for k, v in row.items()}


def _share(hits: BoolArray) -> Rate:
    return rate(int(hits.sum()), hits.size)


def _check_parts(parts: Mapping[str, npt.ArrayLike], yes: BoolArray) -> dict[str, Rows]:
    if not {"fit", "select", "test"} <= set(parts) <= {"fit", "select", "test", "calibrate"}:
        raise InputError(f"parts {sorted(parts)}; needed are fit, select and test, and calibrate if you like")
    owner: dict[int, str] = {}
    out = {}
    for name, given in parts.items():
        a = np.asarray(given)
        if a.dtype == bool and a.shape == yes.shape:
            a = np.flatnonzero(a)
        if a.ndim != 1 or (a.size and a.dtype.kind not in "iu") or not ((a >= 0) & (a < len(yes))).all():
            raise InputError(f"part {name!r} holds no row indices between 0 and {len(yes) - 1}")
        for i in a.tolist():
            if i in owner:
                raise InputError(
                    f"row {i} is in {owner[i]!r} and in {name!r}; each row belongs to one part, once"
                )
            owner[i] = name
        out[name] = a.astype(np.intp)
        few = min(int(yes[out[name]].sum()), int((~yes[out[name]]).sum()))
        if few < 2 and name != "calibrate":
            raise InputError(f"part {name!r} has {few} rows of one class; it needs at least two of each")
    return out


def _check_leaks(
    rows: Mapping[str, Rows],
    texts: Sequence[str] | None,
    topics: Sequence[Hashable] | None,
    clusters: Sequence[Hashable] | None,
    n: int,
    allow_repeats: bool,
) -> None:
    for what, column in (("texts", texts), ("topics", topics), ("clusters", clusters)):
        if column is not None and len(column) != n:
            raise InputError(f"{len(column)} {what} for {n} rows; give one per row")
    for what, keys in (("text", None if allow_repeats else texts), ("cluster", clusters)):
        seen: dict[Hashable, str] = {}
        for name, part in rows.items():
            for i in part.tolist() if keys is not None else ():
                assert keys is not None
                if seen.setdefault(keys[i], name) != name:
                    raise InputError(
                        f"the {what} {str(keys[i])[:60]!r} is in {seen[keys[i]]!r} and in {name!r}: what was "
                        "learnt on it would be tested on it. Split with `split_rows(..., groups=...)`"
                        + (", or pass allow_repeats=True" if what == "text" else "")
                    )
