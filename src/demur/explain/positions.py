"""Names for token positions that mean the same in every chat template, and states collected there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.explain.artefact import Place
from demur.explain.state_store import StateStore
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt, Site

POSITIONS = ("t_inst", "t_post", "last")
_BEFORE = re.compile(r"t_post-([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAt:
    """One token of a prompt as the model reads it.

    Attributes:
        index: counted from 0; end: counted from the end, -1 being the last. Either can name a position.
        text: the token alone, decoded; one that holds part of a character shows a replacement mark.
        names: whose text it is ("prompt" for the user's, "system", "assistant", "tool", "template", joined by "+"
            where a token holds two; left out where that cannot be told), then names of its position.
    """

    index: int
    end: int
    id: int
    text: str
    names: tuple[str, ...]


def show_positions(runtime: Runtime, prompt: Prompt) -> list[TokenAt]:
    """Every token of a prompt, with the names of the positions that states can be read at.

    Raises:
        InputError: the template cannot write the prompt, or ends it in another way than other prompts.
        CapabilityError: a runtime without a chat template; a template that runs into the message, for which
            there is no `t_inst`.

    >>> [t.text for t in show_positions(runtime, prompt) if "t_inst" in t.names]  # doctest: +SKIP
    [' egg']
    """
    chat = _chat(runtime)
    rendered = chat.render(prompt)
    ids, owners = rendered.ids, chat.owners(prompt)
    places: dict[int, list[str]] = {}
    if prompt.messages[-1].role == "user":
        places.setdefault(token_index(runtime, "t_inst"), []).append("t_inst")
        for k in range(rendered.tail):
            places.setdefault(-1 - k, []).append("t_post" if k == 0 else f"t_post-{k}")
    places.setdefault(-1, []).append("last")
    out = []
    for i, token in enumerate(ids):
        end = i - len(ids)
        whose = (
            [] if owners is None else ["+".join(sorted("prompt" if o == "user" else o for o in owners[i]))]
        )
        text = chat.tokenizer.decode([token], skip_special_tokens=False)
        out.append(TokenAt(index=i, end=end, id=token, text=text, names=(*whose, *places.get(end, ()))))
    return out


def token_index(runtime: Runtime, position: int | str) -> int:
    """The token index of a named position, counted from the end of the prompt; integers are passed through.

    `t_inst` is the last token of the user's message, `t_post` the last token that the chat template writes
    behind it, whose logits decide the first token of the answer; `t_post-1` is the token before it, and so on
    to the first that the template writes there. `last` is the last token of any prompt, also of one that ends
    in the beginning of an answer.

    Raises:
        InputError: an unknown name, a `t_post-k` that the template does not write.
        CapabilityError: `t_inst` or `t_post-k` on a runtime that writes no chat template, or with a template
            whose first characters behind the message join its last token.
    """
    if isinstance(position, int):
        return position
    before = _BEFORE.fullmatch(position)
    if position not in POSITIONS and before is None:
        raise InputError(
            f"position {position!r}; known are {', '.join(POSITIONS)}, t_post-1 and so on, or a token index "
            "such as -3"
        )
    if position in ("t_post", "last"):
        return -1
    tail = len(_chat(runtime).tail)
    if before is not None:
        if int(before[1]) >= tail:
            raise InputError(
                f"position {position!r}: the chat template of {runtime.name!r} writes {tail} tokens behind a "
                "message; the user's own end at t_inst"
            )
        return -1 - int(before[1])
    if _chat(runtime).joins:
        raise CapabilityError(
            f"the chat template of {runtime.name!r} has no boundary behind the user's message: what it writes "
            "there joins the last token of some messages, so t_inst would be another kind of token from prompt "
            "to prompt. Read t_post or a token index instead"
        )
    return -tail - 1


def _chat(runtime: Runtime) -> Any:
    chat: Any = getattr(runtime, "chat", None)
    if chat is None:
        raise CapabilityError(
            f"{runtime.name!r} shows no chat template, so positions in it cannot be named; run it locally"
        )
    chat.require_template()
    return chat


def grid(layers: Iterable[int], positions: Iterable[int | str] = ("t_inst", "t_post")) -> list[Place]:
    """Every layer at every position, layers outermost.

    >>> grid([4, 8], ["t_post"])
    [(4, 't_post'), (8, 't_post')]
    """
    names = list(positions)
    return [(int(layer), name) for layer in layers for name in names]


def collect(
    runtime: Runtime,
    prompts: Iterable[Prompt],
    sites: Sequence[Place],
    condition: Condition | None = None,
    *,
    part: Literal["block", "heads"] = "block",
    dtype: Literal["float32", "float16"] = "float32",
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[Place, npt.NDArray[Any]]:
    """Hidden states of the prompts at many sites, one forward pass a prompt.

    Memory is prompts x sites x width x 4 bytes (2 with float16): 1,000 prompts at 60 sites of width 576 are
    138 MB in float32. With `store` they lie in a file instead, memory stays flat, and a stopped job goes on
    where it was.

    Args:
        sites: (layer, position) pairs; see `token_index` and `grid`. Layers count from 0.
        part: "block" for the residual stream behind a layer, "heads" for its heads before the output projection.
        dtype: how to keep them; passes run in the model's own.
        store: a folder for `states.npy`. Another model, other prompts or other sites need another folder; so does
            a steered runtime, unless it has a name of its own.

    Returns:
        (layer, position) -> (n, width), in the order of `prompts` and under the keys that were passed in.

    Raises:
        InputError: no prompts or sites, a site twice, a layer or position that does not exist, a prompt that
            does not end with the user for `t_inst` or `t_post`, values beyond float16, a store of something else.
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
    kept = None if store is None else StateStore(store, runtime, rows, sites, condition, part, dtype)
    out, done = (None, 0) if kept is None else kept.open()
    for i, found in enumerate(runtime.states(rows[done:], wanted, condition), done):
        if out is None:  # site-major, so that each site is one block of memory
            width = found.vectors.shape[-1]
            out = np.empty((len(sites), len(rows), width), dtype) if kept is None else kept.create(width)
        with np.errstate(over="ignore"):
            out[:, i] = found.vectors
        if not np.isfinite(out[:, i]).all():
            raise InputError(
                f"prompt {found.prompt_id!r}: states that are not finite in {dtype}"
                + ("; float16 ends at 65504, collect them in float32" if dtype == "float16" else "")
            )
        if kept is not None:
            kept.commit(out, i + 1)
        if progress is not None:
            progress(i + 1, len(rows))
    assert out is not None
    return dict(zip(sites, out, strict=True))
