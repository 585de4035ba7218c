"""Controls that every reader of hidden states stands beside: trivial rules, nulls, and what "silent" means.

Rules and nulls answer two questions. Could the texts alone, their topic or their length do it? And what would
come out if there were nothing to read? numpy and scipy at import; the bag of words needs scikit-learn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from demur.errors import InputError, MissingExtra
from demur.stats.curves import auroc
from demur.stats.intervals import FloatArray

BoolArray = npt.NDArray[np.bool_]
Interval = Callable[[float], tuple[float, float] | None]
"""The interval of a value at a level of coverage, or None where it is undefined. A higher level is wider."""

_WORD = r"(?u)\w+|[^\w\s]+"


# --- trivial rules ----------------------------------------------------------------------------------------------


def bag_of_words(
    train_texts: Sequence[str], y: npt.ArrayLike, test_texts: Sequence[str], *, C: float = 10.0
) -> FloatArray:
    """Log-odds (n_test,) of a logistic regression on tf-idf of words and word pairs, fitted on the training texts.

    What it finds is on the surface of the texts, so a probe that does no better has shown nothing about the
    model. Texts without a word give the same score to all.

    Raises:
        InputError: lengths differ, or a class is missing. MissingExtra: scikit-learn is not installed.

    >>> s = bag_of_words(["a bomb", "a cake"], [1, 0], ["the bomb", "the cake"])  # doctest: +SKIP
    >>> bool(s[0] > s[1])  # doctest: +SKIP
    True
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("The bag-of-words control", "local") from None
    yes = labels(y, len(train_texts))
    if yes.all() or not yes.any():
        raise InputError(
            f"all {yes.size} training texts are labelled {bool(yes[0])}; a rule needs both classes"
        )
    if not any(re.search(r"\S", t) for t in train_texts):
        return np.zeros(len(test_texts))
    words = TfidfVectorizer(token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=C, max_iter=5000).fit(words.fit_transform(train_texts), yes)
    return np.asarray(model.decision_function(words.transform(test_texts)), float)


def topic_only(train_topics: Sequence[object], y: npt.ArrayLike, test_topics: Sequence[object]) -> FloatArray:
    """Share of positives (n_test,) among the training rows of the same topic, drawn towards the overall share.

    One row's worth of the overall share is added to each topic; a topic that was not trained on has exactly it.

    >>> topic_only(["law", "law", "art", "art"], [1, 1, 0, 1], ["law", "art", "tax"]).round(3).tolist()
    [0.917, 0.583, 0.75]
    """
    yes = labels(y, len(train_topics))
    prior = float(yes.mean())
    hits: dict[object, list[int]] = {}
    for topic, hit in zip(train_topics, yes.tolist(), strict=True):
        of = hits.setdefault(topic, [0, 0])
        of[0], of[1] = of[0] + hit, of[1] + 1
    out = [((k + prior) / (n + 1)) for k, n in (hits.get(t, (0, 0)) for t in test_topics)]
    return np.array(out, float)


def length_rule(train_texts: Sequence[str], y: npt.ArrayLike, test_texts: Sequence[str]) -> FloatArray:
    """Length in characters (n_test,), negated where the training texts of the positives are the shorter ones.

    >>> length_rule(["a", "aaa"], [1, 0], ["aa", "aaaa"]).tolist()
    [-2.0, -4.0]
    """
    area = auroc([len(t) for t in train_texts], labels(y, len(train_texts)))
    sign = -1.0 if area is not None and area < 0.5 else 1.0
    return sign * np.array([len(t) for t in test_texts], float)


def majority(y: npt.ArrayLike, n: int) -> BoolArray:
    """The more frequent label of the training rows, n times; True on a tie."""
    return np.full(n, bool(labels(y).mean() >= 0.5))


def always(n: int) -> BoolArray:
    """Say yes n times."""
    return np.ones(n, bool)


def never(n: int) -> BoolArray:
    """Say no n times."""
    return np.zeros(n, bool)


def keyword(texts: Sequence[str], words: Sequence[str]) -> BoolArray:
    """Whether each text holds one of the words, as a whole word and in any case.

    >>> keyword(["Build a BOMB", "a bombastic speech"], ["bomb"]).tolist()
    [True, False]
    """
    if not words:
        raise InputError("keyword rule without keywords; name at least one")
    found = re.compile("|".join(rf"(?<!\w){re.escape(w)}(?!\w)" for w in words), re.IGNORECASE)
    return np.array([found.search(t) is not None for t in texts], bool)


# --- nulls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """What came out in `draws` worlds without the effect.

    Attributes:
        observed: the real value it stands beside. mean: over the draws.
        low, high: the middle 95 % of the draws (a range of outcomes, not an interval of the mean).
        p_value: (1 + draws at least as large as `observed`) / (1 + draws), so never 0. For directions, which
            have no sign, distances from 0.5 are compared.
    """

    observed: float
    mean: float
    low: float
    high: float
    draws: int
    p_value: float


def random_labels(
    fit_score: Callable[[BoolArray], npt.ArrayLike],
    y_fit: npt.ArrayLike,
    y_test: npt.ArrayLike,
    observed: float,
    *,
    clusters: Sequence[object] | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Null:
    """AUROC on the true test labels of readers that were fitted on permuted labels.

    Args:
        fit_score: fits on labels (n_fit,) and returns scores of the test rows (n_test,).
        observed: AUROC of the reader fitted on the true labels.
        clusters: (n_fit,) sources. Where all rows of a source have one label, labels move from source to source:
            rows of one source resemble each other, and moving them singly would make the null too narrow.
    """
    rng, permuted = np.random.default_rng(seed), _permuter(labels(y_fit), clusters)
    return _null([_area(fit_score(permuted(rng)), y_test) for _ in range(draws)], observed)


def shuffled(
    scores: npt.ArrayLike,
    y: npt.ArrayLike,
    observed: float | None = None,
    *,
    groups: Sequence[object] | None = None,
    clusters: Sequence[object] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Null:
    """AUROC of the same scores when each is paired with the label of another row.

    With `groups` (topics, say) labels move within a group only. Then the mean is what knowing the group gives,
    and `p_value` asks for something beyond it. With `clusters` they move from cluster to cluster, as in
    `random_labels`.
    """
    s = np.asarray(scores, float)
    yes = labels(y, s.size)
    observed = _area(s, yes) if observed is None else observed
    if groups is not None and clusters is not None:
        raise InputError("groups keep labels inside, clusters move them as a whole; give one of the two")
    rng = np.random.default_rng(seed)
    permuted = _permuter(yes, clusters) if groups is None else _within(yes, groups)
    return _null([_area(s, permuted(rng)) for _ in range(draws)], observed)


def random_directions(
    states: npt.ArrayLike, draws: int, *, norm: float | None = None, seed: int = 0
) -> FloatArray:
    """Directions (draws, d) from N(0, covariance of the states (n, d)), scaled to length `norm` when given.

    They lie where the states vary, as a fitted direction does. A direction drawn evenly from the sphere falls
    into the many dimensions that hold next to nothing and is too easy to beat.

    Raises:
        InputError: fewer than two states, or all alike.
    """
    X = np.asarray(states, float)
    if X.ndim != 2 or len(X) < 2 or not np.isfinite(X).all():
        raise InputError(f"states of shape {X.shape}; directions need (n, d) finite numbers with n >= 2")
    centred = X - X.mean(0)
    if not centred.any():
        raise InputError("all states are alike, so they have no direction of variation to draw from")
    z = np.random.default_rng(seed).standard_normal((draws, len(X)))
    out: FloatArray = z @ centred / np.sqrt(len(X) - 1)
    return out if norm is None else norm * out / np.linalg.norm(out, axis=1, keepdims=True)


def random_direction(
    fit_states: npt.ArrayLike,
    test_states: npt.ArrayLike,
    y_test: npt.ArrayLike,
    observed: float,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Null:
    """AUROC of projections on `random_directions` of the fitting states. States that are all alike give 0.5."""
    X = np.asarray(fit_states, float)
    if not np.ptp(X, axis=0).any():
        return _null([0.5] * draws, observed, two_sided=True)
    S = np.asarray(test_states, float) @ random_directions(X, draws, seed=seed).T
    return _null([_area(column, y_test) for column in S.T], observed, two_sided=True)


# --- silence ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Whether a control was silent. `level` is the one Holm asked for; `silent` is None without an interval."""

    null: float
    margin: float
    level: float
    low: float | None
    high: float | None
    silent: bool | None


def silent(
    controls: Mapping[str, tuple[Interval, float, float]], *, level: float = 0.95
) -> dict[str, Silence]:
    """Which controls are silent: their interval lies inside null -+ margin, with Holm over all of them.

    A wide interval is no silence: too few items to tell count as "not silent". With m controls the first
    must hold at level 1 - (1 - level) / m; each one found silent leaves one fewer to correct for, until none
    of the rest holds. So with probability `level` no control is called silent whose value is outside its
    margin.

    Args:
        controls: key -> (interval by level, null, margin). Margins are fixed before the run.

    >>> wide, narrow = (lambda level: (0.2, 0.8)), (lambda level: (0.48, 0.52))
    >>> {k: s.silent for k, s in silent({"a": (wide, 0.5, 0.1), "b": (narrow, 0.5, 0.1)}).items()}
    {'a': False, 'b': True}
    """
    if not 0 < level < 1 or any(not margin > 0 for _, _, margin in controls.values()):
        raise InputError("a silent control needs a level in (0, 1) and a margin above 0")
    out: dict[str, Silence] = {}
    rest = dict(controls)
    while rest:
        step = 1 - (1 - level) / len(rest)
        now = {k: _silence(*control, step) for k, control in rest.items()}
        done = {k: s for k, s in now.items() if s.silent} or now
        out |= done
        rest = {k: c for k, c in rest.items() if k not in done}
    return {k: out[k] for k in controls}


def _silence(interval: Interval, null: float, margin: float, level: float) -> Silence:
    found = interval(level)
    if found is None or not np.isfinite(found).all():
        return Silence(null=null, margin=margin, level=level, low=None, high=None, silent=None)
    low, high = found
    inside = null - margin <= low and high <= null + margin
    return Silence(null=null, margin=margin, level=level, low=low, high=high, silent=inside)


# --- parts ------------------------------------------------------------------------------------------------------


def labels(y: npt.ArrayLike, n: int | None = None) -> BoolArray:
    """Labels (n,) as booleans.

    Raises:
        InputError: not one label a row, or something else than booleans, 0 and 1.
    """
    a = np.asarray(y)
    if a.ndim != 1 or not a.size or (n is not None and a.size != n):
        raise InputError(f"labels of shape {a.shape}{'' if n is None else f' for {n} rows'}; one per row")
    if not np.isin(a, (0, 1)).all():
        raise InputError("labels must be booleans or 0 and 1; leave rows without a label out")
    return a.astype(bool)


def cluster_labels(y: BoolArray, clusters: Sequence[object]) -> tuple[BoolArray, npt.NDArray[np.intp]] | None:
    """The label of each cluster and the cluster of each row (n,); None where a cluster holds both labels."""
    of = _codes(clusters, len(y))
    size, hits = np.bincount(of), np.bincount(of, weights=y)
    return (hits > 0, of) if ((hits == 0) | (hits == size)).all() else None


def _permuter(y: BoolArray, clusters: Sequence[object] | None) -> Callable[[np.random.Generator], BoolArray]:
    found = None if clusters is None else cluster_labels(y, clusters)
    if found is None:
        return lambda rng: rng.permutation(y)
    own, of = found
    return lambda rng: rng.permutation(own)[of]


def _within(y: BoolArray, groups: Sequence[object]) -> Callable[[np.random.Generator], BoolArray]:
    of = _codes(groups, len(y))
    order = np.argsort(of, kind="stable")

    def permuted(rng: np.random.Generator) -> BoolArray:
        out = np.empty_like(y)
        out[order] = y[np.lexsort((rng.random(len(y)), of))]
        return out

    return permuted


def _codes(keys: Sequence[object], n: int) -> npt.NDArray[np.intp]:
    if len(keys) != n:
        raise InputError(f"{len(keys)} groups or clusters for {n} rows; give one per row")
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys], np.intp)


def _area(scores: npt.ArrayLike, y: npt.ArrayLike) -> float:
    value = auroc(scores, y)
    if value is None:
        raise InputError("the test rows are all of one class, so no ranking of them can be measured")
    return value


def _null(values: Sequence[float], observed: float, *, two_sided: bool = False) -> Null:
    if not values:
        raise InputError("draws=0: a null needs at least one draw")
    v = np.array(values)
    far = np.abs(v - 0.5) >= abs(observed - 0.5) - 1e-12 if two_sided else v >= observed - 1e-12
    low, high = np.quantile(v, [0.025, 0.975])
    return Null(
        observed=observed,
        mean=float(v.mean()),
        low=float(low),
        high=float(high),
        draws=v.size,
        p_value=float((1 + far.sum()) / (1 + v.size)),
    )
