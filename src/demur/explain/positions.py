"""Names for token positions that mean the same in every chat template, and states collected there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.explain.artefact import Place
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt, Site

POSITIONS = ("t_inst", "t_post", "last")


def token_index(runtime: Runtime, position: int | str) -> int:
    """The token index of a named position, counted from the end of the prompt; integers are passed through.

    `t_inst` is the last token of the user's message, `t_post` the last token that the chat template writes
    behind it, whose logits decide the first token of the answer. `last` is the last token of any prompt, also
    of one that ends in the beginning of an answer.

    Raises:
        InputError: an unknown name. CapabilityError: `t_inst` on a runtime that writes no chat template.
    """
    if isinstance(position, int):
        return position
    if position not in POSITIONS:
        raise InputError(
            f"position {position!r}; known are {', '.join(POSITIONS)}, or a token index such as -3"
        )
    if position != "t_inst":
        return -1
    chat: Any = getattr(runtime, "chat", None)
    if chat is None:
        raise CapabilityError(
            f"{runtime.name!r} shows no chat template, so t_inst cannot be found; run it locally"
        )
    chat.require_template()
    return -len(chat.tail) - 1


def grid(layers: Iterable[int], positions: Iterable[int | str] = ("t_inst", "t_post")) -> list[Place]:
    """Every layer at every position, layers outermost.

    >>> grid([4, 8], ["t_post"])
    [(4, 't_post'), (8, 't_post')]
    """
    names = list(positions)
    return [(layer, name) for layer in layers for name in names]


def collect(
    runtime: Runtime,
    prompts: Iterable[Prompt],
    sites: Sequence[Place],
    condition: Condition | None = None,
    *,
    part: Literal["block", "heads"] = "block",
    dtype: Literal["float32", "float16"] = "float32",
    progress: Progress | None = None,
) -> dict[Place, npt.NDArray[Any]]:
    """Hidden states of the prompts at many sites, one forward pass a prompt.

    Memory is prompts x sites x width x 4 bytes (2 with float16): 1,000 prompts at 60 sites of width 576 are
    138 MB in float32.

    Args:
        sites: (layer, position) pairs; see `token_index` and `grid`. Layers count from 0.
        part: "block" for the residual stream behind a layer, "heads" for its heads before the output projection.
        dtype: how to keep them; passes run in the model's own.

    Returns:
        (layer, position) -> (n, width), in the order of `prompts` and under the keys that were passed in.

    Raises:
        InputError: no prompts or sites, a site twice, a layer or position that does not exist, a prompt that
            does not end with the user for `t_inst` or `t_post`, values beyond float16.
        CapabilityError: the runtime gives no states.

    >>> states = collect(runtime, prompts, grid(range(30), ["t_post"]))  # doctest: +SKIP
    >>> states[12, "t_post"].shape  # doctest: +SKIP
    (200, 576)
    """
    runtime.require("states")
    rows = tuple(prompts)
    if not rows or not sites:
        raise InputError(
            f"{len(rows)} prompts at {len(sites)} sites; collecting states needs at least one of each"
        )
    if len(set(sites)) < len(sites):
        raise InputError("a site is named twice; each (layer, position) once")
    if any(name in ("t_inst", "t_post") for _, name in sites):
        for prompt in rows:
            if prompt.messages[-1].role != "user":
                raise InputError(
                    f"prompt {prompt.id!r} ends with a message of the {prompt.messages[-1].role}: t_inst and "
                    "t_post are places behind a user's message; take `last` or a token index"
                )
    wanted = [Site(layer=layer, position=token_index(runtime, name), part=part) for layer, name in sites]
    out: npt.NDArray[Any] | None = None
    for i, found in enumerate(runtime.states(rows, wanted, condition)):
        if out is None:  # site-major, so that each site is one block of memory
            out = np.empty((len(sites), len(rows), found.vectors.shape[-1]), dtype)
        with np.errstate(over="ignore"):
            out[:, i] = found.vectors
        if not np.isfinite(out[:, i]).all():
            raise InputError(
                f"prompt {found.prompt_id!r}: states that are not finite in {dtype}"
                + ("; float16 ends at 65504, collect them in float32" if dtype == "float16" else "")
            )
        if progress is not None:
            progress(i + 1, len(rows))
    assert out is not None
    return dict(zip(sites, out, strict=True))
