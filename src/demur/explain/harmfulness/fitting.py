"""Centres, windows of layers and cuts, and whether two labels can be told apart at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.explain.artefact import FloatArray
from demur.explain.positions import collect, grid
from demur.runtime.base import Progress, Runtime
from demur.runtime.batching import windows
from demur.stats.curves import auroc
from demur.types import Condition, Prompt

Sets = Mapping[str, Iterable[Prompt]]
AXES = {"harmful": ("t_inst", "harmful", "harmless"), "refuse": ("t_post", "refused", "accepted")}
"""Belief -> where it is read, the prompts it leans to, the prompts it leans away from."""
FEWEST = 20
"""Prompts that a centre needs."""
AGREE = 0.95
"""Two labels that agree on at least this share of the prompts cannot be told apart."""
CONTRARY = 5
"""And so cannot two labels with fewer prompts than this on which they disagree."""
NOT_IDENTIFIABLE = "not identifiable"


def leaning(states: npt.ArrayLike, toward: npt.ArrayLike, away: npt.ArrayLike) -> FloatArray:
    """cos(h, toward) - cos(h, away) over the last axis: states (..., d) and centres that broadcast to them.

    A vector of no length has cosine 0.

    >>> leaning([[3.0, 4.0]], [1.0, 0.0], [0.0, 1.0]).round(3).tolist()
    [-0.2]
    """
    h = np.asarray(states, float)
    return cosine(h, np.asarray(toward, float)) - cosine(h, np.asarray(away, float))


def cosine(a: FloatArray, b: FloatArray) -> FloatArray:
    """Cosine over the last axis; 0 where one of the two has no length."""
    top = (a * b).sum(-1)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.divide(top, lengths, out=np.zeros_like(top), where=lengths > 0))


def key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same one: roles and contents."""
    return tuple((m.role, m.content) for m in prompt.messages)


def check_sets(lists: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise `InputError` unless these are sets that beliefs can be fitted on."""
    known = [name for _, yes, no in AXES.values() for name in (yes, no)]
    if unknown := sorted(set(lists) - set(known)):
        raise InputError(f"sets {', '.join(unknown)}; beliefs are fitted on {', '.join(known)}")
    for _, yes, no in AXES.values():
        if (yes in lists) != (no in lists) or (yes == "harmful" and yes not in lists):
            raise InputError(
                f"sets {', '.join(sorted(lists)) or 'none'}: a belief needs both its sides. Give harmful and "
                "harmless, and refused and accepted too or neither"
            )
        for name in (yes, no):
            if name in lists and len(lists[name]) < FEWEST:
                also = (
                    "; without both refused and accepted, harmfulness alone is fitted"
                    if name in known[2:]
                    else ""
                )
                raise InputError(
                    f"set {name!r} has {len(lists[name])} prompts; a centre needs at least {FEWEST}, since a mean "
                    f"of fewer is mostly their topics{also}"
                )
        both = {key(p) for p in lists.get(yes, ())} & {key(p) for p in lists.get(no, ())}
        if both:
            raise InputError(
                f"{len(both)} prompts are in {yes!r} and in {no!r} ({next(iter(both))[-1][1][:60]!r}); each has "
                "one side"
            )


def unclear(lists: Mapping[str, Sequence[Prompt]]) -> str | None:
    """Why harmfulness and refusal cannot be told apart on these prompts, or None."""
    if "refused" not in lists:
        return "no refused and accepted prompts were given"
    keys = {name: {key(p) for p in rows} for name, rows in lists.items()}
    agree = len(keys["harmful"] & keys["refused"]) + len(keys["harmless"] & keys["accepted"])
    contrary = len(keys["harmful"] & keys["accepted"]) + len(keys["harmless"] & keys["refused"])
    if not agree + contrary:
        return "no prompt carries both labels, so nobody can tell whether they differ"
    if contrary < CONTRARY or agree / (agree + contrary) >= AGREE:
        return (
            f"harmful and refused agree on {agree} of {agree + contrary} prompts: whatever reads one reads the "
            "other. Add prompts that are harmful and answered, or harmless and refused"
        )
    return None


def depth(runtime: Runtime) -> int:
    """Number of layers of a local model."""
    from demur.runtime.layers import find_layers

    model: Any = getattr(runtime, "model", None)
    if model is None:
        raise InputError(f"{runtime.name!r} does not say how many layers it has; name the layers to read")
    return len(find_layers(model))


def read(
    runtime: Runtime,
    prompts: Iterable[Prompt],
    layers: Sequence[int],
    positions: Sequence[str],
    condition: Condition | None,
    progress: Progress | None,
) -> Iterator[tuple[list[Prompt], dict[str, npt.NDArray[Any]]]]:
    """Windows of prompts with their states, position -> (n, L, d)."""
    total = len(prompts) if isinstance(prompts, Sequence) else None
    done = 0
    for rows in windows(prompts):
        found = collect(runtime, rows, grid(layers, positions), condition)
        yield rows, {at: np.stack([found[k, at] for k in layers], axis=1) for at in positions}
        done += len(rows)
        if progress is not None:
            progress(done, total)


def centres(
    runtime: Runtime,
    lists: Mapping[str, Sequence[Prompt]],
    layers: Sequence[int],
    axes: Sequence[str],
    condition: Condition | None,
    progress: Progress | None,
) -> dict[str, FloatArray]:
    """Mean state (L, d) of each set at its position."""
    at = {name: AXES[a][0] for a in axes for name in AXES[a][1:]}
    every = {key(p): p for name in at for p in lists[name]}  # a prompt in two sets is read once
    counts = {name: Counter(map(key, lists[name])) for name in at}
    sums: dict[str, Any] = dict.fromkeys(at, 0.0)
    places = [AXES[a][0] for a in axes]
    for rows, states in read(runtime, list(every.values()), layers, places, condition, progress):
        for name, position in at.items():
            weight = np.array([counts[name][key(p)] for p in rows], float)
            sums[name] = sums[name] + np.tensordot(weight, states[position].astype(float), axes=1)
    return {name: sums[name] / len(lists[name]) for name in at}


def best_window(
    scores: FloatArray, y: npt.NDArray[np.bool_], layers: Sequence[int]
) -> tuple[tuple[int, ...], float]:
    """The run of layers whose mean score ranks best; the longest of equals, then the earliest."""
    sums = np.cumsum(np.pad(scores, ((0, 0), (1, 0))), axis=1)
    best: tuple[float, int, int] | None = None
    for length in range(len(layers), 0, -1):
        for start in range(len(layers) - length + 1):
            area = auroc((sums[:, start + length] - sums[:, start]) / length, y)
            assert area is not None
            if best is None or area > best[0] + 1e-12:
                best = area, start, length
    assert best is not None
    return tuple(layers[best[1] : best[1] + best[2]]), best[0]


def best_cut(scores: FloatArray, y: npt.NDArray[np.bool_]) -> float:
    """The midpoint between neighbouring scores with the largest difference of shares at or above it."""
    seen = np.unique(scores)
    if len(seen) < 2:
        raise InputError(f"all {len(scores)} calibration prompts have the same score, so no cut parts them")
    middle = (seen[1:] + seen[:-1]) / 2
    shares = [np.searchsorted(np.sort(scores[of]), middle, side="left") / of.sum() for of in (y, ~y)]
    return float(middle[int(np.argmax(np.round(shares[1] - shares[0], 12)))])  # the lowest of equals
