"""The direction from harmless to harmful requests: is it the same in both models, and does it carry over?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.positions import collect, grid
from demur.explain.post_training.results import Curve, Refusal, Steered
from demur.explain.post_training.truth import cosines
from demur.stats import auroc, rate
from demur.stats.controls import bag_of_words, random_directions
from demur.types import EXPECTED_SHORTHANDS, Condition, Prompt, Rate, Reply

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
Stage = Callable[[str, int, int | None], None]
Judge = Callable[[Prompt, Reply], bool]
MODELS = ("base", "tuned")
POSITIONS = ("t_inst", "t_post")
LEAST = 20
DRAWS = 20
Change = Literal["add", "subtract", "ablate"]
DEPTH = 0.4
"""Share of the layers below the one used for steering, about as in the paper (11 of 32, 14 of 40): not chosen."""
TOKENS = 24
RULE = "rules/demur-v1"


def compare_refusal(
    runtimes: Mapping[str, LocalRuntime],
    fit: tuple[Sequence[Prompt], Sequence[Prompt]],
    test: tuple[Sequence[Prompt], Sequence[Prompt]],
    *,
    layer: int | None = None,
    position: str = "t_post",
    doses: Sequence[float] = (1.0, 2.0),
    steer: int = 24,
    allow_refusal_lowering: bool = False,
    judge: Judge | None = None,
    random: int = 3,
    seed: int = 0,
    progress: Stage | None = None,
) -> Refusal:
    """Directions of both models under the tuned one's template, and what they do in each other.

    Args:
        fit, test: (harmful, harmless) requests. layer: read and steered at; default 0.4 of the depth.
        doses: added to harmless requests, in lengths of the target's own mean difference. steer: how many of the
            test requests are answered under each change; 0 for none. judge: says whether a reply refuses; default
            the rule judge.
        random: random directions, among which the requests are dealt out.
        allow_refusal_lowering: also subtract and ablate the directions on harmful requests.

    Raises:
        InputError: fewer than 20 requests of a kind.
    """
    for part in (*fit, *test):
        if len(part) < LEAST:
            raise InputError(f"{len(part)} requests of a kind; directions and rates need at least {LEAST}")
    base, tuned = (runtimes[m] for m in MODELS)
    tuned.chat.require_template()
    own = base.chat.template != tuned.chat.template
    views = {"base": _under(base, tuned) if own else base, "tuned": tuned}
    y = [np.r_[np.ones(len(a), bool), np.zeros(len(b), bool)] for a, b in (fit, test)]
    X = {m: [_read(v, [*a, *b], progress) for a, b in (fit, test)] for m, v in views.items()}
    d = {m: _difference(X[m][0], y[0]) for m in MODELS}
    layers = d["base"].shape[0]
    layer = round(DEPTH * layers) if layer is None else layer
    if not 0 <= layer < layers:
        raise InputError(f"layer {layer}: this model has layers 0 to {layers - 1}")
    place = (layer, POSITIONS.index(position))
    texts = [[p.text for p in (*a, *b)] for a, b in (fit, test)]
    alone = (
        _difference(_read(base, [*fit[0], *fit[1]], progress), y[0]) if own and base.chat.template else None
    )
    at = {m: {p: d[m][:, k] for k, p in enumerate(POSITIONS)} for m in MODELS}
    return Refusal(
        template=tuned.name,
        positions=POSITIONS,
        cosines={p: cosines(at["base"][p], at["tuned"][p]) for p in POSITIONS},
        own_cosines=None
        if alone is None
        else {p: cosines(alone[:, k], at["tuned"][p]) for k, p in enumerate(POSITIONS)},
        ceiling=_ceiling([X[m][0] for m in MODELS], y[0], seed),
        auroc={
            m: {p: _areas(X[m][1][:, :, k], d[m][:, k], y[1]) for k, p in enumerate(POSITIONS)}
            for m in MODELS
        },
        bag_of_words=auroc(bag_of_words(texts[0], y[0], texts[1]), y[1]),
        n_fit=len(y[0]),
        n_test=len(y[1]),
        layer=layer,
        position=position,
        steered=_steered(
            views,
            {m: np.asarray(d[m][place], float) for m in MODELS},
            {m: _within(X[m][0][:, place[0], place[1]], y[0]) for m in MODELS},
            (test[0][:steer], test[1][:steer]),
            layer,
            doses,
            allow_refusal_lowering,
            judge or _by_rule,
            random,
            seed,
            progress,
        )
        if steer
        else (),
    )


def _under(runtime: LocalRuntime, other: LocalRuntime) -> LocalRuntime:
    """A view of `runtime` that writes conversations as `other` does."""
    from demur.runtime.chat import ChatFormat

    view = runtime.with_edits()
    view.chat = ChatFormat(
        runtime.tokenizer,
        template=other.chat.template,
        thinking=other.chat.thinking,
        control_ids=runtime.chat.control_ids,
    )
    return view


def _read(runtime: LocalRuntime, prompts: Sequence[Prompt], progress: Stage | None) -> FloatArray:
    """States (n, layers, positions, width)."""
    from demur.runtime.layers import find_layers

    n = len(find_layers(runtime.model))
    told = (
        None if progress is None else lambda done, total: progress(f"requests, {runtime.name}", done, total)
    )
    found = collect(runtime, prompts, grid(range(n), POSITIONS), progress=told)
    stacked = np.stack([*found.values()], axis=1)
    return stacked.reshape(len(prompts), n, len(POSITIONS), -1)


def _difference(X: FloatArray, y: BoolArray) -> FloatArray:
    return np.asarray(X[y].mean(0, dtype=float) - X[~y].mean(0, dtype=float))


def _within(X: FloatArray, y: BoolArray) -> FloatArray:
    """States (n, d) less the mean of their class: a random direction drawn from them is not the one looked for."""
    return np.concatenate([X[y] - X[y].mean(0), X[~y] - X[~y].mean(0)])


def _areas(X: FloatArray, d: FloatArray, y: BoolArray) -> Curve:
    return tuple(auroc(X[:, k] @ d[k], y) for k in range(len(d)))


def _ceiling(states: Sequence[FloatArray], y: BoolArray, seed: int) -> dict[str, Curve]:
    """Cosine of the directions of two random halves, by position and layer, the lower one of the models."""
    found = []
    for X in states:
        rng, draws = np.random.default_rng([seed, 4]), []
        for _ in range(DRAWS):
            half = np.zeros(len(y), bool)
            for label in (True, False):
                mine = rng.permutation(np.flatnonzero(y == label))
                half[mine[: len(mine) // 2]] = True
            a, b = (_difference(X[side], y[side]) for side in (half, ~half))
            scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            draws.append((a * b).sum(-1) / np.where(scale > 0, scale, np.inf))
        found.append(np.mean(draws, axis=0))
    lowest = np.min(found, axis=0)
    return {p: tuple(lowest[:, k].tolist()) for k, p in enumerate(POSITIONS)}


# --- carrying it over -------------------------------------------------------------------------------------------


def _steered(
    runtimes: Mapping[str, LocalRuntime],
    directions: Mapping[str, FloatArray],
    pools: Mapping[str, FloatArray],
    requests: tuple[Sequence[Prompt], Sequence[Prompt]],
    layer: int,
    doses: Sequence[float],
    lower: bool,
    judge: Judge,
    random: int,
    seed: int,
    progress: Stage | None,
) -> tuple[Steered, ...]:
    harmful, harmless = requests
    jobs: list[tuple[str, str, Change, float, list[LocalRuntime]]] = []
    for m in MODELS:
        length = float(np.linalg.norm(directions[m]))
        vectors: dict[str, Sequence[FloatArray]] = {k: [d] for k, d in directions.items()}
        vectors["random"] = list(random_directions(pools[m], random, seed=seed))
        units = {name: [v / np.linalg.norm(v) for v in drawn] for name, drawn in vectors.items()}
        signs: tuple[tuple[Change, int], ...] = (("add", 1), ("subtract", -1))
        for change, sign in signs[: 2 if lower else 1]:
            jobs.append((m, "none", change, 0.0, [runtimes[m]]))
            jobs += [
                (m, name, change, dose, [added(runtimes[m], layer, sign * u * length * dose) for u in drawn])
                for name, drawn in units.items()
                for dose in doses
            ]
        if lower:
            jobs += [
                (m, name, "ablate", 1.0, [ablated(runtimes[m], u) for u in drawn])
                for name, drawn in units.items()
            ]
    out = []
    for k, (m, name, change, dose, views) in enumerate(jobs):
        asked = harmless if change == "add" else harmful
        rates = [refusals(view, asked[i :: len(views)], judge) for i, view in enumerate(views)]
        refused = rate(sum(r.k for r in rates), sum(r.n for r in rates), judge=rates[0].judge)
        out.append(Steered(vector=name, model=m, change=change, dose=dose, refused=refused))
        if progress is not None:
            progress("answers under the refusal directions", k + 1, len(jobs))
    return tuple(out)


def added(runtime: LocalRuntime, layer: int, vector: FloatArray) -> LocalRuntime:
    """The model with `vector` added to the residual stream behind one layer, at every token."""
    import torch

    from demur.runtime.layers import BlockEdit

    v = torch.from_numpy(np.asarray(vector, np.float32))
    return runtime.with_edits(BlockEdit(layer, lambda h, _at: h + v.to(h)))


def ablated(runtime: LocalRuntime, unit: FloatArray) -> LocalRuntime:
    """The model with the part along `unit` taken out behind every layer, at every token."""
    import torch

    from demur.runtime.layers import BlockEdit, find_layers

    u = torch.from_numpy(np.asarray(unit, np.float32))

    def take(h: Any, _at: Any) -> Any:
        return h - (h @ u.to(h))[..., None] * u.to(h)

    return runtime.with_edits(*(BlockEdit(k, take) for k in range(len(find_layers(runtime.model)))))


def refusals(runtime: LocalRuntime, prompts: Sequence[Prompt], judge: Judge | None = None) -> Rate:
    """Share of greedy answers that refuse."""
    replies = runtime.generate(prompts, Condition(name="greedy", max_new_tokens=TOKENS))
    said = [(judge or _by_rule)(p, r) for p, r in zip(prompts, replies, strict=True)]
    return rate(sum(said), len(said), judge=RULE if judge in (None, _by_rule) else None)


def _by_rule(prompt: Prompt, reply: Reply) -> bool:
    from demur import judges

    return judges.get(RULE).judge(prompt, reply).label in EXPECTED_SHORTHANDS["refuse"]
