"""The training loop behind refusal tokens: closed-form control rows, then LoRA through TRL's SFT trainer.

Kept apart from the recipe because it loads torch, PEFT and TRL. The control rows used here are the very edit that
the runtime installs at inference, so training and serving cannot drift apart.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from demur.runtime.batching import common_prefix
from demur.runtime.control_rows import ControlRows
from demur.train.refusal_tokens import Progress, Recipe, Row, control_of
from demur.types import RESPOND, PromptSet

IGNORE = -100
_HEAD = 12
"""Prompt tokens that tell one system prompt from another."""
_OPENINGS = ("I'm sorry, but I can't", "\n")
"""Texts whose mean embedding starts the input rows of refuse tokens and of `respond`."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What the loop hands back: weights of the best checkpoint and the log of losses."""

    lora: dict[str, Tensor]
    rows: dict[str, Tensor] | None
    peft_config: dict[str, Any]
    best_step: int
    best_loss: float
    log: list[dict[str, float]]


class Rows(nn.Module):
    """Trainable control rows; `edit()` is what the runtime installs."""

    def __init__(self, input_rows: Tensor, output_rows: Tensor, first_id: int) -> None:
        super().__init__()
        self.input = nn.Parameter(input_rows.clone())
        self.output = nn.Parameter(output_rows.clone())
        self.first_id = first_id

    def edit(self) -> ControlRows:
        """The rows as an edit; installed anew for each step, since the graph is freed after each backward pass."""
        return ControlRows(self.input, self.output, self.first_id)


def initial_rows(
    runtime: Any, prompts: PromptSet, names: Sequence[str], recipe: Recipe, note: Progress
) -> tuple[Tensor, Tensor]:
    """Input and output rows (K, d) before any gradient step.

    Output rows: a multinomial logistic probe on the states that enter the unembedding, with its bias and a margin
    written as directions. A ridge fit finds u with u.h close to 1 on every prompt, and v with v.h close to the
    log-sum-exp of the base logits plus `leak`; row_c = w_c + b_c u + v then has the probe's log-odds between
    control tokens and leaves about exp(-leak) of the mass to all other tokens.
    """
    from sklearn.linear_model import LogisticRegression

    ids = [runtime.chat.render(p).ids for p in prompts]
    H, lse = _head_inputs(runtime, ids, note)
    y = np.array([names.index(control_of(p, recipe.mode) or RESPOND) for p in prompts])
    mean, std = H.mean(0), H.std(0) + 1e-3
    probe = LogisticRegression(C=recipe.probe_C, max_iter=500).fit((H - mean) / std, y)
    coef, bias = probe.coef_, probe.intercept_
    if len(names) == 2:  # scikit-learn keeps one row for two classes
        coef, bias = np.vstack([-coef[0], coef[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    W = coef / std
    offset = bias - W @ mean
    gram = H.T @ H + 1e-3 * len(H) * np.eye(H.shape[1])
    u, v = np.linalg.solve(gram, H.T @ np.stack([np.ones(len(H)), lse + recipe.leak - np.log(len(names))], 1)).T
    out = torch.tensor(W + offset[:, None] * u + v, dtype=torch.float32)

    table = runtime.model.get_input_embeddings().weight
    refuse, respond = (
        table[runtime.tokenizer(t, add_special_tokens=False)["input_ids"]].float().mean(0) for t in _OPENINGS
    )
    return torch.stack([respond if n == RESPOND else refuse for n in names]).detach(), out


def _head_inputs(runtime: Any, ids: list[list[int]], note: Progress) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """States that enter the unembedding at the decision position (n, d), and log-sum-exp of the base logits (n,)."""
    seen: list[Tensor] = []
    hook = runtime.model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    H = np.zeros((len(ids), runtime.model.get_input_embeddings().weight.shape[1]))
    lse = np.zeros(len(ids))
    try:
        with torch.inference_mode():
            for start in range(0, len(order), 32):
                batch = order[start : start + 32]
                x_BT, last_B = _pad([ids[i] for i in batch])
                logits = runtime.model(input_ids=x_BT, logits_to_keep=last_B[:, None], use_cache=False).logits
                H[batch] = seen.pop()[:, 0].float().numpy()
                lse[batch] = logits[:, 0].float().logsumexp(-1).numpy()
                note("control rows", start + len(batch), len(order))
    finally:
        hook.remove()
    return H, lse


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and the index of each row's last token (B,). Padding is never attended to."""
    lengths = torch.tensor([len(r) for r in rows])
    x = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for k, r in enumerate(rows):
        x[k, : len(r)] = torch.tensor(r)
    return x, lengths - 1


def collate(rows: Sequence[Row], names: Sequence[str], first_id: int) -> dict[str, Tensor]:
    """Shared prefix (1, P), ids after it (B, T), positions whose next token is learnt (B, M), targets (B, M).

    Positions count from the end of the prefix; target -100 is padding. Column 0 of `targets` is the control token where there is one (mode "none": the first answer token).
    """
    shared = min(common_prefix([r.prompt for r in rows]), min(len(r.prompt) for r in rows) - 1)
    full = [[*r.prompt, *([first_id + names.index(r.control)] if r.control else []), *r.answer][shared:] for r in rows]
    starts = [len(r.prompt) - shared for r in rows]
    M = max(len(f) - s for f, s in zip(full, starts, strict=True))
    x, _ = _pad(full)
    keep = torch.zeros(len(rows), M, dtype=torch.long)
    targets = torch.full((len(rows), M), IGNORE)
    for k, (f, s) in enumerate(zip(full, starts, strict=True)):
        n = len(f) - s
        keep[k, :n] = torch.arange(s - 1, s - 1 + n)
        targets[k, :n] = torch.tensor(f[s:])
    return {"prefix": torch.tensor([rows[0].prompt[:shared]]), "input_ids": x, "keep": keep, "targets": targets}


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """Logits at `keep`, with the prefix that all rows share run once and its keys and values expanded.

    The chat template's system part is about half of a short prompt; gradients flow through it as through the rest.
    """
    if batch["prefix"].shape[1] == 0:
        return model(input_ids=batch["input_ids"], logits_to_keep=batch["keep"], use_cache=False)
    B = len(batch["input_ids"])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    once = base.get_decoder()(input_ids=batch["prefix"], use_cache=True).past_key_values
    cache = DynamicCache()
    for k, layer in enumerate(once.layers):
        cache.update(layer.keys.expand(B, -1, -1, -1), layer.values.expand(B, -1, -1, -1), k)
    return model(input_ids=batch["input_ids"], past_key_values=cache, logits_to_keep=batch["keep"], use_cache=True)


def token_loss(logits_BMV: Tensor, targets_BM: Tensor, recipe: Recipe, has_control: bool) -> tuple[Tensor, Tensor]:
    """Weighted loss and the control position's own loss.

    control_weight * mean over rows of the control token's cross-entropy + answer_weight * mean over answer tokens.
    """
    ce = nn.functional.cross_entropy(
        logits_BMV.float().transpose(1, 2), targets_BM, ignore_index=IGNORE, reduction="none"
    )
    if not has_control:
        return ce.sum() / (targets_BM != IGNORE).sum().clamp(min=1), ce.new_zeros(())
    control, answer = ce[:, 0], ce[:, 1:]
    n_answer = (targets_BM[:, 1:] != IGNORE).sum().clamp(min=1)
    return recipe.control_weight * control.mean() + recipe.answer_weight * answer.sum() / n_answer, control.mean()


def train(
    runtime: Any,
    rows: Sequence[Row],
    select: Sequence[Row],
    names: Sequence[str],
    start: tuple[Tensor, Tensor] | None,
    first_id: int,
    recipe: Recipe,
    folder: Path,
    note: Progress,
) -> Trained:
    """Fine-tune a copy of the runtime's model; keep the weights with the lowest control loss on `select`."""
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig

    torch.manual_seed(recipe.seed)
    dtype = getattr(torch, recipe.precision)
    base = copy.deepcopy(runtime.model).to(dtype)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    control = Rows(*start, first_id) if start else None
    if control is not None:
        model.add_module("demur_control_rows", control)

    steps = max(1, len(rows) // recipe.batch_size)
    watch = _Watch(model, control, select, names, first_id, recipe, folder, note, steps)
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=recipe.batch_size,
            num_train_epochs=1,  # rows already hold every epoch, each under its own variations
            learning_rate=recipe.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, int(0.06 * steps)),
            weight_decay=recipe.weight_decay,
            seed=recipe.seed,
            bf16=recipe.precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_drop_last=len(rows) > recipe.batch_size,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,  # TRL turns it on; it also switches off the cache that prefixes need
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
        trainer = _trainer(model, control, args, rows, names, first_id, recipe, runtime.tokenizer, watch)
        trainer.train()
    watch.check(steps)
    lora, tensors = watch.best()
    saved = config.to_dict() | {"peft_type": "LORA", "target_modules": _target_names(lora), "base_model_name_or_path": runtime.name}
    saved = {k: (sorted(v) if isinstance(v, set) else v) for k, v in saved.items() if _is_plain(v)}
    return Trained(lora, tensors, saved, watch.best_step, watch.best_loss, watch.log)


def _trainer(
    model: Any,
    control: Rows | None,
    args: Any,
    rows: Sequence[Row],
    names: Sequence[str],
    first_id: int,
    recipe: Recipe,
    tokenizer: Any,
    watch: _Watch,
) -> Any:
    """TRL's SFT trainer with our batches, our loss and length-grouped order."""
    from datasets import Dataset
    from trl import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with control.edit().install(model.get_base_model()) if control else nullcontext():
                out = forward(model, inputs)
            loss, decision = token_loss(out.logits, inputs["targets"], recipe, control is not None)
            watch.seen(float(loss.detach()), float(decision.detach()))
            return (loss, out) if return_outputs else loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def create_optimizer(self, model: Any = None) -> Any:
            own = {id(p) for p in control.parameters()} if control else set()
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            groups = [{"params": rest, "lr": recipe.lr}]
            if control:
                groups.append({"params": list(control.parameters()), "lr": recipe.row_lr, "weight_decay": 0.0})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
            return self.optimizer

    # the trainer insists on a table; rows stay ours and are looked up by index
    table = Dataset.from_dict({"input_ids": [[i] for i in range(len(rows))]})
    order = _grouped(rows, recipe.batch_size, recipe.seed)
    return Trainer(
        model=model,
        args=args,
        train_dataset=table,
        processing_class=tokenizer,
        data_collator=lambda items: collate([rows[i["input_ids"][0]] for i in items], names, first_id),
        callbacks=[watch.callback()],
    )


def _grouped(rows: Sequence[Row], batch: int, seed: int) -> list[int]:
    """A random order of batches whose rows share their system prompt and are of like length.

    Within chunks of 20 batches rows are sorted by (system prompt, length); full batches are then shuffled.
    """
    rng = np.random.default_rng(seed)
    chunks = np.array_split(rng.permutation(len(rows)), max(1, len(rows) // (20 * batch)))
    groups, rest = [], []
    for chunk in chunks:
        by_system: dict[tuple[int, ...], list[int]] = {}
        for i in chunk.tolist():
            by_system.setdefault(tuple(rows[i].prompt[:_HEAD]), []).append(i)
        for members in by_system.values():
            members.sort(key=lambda i: len(rows[i].prompt) + len(rows[i].answer))
            groups += [members[k : k + batch] for k in range(0, len(members), batch)]
    full = [g for g in groups if len(g) == batch]
    rest = sorted((i for g in groups if len(g) < batch for i in g), key=lambda i: tuple(rows[i].prompt[:_HEAD]))
    full += [rest[k : k + batch] for k in range(0, len(rest), batch)]
    rng.shuffle(full)
    return [i for g in sorted(full, key=lambda g: len(g) < batch) for i in g]


class _Watch:
    """Follows a run: logs losses, scores the select part, keeps the best weights (in memory and on disk)."""

    def __init__(
        self,
        model: Any,
        control: Rows | None,
        select: Sequence[Row],
        names: Sequence[str],
        first_id: int,
        recipe: Recipe,
        folder: Path,
        note: Progress,
        steps: int,
    ) -> None:
        self.model, self.control, self.select, self.names, self.first_id = model, control, select, names, first_id
        self.recipe, self.folder, self.note, self.steps = recipe, folder, note, steps
        self.best_loss, self.best_step = float("inf"), 0
        self.log: list[dict[str, float]] = []
        self._losses: list[tuple[float, float]] = []
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor] | None] | None = None

    def seen(self, loss: float, control: float) -> None:
        """Take in one step's losses."""
        self._losses.append((loss, control))

    def check(self, step: int) -> None:
        """Score the select part and keep the weights if they are the best so far."""
        if self.log and self.log[-1]["step"] == step:
            return
        loss, auroc = self._select_scores()
        mean = np.mean(self._losses, axis=0) if self._losses else (float("nan"), float("nan"))
        row = {"step": step, "loss": float(mean[0]), "control_loss": float(mean[1]), "select_loss": loss, "select_auroc": auroc}
        self.log.append({k: round(v, 5) for k, v in row.items()})
        self._losses.clear()
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self._kept = self._weights()

    def best(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The kept weights; without control tokens, the last ones."""
        return self._kept or self._weights()

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        from peft import get_peft_model_state_dict

        lora = {
            k: v.detach().to(torch.float16).cpu().clone()
            for k, v in get_peft_model_state_dict(self.model).items()
            if ".lora_" in k
        }
        rows = {"input": self.control.input.detach().clone(), "output": self.control.output.detach().clone()} if self.control else None
        return lora, rows

    def _select_scores(self) -> tuple[float, float]:
        """Mean control cross-entropy and AUROC of p_refuse on the select part."""
        if self.control is None or not self.select:
            return float("nan"), float("nan")
        was = self.model.training
        self.model.eval()
        losses, p_refuse, truth = [], [], []
        order = sorted(self.select, key=lambda r: len(r.prompt))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bfloat16")
        with torch.inference_mode(), autocast, self.control.edit().install(self.model.get_base_model()):
            for start in range(0, len(order), 32):
                batch = order[start : start + 32]
                logits = forward(self.model, collate(batch, self.names, self.first_id)).logits[:, 0].float()
                P = logits.softmax(-1)[:, self.first_id : self.first_id + len(self.names)]
                y = torch.tensor([self.names.index(r.control or RESPOND) for r in batch])
                losses += (-P[torch.arange(len(batch)), y].clamp(min=1e-12).log()).tolist()
                p_refuse += P[:, :-1].sum(1).tolist()
                truth += (y != len(self.names) - 1).tolist()
        self.model.train(was)
        from demur.stats import auroc

        return float(np.mean(losses)), float(auroc(np.array(p_refuse), np.array(truth)))

    def callback(self) -> Any:
        """A trainer callback that checks every `check_every` steps."""
        from transformers import TrainerCallback

        watch = self

        class Follow(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.check(0)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.note("training", state.global_step, state.max_steps)
                if state.global_step % watch.recipe.check_every == 0:
                    watch.check(state.global_step)

        return Follow()


def _target_names(lora: dict[str, Tensor]) -> list[str]:
    return sorted({k.split(".lora_")[0].rsplit(".", 1)[-1] for k in lora})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, set))
