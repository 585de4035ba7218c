"""A cache of keys and values that can be wound back, and whose rows come and go.

transformers' own cache grows by copying everything at each token and forgets what a sliding window has left
behind. This one keeps every column in a buffer with room, so that the columns of a check can be dropped again
without a trace. The model's own mask still limits a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from demur.errors import CapabilityError
from demur.runtime.forward import FEW_ROWS, Stop, fast_linear, stopping_after, unembedding_at
from demur.runtime.layers import input_device, text_config

ROOM = 32
"""Columns that a buffer grows by at least: fewer copies, for a few unused columns."""


class ColumnLayer(DynamicLayer):
    """One layer: `keys` and `values` (B, H, capacity, D), of which the first `length` columns are in use."""

    keys: Any
    values: Any

    def __init__(self, sliding: bool) -> None:
        super().__init__()
        self.is_sliding, self.length = sliding, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty buffers of the dtype, device and shape of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            t.new_zeros(*t.shape[:2], 0, t.shape[3]) for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns and return all that are in use, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.grow(end + max(ROOM, end // 8))
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` columns."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)


class Columns(DynamicCache):
    """Keys and values of B rows that all end in the same column; shorter rows have zeros on their left.

    Args:
        model: a Hugging Face causal model.

    Raises:
        CapabilityError: the model keeps another kind of state than keys and values of all tokens.
    """

    layers: list[ColumnLayer]

    def __init__(self, model: Any) -> None:
        self.model = model
        try:
            super().__init__(config=model.config)
        except (AttributeError, KeyError, TypeError, ValueError):  # a config that says nothing of its cache
            self.layers = []
        kinds = {type(layer).__name__ for layer in self.layers}
        chunked = "chunked_attention" in (getattr(text_config(model), "layer_types", None) or ())
        known = {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
        stateful = getattr(model, "_is_stateful", False)  # transformers' mark of Mamba, Qwen3-Next, ...
        if chunked or stateful or not kinds or kinds - known:
            what = "chunked attention" if chunked else ", ".join(sorted(kinds - known)) or "no known cache"
            raise CapabilityError(
                f"{type(model).__name__} keeps its past as {what}; only plain and sliding-window attention can "
                "be wound back after a check. Use generate() for this model"
            )
        self.layers = [ColumnLayer(layer.is_sliding) for layer in self.layers]

    @property
    def length(self) -> int:
        """Columns in use."""
        return self.layers[0].length

    @property
    def bytes(self) -> int:
        """Memory held by the buffers."""
        made = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in made)

    def rewind(self, length: int) -> None:
        """Drop every column behind the first `length`; layers that were not run count as if they had been."""
        for layer in self.layers:
            layer.length = length

    def chosen(self, rows: Sequence[int], longest: int, layers: int | None = None) -> Columns:
        """A copy of some rows, cut on the left to `longest` columns; the first `layers` layers only.

        >>> fork = cache.chosen([0, 2], longest=40)  # doctest: +SKIP
        """
        new, start = Columns(self.model), self.length - longest
        for k, (old, layer) in enumerate(zip(self.layers, new.layers, strict=True)):
            if old.is_initialized and (layers is None or k < layers):
                layer.lazy_initialization(old.keys, old.values)
                cut = slice(start, start + longest + ROOM)
                layer.keys, layer.values = old.keys[list(rows), :, cut], old.values[list(rows), :, cut]
            layer.length = longest
        return new

    def joined(self, rows: int, picked: Sequence[tuple[Columns, int, int]]) -> Columns:
        """The `rows` rows that are here, and rows of other caches under them, all ending in one column.

        Args:
            picked: for each new row, its cache (rows start in column 0 there), its row in it, and its length.
        """
        new, total = Columns(self.model), rows + len(picked)
        end = max([self.length if rows else 0, *(n for _, _, n in picked)])
        for k, layer in enumerate(new.layers):
            layer.length, mine = end, self.layers[k]
            like = next(
                (c.layers[k] for c in (self, *(c for c, _, _ in picked)) if c.layers[k].is_initialized), None
            )
            if like is None:
                continue  # prompts of one token, or a layer that shares the states of another
            layer.lazy_initialization(like.keys, like.values)
            for name in ("keys", "values"):
                shape = getattr(like, name).shape
                out = getattr(like, name).new_zeros(total, shape[1], end + ROOM, shape[3])
                if rows and mine.is_initialized:
                    out[:rows, :, end - mine.length : end] = getattr(mine, name)[:, :, : mine.length]
                for b, (cache, row, n) in enumerate(picked, rows):
                    if n:
                        out[b, :, end - n : end] = getattr(cache.layers[k], name)[row, :, :n]
                setattr(layer, name, out)
        return new


def fit(model: Any) -> bool:
    """Whether the past of a model is keys and values that `Columns` can hold."""
    try:
        Columns(model)
    except CapabilityError:
        return False
    return True


def advance(
    cache: Columns, lengths: Sequence[int], ids: Sequence[Sequence[int]], *, stop: nn.Module | None = None
) -> Tensor:
    """One pass of the cache's model over new tokens behind its rows.

    Args:
        lengths: true tokens of each row in the cache. ids: the new ones, equally many a row.
        stop: leave after this module; then nothing is returned.

    Returns:
        Logits behind the last token of each row, (B, V) float32; (0,) with `stop`.
    """
    model, before, width = cache.model, cache.length, len(ids[0])
    device = input_device(model)
    lengths_B1 = torch.tensor(list(lengths), device=device)[:, None]
    mask_BT = torch.arange(before + width, device=device) >= before - lengths_B1
    with ExitStack() as stack:
        if len(ids) * width >= FEW_ROWS:  # with fewer it gains nothing, and watching every call costs
            stack.enter_context(fast_linear())
        stack.enter_context(stopping_after(stop))
        if stop is None:
            stack.enter_context(unembedding_at(model, torch.full((len(ids),), width - 1, device=device)))
        try:
            out = model(
                input_ids=torch.tensor([list(row) for row in ids], device=device),
                attention_mask=mask_BT.long() if min(lengths) < before else None,
                position_ids=lengths_B1 + torch.arange(width, device=device),
                past_key_values=cache,
                use_cache=True,
            )
        except Stop:
            return torch.empty(0)
    logits: Tensor = out.logits[:, -1].float()
    return logits
