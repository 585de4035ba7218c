"""What a training run is judged by: the control decision on the select part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demur.errors import InputError
from demur.stats import auroc
from demur.train.batch import collate, forward
from demur.train.refusal_tokens import Progress, Recipe, Row
from demur.train.rows import Rows
from demur.types import RESPOND


class Watch:
    """Follows a run: logs losses, scores the select part, keeps the best weights in memory.

    Attributes:
        best_loss, best_step: of the kept weights; None and the last step where nothing can be scored
            (no control tokens). log: one row a check; unknown numbers are None.
        better: called where a step after the start did better than all before.
    """

    def __init__(
        self,
        model: Any,
        control: Rows | None,
        select: Sequence[Row],
        names: Sequence[str],
        first_id: int,
        recipe: Recipe,
        note: Progress,
        better: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.control, self.select = model, control, select
        self.names, self.first_id, self.recipe, self.note = names, first_id, recipe, note
        self.better = better
        self.best_loss: float | None = None
        self.best_step = 0
        self.log: list[dict[str, float | None]] = []
        self._losses: list[tuple[float, float]] = []
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor] | None] | None = None

    def seen(self, loss: float, control: float) -> None:
        """Take in one step's losses."""
        self._losses.append((loss, control))

    def check(self, step: int) -> None:
        """Score the select part and keep the weights if they are the best so far; once a step."""
        if self.log and self.log[-1]["step"] == step:
            return
        select_loss, select_auroc = self._select_scores()
        means = np.mean(self._losses, axis=0).tolist() if self._losses else (None, None)
        row = {
            "step": step,
            "loss": means[0],
            "control_loss": means[1] if self.control else None,
            "select_loss": select_loss,
            "select_auroc": select_auroc,
        }
        # a loss that overflowed is unknown too: JSON has no word for it
        self.log.append({k: round(v, 5) if v is not None and isfinite(v) else None for k, v in row.items()})
        self._losses.clear()
        if select_loss is None:
            self.best_step = step
        elif select_loss < (float("inf") if self.best_loss is None else self.best_loss):
            self.best_loss, self.best_step = select_loss, step
            self._kept = self._weights()
            if step:
                self.better()

    def best(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """LoRA weights by PEFT's names and control rows; without control tokens, the last ones.

        Raises:
            InputError: training diverged, so they are no numbers.
        """
        found = self._kept or self._weights()
        if not all(bool(v.isfinite().all()) for part in found for v in (part or {}).values()):
            raise InputError("training diverged: the weights are no numbers. Take smaller lr and row_lr")
        return found

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        from peft import get_peft_model_state_dict

        lora = {
            k: v.detach().to(torch.float16).cpu().clone()
            for k, v in get_peft_model_state_dict(self.model).items()
            if ".lora_" in k
        }
        if self.control is None:
            return lora, None
        both = {"input": self.control.input, "output": self.control.output}
        return lora, {k: v.detach().cpu().clone() for k, v in both.items()}

    def _select_scores(self) -> tuple[float | None, float | None]:
        """Mean control cross-entropy and AUROC of p_refuse on the select part."""
        if self.control is None or not self.select:
            return None, None
        was = self.model.training
        self.model.eval()
        losses: list[float] = []
        p_refuse: list[float] = []
        truth: list[bool] = []
        order = sorted(self.select, key=lambda r: len(r.prompt))
        base = self.model.get_base_model()
        device = base.get_input_embeddings().weight.device
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")
        with torch.inference_mode(), half, self.control.edit().install(base):
            for start in range(0, len(order), 32):
                rows = order[start : start + 32]
                batch = {k: v.to(device) for k, v in collate(rows, self.names, self.first_id).items()}
                z_BV = forward(self.model, batch).logits.float()
                P = z_BV.softmax(-1)[:, self.first_id : self.first_id + len(self.names)].cpu()
                y = torch.tensor([self.names.index(r.control or RESPOND) for r in rows])
                losses += (-P[torch.arange(len(rows)), y].clamp(min=1e-12).log()).tolist()
                p_refuse += P[:, :-1].sum(1).tolist()
                truth += (y != len(self.names) - 1).tolist()
        self.model.train(was)
        loss = float(np.mean(losses))
        return loss, auroc(p_refuse, truth) if isfinite(loss) else None  # diverged: earlier weights are kept

    def callback(self) -> Any:
        """A trainer callback that checks every `check_every` steps."""
        from transformers import TrainerCallback

        watch = self

        class Follow(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch.check(0)

            def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
                watch.note("training", state.global_step, state.max_steps)
                if state.global_step % watch.recipe.check_every == 0:
                    watch.check(state.global_step)

        return Follow()
