"""The direction from false to true statements: does one serve both models, and does the model use it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.positions import collect, grid
from demur.explain.post_training.results import Curve, Nie, Transfer, Truth
from demur.explain.post_training.statements import ANSWERS, SUFFIX, Statement
from demur.explain.probe import fit_probe
from demur.stats import auroc, rate
from demur.stats.controls import bag_of_words, random_directions
from demur.types import Prompt, PromptSet

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
States = Mapping[str, FloatArray]
"""Set -> (n, layers, width)."""
Stage = Callable[[str, int, int | None], None]
MODELS = ("base", "tuned")
LEAST = 20
DRAWS = 20
BAND = 5 / 32
"""Share of the layers that the direction is added at, the last being the one it was read at (8 to 12 of 32)."""


def as_text(runtime: LocalRuntime) -> LocalRuntime:
    """A view of the model that reads the user's words alone, begun as its tokenizer begins a text."""
    from demur.runtime.chat import ChatFormat

    view = runtime.with_edits()
    bos = runtime.tokenizer.bos_token_id
    begins = bos is not None and runtime.tokenizer("a")["input_ids"][:1] == [bos]
    template = ("{{ bos_token }}" if begins else "") + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    view.chat = ChatFormat(runtime.tokenizer, template=template, control_ids=runtime.chat.control_ids)
    return view


def text_states(
    runtime: LocalRuntime, sets: Mapping[str, Sequence[Statement]], progress: Stage | None = None
) -> dict[str, FloatArray]:
    """States of every block at the last token of each statement: set -> (n, layers, width) float32."""
    from demur.runtime.layers import find_layers

    places = grid(range(len(find_layers(runtime.model))), [-1])
    rows = [(name, s) for name, statements in sets.items() for s in statements]
    asked = PromptSet("statements", tuple(Prompt.of(s.text, id=str(i)) for i, (_, s) in enumerate(rows)))
    told = (
        None if progress is None else lambda done, total: progress(f"statements, {runtime.name}", done, total)
    )
    found = np.stack([*collect(as_text(runtime), asked, places, progress=told).values()], axis=1)
    names = np.array([name for name, _ in rows])
    return {name: found[names == name] for name in sets}


def check_sets(sets: Mapping[str, Sequence[Statement]]) -> None:
    """Raise `InputError` unless there are three sets or more, each with enough statements of both kinds."""
    if len(sets) < 3:
        raise InputError(
            f"{len(sets)} sets of statements; leaving one out and choosing a layer needs three or more"
        )
    for name, rows in sets.items():
        true = sum(s.true for s in rows)
        if len(rows) < LEAST or min(true, len(rows) - true) < 2:
            raise InputError(
                f"set {name!r}: {len(rows)} statements, {true} true; needed are {LEAST}, some of both kinds"
            )


def compare_truth(
    states: Mapping[str, States], sets: Mapping[str, Sequence[Statement]], *, seed: int = 0
) -> Truth:
    """Cosines, leave-one-set-out transfer, and their controls.

    Args:
        states: "base" and "tuned" -> set -> (n, layers, width). sets: the statements themselves.

    Raises:
        InputError: see `check_sets`. MissingExtra: scikit-learn is not installed.
    """
    check_sets(sets)
    y = {name: np.array([s.true for s in rows]) for name, rows in sets.items()}
    own = {m: {k: X - X.mean(0) for k, X in states[m].items()} for m in MODELS}
    areas = {m: {s: _areas(own[m], y, s) for s in sets} for m in MODELS}
    curves: dict[str, list[FloatArray]] = {}
    rows: list[Transfer] = []
    words: dict[str, Any] = {}
    null: list[float] = []
    for held in sets:
        fit = [s for s in sets if s != held]
        layer = _best([areas[m][s] for m in MODELS for s in fit])
        probes = {m: [_probe(own[m], y, fit, k) for k in range(own[m][held].shape[1])] for m in MODELS}
        for p in MODELS:
            for m in MODELS:
                right = np.stack([_right(pr, own[m][held][:, k], y[held]) for k, pr in enumerate(probes[p])])
                curves.setdefault(f"{p} on {m}", []).append(right.mean(1))
                rows.append(_transfer(held, p, m, "own", layer, right[layer]))
                rows.append(
                    _transfer(held, p, m, "train", layer, _by_train_mean(states, y, fit, held, p, m, layer))
                )
        train = [s for name in fit for s in sets[name]]
        said = (
            bag_of_words([s.text for s in train], [s.true for s in train], [s.text for s in sets[held]]) >= 0
        )
        words[held] = rate(int((said == y[held]).sum()), len(said))
        null += permuted(own["base"], y, fit, held, layer, seed=seed)
    ceilings = [_halves(own[m], y, seed) for m in MODELS]
    thetas = [_theta(own[m], y, list(sets)) for m in MODELS]
    return Truth(
        sets={name: len(rows_) for name, rows_ in sets.items()},
        cosines=cosines(*thetas),
        ceiling=tuple(None if a is None or b is None else min(a, b) for a, b in zip(*ceilings, strict=True)),
        layer=_best([areas[m][s] for m in MODELS for s in sets]),
        transfer=tuple(rows),
        by_layer={k: tuple(np.mean(v, axis=0).tolist()) for k, v in curves.items()},
        bag_of_words=words,
        random_labels=float(np.mean(null)),
    )


def cosines(a: FloatArray, b: FloatArray) -> Curve:
    """Cosine of each row of a with the same row of b, (n, d) each; None where one has no length."""
    x, z = np.asarray(a, float), np.asarray(b, float)
    scale = np.linalg.norm(x, axis=-1) * np.linalg.norm(z, axis=-1)
    dots = (x * z).sum(-1)
    return tuple(float(d / s) if s > 0 else None for d, s in zip(dots.tolist(), scale.tolist(), strict=True))


def _theta(X: States, y: Mapping[str, BoolArray], sets: Sequence[str]) -> FloatArray:
    """Mean of all true rows minus mean of all false ones, (layers, width)."""
    sums = [sum(X[s][y[s] == label].sum(0, dtype=float) for s in sets) for label in (True, False)]
    counts = [sum(int((y[s] == label).sum()) for s in sets) for label in (True, False)]
    return np.asarray(sums[0] / counts[0] - sums[1] / counts[1])


def _areas(X: States, y: Mapping[str, BoolArray], held: str) -> FloatArray:
    """AUROC by layer on one set, of directions from the others."""
    theta = _theta(X, y, [s for s in X if s != held])
    return np.array([auroc(X[held][:, k] @ theta[k], y[held]) for k in range(len(theta))], float)


def _best(areas: Sequence[FloatArray]) -> int:
    return int(np.argmax(np.mean(areas, axis=0)))


def _probe(X: States, y: Mapping[str, BoolArray], fit: Sequence[str], layer: int) -> tuple[FloatArray, Any]:
    """The direction at a layer and the logistic regression on the projection that sets the threshold."""
    theta = _theta({s: X[s][:, layer : layer + 1] for s in fit}, y, fit)[0]
    along = np.concatenate([X[s][:, layer] @ theta for s in fit])
    return theta, fit_probe(along[:, None], np.concatenate([y[s] for s in fit]))


def _right(probe: tuple[FloatArray, Any], X: FloatArray, y: BoolArray) -> BoolArray:
    theta, threshold = probe
    return np.asarray((threshold.score((X @ theta)[:, None]) >= 0) == y)


def _by_train_mean(
    states: Mapping[str, States],
    y: Mapping[str, BoolArray],
    fit: Sequence[str],
    held: str,
    probe: str,
    model: str,
    layer: int,
) -> BoolArray:
    """The same without looking at the tested set's mean: everything centred by the fitting sets of its model."""
    means = {m: np.concatenate([states[m][s][:, layer] for s in fit]).mean(0) for m in (probe, model)}
    X = {s: states[probe][s][:, layer : layer + 1] - means[probe] for s in fit}
    return _right(_probe(X, y, fit, 0), states[model][held][:, layer] - means[model], y[held])


def _transfer(
    held: str, probe: str, model: str, centred: Literal["own", "train"], layer: int, right: BoolArray
) -> Transfer:
    accuracy = rate(int(right.sum()), right.size)
    return Transfer(held_out=held, probe=probe, model=model, centred=centred, layer=layer, accuracy=accuracy)


def permuted(
    X: States,
    y: Mapping[str, BoolArray],
    fit: Sequence[str],
    held: str,
    layer: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[float]:
    """Accuracy on the set `held` of directions that were fitted on permuted labels, for each draw."""
    rng, found = np.random.default_rng([seed, 1]), []
    for _ in range(draws):
        drawn = {s: rng.permutation(y[s]) for s in fit}
        found.append(float(_right(_probe(X, drawn, fit, layer), X[held][:, layer], y[held]).mean()))
    return found


def _halves(X: States, y: Mapping[str, BoolArray], seed: int) -> Curve:
    """Cosine by layer of the directions of two random halves of each set, averaged over draws."""
    rng, found = np.random.default_rng([seed, 2]), []
    for _ in range(DRAWS):
        half = {s: rng.permutation(len(y[s])) < len(y[s]) // 2 for s in X}
        a, b = (
            _theta({s: X[s][half[s] == side] for s in X}, {s: y[s][half[s] == side] for s in X}, list(X))
            for side in (True, False)
        )
        found.append(cosines(a, b))
    return tuple(
        float(np.mean(known)) if (known := [v for v in column if v is not None]) else None
        for column in zip(*found, strict=True)
    )


# --- does the model use it? -------------------------------------------------------------------------------------


def compare_effects(
    runtimes: Mapping[str, LocalRuntime],
    states: Mapping[str, States],
    sets: Mapping[str, Sequence[Statement]],
    held: str,
    layer: int,
    *,
    before: str,
    question: str = SUFFIX,
    most: int = 100,
    seed: int = 0,
    progress: Stage | None = None,
) -> tuple[tuple[Nie, ...], tuple[int, ...]]:
    """Add and subtract each model's truth direction in each model, on statements of the set `held`.

    The direction comes from the other sets at `layer`, is scaled to the gap between the class means of the model
    that it is put into, and is added at the last layers up to there, at the full stop and the token before it.
    Beside it stand random directions in which its own states vary within a class, as long as its truth direction.

    Returns:
        The effects, and the layers.
    """
    fit = [s for s in sets if s != held]
    y = {s: np.array([row.true for row in sets[s]]) for s in fit}
    own = {m: {s: states[m][s][:, layer] - states[m][s][:, layer].mean(0) for s in fit} for m in MODELS}
    thetas = {m: _theta({s: own[m][s][:, None] for s in fit}, y, fit)[0] for m in MODELS}
    texts = [[s.text for s in sets[held] if s.true == label][: most // 2] for label in (True, False)]
    wide = max(1, round(BAND * states["base"][held].shape[1]))
    band = tuple(range(max(0, layer - wide + 1), layer + 1))
    out = []
    for i, (m, runtime) in enumerate((m, runtimes[m]) for m in MODELS):
        plain = [lean(runtime, rows, before, question) for rows in texts]
        pool = np.concatenate(
            [own[m][s][y[s] == t] - own[m][s][y[s] == t].mean(0) for s in fit for t in (True, False)]
        )
        length = float(np.linalg.norm(thetas[m]))
        vectors = {name: [_scaled(theta, thetas[m])] for name, theta in thetas.items()}
        vectors["random"] = list(random_directions(pool, 3, norm=length, seed=seed))
        for k, (name, drawn) in enumerate(vectors.items()):
            down = np.mean([lean(runtime, texts[0], before, question, band, -v) for v in drawn], axis=0)
            up = np.mean([lean(runtime, texts[1], before, question, band, v) for v in drawn], axis=0)
            out.append(_nie(name, m, plain, down, up, seed))
            if progress is not None:
                progress("effect of the truth direction", 3 * i + k + 1, 6)
    return tuple(out), band


def _scaled(theta: FloatArray, target: FloatArray) -> FloatArray:
    """`theta` with the length of the target's class gap along it."""
    unit = theta / np.linalg.norm(theta)
    return np.asarray(unit * abs(float(unit @ target)))


def _nie(
    name: str, model: str, plain: Sequence[FloatArray], down: FloatArray, up: FloatArray, seed: int
) -> Nie:
    def effects(true: FloatArray, minus: FloatArray, false: FloatArray, plus: FloatArray) -> tuple[Any, Any]:
        p, q = float(true.mean()), float(false.mean())
        first = (float(minus.mean()) - p) / (-1 - p) if p > -1 + 1e-6 else None
        second = (float(plus.mean()) - q) / (1 - q) if q < 1 - 1e-6 else None
        return first, second

    first, second = effects(plain[0], down, plain[1], up)
    mean = None if first is None or second is None else (first + second) / 2
    rng, drawn = np.random.default_rng([seed, 3]), []
    for _ in range(500):
        a, b = (rng.integers(0, len(x), len(x)) for x in plain)
        pair = effects(plain[0][a], down[a], plain[1][b], up[b])
        if None not in pair:
            drawn.append(sum(pair) / 2)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if mean is not None and drawn else (None, None)
    return Nie(
        vector=name,
        model=model,
        n=len(down) + len(up),
        before=(float(plain[0].mean()), float(plain[1].mean())),
        true_false=first,
        false_true=second,
        mean=mean,
        low=low,
        high=high,
    )


def lean(
    runtime: LocalRuntime,
    texts: Sequence[str],
    before: str,
    question: str = SUFFIX,
    layers: Sequence[int] = (),
    vector: FloatArray | None = None,
) -> FloatArray:
    """P(TRUE) - P(FALSE) (n,) behind each statement and the question, which may be empty.

    `vector` is added at `layers`, at the statement's last token and the one before it.
    """
    import torch

    from demur.explain.post_training.tracing import answer_ids, plain_ids
    from demur.runtime import forward
    from demur.runtime.layers import BlockEdit

    answers = answer_ids(runtime.tokenizer, before + texts[0] + question, ANSWERS)
    if answers is None:
        raise InputError(
            f"{runtime.name!r}: the answers {ANSWERS} begin with one token, or merge with the question"
        )
    rows = [plain_ids(runtime.tokenizer, before + text + question) for text in texts]
    ends = [len(plain_ids(runtime.tokenizer, before + text)) for text in texts]
    out = np.empty(len(rows))
    for shape in sorted({(len(r), e) for r, e in zip(rows, ends, strict=True)}):
        mine = [i for i in range(len(rows)) if (len(rows[i]), ends[i]) == shape]
        view = runtime
        if vector is not None:
            v = torch.from_numpy(np.asarray(vector, np.float32))

            def add(h: Any, at: Any, v: Any = v, end: int = shape[1]) -> Any:
                return h + ((at == end - 1) | (at == end - 2))[..., None] * v.to(h)

            view = runtime.with_edits(*(BlockEdit(layer, add) for layer in layers))

        def work(batch: list[int], prefix: Any, mine: list[int] = mine, view: Any = view) -> list[float]:
            start = prefix.length if prefix else 0
            cache = prefix.expanded(len(batch)) if prefix else None
            logits = forward.run(view.model, [rows[mine[i]][start:] for i in batch], cache=cache)
            assert logits is not None
            p = logits.float().softmax(-1)[:, list(answers)]
            return [float(d) for d in (p[:, 0] - p[:, 1]).tolist()]

        out[mine] = view.batched([rows[i] for i in mine], work)
    return out
