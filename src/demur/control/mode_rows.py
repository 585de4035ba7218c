"""Embedding rows of mode ids: read in prompts, never written in answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from demur.errors import MismatchError
from demur.runtime.control_rows import ControlRows
from demur.runtime.layers import hooked


class ModeRows(ControlRows):
    """Lets the ids `first_id` .. `first_id + K - 1` be embedded. The unembedding stays the model's own.

    Args:
        rows: (K, d) float32. first_id: beyond the model's vocabulary.
    """

    def __init__(self, rows: npt.ArrayLike, first_id: int) -> None:
        table = torch.as_tensor(rows, dtype=torch.float32)
        super().__init__(table, table, first_id)

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the embedding; the hooks are gone on exit.

        Raises:
            MismatchError: rows of another width, or ids that the model's vocabulary has.
        """
        embed = model.get_input_embeddings()
        size, width = embed.weight.shape
        if self.input_rows.shape[1] != width or self.first_id < size:
            raise MismatchError(
                f"mode rows of width {self.input_rows.shape[1]} from id {self.first_id}; this model has width "
                f"{width} and ids up to {size - 1} of its own: they were made for another one"
            )
        table_KD = self._embedded(embed)
        first, K = self.first_id, len(self.input_rows)
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ids = args[0]
            seen.append(ids)
            ours = (ids >= first) & (ids < first + K)
            return (ids.masked_fill(ours, 0), *args[1:])

        def after(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            ids = seen.pop()
            ours = (ids >= first) & (ids < first + K)
            rows = table_KD[(ids - first).clamp(0, K - 1)].to(out.dtype)
            return torch.where(ours[..., None], rows, out)

        with hooked(embed.register_forward_pre_hook(before), embed.register_forward_hook(after)):
            yield
