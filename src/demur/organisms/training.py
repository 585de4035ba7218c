"""The training loop of organisms: standard transformers models, AdamW, one thread, no trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from demur.errors import InputError
from demur.organisms.base import Batches, Ids, Mask, Progress, Recipe
from demur.organisms.words import BOS, EOS, MASK, PAD


def build(recipe: Recipe, n_words: int) -> Any:
    """An untrained model for a vocabulary of `n_words` tokens; its weights hang on the recipe's seed alone."""
    shape = {
        "vocab_size": n_words,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": recipe.context,
        "initializer_range": 0.5 * recipe.width**-0.5,  # 0.02 is meant for widths in the thousands
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.kind == "decoder":
            return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=recipe.heads))
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 1}
        return BertForMaskedLM(BertConfig(**shape, **plain))


def load(folder: Path, recipe: Recipe) -> Any:
    """The grown model in `folder`."""
    kind = LlamaForCausalLM if recipe.kind == "decoder" else BertForMaskedLM
    with _no_bars():
        model = kind.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), config and tokenizer as transformers does."""
    with _no_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _no_bars() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def train(model: Any, recipe: Recipe, batches: Batches, progress: Progress | None) -> list[float]:
    """Train in place; the mean loss of each step in nats per predicted token."""
    rng = np.random.default_rng([recipe.seed, 1])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    losses = []
    model.train()
    with _one_thread():
        for step in range(recipe.steps):
            ids, mask = batches(rng, recipe.batch)
            check_batch(ids, mask, recipe, model.config.vocab_size)
            logits_NV, targets_N = predict(model, ids, mask)
            loss = nn.functional.cross_entropy(logits_NV, targets_N)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule(step, recipe)
            optimizer.step()
            losses.append(loss.item())
            if progress is not None and (step % 50 == 49 or step + 1 == recipe.steps):
                progress(f"grow {recipe.name}", step + 1, recipe.steps)
    model.eval().requires_grad_(False)
    return losses


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step counted from 0."""
    rise = (step + 1) / recipe.warmup if recipe.warmup else 1.0
    return min(1.0, rise) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def predict(model: Any, ids: Ids, mask: Mask) -> tuple[Tensor, Tensor]:
    """Logits (N, V) for the N marked tokens, row by row, and the tokens themselves (N,).

    A decoder sees what stands before a token, an encoder everything but the marked tokens. Padding (id 0) is
    not attended to. Only marked positions pass the unembedding.
    """
    x_BT, m_BT = torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(np.ascontiguousarray(mask))
    targets_N = x_BT[m_BT]
    if isinstance(model, BertForMaskedLM):
        hidden = model.bert(x_BT.masked_fill(m_BT, MASK), attention_mask=(x_BT != PAD).long())
        return model.cls(hidden.last_hidden_state[m_BT]), targets_N
    hidden = model.model(input_ids=x_BT[:, :-1], use_cache=False)  # right padding: causal attention skips it
    return model.lm_head(hidden.last_hidden_state[m_BT[:, 1:]]), targets_N


def check_batch(ids: Any, mask: Any, recipe: Recipe, n_words: int) -> None:
    """Raise `InputError` unless a batch has the form that `grow` asks for."""

    def wrong(what: str) -> InputError:
        return InputError(f"recipe {recipe.name!r}: a batch has {what}")

    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype != np.int64:
        raise wrong("no int64 array of token ids of shape (rows, length)")
    if not isinstance(mask, np.ndarray) or mask.shape != ids.shape or mask.dtype != np.bool_:
        raise wrong("no boolean mask of the ids' shape")
    if ids.shape[1] > recipe.context:
        raise wrong(f"{ids.shape[1]} tokens per row; the context is {recipe.context}")
    if ids.min() < 0 or ids.max() >= n_words:
        raise wrong(f"ids from {ids.min()} to {ids.max()}; the vocabulary is 0 to {n_words - 1}")
    if not mask.any():
        raise wrong("no token to predict")
    if recipe.kind == "decoder" and mask[:, 0].any():
        raise wrong("a marked first token; nothing stands before it to predict it from")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are added in another order on another number of threads; one thread gives the same bits anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
