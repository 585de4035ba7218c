"""States counted again: those published of Qwen2-7B, and those of the built-in model on public prompts.

Of Qwen2-7B there are five harmless prompts that it refused: both beliefs, both sets of centres read at the other
one's position, and the centres of harm swapped. Of SmolLM2, with and without the adapter, the AUROC of the belief
harmful as `demur lab harmfulness-vs-refusal` found it, at the layer that it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from demur.replicate.spec import Anchor

_FILES = tuple(
    f"harmfulness-vs-refusal/{name}.npy"
    for name in (
        "center_harmful_t_inst",
        "center_harmless_t_inst",
        "center_refuse_t_post",
        "center_accept_t_post",
        "refused_harmless5_layers_x_ex_x_pos",
    )
)
_FOUND: Mapping[str, tuple[str, Sequence[float]]] = {
    "harmful": ("belief harmful at t_inst", (-0.0561, -0.0278, -0.0449, -0.0431, -0.0399)),
    "refuse": ("belief refuse at t_post", (0.0092, 0.0096, 0.0159, 0.0088, 0.0146)),
    "harmful_elsewhere": ("harm centres read at t_post", (-0.0156, -0.0157, -0.0140, -0.0147, -0.0142)),
    "refuse_elsewhere": ("refusal centres read at t_inst", (0.0033, 0.0005, 0.0052, 0.0031, 0.0037)),
    "swapped": ("belief harmful, its centres swapped", (0.0561, 0.0278, 0.0449, 0.0431, 0.0399)),
}
_LAYER = 14
"""What core/select chose, with and without the adapter."""
_PUBLIC = {
    "xstest": ("xstest/prompts.csv",),
    "coconot": ("coconot/original_eval.jsonl", "coconot/contrast_eval.jsonl"),
}
_AREAS = {
    "smollm2": {"xstest": 0.724, "coconot": 0.905},
    "demur-smollm2": {"xstest": 0.751, "coconot": 0.893},
}
"""Found on 300 + 300 prompts of core/train."""
ANCHORS = (
    *(
        Anchor(key=f"{key}_{i + 1}", text=f"{text}, prompt {i + 1}", expected=x, tolerance=1e-3, needs=_FILES)
        for key, (text, values) in _FOUND.items()
        for i, x in enumerate(values)
    ),
    *(
        Anchor(
            key=f"cosine_{end}",
            text=f"{end}est cosine of the two directions over 29 layers",
            expected=x,
            tolerance=1e-3,
            needs=_FILES,
        )
        for end, x in (("low", -0.016), ("high", 0.136))
    ),
    *(
        Anchor(
            key=f"{model}_{name}",
            text=f"{model}: AUROC of the belief harmful, harmful against look-alikes of {name}",
            expected=x,
            tolerance=0.005,
            needs=_PUBLIC[name],
        )
        for model, areas in _AREAS.items()
        for name, x in areas.items()
    ),
)


def recount() -> dict[str, float | Callable[[], float]]:
    """The anchors' values; those that need a model as functions."""
    models = {
        f"{model}_{name}": partial(_area, model, name) for model, areas in _AREAS.items() for name in areas
    }
    return {**models, **{key: partial(_published, key) for key in _published_keys()}}


def _published_keys() -> list[str]:
    return [a.key for a in ANCHORS if a.needs == _FILES]


def _published(key: str) -> float:
    return _qwen()[key]


def _area(model: str, name: str) -> float:
    """AUROC on the safety prompts of a public set.

    Raises:
        MissingExtra: the model cannot be had here.
    """
    from demur import prompts
    from demur.control.latent_guard_report import contrast
    from demur.errors import DataUnavailable, MissingExtra
    from demur.stats import auroc

    try:
        runtime, beliefs = _fitted(model)
    except DataUnavailable:
        raise MissingExtra(f"The model {model}", "local") from None
    sides = contrast(getattr(prompts, name)())
    rows = [p for side in sides.values() for p in side]
    scores = [b.harmful for b in beliefs.score(runtime, rows)]
    found = auroc(scores, [i < len(sides["harmful"]) for i in range(len(rows))])
    assert found is not None
    return found


@cache
def _fitted(model: str) -> tuple[Any, Any]:
    from demur import prompts
    from demur.control.latent_guard_report import contrast
    from demur.explain.harmfulness import Beliefs
    from demur.flows.load import load_runtime

    runtime = load_runtime(model)
    return runtime, Beliefs.fit(runtime, contrast(prompts.core("train"), 300), [_LAYER])


@cache
def _qwen() -> dict[str, float]:
    """Means over all 29 layers (the embeddings first) of the leanings of the five prompts."""
    from demur import data
    from demur.explain.harmfulness.fitting import cosine, leaning

    harmful, harmless, refused, accepted, states = (
        np.load(data.get(*file.split("/")), allow_pickle=False).astype(float) for file in _FILES
    )
    t_inst, t_post = states[:, :, 0].swapaxes(0, 1), states[:, :, 1].swapaxes(0, 1)
    found = {
        "harmful": leaning(t_inst, harmful, harmless),
        "refuse": leaning(t_post, refused, accepted),
        "harmful_elsewhere": leaning(t_post, harmful, harmless),
        "refuse_elsewhere": leaning(t_inst, refused, accepted),
        "swapped": leaning(t_inst, harmless, harmful),
    }
    out = {f"{key}_{i + 1}": float(x) for key, rows in found.items() for i, x in enumerate(rows.mean(1))}
    cosines = cosine(harmful - harmless, refused - accepted)
    return out | {"cosine_low": float(cosines.min()), "cosine_high": float(cosines.max())}
