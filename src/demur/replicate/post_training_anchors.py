"""The figures of the paper's shipped files, counted again, and what SmolLM2 and its adapter gave here."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.replicate.spec import Anchor

FloatArray = npt.NDArray[np.float64]
SLUG = "post-training-mechanistic"
MAP = "patching_llama31_8b_instruct_cities.npz"
VECTORS = "refusal_directions_llama31_8b.npz"
EFFECTS = "label_change_intervention_results.json"


def recount() -> dict[str, Any]:
    """Values of the anchors, read from the public files when asked for."""
    return {
        **{f"cosine_{key}": _cosine_of(*names) for key, names in DIRECTIONS.items()},
        **{key: _nie_of(*names) for key, names in NIES.items()},
        "map_halves": _halves,
        "map_dealt": _dealt,
        **{f"map_{name}": _visible(column) for name, column in COLUMNS.items()},
        "map_elsewhere": _elsewhere,
        "smollm2_map": lambda: smollm2("knowledge").knowledge.likeness["tuned"].pearson,
        "smollm2_truth": lambda: smollm2("truth").accuracy("base", "tuned").value,
        "smollm2_refusal": lambda: smollm2("refusal").refusal.cosines["t_post"][-1],
        "smollm2_neurons": lambda: smollm2("confidence").confidence.iou,
    }


DIRECTIONS = {
    "base_instruct": ("base", "instruct"),
    "instruct_sft": ("instruct", "sft"),
    "base_sft": ("base", "sft"),
}
NIES = {
    "nie_base_on_base": ("m1", "m1"),
    "nie_instruct_on_base": ("m2", "m1"),
    "nie_base_on_instruct": ("m1", "m2"),
    "nie_instruct_on_instruct": ("m2", "m2"),
}
COLUMNS = {"subject": 5, "object": 8, "colon": 13}
"""Columns of the shipped map that stay above zero after the 20 bins."""


def _file(name: str) -> Any:
    from demur import data

    return data.get(SLUG, name)


def _cosine_of(a: str, b: str) -> Any:
    def value() -> float:
        with np.load(_file(VECTORS)) as held:
            x, y = (held[k].astype(float).ravel() for k in (a, b))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    return value


def _nie_of(vector: str, model: str) -> Any:
    """The mean of both ways, recomputed from the two shares in the file."""

    def value() -> float:
        import json

        row = json.loads(_file(EFFECTS).read_text("utf-8"))[0]
        ways = [row[f"nif_{vector}_{model}_{way}"] for way in ("true_false", "false_true")]
        return float(np.mean(ways))

    return value


def _map() -> FloatArray:
    with np.load(_file(MAP)) as held:
        return np.asarray(held["logit_diff"], float)


def _halves() -> float:
    from demur.explain.post_training.maps import split_half

    return split_half(_map()) or 0.0


def _dealt() -> float:
    from demur.explain.post_training.maps import shuffled

    mean = _map().mean(0)
    return shuffled(mean, mean) or 0.0


def _visible(column: int) -> Any:
    def value() -> float:
        from demur.explain.post_training.maps import binned

        above = np.flatnonzero(binned(_map().mean(0))[:, column] > 0)
        # the first and the last layer in one number: layers 8 to 11 are 8.11
        return float(above[0] + above[-1] / 100) if np.ptp(above) + 1 == len(above) else -1.0

    return value


def _elsewhere() -> float:
    from demur.explain.post_training.maps import binned

    rest = np.delete(binned(_map().mean(0)), list(COLUMNS.values()), axis=1)
    return float((rest > 0).sum())


@cache
def smollm2(part: str) -> Any:
    """One part of the comparison of SmolLM2 with and without the shipped adapter.

    Raises:
        MissingExtra: a model is not to be had here, so the anchor is skipped.
    """
    from demur.errors import DataUnavailable, MissingExtra
    from demur.explain.post_training import compare, load_statements
    from demur.explain.post_training.comparison import local
    from demur.explain.post_training.truth import compare_truth, text_states
    from demur.flows.load import load_runtime

    try:
        base, tuned = (local(load_runtime(name)) for name in ("smollm2", "demur-smollm2"))
    except DataUnavailable:
        raise MissingExtra("SmolLM2 with its adapter", "local") from None
    if part != "truth":
        return compare(base, tuned, parts=(part,), steer=0)
    sets = load_statements(per_set=40)
    return compare_truth({"base": text_states(base, sets), "tuned": text_states(tuned, sets)}, sets)


def _anchors() -> tuple[Anchor, ...]:
    def of(name: str, *rows: tuple[str, str, float, float]) -> list[Anchor]:
        need = (f"{SLUG}/{name}",)
        return [Anchor(key=k, text=t, expected=e, tolerance=tol, needs=need) for k, t, e, tol in rows]

    model = "Llama-3.1-8B"
    return (
        *of(
            VECTORS,
            (
                "cosine_base_instruct",
                f"{model}: cosine of the refusal directions, base and instruct",
                0.251,
                5e-4,
            ),
            (
                "cosine_instruct_sft",
                f"{model}: cosine of the refusal directions, instruct and SFT",
                0.435,
                5e-4,
            ),
            ("cosine_base_sft", f"{model}: cosine of the refusal directions, base and SFT", 0.073, 5e-4),
        ),
        *of(
            EFFECTS,
            (
                "nie_base_on_base",
                f"{model}, cities: effect of the base's truth vector in the base",
                0.829,
                5e-4,
            ),
            ("nie_instruct_on_base", "of the instruct vector in the base", 0.822, 5e-4),
            ("nie_base_on_instruct", "of the base's vector in instruct", 0.896, 5e-4),
            ("nie_instruct_on_instruct", "of the instruct vector in instruct", 0.877, 5e-4),
        ),
        *of(
            MAP,
            ("map_subject", "cells above 0 at the last subject token: layers 1 to 7 (as 1.07)", 1.07, 0.0),
            ("map_object", "cells above 0 at the object: layers 8 to 11 (as 8.11)", 8.11, 0.0),
            ("map_colon", "cells above 0 at the last token: layers 14 to 31 (as 14.31)", 14.31, 0.0),
            ("map_elsewhere", "cells above 0 anywhere else", 0.0, 0.0),
            ("map_halves", "Pearson of the binned maps of two halves of the pairs", 0.9985, 5e-4),
            ("map_dealt", "mean |Pearson| with the cells dealt out anew", 0.04, 0.01),
        ),
        *of(
            "patching_pairs.csv",
            (
                "smollm2_map",
                "SmolLM2 with and without our adapter, 40 pairs: Pearson of the maps",
                1.0,
                0.002,
            ),
        ),
        *of(
            "cities.csv",
            (
                "smollm2_truth",
                "base's truth direction on SmolLM2 with our adapter, 240 statements",
                0.688,
                0.02,
            ),
        ),
        Anchor(
            key="smollm2_refusal",
            text="SmolLM2: cosine of the refusal directions, last layer, before the answer",
            expected=0.908,
            tolerance=0.01,
        ),
        Anchor(
            key="smollm2_neurons", text="SmolLM2: IoU of the entropy neurons", expected=1.0, tolerance=0.2
        ),
    )


ANCHORS = _anchors()
