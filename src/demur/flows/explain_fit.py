"""What explaining a model needs once: its two beliefs, fitted on the packaged prompts, and what they are worth.

Centres come from core/train, windows of layers from core/select, cuts from core/calibrate; the figures that
stand beside every explanation (with bag of words and random labels) come from core/test. The result is kept in
the user's cache under the model's fingerprint and the hash of the prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from demur.cachedir import cache_dir
from demur.explain import collect, grid
from demur.explain.harmfulness import AXES, Axis, Beliefs, by_behaviour, fitting, leaning
from demur.flows.explained import Fit, FloatArray, Worth
from demur.prompts import core, stratified
from demur.runtime.base import Progress, Runtime
from demur.stats import auroc, auroc_interval, bootstrap_interval, controls
from demur.types import Condition, Prompt, PromptSet

BoolArray = npt.NDArray[np.bool_]

SIZES: Mapping[str, int] = {"train": 200, "select": 90, "calibrate": 90, "test": 150}
SHARES = (1 / 3, 1 / 4, 1 / 4)
"""Of a sample: harmful requests, harmless ones that resemble them, other requests to refuse. The rest is harmless
and resembles other things. So "harmful" and "to refuse" differ on a quarter of the prompts."""
ANSWER_TOKENS = 24
"""Tokens of an answer that shows whether a model without control tokens declines."""
PLACES = tuple((axis, at) for axis in AXES for at in ("t_inst", "t_post"))
FORM = 3
"""Of the file, and of how its content is made; another number is another key."""


def is_harmful(prompt: Prompt) -> bool:
    """Whether the corpus calls the request harmful: it is in category safety and should be refused."""
    return prompt.category == "safety" and bool(prompt.should_refuse)


def sample(part: str, n: int, seed: int = 0) -> tuple[Prompt, ...]:
    """About n prompts of a part of `core`, in set order, in the shares of `SHARES`."""
    everything = core(part)
    kinds: tuple[Callable[[Prompt], bool], ...] = (
        is_harmful,
        lambda p: p.category == "safety" and not p.should_refuse,
        lambda p: p.category != "safety" and bool(p.should_refuse),
        lambda p: p.category != "safety" and not p.should_refuse,
    )
    counts = [round(n * share) for share in SHARES]
    keep: set[str] = set()
    for kind, k in zip(kinds, (*counts, n - sum(counts)), strict=True):
        keep |= {p.id for p in stratified(PromptSet(part, tuple(p for p in everything if kind(p))), k, seed)}
    return tuple(p for p in everything if p.id in keep)


def fit_model(
    runtime: Runtime,
    condition: Condition | None = None,
    *,
    behaviour: bool = True,
    sizes: Mapping[str, int] = SIZES,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """The fit of a model: from the cache, or made now and kept there (models without fingerprint are not kept).

    Args:
        condition: system message under which prompts are read.
        behaviour: also fit the belief "will refuse", from what the model does; a model without control tokens
            answers each prompt in a few words for it. Where fewer than 20 prompts are declined (or answered) it
            is left out and `labels` says so.
        cache: folder; default the user's.

    Raises:
        CapabilityError: the runtime gives no states. MissingExtra: scikit-learn is not installed.
    """
    runtime.require("states")
    controls.bag_of_words(["yes", "no"], [1, 0], ["no"])  # what is missing shows before minutes of reading
    parts = {
        name: tuple(p for p in sample(name, n) if runtime.problem(p, condition) is None)
        for name, n in sizes.items()
    }
    path = None
    if runtime.fingerprint is not None:
        path = (
            cache or cache_dir() / "explain"
        ) / f"{_key(runtime, parts, condition, behaviour)}.safetensors"
        if path.is_file():
            return Fit.load(path, runtime.fingerprint)
    fit = _fit(runtime, parts, condition, behaviour, progress)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fit.save(path)
        return Fit.load(path, runtime.fingerprint)  # what the next call will read, rounding included
    return fit


def _key(
    runtime: Runtime, parts: Mapping[str, Sequence[Prompt]], condition: Condition | None, behaviour: bool
) -> str:
    point = runtime.shipped_point
    what = [
        FORM,
        runtime.name,  # a steered view keeps the fingerprint of its model
        runtime.fingerprint,
        runtime.dtype,
        {name: PromptSet(name, tuple(rows)).hash for name, rows in parts.items()},
        condition.system if condition else None,
        behaviour,
        [point.rule, {name: t.tau for name, t in point.thresholds.items()}] if point else None,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


# --- making it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Prompts of one part with their labels (-1 where unknown) and, by position, their states (n, L, d)."""

    prompts: tuple[Prompt, ...]
    labels: Mapping[str, npt.NDArray[np.int8]]
    states: Mapping[str, npt.NDArray[np.float32]]

    def sides(self, axis: str) -> tuple[npt.NDArray[np.intp], BoolArray]:
        """Rows that have a label of this belief, and the labels."""
        rows = np.flatnonzero(self.labels[axis] >= 0)
        return rows, self.labels[axis][rows] == 1


class _Meter:
    """Adds the steps of several jobs up for one progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.before = progress, total, 0

    def step(self, n: int) -> None:
        self.before += n
        if self.progress is not None:
            self.progress(self.before, self.total)

    def __call__(self, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(self.before + done, self.total)
        if done == total:
            self.before += done


def _fit(
    runtime: Runtime,
    parts: Mapping[str, tuple[Prompt, ...]],
    condition: Condition | None,
    behaviour: bool,
    progress: Progress | None,
) -> Fit:
    layers = tuple(range(fitting.depth(runtime)))
    meter = _Meter(progress, sum(map(len, parts.values())) * (2 if behaviour else 1))
    declined, why = _behaviour(runtime, parts, condition, meter) if behaviour else ({}, "not asked for")
    axes = ("harmful", "refuse") if why is None else ("harmful",)
    data = {
        name: _read(runtime, rows, layers, condition, declined.get(name), meter)
        for name, rows in parts.items()
    }
    train, test = data["train"], data["test"]
    places = [(axis, at) for axis, at in PLACES if axis in axes]
    centres = {(axis, at): _centres(train.states[at], *train.sides(axis)) for axis, at in places}
    made, scale, usual, tested = {}, [], [], []
    for name in axes:
        position = AXES[name][0]
        toward, away = centres[name, position]
        window, area = _window(data["select"], name, position, toward, away, layers)
        keep = [layers.index(k) for k in window]
        rows, y = data["calibrate"].sides(name)
        scores = leaning(data["calibrate"].states[position][rows][:, keep], toward[keep], away[keep]).mean(1)
        both = y.any() and not y.all()
        of, labels = train.sides(name)
        fitted = leaning(train.states[position][of], toward, away)
        scale.append(_sides(fitted, labels))
        tested.append(leaning(test.states[position], toward, away))
        usual.append(_sides(fitted[:, keep].mean(1), labels))
        made[name] = Axis(
            position=position,
            toward=toward,
            away=away,
            n=(int(labels.sum()), int((~labels).sum())),
            window=window,
            cut=fitting.best_cut(scores, y) if both else float(usual[-1][:2].mean()),
            select_auroc=area,
        )
    beliefs = Beliefs(
        layers=layers,
        harmful=made["harmful"],
        refuse=made.get("refuse"),
        fingerprint=runtime.fingerprint,
        unclear=fitting.unclear(_sets(train, axes)),
    )
    near_layer = made["harmful"].window[len(made["harmful"].window) // 2]
    return Fit(
        beliefs=beliefs,
        scale=np.stack(scale),
        own=np.stack(usual),
        fitted=tuple(p.id for p in train.prompts),
        declined=train.labels["refuse"],
        tested=tuple(p.id for p in test.prompts),
        tested_declined=test.labels["refuse"],
        tested_leanings=np.stack(tested),
        near=train.states["t_inst"][:, near_layer],
        near_layer=near_layer,
        maps={
            f"{axis} {at}": areas
            for axis, at in places
            if (areas := _areas(test, axis, at, *centres[axis, at])) is not None
        },
        worth=tuple(w for name in axes if (w := _worth(name, made[name], train, test)) is not None),
        labels=why or "behaviour",
    )


def _behaviour(
    runtime: Runtime, parts: Mapping[str, tuple[Prompt, ...]], condition: Condition | None, meter: _Meter
) -> tuple[dict[str, npt.NDArray[np.int8]], str | None]:
    """What the model does with every prompt; or why no belief about that can be fitted."""
    system = condition.system if condition else None
    short = Condition(system=system, max_new_tokens=ANSWER_TOKENS)
    out = {}
    for name in sorted(parts, key=lambda part: part != "train"):
        rows = parts[name]
        says = np.full(len(rows), -1, np.int8)
        for start in range(0, len(rows), 40):
            some = rows[start : start + 40]
            found = by_behaviour(runtime, some, short)
            for value, side in ((1, "refused"), (0, "accepted")):
                ids = {p.id for p in found[side]}
                says[[start + i for i, p in enumerate(some) if p.id in ids]] = value
            meter.step(len(some))
        out[name] = says
        if name == "train" and min((says == 1).sum(), (says == 0).sum()) < fitting.FEWEST:
            meter.total -= sum(len(r) for part, r in parts.items() if part != "train")
            return out, (
                f"the model declined {int((says == 1).sum())} and answered {int((says == 0).sum())} of {len(says)} "
                f"prompts, and a belief about refusing needs {fitting.FEWEST} of each"
            )
    return out, None


def _read(
    runtime: Runtime,
    prompts: tuple[Prompt, ...],
    layers: Sequence[int],
    condition: Condition | None,
    declined: npt.NDArray[np.int8] | None,
    meter: _Meter,
) -> Part:
    found = collect(runtime, prompts, grid(layers), condition, progress=meter)
    states = {at: np.stack([found[k, at] for k in layers], axis=1) for at in ("t_inst", "t_post")}
    labels = {
        "harmful": np.array([is_harmful(p) for p in prompts], np.int8),
        "refuse": np.full(len(prompts), -1, np.int8) if declined is None else declined,
    }
    return Part(prompts, labels, states)


def _centres(
    states: npt.NDArray[np.float32], rows: npt.NDArray[np.intp], y: BoolArray
) -> tuple[FloatArray, FloatArray]:
    return states[rows[y]].mean(0, dtype=float), states[rows[~y]].mean(0, dtype=float)


def _sides(values: FloatArray, y: BoolArray) -> FloatArray:
    """(..., 3): mean of the yes-side and of the no-side, standard deviation within."""
    yes, no = values[y], values[~y]
    spread = np.sqrt((yes.var(0) * len(yes) + no.var(0) * len(no)) / len(values))
    return np.stack([yes.mean(0), no.mean(0), spread], axis=-1)


def _window(
    part: Part, axis: str, position: str, toward: FloatArray, away: FloatArray, layers: tuple[int, ...]
) -> tuple[tuple[int, ...], float | None]:
    rows, y = part.sides(axis)
    if not y.any() or y.all():
        return layers, None
    return fitting.best_window(leaning(part.states[position][rows], toward, away), y, layers)


def _tested(part: Part, axis: str) -> npt.NDArray[np.intp]:
    """Rows a belief is tested on: harmfulness among requests that are or look harmful, refusal on all."""
    rows, _ = part.sides(axis)
    return rows if axis != "harmful" else rows[[part.prompts[i].category == "safety" for i in rows]]


def _areas(part: Part, axis: str, at: str, toward: FloatArray, away: FloatArray) -> tuple[float, ...] | None:
    rows = _tested(part, axis)
    y = part.labels[axis][rows] == 1
    if not y.any() or y.all():
        return None
    return tuple(float(auroc(s, y) or 0.0) for s in leaning(part.states[at][rows], toward, away).T)


def _sets(part: Part, axes: Sequence[str]) -> dict[str, tuple[Prompt, ...]]:
    out = {}
    for name in axes:
        rows, y = part.sides(name)
        for side, of in zip(AXES[name][1:], (rows[y], rows[~y]), strict=True):
            out[side] = tuple(part.prompts[i] for i in of)
    return out


def _worth(name: str, axis: Axis, train: Part, test: Part) -> Worth | None:
    (of, y_fit), rows = train.sides(name), _tested(test, name)
    y = test.labels[name][rows] == 1
    if min(y.sum(), (~y).sum()) < 2:
        return None
    keep = list(axis.window)
    X, S = train.states[axis.position][of][:, keep], test.states[axis.position][rows][:, keep]

    def read(labels: BoolArray) -> FloatArray:
        return np.asarray(leaning(S, *_centres(X, np.arange(len(X)), labels)).mean(1))

    def gain(a: FloatArray, b: FloatArray, labels: BoolArray) -> float:
        first, second = auroc(a, labels), auroc(b, labels)
        return float("nan") if first is None or second is None else first - second

    scores = read(y_fit)
    area, bounds = auroc(scores, y), auroc_interval(scores, y)
    assert area is not None and bounds is not None
    texts = [[part.prompts[i].text for i in some] for part, some in ((train, of), (test, rows))]
    words = controls.bag_of_words(texts[0], y_fit, texts[1])
    low, high = bootstrap_interval(gain, scores, words, y, n_boot=1000)
    null = controls.random_labels(read, y_fit, y, area, draws=20)
    return Worth(
        axis=name,
        positive=int(y.sum()),
        negative=int((~y).sum()),
        auroc=area,
        low=bounds[0],
        high=bounds[1],
        words=auroc(words, y) or 0.0,
        gain=gain(scores, words, y),
        gain_low=low,
        gain_high=high,
        random=null.mean,
        random_low=null.low,
        random_high=null.high,
    )
