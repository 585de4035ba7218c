"""How likely a model finds a given answer: forced continuations of a prompt, one pass each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from demur.errors import CapabilityError, InputError
from demur.runtime import batching
from demur.runtime.layers import hooked, input_device
from demur.types import Condition, Message, Prompt

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

Stage = Callable[[str, int, int | None], None]


def answer_loglik(
    runtime: LocalRuntime,
    asked: Sequence[tuple[Prompt, str]],
    condition: Condition | None = None,
    *,
    progress: Stage | None = None,
) -> list[tuple[float, int]]:
    """Log-likelihood in nats, and number of tokens, of each given answer to its prompt.

    The end-of-turn token is not counted. One pass an answer; what all prompts share is computed once.

    Raises:
        InputError: an answer without text, a prompt with answer that does not fit the context.
        CapabilityError: not a local model, or a model that thinks before it answers.
    """
    runtime.require("states")
    runtime.chat.require_decision()
    condition = condition or Condition()
    out: list[tuple[float, int]] = []
    for window in batching.windows(asked):
        rows = [_answered(runtime, p, answer, condition) for p, answer in window]

        def work(batch: list[int], prefix: Any, rows: Any = rows) -> list[tuple[float, int]]:
            return _loglik(runtime, [rows[i] for i in batch], prefix)

        first = min(start for _, start in rows) - 1
        out += runtime.batched([ids for ids, _ in rows], work, first=first)
        if progress is not None:
            progress("likelihood of answers", len(out), len(asked))
    return out


def _answered(
    runtime: LocalRuntime, prompt: Prompt, answer: str, condition: Condition
) -> tuple[list[int], int]:
    """Token ids of a prompt with its answer, and where the answer starts."""
    if not answer.strip():
        raise InputError(f"prompt {prompt.id!r}: an answer is empty, so it has no likelihood per token")
    prompt = prompt.with_system(condition.system)
    said = Message(role="assistant", content=answer.strip())
    before = runtime.chat.render(prompt).ids
    both = runtime.chat.render(Prompt(id=prompt.id, messages=(*prompt.messages, said))).ids
    if both[: len(before)] != before or len(both) == len(before):
        raise CapabilityError(
            f"the chat template of {runtime.name!r} writes a finished answer differently from one that it "
            "opens, so the likelihood of a given answer cannot be read from it"
        )
    runtime.check_fits(prompt, both, 0)
    return both, len(before)


def _loglik(runtime: Any, rows: Sequence[tuple[list[int], int]], prefix: Any) -> list[tuple[float, int]]:
    """Log-likelihoods of one batch; the unembedding sees only the positions that predict answer tokens."""
    skip = prefix.length if prefix else 0
    longest = max(len(ids) for ids, _ in rows) - 1 - skip
    device = input_device(runtime.model)
    # rows are padded on the right without a mask: attention is causal
    tokens_BT = [[*ids[skip:-1], *[0] * (longest - len(ids) + 1 + skip)] for ids, _ in rows]
    places = [(r, t - 1 - skip) for r, (ids, start) in enumerate(rows) for t in range(start, len(ids))]
    row_N, place_N = torch.tensor(places, device=device).unbind(1)
    target_N = torch.tensor([t for ids, start in rows for t in ids[start:]], device=device)

    def take(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h_BTD = args[0]
        return (h_BTD[row_N.to(h_BTD.device), place_N.to(h_BTD.device)][None], *args[1:])

    with hooked(runtime.model.get_output_embeddings().register_forward_pre_hook(take)):
        logits = runtime.model(
            input_ids=torch.tensor(tokens_BT, device=device),
            past_key_values=prefix.expanded(len(rows)) if prefix else None,
            use_cache=prefix is not None,
        ).logits
    if logits.shape[:2] != (1, len(places)):
        raise CapabilityError(
            f"{type(runtime.model).__name__} does not compute its logits through its unembedding module, so "
            "the likelihood of an answer cannot be read from it"
        )
    said = logits[0].float().log_softmax(-1)[torch.arange(len(places)), target_N.to(logits.device)]
    sizes = [len(ids) - start for ids, start in rows]
    return [(float(part.double().sum()), len(part)) for part in said.cpu().split(sizes)]
