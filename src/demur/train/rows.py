"""Control rows before any gradient step: a linear probe written into the unembedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from demur.runtime.control_rows import ControlRows
from demur.runtime.layers import hooked, input_device
from demur.train.batch import collate, forward
from demur.train.refusal_tokens import Progress, Recipe, Row, control_of
from demur.types import RESPOND, PromptSet

FloatArray = npt.NDArray[np.float64]
_OPENINGS = ("I'm sorry, but I can't", "\n")
"""Texts whose mean embedding starts the input rows of refuse tokens and of `respond`."""


class Rows(nn.Module):
    """Trainable control rows; `edit()` is what the runtime installs."""

    def __init__(self, input_rows: Tensor, output_rows: Tensor, first_id: int) -> None:
        super().__init__()
        self.input = nn.Parameter(input_rows.clone())
        self.output = nn.Parameter(output_rows.clone())
        self.first_id = first_id

    def edit(self) -> ControlRows:
        """The rows as an edit, installed anew for each step: a backward pass frees the graph behind it."""
        return ControlRows(self.input, self.output, self.first_id)


def initial_rows(
    runtime: Any, prompts: PromptSet, names: Sequence[str], recipe: Recipe, note: Progress
) -> tuple[Tensor, Tensor]:
    """Input and output rows, both (K, d) float32, before any gradient step.

    Output rows: a multinomial logistic probe on the states that enter the unembedding, with its bias and a
    margin written as directions. A ridge fit finds u with u.h close to 1 on every prompt, and v with v.h
    close to the log-sum-exp of the base logits plus `leak` minus log K; row_c = w_c + b_c u + v then has the
    probe's log-odds between control tokens and leaves about exp(-leak) of the mass to all other tokens.
    """
    from sklearn.linear_model import LogisticRegression

    ids = [runtime.chat.render(p).ids for p in prompts]
    with runtime.edited():
        H, lse = _head_inputs(runtime.model, ids, note)
    y = np.array([names.index(control_of(p, recipe.mode) or RESPOND) for p in prompts])
    mean, std = H.mean(0), H.std(0) + 1e-3
    probe = LogisticRegression(C=recipe.probe_C, max_iter=500).fit((H - mean) / std, y)
    coef, bias = probe.coef_, probe.intercept_
    if len(names) == 2:  # scikit-learn keeps one row for two classes
        coef, bias = np.vstack([-coef[0], coef[0]]) / 2, np.array([-bias[0], bias[0]]) / 2
    W = coef / std
    offset = bias - W @ mean
    gram = H.T @ H + 1e-3 * len(H) * np.eye(H.shape[1])
    goals = np.stack([np.ones(len(H)), lse + recipe.leak - np.log(len(names))], axis=1)
    u, v = np.linalg.solve(gram, H.T @ goals).T
    out = torch.tensor(W + offset[:, None] * u + v, dtype=torch.float32)
    refuse, respond = (_mean_embedding(runtime, text) for text in _OPENINGS)
    return torch.stack([respond if n == RESPOND else refuse for n in names]), out


def _mean_embedding(runtime: Any, text: str) -> Tensor:
    """Mean row of the text's tokens; of the whole table where the tokenizer makes nothing of the text."""
    table = runtime.model.get_input_embeddings().weight.detach().float().cpu()
    ids = runtime.tokenizer(text, add_special_tokens=False)["input_ids"]
    mean: Tensor = (table[ids] if ids else table).mean(0)
    return mean


def _head_inputs(model: Any, ids: list[list[int]], note: Progress) -> tuple[FloatArray, FloatArray]:
    """States that enter the unembedding at the decision position (n, d), log-sum-exp of its logits (n,)."""
    seen: list[Tensor] = []
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    H = np.zeros((len(ids), model.get_input_embeddings().weight.shape[1]))
    lse = np.zeros(len(ids))
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        inputs = collate([Row(ids[i], None, [0]) for i in batch], (), 0)
        with hooked(
            model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
        ):
            logits = forward(model, {k: v.to(input_device(model)) for k, v in inputs.items()}).logits
        H[batch] = seen.pop().float().cpu().numpy()
        lse[batch] = logits.float().logsumexp(-1).cpu().numpy()
        note("control rows", start + len(batch), len(order))
    return H, lse
