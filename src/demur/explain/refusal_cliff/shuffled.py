"""Traces read by probes of shuffled labels: what drops and curves may look like by chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demur.explain.refusal_cliff.text import Encoded, Thought, encode, states
from demur.explain.refusal_cliff.tracing import (
    By,
    CliffProbes,
    Point,
    Reader,
    ReaderKind,
    Trace,
    check_model,
    cliff,
    fit_reader,
    gather,
    parts,
)
from demur.types import Condition

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime


def shuffled_traces(
    runtime: LocalRuntime,
    labelled: Sequence[Thought],
    thoughts: Sequence[Thought],
    probes: CliffProbes,
    *,
    by: By = "groups",
    condition: Condition | None = None,
    draws: int = 20,
    seed: int = 0,
) -> list[list[Trace]]:
    """For each draw the traces of the same thoughts, read by probes fitted on permuted labels: what chance gives.

    One such probe may well show a drop or a rise, where a state leaves the range that it was fitted on; hence many.

    Args:
        labelled: what `probes` were fitted on. thoughts: what is traced, from the thinking on, without answers and
            without the text of tokens.
    """
    check_model(runtime, probes)
    X = gather(runtime, labelled, probes.layer, probes.markup, condition)
    kind: ReaderKind = "logistic" if probes.final.line is None else "mean_difference"
    used = [name for name in ("thinking", "close") if name in X and by == "groups"]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        y = rng.permutation([bool(t.refused) for t in labelled])
        groups: dict[str, Reader] = {name: fit_reader(X[name][0], y[X[name][1]], kind) for name in used}
        drawn.append(dataclasses.replace(probes, final=fit_reader(X["final"][0], y, kind), groups=groups))
    rows = [encode(runtime, dataclasses.replace(t, answer=""), probes.markup, condition) for t in thoughts]
    out: list[list[Trace]] = [[] for _ in drawn]
    for row, H in zip(rows, states(runtime, rows, [probes.layer]), strict=True):
        start = row.spans.index("thinking")
        end = Encoded(row.id, row.ids[start:], row.spans[start:])
        for found, one in zip(out, drawn, strict=True):
            scores = one.score(H[0, start:], end, by)
            found.append(Trace(id=row.id, tokens=(), spans=end.spans, scores=scores))
    return out


def shuffled_drops(drawn: Sequence[Sequence[Trace]]) -> npt.NDArray[np.float64]:
    """The median drop of each draw, (draws,)."""
    return np.array([np.median([cliff(t).drop for t in traces]) for traces in drawn])


def shuffled_curve(drawn: Sequence[Sequence[Trace]], *, bins: int = 10) -> list[Point]:
    """Places and medians over thoughts as in `curve`; of these, the median and the middle 95 % over the draws."""
    found: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    for same in zip(*drawn, strict=True):
        scores = np.array([t.scores for t in same])
        for key, here in parts(same[0].spans, bins).items():
            found.setdefault(key, []).append(scores[:, here].mean(1))
    out = []
    for (span, place), values in sorted(found.items(), key=lambda item: (item[0][0] == "close", item[0][1])):
        low, middle, high = np.quantile(np.median(values, axis=0), [0.025, 0.5, 0.975]).tolist()
        out.append(Point(span=span, place=place, median=middle, low=low, high=high, n=len(values)))
    return out
