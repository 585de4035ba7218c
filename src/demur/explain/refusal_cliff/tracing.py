"""Refusal probes over positions, the traces they give, and statistics of traces that averaging has not made up.

Curves of different length must not be padded with zeros and averaged, nor stretched by splines: the first makes
flat curves rise, the second overshoots. Here each trace gives its own plateau, final score and drop, and only these
are summed up; a curve for the eye takes, at each place, the traces that have a token there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from demur.errors import InputError
from demur.explain.probe import Probe, fit_probe
from demur.explain.refusal_cliff.text import Encoded, Markup, Thought, encode, states
from demur.explain.sweep import split_rows
from demur.stats import auroc, bootstrap_interval, controls
from demur.types import Condition, Table

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]
By = Literal["groups", "final"]
ReaderKind = Literal["mean_difference", "logistic"]
PER_ROW = 8
"""Tokens of a span that one thought gives to a probe, evenly spaced."""
LEAST = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """A probe whose score is a log-odds of refusing: a logistic one is that by itself, another through `line`.

    A logistic probe turns away from what refusing varies along with everything else, and may miss a fall that comes
    from elsewhere; the difference of means does not. `line` is a logistic regression on its score alone.
    """

    probe: Probe
    line: Probe | None = None

    def score(self, X: npt.ArrayLike) -> FloatArray:
        """Log-odds of refusing (n,) of states (n, d)."""
        s = self.probe.score(X)
        return s if self.line is None else self.line.score(s[:, None])

    @property
    def direction(self) -> FloatArray:
        """The vector (d,) that the score grows along."""
        return self.probe.direction.vector


def fit_reader(
    X: npt.ArrayLike,
    y: npt.ArrayLike,
    kind: ReaderKind = "mean_difference",
    *,
    site: tuple[int, str] | None = None,
    fingerprint: str | None = None,
) -> Reader:
    """Fit a reader on states (n, d) and labels (n,)."""
    probe = fit_probe(X, y, kind, site=site, fingerprint=fingerprint)
    return Reader(
        probe=probe, line=None if kind == "logistic" else fit_probe(probe.score(X)[:, None], y, "logistic")
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CliffProbes:
    """Readers of "will refuse" at one layer.

    Attributes:
        final: fitted at the last token before the answer alone, as published. Elsewhere it is out of distribution.
        groups: one for each span before the answer, fitted on tokens of that span.
        markup: the string the thoughts were written with.
        held_out: AUROC on the thoughts kept back (a fifth) of `final`, of each group, and of `bag_of_words` on
            prompt and thinking; `random_labels` is the mean over readers fitted on permuted labels.
        n_fit, n_held_out: thoughts.
        notes: what a reader should know.
    """

    layer: int
    final: Reader
    groups: Mapping[str, Reader]
    markup: Markup
    held_out: Mapping[str, float]
    n_fit: int
    n_held_out: int
    notes: tuple[str, ...] = ()

    def score(self, H: npt.ArrayLike, row: Encoded, by: By = "groups") -> FloatArray:
        """Probability of refusing (T,) at the tokens of a row, from their states (T, d).

        "groups" uses the probe of each token's span, and `final` at the last token before the answer and behind it;
        "final" uses that one everywhere.
        """
        X = np.asarray(H, float)
        out = self.final.score(X)
        spans = np.array(row.spans)
        for name, probe in self.groups.items() if by == "groups" else ():
            here = (spans == name) & (np.arange(len(spans)) != row.final)
            if here.any():
                out[here] = probe.score(X[here])
        return np.asarray(expit(out), float)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A score for each token of one thought: `tokens`, `spans` (of `SPANS`) and `scores` have one entry a token."""

    id: str
    tokens: tuple[str, ...]
    spans: tuple[str, ...]
    scores: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Cliff:
    """What one trace says: mean score over the last half of the thinking, score before the answer, their gap."""

    id: str
    plateau: float
    final: float

    @property
    def drop(self) -> float:
        """plateau - final."""
        return self.plateau - self.final


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Median over the `n` traces that have a token at this place, with its 95 % interval."""

    span: str
    place: int
    median: float
    low: float
    high: float
    n: int


def fit_probes(
    runtime: LocalRuntime,
    thoughts: Sequence[Thought],
    *,
    layer: int | None = None,
    kind: ReaderKind = "mean_difference",
    markup: Markup | None = None,
    condition: Condition | None = None,
    seed: int = 0,
) -> CliffProbes:
    """Fit readers of "the answer will refuse" on thoughts with a label `refused`; a fifth is kept back for testing.

    Use the model's own thinking and answers. Answers are not read.

    Args:
        layer: 0..n-1; the last by default. kind: of the readers; the published one is "logistic".

    Raises:
        InputError: thoughts without label, fewer than 20, or fewer than 10 of a class; see also `encode`.
        MissingExtra: scikit-learn is not installed.

    >>> probes = fit_probes(runtime, thoughts)  # doctest: +SKIP
    >>> probes.held_out["final"]  # doctest: +SKIP
    0.98
    """
    y = _labels(thoughts)
    markup = markup or Markup()
    layer = _last(runtime) if layer is None else layer
    X = gather(runtime, thoughts, layer, markup, condition)
    part = split_rows(y, {"fit": 0.8, "test": 0.2}, seed=seed)
    test = np.zeros(len(y), bool)
    test[part["test"]] = True
    probes, held_out = {}, {}
    for name, (H, owner) in X.items():
        use = ~test[owner]
        mark = runtime.fingerprint
        probes[name] = fit_reader(H[use], y[owner[use]], kind, site=(layer, name), fingerprint=mark)
        held_out[name] = _area(probes[name].score(H[~use]), y[owner[~use]])
    final = X["final"][0]

    def refit(drawn: npt.NDArray[np.bool_]) -> FloatArray:
        return fit_reader(final[~test], drawn, kind).score(final[test])

    texts = [f"{t.prompt.text}\n{t.thinking}" for t in thoughts]
    words = controls.bag_of_words(
        [t for t, k in zip(texts, test, strict=True) if not k],
        y[~test],
        [t for t, k in zip(texts, test, strict=True) if k],
    )
    held_out["bag_of_words"] = _area(words, y[test])
    null = controls.random_labels(refit, y[~test], y[test], held_out["final"], seed=seed)
    held_out["random_labels"] = null.mean
    return CliffProbes(
        layer=layer,
        final=probes.pop("final"),
        groups=probes,
        markup=markup,
        held_out=held_out,
        n_fit=int((~test).sum()),
        n_held_out=int(test.sum()),
        notes=_confounds(thoughts),
    )


def gather(
    runtime: LocalRuntime,
    thoughts: Sequence[Thought],
    layer: int,
    markup: Markup,
    condition: Condition | None,
) -> dict[str, tuple[FloatArray, npt.NDArray[np.intp]]]:
    """Of each span and of `final`: states (N, d), and the thought that each comes from (N,)."""
    rows = [encode(runtime, dataclasses.replace(t, answer=""), markup, condition) for t in thoughts]
    found: dict[str, list[FloatArray]] = {}
    of: dict[str, list[int]] = {}
    for i, (row, H) in enumerate(zip(rows, states(runtime, rows, [layer]), strict=True)):
        for name, places in _places(row).items():
            found.setdefault(name, []).append(H[0, places].astype(float))
            of.setdefault(name, []).extend([i] * len(places))
    return {name: (np.concatenate(blocks), np.array(of[name], np.intp)) for name, blocks in found.items()}


def _labels(thoughts: Sequence[Thought]) -> npt.NDArray[np.bool_]:
    if missing := [t.id for t in thoughts if t.refused is None]:
        raise InputError(
            f"{len(missing)} of {len(thoughts)} thoughts ({missing[0]!r} first) do not say whether the answer "
            "refused; a probe is fitted on labels. Judge the answers first (demur judge)"
        )
    y = np.array([bool(t.refused) for t in thoughts])
    few = min(int(y.sum()), int((~y).sum()))
    if len(y) < LEAST or few < LEAST // 2:
        raise InputError(
            f"{len(y)} thoughts, {int(y.sum())} of them refused: a probe needs at least {LEAST}, with "
            f"{LEAST // 2} of each kind"
        )
    return y


def _places(row: Encoded) -> dict[str, list[int]]:
    """Token indices of each span that a probe is fitted on, and of `final`."""
    out = {}
    for name in ("prompt", "template", "thinking", "close"):
        here = [i for i, span in enumerate(row.spans) if span == name and i != row.final]
        if here:
            pick = np.unique(np.linspace(0, len(here) - 1, min(PER_ROW, len(here))).round().astype(int))
            out[name] = [here[k] for k in pick]
    return {**out, "final": [row.final]}


def _area(scores: npt.ArrayLike, y: npt.ArrayLike) -> float:
    value = auroc(scores, y)
    assert value is not None  # a fifth of at least ten of each kind
    return value


def _last(runtime: LocalRuntime) -> int:
    from demur.runtime.layers import find_layers

    return len(find_layers(runtime.model)) - 1


def _confounds(thoughts: Sequence[Thought]) -> tuple[str, ...]:
    known = [(t.refused, t.harmful) for t in thoughts if t.harmful is not None]
    if len(known) < len(thoughts):
        return (
            "not every thought says whether its request is harmful, so the probe may read harm, not refusal",
        )
    if not {(False, True), (True, False)} <= set(known):
        missing = "answered harmful" if (False, True) not in known else "refused harmless"
        return (f"no {missing} requests among the fitted ones: the probe may read harm instead of refusal",)
    return ()


def trace(
    runtime: LocalRuntime,
    probes: CliffProbes,
    thoughts: Sequence[Thought],
    *,
    by: By = "groups",
    condition: Condition | None = None,
) -> list[Trace]:
    """The probability of refusing that the probes read at each token, one pass a thought.

    Raises:
        MismatchError: the probes were fitted on another model; InputError: as of `encode`.

    >>> trace(runtime, probes, thoughts)[0].scores  # doctest: +SKIP
    array([0.52, 0.61, 0.93, 0.95, 0.12])
    """
    check_model(runtime, probes)
    rows = [encode(runtime, t, probes.markup, condition) for t in thoughts]
    out = []
    for row, H in zip(rows, states(runtime, rows, [probes.layer]), strict=True):
        tokens = tuple(runtime.tokenizer.decode([i]) for i in row.ids)
        out.append(Trace(id=row.id, tokens=tokens, spans=row.spans, scores=probes.score(H[0], row, by)))
    return out


def check_model(runtime: Any, probes: CliffProbes) -> None:
    """Raise `MismatchError` where the probes are known to be of another model."""
    from demur.errors import MismatchError

    of = probes.final.probe.fingerprint
    if of and runtime.fingerprint and of != runtime.fingerprint:
        raise MismatchError(f"probes of model {of} on {runtime.fingerprint}; fit them anew on this model")


def cliff(found: Trace) -> Cliff:
    """Plateau, final score and drop of a trace. The later half of n thinking tokens is the last ceil(n / 2).

    >>> spans = ("template", "thinking", "thinking", "thinking", "close")
    >>> scores = np.array([0.1, 0.2, 0.8, 1.0, 0.3])
    >>> found = cliff(Trace(id="a", tokens=("",) * 5, spans=spans, scores=scores))
    >>> found.plateau, found.final, round(found.drop, 6)
    (0.9, 0.3, 0.6)
    """
    late, closing = _late(found.spans), [i for i, s in enumerate(found.spans) if s == "close"]
    if not late or not closing:
        missing = "closing" if late else "thinking"
        raise InputError(f"trace {found.id!r} has no {missing} tokens, so no cliff")
    return Cliff(
        id=found.id, plateau=float(found.scores[late].mean()), final=float(found.scores[closing[-1]])
    )


def _late(spans: Sequence[str]) -> list[int]:
    """Indices of the later half of the thinking."""
    thinking = [i for i, s in enumerate(spans) if s == "thinking"]
    return thinking[-math.ceil(len(thinking) / 2) :]


def summarise(cliffs: Sequence[Cliff], *, title: str = "cliff", seed: int = 0) -> Table:
    """Plateau, final and drop, a row each: median over thoughts, its 95 % bootstrap interval, their number."""
    if not cliffs:
        raise InputError("no cliffs to sum up; trace at least one thought")
    rows = []
    for name in ("plateau", "final", "drop"):
        values = np.array([getattr(c, name) for c in cliffs])
        low, high = bootstrap_interval(lambda v: float(np.median(v)), values, seed=seed)
        rows.append((name, float(np.median(values)), low, high, len(values)))
    return Table(title, ("what", "median", "low", "high", "n"), tuple(rows))


def curve(traces: Sequence[Trace], *, bins: int = 10, seed: int = 0) -> list[Point]:
    """Medians along the thinking, in equal parts of each trace's own length, and at the closing tokens.

    A trace counts in a part where it has tokens, with their mean; shorter ones leave parts out. Places of the
    thinking are 0 to bins - 1, those of the closing tokens -1 for the last, -2 for the one before.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for one in traces:
        for key, here in parts(one.spans, bins).items():
            found.setdefault(key, []).append(float(np.mean(one.scores[here])))
    out = []
    for (span, place), values in sorted(found.items(), key=lambda item: (item[0][0] == "close", item[0][1])):
        v = np.array(values)
        low, high = bootstrap_interval(lambda x: float(np.median(x)), v, n_boot=500, seed=seed)
        out.append(Point(span=span, place=place, median=float(np.median(v)), low=low, high=high, n=len(v)))
    return out


def parts(spans: Sequence[str], bins: int) -> dict[tuple[str, int], list[int]]:
    """Token indices of each part of the thinking and of each closing token, by the places of `curve`."""
    thinking, closing = ([i for i, s in enumerate(spans) if s == name] for name in ("thinking", "close"))
    out: dict[tuple[str, int], list[int]] = {}
    for k, i in enumerate(thinking):
        out.setdefault(("thinking", int((k + 0.5) / len(thinking) * bins)), []).append(i)
    return out | {("close", k - len(closing)): [i] for k, i in enumerate(closing)}
