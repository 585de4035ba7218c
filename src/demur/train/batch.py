"""Training batches, the forward pass over them, and their loss.

Knows torch and transformers, and nothing of PEFT or TRL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from demur.runtime.batching import common_prefix
from demur.runtime.forward import prefix_fits
from demur.runtime.layers import hooked
from demur.train.refusal_tokens import Recipe, Row

PART = 6
"""About how many rows run together: fewer pad less, more keep a processor busier."""


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """One batch's rows in parts of like length, which share a system message where enough rows do.

    The batch itself is drawn at random: batches of like length would be batches of one kind, since refusals,
    own answers and bare decisions differ in length, and the decision would be learnt from one kind at a time.

    >>> short, long = Row([1, 2], "respond", []), Row([1, 2, 3, 4, 5, 6], "respond", [7, 8])
    >>> [len(part) for part in alike([short, long] * PART)]
    [6, 6]
    """
    by_system: dict[str, list[Row]] = {}
    for row in rows:
        by_system.setdefault(row.system, []).append(row)
    groups = [group for group in by_system.values() if len(group) > PART // 2]
    groups.append([row for group in by_system.values() if len(group) <= PART // 2 for row in group])
    parts: list[list[Row]] = []
    for group in filter(None, groups):
        ordered = sorted(group, key=lambda row: len(row.prompt) + len(row.answer))
        n = max(1, round(len(ordered) / PART))
        cuts = [round(k * len(ordered) / n) for k in range(n + 1)]
        parts += [ordered[i:j] for i, j in pairwise(cuts)]
    return parts


def collate(rows: Sequence[Row], names: Sequence[str], first_id: int) -> dict[str, Tensor]:
    """One batch of token ids.

    Args:
        rows: B rows, all with a control name or all without. names: control names in id order.
        first_id: id of names[0].

    Returns:
        `prefix` (1, P): prompt tokens that all rows share. `input_ids` (B, T): what follows, padded on the
        right. For each of the N tokens to learn, row by row: `row` and `at`, the position in `input_ids` that
        predicts it; `targets`, the token; `control`, whether it is the row's control token; `own`, whether it
        belongs to an answer of the base model.
    """
    shared = min(common_prefix([r.prompt for r in rows]), min(len(r.prompt) for r in rows) - 1)
    asked = [r.prompt[shared:] for r in rows]
    taught = [[*([first_id + names.index(r.control)] if r.control else []), *r.answer] for r in rows]
    x_BT, _ = pad([[*a, *t] for a, t in zip(asked, taught, strict=True)])
    place = [
        (k, len(a) - 1 + j, token, j == 0 and r.control is not None, r.own and not (j == 0 and r.control))
        for k, (r, a, t) in enumerate(zip(rows, asked, taught, strict=True))
        for j, token in enumerate(t)
    ]
    row, at, targets = torch.tensor([p[:3] for p in place]).reshape(-1, 3).T
    control, own = torch.tensor([p[3:] for p in place]).reshape(-1, 2).T
    prefix = torch.tensor([rows[0].prompt[:shared]], dtype=torch.long)
    return {
        "prefix": prefix,
        "input_ids": x_BT,
        "row": row,
        "at": at,
        "targets": targets,
        "control": control,
        "own": own,
    }


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) and the index of each row's last token (B,). Padding is never attended to."""
    lengths = torch.tensor([len(r) for r in rows])
    x = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for k, r in enumerate(rows):
        x[k, : len(r)] = torch.tensor(r, dtype=torch.long)
    return x, lengths - 1


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """The model's output with logits (N, V) of the tokens to learn: at (`row`, `at`) and nowhere else.

    The prefix that all rows share, about half of a short prompt, runs once; its keys and values are expanded
    and gradients flow through them. A prefix that a sliding window would cut runs within each row instead.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix_1P, x_BT, at = batch["prefix"], batch["input_ids"], batch["at"]
    B, P = len(x_BT), prefix_1P.shape[1]
    if P and not prefix_fits(base, P):
        x_BT, at, P = torch.cat([prefix_1P.expand(B, -1), x_BT], dim=1), at + P, 0
    cache = None
    if P:
        once = DynamicCache(config=base.config)
        base.get_decoder()(input_ids=prefix_1P, past_key_values=once, use_cache=True)
        cache = DynamicCache(config=base.config)
        for k, layer in enumerate(once.layers):
            cache.update(layer.keys.expand(B, -1, -1, -1), layer.values.expand(B, -1, -1, -1), k)
    with unembedding_at(base, batch["row"], at):
        return model(input_ids=x_BT, past_key_values=cache, use_cache=cache is not None)


@contextmanager
def unembedding_at(model: Any, row: Tensor, at: Tensor) -> Iterator[None]:
    """Let the unembedding see N asked positions alone: most of the memory of a small model, and much time."""

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        where = args[0].device
        return (args[0][row.to(where), at.to(where)], *args[1:])

    with hooked(model.get_output_embeddings().register_forward_pre_hook(take)):
        yield


def teach(batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The rows with the base model's own answers as the base sees them, without control token.

    Returns:
        A batch that predicts the tokens marked `own`, in their order; None if there are none.
    """
    own = batch["own"]
    if not own.any():
        return None
    rows, row = batch["row"][own].unique(return_inverse=True)
    x_bT, at = batch["input_ids"][rows], batch["at"][own]
    control = batch["control"] & torch.isin(batch["row"], rows)
    if control.any():
        before = batch["at"][control][:, None]  # each row's control token comes after this position
        columns = torch.arange(x_bT.shape[1] - 1, device=x_bT.device)[None]
        x_bT, at = x_bT.gather(1, columns + (columns > before)), at - 1
    return {"prefix": batch["prefix"], "input_ids": x_bT, "row": row, "at": at}


def token_loss(
    logits_NV: Tensor, batch: dict[str, Tensor], recipe: Recipe, teacher_nV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted loss, and the control tokens' own loss (0 where there are none).

    control_weight * mean cross-entropy of the control tokens
    + answer_weight * mean cross-entropy over the tokens of the refusals
    + keep_weight * mean over the tokens of own answers of KL(base || model), `teacher_nV` being the base's
      logits as `teach` asks for them. Without a teacher own answers count as refusals do.
    """
    control, own = batch["control"], batch["own"]
    ce_N = nn.functional.cross_entropy(logits_NV.float(), batch["targets"], reduction="none")
    learnt = ~control if teacher_nV is None else ~control & ~own
    decision = ce_N[control].sum() / control.sum().clamp(min=1)
    loss = recipe.control_weight * decision
    loss = loss + recipe.answer_weight * ce_N[learnt].sum() / learnt.sum().clamp(min=1)
    if teacher_nV is not None:
        loss = loss + recipe.keep_weight * _divergence(teacher_nV, logits_NV[own])
    return loss, decision


def _divergence(teacher_nV: Tensor, student_nW: Tensor) -> Tensor:
    """Mean KL(teacher || student); the student may have more tokens (W >= V)."""
    want = teacher_nV.float().log_softmax(-1)
    have = student_nW.float().log_softmax(-1)[:, : want.shape[1]]
    return (want.exp() * (want - have)).sum(-1).mean()
