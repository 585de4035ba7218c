"""The card's reading of states: where refusal and harmfulness are told apart, and what an adapter moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.explain import collect, grid
from demur.explain.harmfulness import leaning
from demur.explain.harmfulness.fitting import cosine
from demur.flows.collect import Stage
from demur.flows.explain_fit import SIZES, fit_model, is_harmful
from demur.flows.explained import FloatArray
from demur.prompts import core
from demur.runtime.base import Progress, Runtime
from demur.stats import auroc, bootstrap_interval
from demur.types import Condition, Prompt, PromptSet


def states_stages(
    runtime: Runtime, baseline: Runtime | None, sample: PromptSet, condition: Condition, *, full: bool = False
) -> list[Stage]:
    """Stages `where` and, with a baseline that gives states, `changed`; none where the model gives no states.

    A model without control tokens would have to answer hundreds of prompts before its refusals could be located,
    so without `full` only harmfulness is read.
    """
    if "states" not in runtime.capabilities:
        return []
    behaviour = full or runtime.control is not None
    every = sum(SIZES.values())
    answers = 0 if not behaviour else every if runtime.control is not None else 5 * every
    common: dict[str, Any] = {"kind": "states", "prompts": sample.prompts, "condition": condition}
    stages = [
        Stage(
            name="where",
            title="reading states",
            runtime=runtime,
            streams=("where",),
            passes=every + answers + len(sample),
            read=lambda progress: where(runtime, sample, condition, behaviour, progress),
            **common,
        )
    ]
    if baseline is not None and "states" in baseline.capabilities:
        stages.append(
            Stage(
                name="changed",
                title="reading states (base model)",
                runtime=baseline,
                streams=("changed",),
                passes=SIZES["train"] + SIZES["test"],
                read=lambda progress: changed(baseline, runtime, condition, behaviour, progress),
                **common,
            )
        )
    return stages


def where(
    runtime: Runtime,
    sample: PromptSet,
    condition: Condition,
    behaviour: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What is known of the model's beliefs, and both beliefs about each prompt of the sample."""
    fit = fit_model(runtime, condition, behaviour=behaviour, progress=progress)
    beliefs = fit.beliefs
    scored = beliefs.score(runtime, sample, condition)
    return {
        "layers": len(beliefs.layers),
        "fitted": len(fit.fitted),
        "labels": fit.labels,
        "unclear": beliefs.unclear,
        "axes": {
            name: {
                "n": list(fit.axis(name).n),
                "position": fit.axis(name).position,
                "window": list(fit.axis(name).window),
                "cut": round(fit.belief(name, fit.axis(name).cut), 6),
            }
            for name in fit.axes
        },
        "maps": {name: _plain(values) for name, values in fit.maps.items()},
        "worth": [{k: _round(v) for k, v in asdict(w).items()} for w in fit.worth],
        "cosines": None if beliefs.refuse is None else _plain(beliefs.cosines),
        "prompts": [
            {
                "id": b.id,
                "quadrant": beliefs.quadrant(b),
                **{name: round(fit.belief(name, getattr(b, name)), 6) for name in fit.axes},
            }
            for b in scored
        ],
    }


def changed(
    base: Runtime, tuned: Runtime, condition: Condition, behaviour: bool, progress: Progress | None = None
) -> dict[str, Any]:
    """The tuned model's directions against those of its base on the same prompts with the same labels.

    The labels are what the tuned model declines, so the base's direction says what the base makes of just these
    prompts. Beliefs of both are read with the tuned model's centres.
    """
    fit = fit_model(tuned, condition, behaviour=behaviour)
    train, test = _by_id("train", fit.fitted), _by_id("test", fit.tested)
    layers = fit.beliefs.layers
    places = [fit.axis(name).position for name in fit.axes]
    found = collect(base, [*train, *test], grid(layers, places), condition, progress=progress)
    rng = np.random.default_rng(0)
    half = rng.permutation(len(train)) % 2 == 0
    out: dict[str, Any] = {"axes": {}, "shifts": []}
    for k, name in enumerate(fit.axes):
        axis = fit.axis(name)
        states = np.stack([found[layer, axis.position] for layer in layers], axis=1).astype(float)
        own, new = states[: len(train)], states[len(train) :]
        y, y_test = (_labels(name, *rows) for rows in ((train, fit.declined), (test, fit.tested_declined)))
        toward, away = _means(own, y)
        halves = [np.subtract(*_means(own[part], y[part])) for part in (half, ~half)]
        known = y_test >= 0
        if name == "harmful":
            known &= np.array([p.category == "safety" for p in test])
        of_base = leaning(new[known], toward, away)
        of_tuned = fit.tested_leanings[k][known]
        out["axes"][name] = {
            "position": axis.position,
            "cosines": _plain(cosine(toward - away, axis.toward - axis.away)),
            "halves": _plain(cosine(*halves)),
            "auroc": {"base": _areas(of_base, y_test[known]), "tuned": _areas(of_tuned, y_test[known])},
        }
        window = [layers.index(layer) for layer in axis.window]
        before = leaning(new, axis.toward, axis.away)[:, window].mean(1)
        after = fit.tested_leanings[k][:, window].mean(1)
        for group, wanted in (("to refuse", True), ("to answer", False)):
            rows = [i for i, p in enumerate(test) if bool(p.should_refuse) is wanted]
            a, b = (np.array([fit.belief(name, v) for v in values[rows]]) for values in (before, after))
            low, high = bootstrap_interval(np.mean, b - a)
            shift = {"axis": name, "group": group, "n": len(rows), "base": a.mean(), "tuned": b.mean()}
            out["shifts"].append({k: _round(v) for k, v in {**shift, "low": low, "high": high}.items()})
    return out


def _by_id(part: str, ids: Sequence[str]) -> list[Prompt]:
    known = {p.id: p for p in core(part)}
    return [known[i] for i in ids]


def _labels(name: str, prompts: Sequence[Prompt], declined: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    return np.array([is_harmful(p) for p in prompts], np.int8) if name == "harmful" else declined


def _means(states: FloatArray, y: npt.NDArray[np.int8]) -> tuple[FloatArray, FloatArray]:
    return states[y == 1].mean(0), states[y == 0].mean(0)


def _areas(scores: FloatArray, y: npt.NDArray[np.int8]) -> list[float | None]:
    return [None if (a := auroc(s, y == 1)) is None else round(a, 6) for s in scores.T]


def _plain(values: Any) -> list[float]:
    return [round(float(v), 6) for v in values]


def _round(value: Any) -> Any:
    return round(float(value), 6) if isinstance(value, float) else value
