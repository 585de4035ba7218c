"""Answers that grow side by side, one token a step, while rows join, leave and are looked at.

`LocalRuntime.generate` writes a batch from start to end. A server needs rows that come and go between steps,
and a check inside the answer needs to run a few tokens on the side and to forget them again. Both are one
loop over one cache here, on unmodified transformers models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demur.errors import InputError
from demur.runtime import batching, forward, layers
from demur.runtime.columns import Columns, advance
from demur.runtime.decode import end_ids
from demur.types import Condition, Site

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = NDArray[np.float32]
Asked = tuple[Sequence[int], Condition, bool]
"""One row to join: token ids of the prompt (with the forced control token, if any), condition, forced."""


@dataclass(slots=True)
class _Lane:
    """One row. `prompt` tokens were given, `length` are in the cache, and `pending` is the one behind these."""

    condition: Condition
    prompt: int
    pending: int
    length: int
    open: bool
    """Whether a control token may come next: the first place of an answer that was not decided."""
    draws: torch.Generator


class Lanes:
    """A changing set of rows over one model. Not for several threads at once.

    Rows are numbered by keys that are never used again. What a row says does not depend on the rows beside
    it, within rounding of sums. Greedy rows say what `LocalRuntime.generate` says; sampled rows draw from a
    generator of their own, seeded by their condition.

    Args:
        runtime: a local runtime; its edits are in force at every step.

    Attributes:
        ends: token ids that end an answer. A row goes on behind them until it is told to leave.

    Raises:
        CapabilityError: the model's past cannot be wound back (recurrent states, chunked attention).

    >>> lanes = Lanes(runtime)  # doctest: +SKIP
    >>> key = lanes.join(runtime.chat.render(prompt).ids, Condition())  # doctest: +SKIP
    >>> lanes.step()  # doctest: +SKIP
    {0: 504}
    """

    def __init__(self, runtime: LocalRuntime) -> None:
        self.runtime, self.ends = runtime, tuple(end_ids(runtime))
        self._control = list(runtime.control.ids.values()) if runtime.control else []
        self._cache = Columns(runtime.model)
        self._lanes: dict[int, _Lane] = {}
        self._joined = 0

    def __len__(self) -> int:
        return len(self._lanes)

    def __contains__(self, key: object) -> bool:
        return key in self._lanes

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys of the rows under way, oldest first."""
        return tuple(self._lanes)

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return self._cache.bytes

    # --- rows -----------------------------------------------------------------------------------------------

    def join(self, ids: Sequence[int], condition: Condition | None = None, *, forced: bool = False) -> int:
        """Take in one row and return its key. See `join_all`."""
        return self.join_all([(ids, condition or Condition(), forced)])[0]

    def join_all(self, rows: Sequence[Asked]) -> list[int]:
        """Take in rows: one padded pass over their prompts, in which a prompt that begins another is free.

        Args:
            rows: (token ids, condition, forced) each. `forced` says that the answer has been opened already, by
                a control token or by text at the end of the ids: no control token may come next. Of the
                condition, temperature, top_p, seed and (for the context only) max_new_tokens are read.

        Raises:
            InputError: a row without tokens, or longer than the model's context.
        """
        for ids, condition, _ in rows:
            self._check(ids, condition)
        with self.runtime.edited():
            computed = self._computed([list(ids[:-1]) for ids, _, _ in rows])
            self._cache = self._cache.joined(len(self), computed)
        keys = list(range(self._joined, self._joined + len(rows)))
        self._joined += len(rows)
        for key, (ids, condition, forced) in zip(keys, rows, strict=True):
            draws = torch.Generator().manual_seed(condition.seed)
            self._lanes[key] = _Lane(condition, len(ids), int(ids[-1]), len(ids) - 1, not forced, draws)
        return keys

    def leave(self, *keys: int) -> None:
        """Drop rows and free what they held. Unknown keys (rows that have left) are passed over."""
        kept = [n for n, key in enumerate(self._lanes) if key not in keys]
        if len(kept) == len(self):
            return
        self._lanes = {key: lane for key, lane in self._lanes.items() if key not in keys}
        longest = max((lane.length for lane in self._lanes.values()), default=0)
        with torch.inference_mode():
            self._cache = self._cache.chosen(kept, longest) if kept else Columns(self.runtime.model)

    def step(self) -> dict[int, int]:
        """Write one token in every row: {key: token id}."""
        if not self._lanes:
            return {}
        lanes, cache = list(self._lanes.values()), self._cache
        before = cache.length
        with self.runtime.edited(), forward.answers_at([lane.prompt for lane in lanes]):
            try:
                logits_BV = advance(cache, [a.length for a in lanes], [[a.pending] for a in lanes])
                tokens = self._sampled(logits_BV, lanes)
            except BaseException:
                cache.rewind(before)
                raise
        for lane, token in zip(lanes, tokens, strict=True):
            lane.pending, lane.length, lane.open = token, lane.length + 1, False
        return dict(zip(self._lanes, tokens, strict=True))

    # --- looking without a trace ----------------------------------------------------------------------------

    def peek(self, keys: Sequence[int], suffix_ids: Sequence[int], sites: Sequence[Site]) -> FloatArray:
        """Hidden states behind a suffix that is run on the side; the rows go on as if nothing had been.

        Args:
            keys: rows to look at. suffix_ids: tokens put behind what each row has written so far.
            sites: positions count from the suffix's end (-1 its last token); the lowest that can be read is
                the row's last token, -len(suffix_ids) - 1. Layers behind the last one read are not run.

        Returns:
            (len(keys), len(sites), width), float32.
        """
        width = len(suffix_ids) + 1
        if not suffix_ids or not sites or any(not -width <= s.position < 0 for s in sites):
            raise InputError(
                f"peek with {len(suffix_ids)} suffix tokens and positions {[s.position for s in sites]}: at least "
                f"one of each is needed, and positions run from -{width} (the row's last token) to -1"
            )
        if not keys:
            return np.zeros((0, len(sites), 0), np.float32)
        heads = self._projections if any(s.part == "heads" for s in sites) else ()
        reader = forward.SiteReader(self._layers, heads, sites)
        top = 1 + max(s.layer for s in sites)
        with self.runtime.edited(), self._forked(keys, top) as (cache, lanes):
            reader.start(torch.tensor([[width + s.position for s in sites]] * len(lanes)))
            with reader.installed():
                feed = [[lane.pending, *suffix_ids] for lane in lanes]
                advance(cache, [a.length for a in lanes], feed, stop=reader.last)
            found: FloatArray = reader.result().numpy()
        return found[self._order(keys)]

    def masses(self, keys: Sequence[int], suffix_ids: Sequence[int], ids: Sequence[int]) -> FloatArray:
        """Probabilities of some next tokens behind a suffix that is run on the side, over the whole vocabulary.

        Returns:
            (len(keys), len(ids)), float32.
        """
        if not suffix_ids or not ids:
            raise InputError(f"masses with {len(suffix_ids)} suffix tokens and {len(ids)} ids: give both")
        if not keys:
            return np.zeros((0, len(ids)), np.float32)
        with self.runtime.edited(), self._forked(keys) as (cache, lanes):
            feed = [[lane.pending, *suffix_ids] for lane in lanes]
            logits_BV = advance(cache, [a.length for a in lanes], feed)
            found: FloatArray = logits_BV.softmax(-1)[:, list(ids)].cpu().numpy()
        return found[self._order(keys)]

    def look_ahead(self, keys: Sequence[int], suffix_ids: Sequence[int], n: int) -> list[list[int]]:
        """What each row would say next behind a suffix: up to `n` greedy tokens, cut behind an end token.

        A control token may come first here, as behind any header. The rows themselves stay as they are.
        """
        if n < 1:
            raise InputError(f"look_ahead with n={n}: at least one token")
        if not keys:
            return []
        with self.runtime.edited(), self._forked(keys) as (cache, lanes):
            said: list[list[int]] = [[] for _ in lanes]
            feed = [[lane.pending, *suffix_ids] for lane in lanes]
            for k in range(n):
                logits_BV = advance(cache, [a.length for a in lanes], feed)
                if k:
                    logits_BV[:, self._control] = -torch.inf
                for lane, row, fed, token in zip(
                    lanes, said, feed, logits_BV.argmax(-1).tolist(), strict=True
                ):
                    lane.length += len(fed)
                    row.append(token)
                if all(any(t in self.ends for t in row) for row in said):
                    break
                feed = [[row[-1]] for row in said]
        cut = [row[: 1 + next((k for k, t in enumerate(row) if t in self.ends), n)] for row in said]
        return [cut[k] for k in self._order(keys)]

    @contextmanager
    def _forked(self, keys: Sequence[int], top: int | None = None) -> Iterator[tuple[Columns, list[_Lane]]]:
        """A cache to write in, and copies of the rows, in lane order: all rows in place, some as a copy."""
        if unknown := [k for k in keys if k not in self._lanes]:
            raise InputError(f"no row {unknown[0]}: rows under way are {list(self._lanes)}")
        rows = [n for n, key in enumerate(self._lanes) if key in keys]
        lanes = [replace(lane) for key, lane in self._lanes.items() if key in keys]
        with forward.answers_at([lane.prompt for lane in lanes]):
            if len(rows) < len(self):
                yield self._cache.chosen(rows, max(lane.length for lane in lanes), top), lanes
                return
            before = self._cache.length
            try:
                yield self._cache, lanes
            finally:
                self._cache.rewind(before)

    def _order(self, keys: Sequence[int]) -> list[int]:
        place = {key: n for n, key in enumerate(k for k in self._lanes if k in set(keys))}
        return [place[key] for key in keys]

    # --- passes ---------------------------------------------------------------------------------------------

    @cached_property
    def _layers(self) -> list[nn.Module]:
        return layers.find_layers(self.runtime.model)

    @cached_property
    def _projections(self) -> list[nn.Module]:
        return layers.find_projections(self.runtime.model, self._layers)

    def _check(self, ids: Sequence[int], condition: Condition) -> None:
        limit = getattr(layers.text_config(self.runtime.model), "max_position_embeddings", None)
        if not ids or (limit and len(ids) + condition.max_new_tokens > limit):
            raise InputError(
                f"a row of {len(ids)} tokens and {condition.max_new_tokens} new ones: at least one token is "
                f"needed, and the context of {self.runtime.name!r} is {limit or 'unlimited'} tokens"
            )

    def _computed(self, heads: Sequence[list[int]]) -> list[tuple[Columns, int, int]]:
        """Where the states of each prompt are: (cache, row in it, length)."""
        owner: dict[int, int] = {}
        last: int | None = None
        for n in sorted(range(len(heads)), key=lambda n: heads[n], reverse=True):
            # in falling order, what a prompt begins stands directly before it
            begins = last is not None and heads[last][: len(heads[n])] == heads[n]
            owner[n] = owner[last] if last is not None and begins else n
            last = n
        todo = [n for n in owner if owner[n] == n]
        where: dict[int, tuple[Columns, int]] = {}
        for batch in batching.plan([len(heads[n]) for n in todo], self.runtime.budget(0)):
            part = Columns(self.runtime.model)
            rows = [todo[b] for b in batch]
            if any(heads[n] for n in rows):
                forward.run(self.runtime.model, [heads[n] for n in rows], cache=part)
            where.update({n: (part, k) for k, n in enumerate(rows)})
        return [(*where[owner[n]], len(heads[n])) for n in range(len(heads))]

    def _sampled(self, logits_BV: Tensor, lanes: Sequence[_Lane]) -> list[int]:
        if self._control:
            closed_B1 = torch.tensor([not lane.open for lane in lanes], device=logits_BV.device)[:, None]
            logits_BV[:, self._control] = logits_BV[:, self._control].masked_fill(closed_B1, -torch.inf)
        tokens: list[int] = logits_BV.argmax(-1).tolist()
        for b, lane in enumerate(lanes):
            if lane.condition.temperature > 0:
                tokens[b] = _drawn(logits_BV[b].cpu(), lane.condition, lane.draws)
        return tokens


def _drawn(logits_V: Tensor, condition: Condition, draws: torch.Generator) -> int:
    """One token from the smallest set of likeliest ones that holds `top_p` of the mass."""
    # the maximum comes off first, and one token is always kept: no temperature or top_p may give NaN or nothing
    z_V, ids_V = ((logits_V - logits_V.max()).double() / condition.temperature).sort(descending=True)
    p_V = z_V.softmax(-1)
    if condition.top_p < 1:
        kept_V = p_V.cumsum(-1) - p_V < condition.top_p
        kept_V[0] = True
        p_V = p_V * kept_V
    return int(ids_V[torch.multinomial(p_V, 1, generator=draws)])
