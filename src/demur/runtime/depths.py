"""What a model says at its answer header when the header is put behind the first d tokens of an answer.

Prompt and answer are computed once. The headers of all depths follow in one pass: a mask shows each of them
only the tokens before its depth, and positions are as if it stood there. Where the attention does not allow
such a mask (a sliding window that is shorter than the row, say), the answer's states are wound back from depth
to depth; where that does not work either (recurrent states), each depth is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from demur.errors import CapabilityError, InputError
from demur.runtime import forward, layers
from demur.runtime.columns import Columns, advance
from demur.types import Message, Prompt, Site

if TYPE_CHECKING:
    from demur.runtime.chat import ChatFormat
    from demur.runtime.local import LocalRuntime

FloatArray = NDArray[np.float32]
Way = Literal["packed", "wound", "apart"]
MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask of our own."""
_PACKS: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class DepthRow:
    """A prompt's token ids up to the answer, and the ids of an answer."""

    prompt: Sequence[int]
    answer: Sequence[int]


def header_ids(chat: ChatFormat) -> list[int]:
    """The tokens that end an assistant turn and open the next, as the chat template itself writes them.

    Behind a template without a header of its own (Llama 2), what stands between a request and its answer takes
    its place.

    Raises:
        InputError: the template writes something else behind different answers.

    >>> runtime.tokenizer.decode(header_ids(runtime.chat))  # doctest: +SKIP
    '<|im_end|>\\n<|im_start|>assistant\\n'
    """
    found = set()
    for text in chat.probes:
        messages = (Message(role="user", content="a"), Message(role="assistant", content=text))
        prompt = Prompt(id="header", messages=messages)
        written, whole = chat.render(prompt).ids, chat.render(prompt, header=True).ids
        if whole[: len(written)] != written:
            raise InputError(
                f"this chat template writes an answer of {text!r} differently once another turn follows, so it "
                "is unknown what ends the turn; the header cannot be put behind a part of an answer"
            )
        found.add(tuple(whole[len(written) :]))
    if len(found) != 1:
        raise InputError(
            f"this chat template ends a turn in {len(found)} ways, depending on the answer; the header cannot be "
            "put behind a part of an answer"
        )
    ids = list(found.pop())
    if ids[-1:] != chat.tail[-1:]:  # only the end of the turn
        ids += chat.tail
    if not ids:
        raise InputError(
            "this chat template writes nothing between a request and its answer: no header to put"
        )
    return ids


def header_states(
    runtime: LocalRuntime,
    rows: Sequence[DepthRow],
    depths: Sequence[int],
    suffix_ids: Sequence[int],
    sites: Sequence[Site],
) -> FloatArray:
    """Hidden states behind [prompt, answer[:d], suffix] at all depths d.

    Args:
        rows: prompts and answers. depths: numbers of answer tokens, any order.
        suffix_ids: usually `header_ids(runtime.chat)`.
        sites: positions count from the suffix's end (-1 its last token); -len(suffix_ids) - 1 is the last
            token before it.

    Returns:
        (len(rows), len(depths), len(sites), width) float32; NaN where an answer is shorter than the depth.

    >>> h = header_states(runtime, rows, [0, 8, 64], header, [Site(layer=15)])  # doctest: +SKIP
    """
    found = layers.find_layers(runtime.model)
    heads = layers.find_projections(runtime.model, found) if any(s.part == "heads" for s in sites) else ()
    low = -len(suffix_ids) - 1
    if not sites or any(not low <= s.position < 0 or not 0 <= s.layer < len(found) for s in sites):
        raise InputError(
            f"sites {[(s.layer, s.position) for s in sites]}: at least one is needed, layers are 0 to "
            f"{len(found) - 1}, and positions run from {low} (the token before the suffix) to -1"
        )

    def read(way: Way, row: DepthRow, some: Sequence[int]) -> Tensor:
        return _at_depths(runtime.model, way, row, some, suffix_ids, sites, (found, heads))

    return _all_rows(runtime, rows, depths, suffix_ids, read)


def header_scores(
    runtime: LocalRuntime,
    rows: Sequence[DepthRow],
    depths: Sequence[int],
    suffix_ids: Sequence[int],
    ids: Sequence[int] | None = None,
    *,
    T: float = 1.0,
) -> FloatArray:
    """Probabilities of the next token behind [prompt, answer[:d], suffix] at all depths d.

    Args:
        ids: whose probabilities; by default the control tokens in the order of `runtime.control.names`, or,
            without control tokens, the tokens that open usual refusals.
        T: softmax temperature. Others as in `header_states`.

    Returns:
        (len(rows), len(depths), len(ids)) float32; NaN where an answer is shorter than the depth.
    """
    if ids is None:
        own = runtime.control
        ids = [own.ids[c] for c in own.names] if own else runtime.openings
    columns = torch.tensor(list(ids))

    def read(way: Way, row: DepthRow, some: Sequence[int]) -> Tensor:
        z_DV = _at_depths(runtime.model, way, row, some, suffix_ids)
        z_DV = z_DV.float() / T
        return (z_DV[:, columns.to(z_DV.device)] - z_DV.logsumexp(-1, keepdim=True)).exp().cpu()

    return _all_rows(runtime, rows, depths, suffix_ids, read)


def _all_rows(
    runtime: LocalRuntime, rows: Sequence[DepthRow], depths: Sequence[int], suffix: Sequence[int], read: Any
) -> FloatArray:
    limit = getattr(layers.text_config(runtime.model), "max_position_embeddings", None)
    if not rows or not depths or not suffix or min(depths) < 0:
        raise InputError(
            f"{len(rows)} rows, depths {list(depths)}, {len(suffix)} suffix tokens: at least one of each is "
            "needed, and depths count answer tokens from 0"
        )
    out: list[Tensor | None] = []
    with runtime.edited():
        for row in rows:
            some = [d for d in depths if d <= len(row.answer)]
            longest = len(row.prompt) + max(some, default=0) + len(suffix)
            if not row.prompt or (limit and longest > limit):
                raise InputError(
                    f"a row of {longest} tokens with its header: at least one of the prompt is needed, and the "
                    f"context of {runtime.name!r} is {limit} tokens"
                )
            with forward.answers_at([len(row.prompt)]):
                out.append(read(_way(runtime.model, longest), row, some) if some else None)
    like = next((t for t in out if t is not None), None)
    shape = tuple(like.shape[1:]) if like is not None else (0,)
    table = np.full((len(rows), len(depths), *shape), np.nan, np.float32)
    for n, (row, found) in enumerate(zip(rows, out, strict=True)):
        if found is not None:
            table[n, [k for k, d in enumerate(depths) if d <= len(row.answer)]] = found.numpy()
    return table


# --- one row ----------------------------------------------------------------------------------------------------


def _at_depths(
    model: Any,
    way: Way,
    row: DepthRow,
    depths: Sequence[int],
    suffix: Sequence[int],
    sites: Sequence[Site] = (),
    modules: tuple[Sequence[nn.Module], Sequence[nn.Module]] = ((), ()),
) -> Tensor:
    """States (D, S, width) at `sites` of `modules` (blocks, projections); without sites, logits (D, V)."""
    whole, P = [*row.prompt, *row.answer], len(row.prompt)
    lead = int(any(s.position < -len(suffix) for s in sites))  # the token before the suffix is run with it
    starts = [P + d - lead for d in depths]
    feeds = [[*whole[a : a + lead], *suffix] for a in starts]
    at = [lead + len(suffix) + s.position for s in sites]
    stop = modules[0][max(s.layer for s in sites)] if sites else None

    def reader(copies: int) -> forward.SiteReader | None:
        return forward.SiteReader(*modules, list(sites) * copies) if sites else None

    found: dict[int, Tensor] = {}
    if way == "apart":
        for d, a, feed in zip(depths, starts, feeds, strict=True):
            with _reading(one := reader(1), [a + k for k in at]):
                z = forward.run(model, [[*whole[:a], *feed]], stop=stop)
            found[d] = _of(one, z)[0]
        return torch.stack([found[d] for d in depths])
    cache = Columns(model)
    forward.run(model, [whole[: P + max(depths)]], stop=stop, cache=cache)
    cache.rewind(P + max(depths))
    if way == "packed":
        with _reading(
            every := reader(len(depths)), [k * len(feeds[0]) + n for k in range(len(depths)) for n in at]
        ):
            z = _packed(cache, starts, feeds, stop)
        return _of(every, z)[0].unflatten(0, (len(depths), -1)) if every else z
    for d, a, feed in sorted(zip(depths, starts, feeds, strict=True), reverse=True):
        cache.rewind(a)
        with _reading(one := reader(1), at):
            z = advance(cache, [a], [feed], stop=stop)
        found[d] = _of(one, z)[0]
    return torch.stack([found[d] for d in depths])


def _of(reader: forward.SiteReader | None, logits: Tensor | None) -> Tensor:
    if reader is not None:
        return reader.result()
    assert logits is not None
    return logits


@contextmanager
def _reading(reader: forward.SiteReader | None, places: Sequence[int]) -> Iterator[None]:
    with ExitStack() as stack:
        if reader is not None:
            reader.start(torch.tensor([list(places)]))
            stack.enter_context(reader.installed())
        yield


def _packed(
    cache: Columns, starts: Sequence[int], feeds: Sequence[Sequence[int]], stop: nn.Module | None
) -> Tensor:
    """One pass over all `feeds` side by side, each seeing the cache up to its start: logits at their ends."""
    model, before, S = cache.model, cache.length, len(feeds[0])
    device, total = layers.input_device(model), len(feeds) * S
    open_QT = torch.zeros(total, before + total, dtype=torch.bool)
    for k, start in enumerate(starts):
        mine = slice(k * S, (k + 1) * S)
        open_QT[mine, :start] = True
        open_QT[mine, before + k * S : before + (k + 1) * S] = torch.ones(S, S, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, *open_QT.shape, dtype=model.dtype)
    mask.masked_fill_(~open_QT, torch.finfo(model.dtype).min)
    with ExitStack() as stack:
        stack.enter_context(forward.fast_linear())
        stack.enter_context(forward.stopping_after(stop))
        if stop is None:
            stack.enter_context(_unembedding_of(model, range(S - 1, total, S)))
        try:
            out = model(
                input_ids=torch.tensor([[i for feed in feeds for i in feed]], device=device),
                attention_mask=mask.to(device),
                position_ids=torch.tensor([[a + k for a in starts for k in range(S)]], device=device),
                past_key_values=cache,
                use_cache=True,
            )
        except forward.Stop:
            return torch.empty(0)
    logits: Tensor = out.logits[0]
    return logits


@contextmanager
def _unembedding_of(model: Any, places: Sequence[int]) -> Iterator[None]:
    """Let the unembedding see some positions of the one row."""

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, list(places)], *args[1:])

    with layers.hooked(model.get_output_embeddings().register_forward_pre_hook(take)):
        yield


def _way(model: Any, length: int) -> Way:
    """How a row of `length` tokens can be read."""
    try:
        Columns(model)
    except CapabilityError:
        return "apart"
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    fits = length <= min((w for w in windows if w), default=length)
    return "packed" if fits and _packs(model) else "wound"


def _packs(model: Any) -> bool:
    """Whether the model keeps to a mask and positions of our own: tried once, on a few tokens."""
    kind = str(getattr(layers.text_config(model), "_attn_implementation", None))
    known = _PACKS.setdefault(model, {})
    if kind not in known:
        known[kind] = kind in MASKED and _tried(model)
    return known[kind]


def _tried(model: Any) -> bool:
    row, depths, suffix = DepthRow([3, 5, 4, 7], [6, 3, 5, 4]), [1, 4], [7, 5]
    try:
        got = _at_depths(model, "packed", row, depths, suffix).float()
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    want = _at_depths(model, "apart", row, depths, suffix).float()
    noise = 1e-4 if model.dtype == torch.float32 else 0.05
    return got.shape == want.shape and bool((got - want).abs().max() <= noise * want.abs().max().clamp(min=1))
