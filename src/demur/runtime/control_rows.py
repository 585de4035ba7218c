"""Control tokens without text: extra embedding and unembedding rows, added by hooks and never by resizing.

The base model's matrices stay as they are, so its logits keep the base vocabulary wherever the edit is not
installed, and one base can carry several adapters at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from demur.errors import CapabilityError, InputError, MismatchError
from demur.runtime.layers import hooked


class ControlRows:
    """Lets the ids `first_id` .. `first_id + K - 1` be embedded and scored.

    Args:
        input_rows: embedding rows, shape (K, d), in the units of the embedding matrix (a model that scales
            its embeddings scales these too).
        output_rows: unembedding rows, shape (K, d); their logits go through the same soft-capping as all
        others.
        first_id: id of row 0. Usually the number of rows of the model's embedding; smaller where the matrix
            has padding rows beyond the tokenizer, which are then replaced.

    >>> rows = ControlRows(torch.zeros(6, 576), torch.zeros(6, 576), first_id=49152)  # doctest: +SKIP
    >>> runtime = base.with_edits(rows, control=ControlTokens(ids={"safety": 49152, ...}))  # doctest: +SKIP
    """

    def __init__(self, input_rows: Tensor, output_rows: Tensor, first_id: int) -> None:
        if input_rows.ndim != 2 or input_rows.shape != output_rows.shape:
            raise InputError(
                f"control rows: input {tuple(input_rows.shape)} and output {tuple(output_rows.shape)} must "
                "both be (number of control tokens, hidden size)"
            )
        self.input_rows, self.output_rows, self.first_id = input_rows, output_rows, first_id

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the embedding and the unembedding; the hooks are gone on exit.

        Raises:
            MismatchError: the rows are of another width, or leave a gap after the model's vocabulary.
        """
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None:
            raise CapabilityError(f"{type(model).__name__} has no unembedding to add control tokens to")
        self._check(embed, head)
        first, K = self.first_id, len(self.input_rows)
        table_KD = self._embedded(embed)
        out_KD = self.output_rows.to(head.weight.device, head.weight.dtype)
        masks: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ids = args[0]
            masks.append(ids)
            return (ids.where(ids < first, torch.zeros_like(ids)), *args[1:])

        def after(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            ids = masks.pop()
            ours = ids >= first
            rows = table_KD[(ids - first).clamp(0, K - 1)].to(out.dtype)
            return torch.where(ours[..., None], rows, out) if bool(ours.any()) else out

        def extend(_module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            extra = (args[0].to(out_KD.dtype) @ out_KD.T).to(logits.dtype)
            return torch.cat([logits[..., :first], extra, logits[..., first + K :]], dim=-1)

        with hooked(
            embed.register_forward_pre_hook(before),
            embed.register_forward_hook(after),
            head.register_forward_hook(extend),
        ):
            yield

    def _check(self, embed: nn.Module, head: nn.Module) -> None:
        for name, module, rows in (
            ("embedding", embed, self.input_rows),
            ("unembedding", head, self.output_rows),
        ):
            size, width = module.weight.shape
            if rows.shape[1] != width:
                raise MismatchError(
                    f"control rows have width {rows.shape[1]}, the model's {name} has {width}: they were "
                    "made for another model"
                )
            if not 0 < self.first_id <= size:
                raise MismatchError(
                    f"control ids start at {self.first_id}, the model's {name} has {size} rows: ids must "
                    f"follow on (first_id={size}) or replace its padding rows"
                )

    def _embedded(self, embed: nn.Module) -> Tensor:
        """The rows after what the model's embedding module does to a row (Gemma multiplies by a scale)."""
        weight = embed.weight
        rows = self.input_rows.to(weight.device, weight.dtype)
        lead = 1 + (getattr(embed, "padding_idx", None) or 0)  # keeps padding_idx inside the small matrix
        small = torch.cat([rows.new_zeros(lead, rows.shape[1]), rows])
        ids = torch.arange(lead, lead + len(rows), device=rows.device)
        return torch.func.functional_call(embed, {"weight": small}, (ids,))
