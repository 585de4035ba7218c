"""Maps of which experts a prompt's tokens are sent to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.runtime.base import Progress
from demur.types import Condition, Prompt

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]
Expert = tuple[int, int]
"""Decoder layer and routed expert, both from 0."""
Weighting = Literal["count", "gate"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Maps:
    """How much each routed expert is used by each prompt.

    Attributes:
        values: (n, L, E) times chosen ("count") or summed weights ("gate") over the tokens of the prompt, divided
            by their number. layers: (L,) decoder layers that have experts. tokens: (n,) prompt lengths.
        ids: of the prompts. chosen: experts that each token gets in a layer. weighting: see `values`.
    """

    values: FloatArray
    layers: tuple[int, ...]
    tokens: npt.NDArray[np.int64]
    ids: tuple[str, ...]
    chosen: int
    weighting: Weighting

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: npt.ArrayLike) -> Maps:
        """The maps of some rows, by index or mask."""
        pick = np.arange(len(self))[np.asarray(rows)]
        ids = tuple(self.ids[i] for i in pick)
        return replace(self, values=self.values[pick], tokens=self.tokens[pick], ids=ids)

    def resonance(self, experts: Sequence[Expert]) -> FloatArray:
        """Sum over some experts, (n,)."""
        at = [(self.layers.index(layer), expert) for layer, expert in experts]
        return np.sum([self.values[:, row, column] for row, column in at], axis=0)


def resonance_maps(
    runtime: LocalRuntime,
    prompts: Sequence[Prompt],
    condition: Condition | None = None,
    *,
    weighting: Weighting = "count",
    progress: Progress | None = None,
) -> Maps:
    """The maps of some prompts over all tokens that the model reads, chat template included. No answer is written.

    Shared experts see every token and are not counted; nor are layers without experts.

    Args:
        weighting: "count" as published; "gate" adds up the weights as the model normalises them.

    Raises:
        CapabilityError: no local mixture-of-experts model, or layers with different numbers of experts.
        InputError: no prompts, one that cannot be written or is too long.

    >>> maps = resonance_maps(runtime, prompts)  # doctest: +SKIP
    >>> maps.values.shape  # 58 layers of 256 experts  # doctest: +SKIP
    (100, 58, 256)
    """
    runtime.require("states")
    if not prompts or weighting not in ("count", "gate"):
        raise InputError(f"{len(prompts)} prompts, weighting={weighting!r}: at least one, and count or gate")
    from demur.runtime import batching, forward
    from demur.runtime.layers import find_layers, find_routers

    condition = condition or Condition()
    routers = find_routers(runtime.model)
    shapes = {(r.experts, r.chosen) for r in routers}
    if len(shapes) > 1:
        raise CapabilityError(f"layers with different experts (number, chosen): {sorted(shapes)}")
    last = find_layers(runtime.model)[routers[-1].layer]
    found: list[FloatArray] = []
    tokens: list[int] = []
    for window in batching.windows(prompts):
        rows = [runtime.chat.render(p.with_system(condition.system)).ids for p in window]
        for p, ids in zip(window, rows, strict=True):
            runtime.check_fits(p, ids, 0)

        def work(batch: list[int], _prefix: Any, rows: Any = rows) -> list[FloatArray]:
            some = [rows[i] for i in batch]
            with _counting(routers, [len(r) for r in some], weighting) as counts:
                forward.run(runtime.model, some, stop=last)
            return list(np.stack(counts, axis=1))

        found += runtime.batched(rows, work, stop=last, share=False)
        tokens += map(len, rows)
        if progress is not None:
            progress(len(tokens), len(prompts))
    lengths = np.array(tokens, np.int64)
    return Maps(
        values=np.stack(found) / lengths[:, None, None],
        layers=tuple(r.layer for r in routers),
        tokens=lengths,
        ids=tuple(p.id for p in prompts),
        chosen=routers[0].chosen,
        weighting=weighting,
    )


@contextmanager
def _counting(
    routers: Sequence[Any], lengths: Sequence[int], weighting: Weighting
) -> Iterator[list[FloatArray]]:
    """Add up the choices of one right-padded batch: a list that fills with (B, E), one for each router."""
    import torch

    from demur.runtime.layers import hooked

    out: list[FloatArray] = []
    B, T = len(lengths), max(lengths)
    real_BT1 = (torch.arange(T) < torch.tensor(lengths)[:, None])[..., None]

    def count(_module: Any, _args: Any, output: Any) -> None:
        logits, weights, indices = (t.cpu() for t in output)
        w_BTK = weights.double().reshape(B, T, -1)
        w_BTK = real_BT1 * (torch.ones_like(w_BTK) if weighting == "count" else w_BTK)
        total = torch.zeros(B, logits.shape[-1], dtype=torch.float64)
        out.append(total.scatter_add(1, indices.reshape(B, -1), w_BTK.flatten(1)).numpy())

    with hooked(*(r.module.register_forward_hook(count) for r in routers)):
        yield out
