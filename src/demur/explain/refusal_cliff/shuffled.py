"""The curve that readers of shuffled labels give: what a trace may look like by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from demur.explain.refusal_cliff.text import Thought, encode, states
from demur.explain.refusal_cliff.tracing import (
    By,
    CliffProbes,
    Point,
    Reader,
    ReaderKind,
    _gather,
    _labels,
    _silent,
    check_model,
    fit_reader,
)
from demur.types import Condition

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime


def shuffled_curve(
    runtime: LocalRuntime,
    labelled: Sequence[Thought],
    thoughts: Sequence[Thought],
    probes: CliffProbes,
    *,
    by: By = "groups",
    condition: Condition | None = None,
    draws: int = 20,
    bins: int = 10,
    seed: int = 0,
) -> list[Point]:
    """The curve of the same thoughts, read by probes fitted on permuted labels, without answers.

    In each draw the medians over thoughts are taken as in `curve`; `median`, `low` and `high` are the median and
    the middle 95 % of these over the draws, `n` the thoughts.

    Args:
        labelled: what `probes` were fitted on. thoughts: what is traced.
    """
    check_model(runtime, probes)
    y, X = _labels(labelled), _gather(runtime, labelled, probes.layer, probes.markup, condition)
    kind: ReaderKind = "logistic" if probes.final.line is None else "mean_difference"
    rng = np.random.default_rng(seed)
    readers = []
    for _ in range(draws):
        drawn = rng.permutation(y)
        one = {"final": fit_reader(X["final"][0], drawn, kind)}
        for name in ("thinking", "close"):
            known = name in X and by == "groups"
            one[name] = fit_reader(X[name][0], drawn[X[name][1]], kind) if known else one["final"]
        readers.append(one)
    found: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    rows = [encode(runtime, _silent(t), probes.markup, condition) for t in thoughts]
    for row, H in zip(rows, states(runtime, rows, [probes.layer]), strict=True):
        thinking = [i for i, s in enumerate(row.spans) if s == "thinking"]
        closing = [i for i, s in enumerate(row.spans) if s == "close"]
        part = ((np.arange(len(thinking)) + 0.5) / len(thinking) * bins).astype(int)
        scores = _scores(readers, "thinking", H[0, thinking])
        for b in np.unique(part).tolist():
            found.setdefault(("thinking", b), []).append(scores[:, part == b].mean(1))
        for k, i in enumerate(closing):
            name = "final" if i == row.final else "close"
            found.setdefault(("close", k - len(closing)), []).append(_scores(readers, name, H[0, [i]])[:, 0])
    out = []
    for (span, place), values in sorted(found.items(), key=lambda item: (item[0][0] == "close", item[0][1])):
        low, middle, high = np.quantile(np.median(values, axis=0), [0.025, 0.5, 0.975]).tolist()
        out.append(Point(span=span, place=place, median=middle, low=low, high=high, n=len(values)))
    return out


def _scores(
    readers: Sequence[Mapping[str, Reader]], name: str, X: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Probability of refusing (draws, T) that each draw's reader sees at states (T, d)."""
    return np.array([expit(one[name].score(X.astype(float))) for one in readers])
