"""Training batches, the forward pass over them, and their loss.

Knows torch and transformers, and nothing of PEFT or TRL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from demur.runtime.batching import common_prefix
from demur.runtime.forward import prefix_fits
from demur.runtime.layers import hooked
from demur.train.refusal_tokens import Recipe, Row

IGNORE = -100
"""Target of positions that are padding."""


def collate(rows: Sequence[Row], names: Sequence[str], first_id: int) -> dict[str, Tensor]:
    """One batch of token ids.

    Args:
        rows: B rows, all with a control name or all without. names: control names in id order.
        first_id: id of names[0].

    Returns:
        `prefix` (1, P): prompt tokens that all rows share. `input_ids` (B, T): what follows, padded on the
        right. `keep` (B, M): positions in `input_ids` whose next token is learnt. `targets` (B, M): that
        token, or -100 for padding. Column 0 of `targets` is the control token where there is one, else the
        first answer token. `own` (B,): whether the answer is the base model's.
    """
    shared = min(common_prefix([r.prompt for r in rows]), min(len(r.prompt) for r in rows) - 1)
    control = [[first_id + names.index(r.control)] if r.control else [] for r in rows]
    full = [[*r.prompt[shared:], *c, *r.answer] for r, c in zip(rows, control, strict=True)]
    starts = [len(r.prompt) - shared for r in rows]
    M = max(len(f) - s for f, s in zip(full, starts, strict=True))
    x_BT, _ = pad(full)
    keep_BM = torch.zeros(len(rows), M, dtype=torch.long)
    targets_BM = torch.full((len(rows), M), IGNORE)
    for k, (f, s) in enumerate(zip(full, starts, strict=True)):
        n = len(f) - s
        keep_BM[k, :n] = torch.arange(s - 1, s - 1 + n)
        targets_BM[k, :n] = torch.tensor(f[s:])
    prefix = torch.tensor([rows[0].prompt[:shared]], dtype=torch.long)
    own = torch.tensor([r.own for r in rows])
    return {"prefix": prefix, "input_ids": x_BT, "keep": keep_BM, "targets": targets_BM, "own": own}


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and the index of each row's last token (B,). Padding is never attended to."""
    lengths = torch.tensor([len(r) for r in rows])
    x = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for k, r in enumerate(rows):
        x[k, : len(r)] = torch.tensor(r, dtype=torch.long)
    return x, lengths - 1


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model's output with logits (B, M, V) at `keep`.

    The prefix that all rows share, about half of a short prompt, runs once; its keys and values are expanded
    and gradients flow through them. A prefix that a sliding window would cut runs within each row instead.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix_1P, x_BT, keep_BM = batch["prefix"], batch["input_ids"], batch["keep"]
    B, P = len(x_BT), prefix_1P.shape[1]
    if P and not prefix_fits(base, P):
        x_BT, keep_BM, P = torch.cat([prefix_1P.expand(B, -1), x_BT], dim=1), keep_BM + P, 0
    cache = None
    if P:
        once = DynamicCache(config=base.config)
        base.get_decoder()(input_ids=prefix_1P, past_key_values=once, use_cache=True)
        cache = DynamicCache(config=base.config)
        for k, layer in enumerate(once.layers):
            cache.update(layer.keys.expand(B, -1, -1, -1), layer.values.expand(B, -1, -1, -1), k)
    with unembedding_at(base, keep_BM):
        return model(input_ids=x_BT, past_key_values=cache, use_cache=cache is not None)


@contextmanager
def unembedding_at(model: Any, keep_BM: Tensor) -> Iterator[None]:
    """Let the unembedding see the asked positions alone, which is most of the memory of a small model."""

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.arange(len(keep_BM), device=args[0].device)[:, None]
        return (args[0][rows, keep_BM.to(args[0].device)], *args[1:])

    with hooked(model.get_output_embeddings().register_forward_pre_hook(take)):
        yield


def teach(batch: dict[str, Tensor], has_control: bool) -> dict[str, Tensor] | None:
    """The rows with the base model's own answers as the base sees them, without control token.

    Returns:
        A batch whose `keep` (b, M) are the positions that predict the answer's tokens, aligned with the
        columns of the given batch's `targets` after the control token; None if no row has an own answer.
    """
    own = batch["own"]
    if not own.any():
        return None
    x_bT, keep_bM = batch["input_ids"][own], batch["keep"][own]
    if has_control:
        at = keep_bM[:, :1] + 1
        columns = torch.arange(x_bT.shape[1] - 1, device=x_bT.device)[None]
        x_bT = x_bT.gather(1, columns + (columns >= at))
        keep_bM = (keep_bM[:, 1:] - 1).clamp(min=0)
    return {"prefix": batch["prefix"], "input_ids": x_bT, "keep": keep_bM}


def token_loss(
    logits_BMV: Tensor,
    batch: dict[str, Tensor],
    recipe: Recipe,
    has_control: bool,
    teacher_bMV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted loss, and the control position's own loss (0 without control tokens).

    control_weight * mean over rows of the control token's cross-entropy
    + answer_weight * mean cross-entropy over the tokens of the refusals
    + keep_weight * mean over the tokens of own answers of KL(base || model), `teacher_bMV` being the base's
      logits at the positions of `teach`. Cross-entropy takes its place where there is no teacher.
    """
    targets_BM, own = batch["targets"], batch["own"]
    first = int(has_control)
    ce_BM = nn.functional.cross_entropy(
        logits_BMV.float().transpose(1, 2), targets_BM, ignore_index=IGNORE, reduction="none"
    )
    learnt_BM = targets_BM[:, first:] != IGNORE
    if teacher_bMV is not None:
        learnt_BM = learnt_BM & ~own[:, None]
    answer = (ce_BM[:, first:] * learnt_BM).sum() / learnt_BM.sum().clamp(min=1)
    loss = recipe.answer_weight * answer
    if teacher_bMV is not None:
        loss = loss + recipe.keep_weight * _divergence(
            teacher_bMV, logits_BMV[own, first:], targets_BM[own, first:] != IGNORE
        )
    control = ce_BM[:, 0].mean() if has_control else ce_BM.new_zeros(())
    return loss + recipe.control_weight * control, control


def _divergence(teacher_bMV: Tensor, student_bMW: Tensor, learnt_bM: Tensor) -> Tensor:
    """Mean KL(teacher || student) over the learnt positions; the student may have more tokens (W >= V)."""
    want_nV = teacher_bMV[learnt_bM].float().log_softmax(-1)
    have_nV = student_bMW[learnt_bM].float().log_softmax(-1)[:, : want_nV.shape[1]]
    return (want_nV.exp() * (want_nV - have_nV)).sum(-1).sum() / max(len(want_nV), 1)
