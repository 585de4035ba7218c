"""The training loop behind refusal tokens: LoRA and control rows through TRL's SFT trainer.

Kept apart from the recipe because it loads torch, PEFT and TRL. The control rows used here are the very edit
that the runtime installs at inference, so training and serving cannot drift apart.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demur.runtime.layers import input_device
from demur.runtime.local import LocalRuntime
from demur.train.batch import alike, collate, forward, teach, token_loss
from demur.train.refusal_tokens import Progress, Recipe, Row
from demur.train.rows import Rows
from demur.train.watch import Watch


@dataclass(frozen=True, slots=True)
class Trained:
    """What the loop hands back: weights of the best checkpoint and the log of losses."""

    lora: dict[str, Tensor]
    rows: dict[str, Tensor] | None
    peft_config: dict[str, Any]
    best_step: int
    best_loss: float | None
    log: list[dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class Start:
    """Where training begins: control rows (input, output), both (K, d), and LoRA weights by module, if any."""

    rows: tuple[Tensor, Tensor] | None
    lora: Mapping[str, tuple[Tensor, Tensor]] | None = None


def working_copy(runtime: LocalRuntime, recipe: Recipe) -> LocalRuntime:
    """The same model in training precision, ours to change; the caller's runtime stays as it is."""
    model = copy.deepcopy(runtime.model).to(getattr(torch, recipe.precision))
    return LocalRuntime(
        model,
        runtime.tokenizer,
        name=runtime.name,
        fingerprint=runtime.fingerprint,
        template=runtime.chat.template,
        thinking=runtime.chat.thinking,
    )


def train(
    runtime: Any,
    rows: Sequence[Row],
    select: Sequence[Row],
    names: Sequence[str],
    start: Start,
    first_id: int,
    recipe: Recipe,
    note: Progress,
    keep: Callable[[Trained], None] = lambda _: None,
) -> Trained:
    """Fine-tune the model of a `working_copy`; keep the weights with the lowest control loss on `select`.

    Args:
        keep: called with each set of weights that beats all before it, so that an interrupted run leaves its best.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    torch.manual_seed(recipe.seed)
    base = runtime.model
    if input_device(base).type == "cpu":  # the fused kernel's backward pass is slow there on short rows
        base.set_attn_implementation("eager")
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with _quiet():
        model = get_peft_model(base, config, autocast_adapter_dtype=True)
        if start.lora:
            set_peft_model_state_dict(model, _peft_names(start.lora))
    control = Rows(*start.rows, first_id) if start.rows else None
    if control is not None:
        model.add_module("demur_control_rows", control)

    def best() -> Trained:
        lora, tensors = watch.best()
        saved = config.to_dict() | {
            "peft_type": "LORA",
            "target_modules": _target_names(lora),
            "base_model_name_or_path": runtime.name,
        }
        saved = {k: (sorted(v) if isinstance(v, set) else v) for k, v in saved.items() if _is_plain(v)}
        return Trained(lora, tensors, saved, watch.best_step, watch.best_loss, watch.log)

    watch = Watch(model, control, select, names, first_id, recipe, note, better=lambda: keep(best()))
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        trainer = _trainer(model, control, rows, names, first_id, recipe, runtime.tokenizer, watch, scratch)
        trainer.train()
    watch.check(trainer.state.global_step)
    return best()


def _trainer(
    model: Any,
    control: Rows | None,
    rows: Sequence[Row],
    names: Sequence[str],
    first_id: int,
    recipe: Recipe,
    tokenizer: Any,
    watch: Watch,
    scratch: str,
) -> Any:
    """TRL's SFT trainer with our batches, our loss and our order."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    order = np.random.default_rng(recipe.seed).permutation(len(rows)).tolist()

    class Trainer(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            parts = inputs["parts"]
            with control.edit().install(model.get_base_model()) if control else nullcontext():
                logits_NV = torch.cat([forward(model, part).logits for part in parts])
            asked = [own for part in parts if (own := teach(part))]
            with torch.no_grad(), model.disable_adapter():
                teacher_nV = torch.cat([forward(model, own).logits for own in asked]) if asked else None
            marks = {k: torch.cat([part[k] for part in parts]) for k in ("targets", "control", "own")}
            loss, decision = token_loss(logits_NV, marks, recipe, teacher_nV)
            watch.seen(float(loss.detach()), float(decision.detach()))
            return (loss, {"logits": logits_NV}) if return_outputs else loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return order

        def create_optimizer(self, *_: Any) -> Any:
            own = {id(p) for p in control.parameters()} if control else set()
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            groups: list[dict[str, Any]] = [{"params": rest, "lr": recipe.lr}]
            if control:
                rows = {"params": list(control.parameters()), "lr": recipe.row_lr, "weight_decay": 0.0}
                groups.append(rows)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
            return self.optimizer

    # the trainer insists on a table; rows stay ours and are looked up by index
    table = Dataset.from_dict({"input_ids": [[i] for i in range(len(rows))]})
    trainer = Trainer(
        model=model,
        args=_settings(recipe, len(rows), scratch),
        train_dataset=table,
        processing_class=tokenizer,
        data_collator=lambda items: {
            "parts": [
                collate(part, names, first_id) for part in alike([rows[i["input_ids"][0]] for i in items])
            ]
        },
        callbacks=[watch.callback()],
    )
    trainer.remove_callback(PrinterCallback)  # standard output belongs to the caller
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PEFT, TRL and transformers tell one another, which no user can act on."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*gradient_checkpointing", FutureWarning
        )  # renamed after our oldest
        yield


def _settings(recipe: Recipe, n: int, scratch: str) -> Any:
    """The trainer's settings for n rows."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=1,  # rows already hold every epoch, each under its own variations
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(0.06 * max(1, n // recipe.batch_size))),
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        bf16=recipe.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=n > recipe.batch_size,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,  # TRL turns it on; it also switches off the cache that prefixes need
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _peft_names(lora: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRA weights by module under the names that PEFT loads."""
    return {
        f"base_model.model.{name}.lora_{part}.weight": weight
        for name, pair in lora.items()
        for part, weight in zip("AB", pair, strict=True)
    }


def _target_names(lora: dict[str, Tensor]) -> list[str]:
    return sorted({k.split(".lora_")[0].rsplit(".", 1)[-1] for k in lora})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, set))
