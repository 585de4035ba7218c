"""States of the tokens of given answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.types import Condition, Message, Prompt, Site

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime


def reply_states(
    runtime: LocalRuntime,
    said: Sequence[tuple[Prompt, str]],
    layers: Sequence[int],
    condition: Condition | None = None,
    *,
    drop: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """States of the tokens of given answers, one at a time, as (row, states (tokens, layers, width)).

    Rows come grouped by the number of their tokens, not in order. What all prompts share is computed once.

    Args:
        said: prompts, each with an answer. drop: tokens left out at the end; one is always kept.

    Raises:
        InputError: an empty answer, or one that does not fit the context. CapabilityError: no states here, or a
            template that writes a finished answer differently from one it opens.
    """
    runtime.require("states")
    condition = condition or Condition()
    by_size: dict[int, list[int]] = {}
    rows = []
    for i, (prompt, answer) in enumerate(said):
        if not answer.strip():
            raise InputError(
                f"prompt {prompt.id!r}: its answer is empty, so it has no tokens to read. Leave the row out, or "
                "give the text that was answered"
            )
        prompt = prompt.with_system(condition.system)
        spoken = Message(role="assistant", content=answer.strip())
        full = Prompt(id=prompt.id, messages=(*prompt.messages, spoken))
        before, both = runtime.chat.render(prompt).ids, runtime.chat.render(full).ids
        if both[: len(before)] != before or len(both) == len(before):
            raise CapabilityError(
                f"the chat template of {runtime.name!r} writes a finished answer differently from one that it "
                "opens, so the tokens of a given answer cannot be told apart"
            )
        rows.append(full)
        by_size.setdefault(len(both) - len(before), []).append(i)
    done = 0
    for size, chosen in sorted(by_size.items()):
        ends = range(-size, max(-drop, 1 - size))
        sites = [Site(layer=layer, position=t) for t in ends for layer in layers]
        for i, found in zip(chosen, runtime.states([rows[i] for i in chosen], sites), strict=True):
            yield i, np.asarray(found.vectors, np.float32).reshape(len(ends), len(layers), -1)
            done += 1
            if progress is not None:
                progress(done, len(said))


def mean_states(
    runtime: LocalRuntime,
    said: Sequence[tuple[Prompt, str]],
    layers: Sequence[int],
    condition: Condition | None = None,
    *,
    drop: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """The mean over each answer's tokens, (n, layers, width).

    A linear probe's score of the mean is the mean of its scores, so this is all that scoring answers needs.
    """
    out: npt.NDArray[np.float32] | None = None
    for i, states in reply_states(runtime, said, layers, condition, drop=drop, progress=progress):
        if out is None:
            out = np.empty((len(said), *states.shape[1:]), np.float32)
        out[i] = states.mean(axis=0)
    if out is None:
        raise InputError("no answers were given, so there is nothing to read")
    return out
