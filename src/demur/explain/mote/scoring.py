"""Experts ranked by how much more one class of prompts uses them, and two checks of what such a rank means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.mote.maps import Expert, FloatArray, Maps
from demur.explain.mote.rows import REFUSED
from demur.stats import Null, bootstrap_interval
from demur.stats.controls import cluster_labels

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertScores:
    """Mean use by the prompts of one class minus mean use by all others, for each expert.

    Attributes:
        values: (L, E). layers: (L,) decoder layers. target: the class. n_target, n_other: prompts of either side.
    """

    values: FloatArray = field(repr=False)
    layers: tuple[int, ...] = field(repr=False)
    target: str
    n_target: int
    n_other: int

    def top(self, k: int) -> list[Expert]:
        """The k experts of highest score over all layers together, the first ones first.

        Raises:
            InputError: k below 1, or beyond the experts whose score is above 0.
        """
        above = int((self.values > 0).sum())
        if not 1 <= k <= above:
            raise InputError(
                f"k={k}: {above} of {self.values.size} experts are used more by {self.target!r}, and no k is larger"
            )
        order = np.argsort(-self.values.ravel(), kind="stable")[:k]
        rows, columns = np.unravel_index(order, self.values.shape)
        return [(self.layers[i], int(j)) for i, j in zip(rows, columns, strict=True)]

    def of(self, expert: Expert) -> float:
        """The score of one expert."""
        return float(self.values[self.layers.index(expert[0]), expert[1]])

    def rank(self, expert: Expert) -> int:
        """Its place over all layers, from 1."""
        return int((self.values > self.of(expert)).sum()) + 1


def score_experts(maps: Maps, labels: Sequence[str | None], target: str = REFUSED) -> ExpertScores:
    """Scores of all experts for one class; rows labelled None are left out.

    Raises:
        InputError: not one label a row, or nothing on one of the two sides.
    """
    yes, known = _sides(maps, labels, target)
    values = maps.values[yes].mean(0) - maps.values[known & ~yes].mean(0)
    return ExpertScores(
        values=values,
        layers=maps.layers,
        target=target,
        n_target=int(yes.sum()),
        n_other=int((known & ~yes).sum()),
    )


def top_used(maps: Maps, labels: Sequence[str | None], k: int, target: str = REFUSED) -> list[Expert]:
    """The k experts that one class uses most, without a contrast: a trivial rule to compare with."""
    use = maps.values[_sides(maps, labels, target)[0]].mean(0)
    rows, columns = np.unravel_index(np.argsort(-use.ravel(), kind="stable")[:k], use.shape)
    return [(maps.layers[i], int(j)) for i, j in zip(rows, columns, strict=True)]


def permuted(
    maps: Maps,
    labels: Sequence[str | None],
    *,
    k: int,
    target: str = REFUSED,
    topics: Sequence[object] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> Null:
    """Mean score of the top k experts, beside what permuted labels give.

    With `topics` (n,) labels move from topic to topic where all rows of a topic have one label: prompts about one
    thing use like experts, and moving labels singly would make the null too narrow. It says that routing differs
    between the classes and no more; topics alone can do that (`topic_check`).
    """
    yes, known = _sides(maps, labels, target)
    own, y = maps.take(known), yes[known]
    of = None if topics is None else [t for t, use in zip(topics, known, strict=True) if use]
    found = None if of is None else cluster_labels(y, of)
    rng = np.random.default_rng([seed, 22])

    def score(y: BoolArray) -> float:
        gaps = own.values[y].mean(0) - own.values[~y].mean(0)
        return float(np.sort(gaps.ravel())[-k:].mean())

    def shuffled() -> BoolArray:
        return rng.permutation(y) if found is None else rng.permutation(found[0])[found[1]]

    values, observed = np.array([score(shuffled()) for _ in range(draws)]), score(y)
    low, high = np.quantile(values, [0.025, 0.975])
    above = int((values >= observed - 1e-12).sum())
    return Null(
        observed=observed,
        mean=float(values.mean()),
        low=float(low),
        high=float(high),
        draws=draws,
        p_value=(1 + above) / (1 + draws),
    )


def unrelated_labels(labels: Sequence[str], rng: np.random.Generator, target: str = REFUSED) -> list[str]:
    """Random labels that hold nothing of the true ones: half of each true class is called `target`.

    >>> made = unrelated_labels(["refused"] * 4 + ["answered"] * 2, np.random.default_rng(0))
    >>> made[:4].count("refused"), made[4:].count("refused")
    (2, 1)
    """
    out = [f"not {target}"] * len(labels)
    for name in dict.fromkeys(labels):
        mine = rng.permutation([i for i, x in enumerate(labels) if x == name])
        for i in mine[: len(mine) // 2]:
            out[i] = target
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicCheck:
    """Do experts follow the refusal, or the topics that get refused?

    Attributes:
        response_gap: first template, mean use by refused prompts minus mean use by answered ones.
        topic_gap: second template, answered prompts only: topics that the first template has refused minus others.
        share: topic_gap / response_gap, how much of the first gap the topic alone makes. low, high: its 95 %
            interval, topics resampled. n: prompts in the four groups.
        verdict: "response" (all of the interval below a half), "topic" (above), "unclear".
    """

    response_gap: float
    topic_gap: float
    share: float | None
    low: float
    high: float
    n: tuple[int, int, int, int]
    verdict: Literal["response", "topic", "unclear"]


def topic_check(
    experts: Sequence[Expert],
    first: tuple[Maps, Sequence[str | None], Sequence[str]],
    second: tuple[Maps, Sequence[str | None], Sequence[str]],
    *,
    target: str = REFUSED,
    seed: int = 0,
) -> TopicCheck:
    """Use of some experts when the same topics are asked about in a way that is answered.

    Args:
        first: maps, labels and topics (n,) of the template that the experts were found on; better other rows of it.
        second: those of a template under which the refused topics are (also) answered.

    Raises:
        InputError: one of the four groups of prompts is empty.
    """
    yes, known = _sides(first[0], first[1], target)
    refused = {t for t in first[2] if _share(t, first[2], yes, known) > 0.5}
    others = {t for t, k in zip(first[2], known, strict=True) if k} - refused
    calm = np.array([x is not None and x != target for x in second[1]])
    groups = (yes, known & ~yes, calm & _isin(second[2], refused), calm & _isin(second[2], others))
    n = [int(g.sum()) for g in groups]
    if not all(n):
        raise InputError(
            "the topic check compares refused and answered prompts of the first template with answered prompts of "
            f"the second, of refused topics and of others; here are {n[0]}, {n[1]}, {n[2]} and {n[3]} of them"
        )
    use = np.concatenate([first[0].resonance(experts)] * 2 + [second[0].resonance(experts)] * 2)
    which = np.concatenate([np.where(g, k, -1) for k, g in enumerate(groups)])
    topics = np.array([*first[2], *first[2], *second[2], *second[2]])
    use, which, topics = use[which >= 0], which[which >= 0], topics[which >= 0]

    def share(u: FloatArray, w: npt.NDArray[np.int64]) -> float:
        gap, by_topic = _gaps(u, w)
        return by_topic / gap if gap > 0 else np.nan

    gap, by_topic = _gaps(use, which)
    low, high = bootstrap_interval(share, use, which, clusters=topics, n_boot=1000, seed=seed)
    verdict: Literal["response", "topic", "unclear"]
    verdict = "response" if high < 0.5 else "topic" if low > 0.5 else "unclear"
    return TopicCheck(
        response_gap=gap,
        topic_gap=by_topic,
        share=by_topic / gap if gap > 0 else None,
        low=low,
        high=high,
        n=(n[0], n[1], n[2], n[3]),
        verdict=verdict,
    )


def _gaps(use: FloatArray, which: npt.NDArray[np.int64]) -> tuple[float, float]:
    sums = np.bincount(which, use, 4)
    means = sums / np.where((count := np.bincount(which, minlength=4)) > 0, count, np.nan)
    return float(means[0] - means[1]), float(means[2] - means[3])


def _share(topic: str, topics: Sequence[str], yes: BoolArray, known: BoolArray) -> float:
    mine = known & _isin(topics, {topic})
    return float(yes[mine].mean()) if mine.any() else 0.0


def _isin(topics: Sequence[str], some: set[str]) -> BoolArray:
    return np.array([t in some for t in topics], bool)


def _sides(maps: Maps, labels: Sequence[str | None], target: str) -> tuple[BoolArray, BoolArray]:
    """Rows of the target class, and rows that have a class."""
    if len(labels) != len(maps):
        raise InputError(f"{len(labels)} labels for {len(maps)} prompts; give one each, or None")
    known = np.array([x is not None for x in labels], bool)
    yes = np.array([x == target for x in labels], bool)
    if not yes.any() or not (known & ~yes).any():
        raise InputError(
            f"{int(yes.sum())} of {int(known.sum())} labelled prompts are {target!r}; a comparison needs that "
            "class and another one"
        )
    return yes, known
