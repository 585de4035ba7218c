"""A Hugging Face model in this process: scores, answers, hidden states, reversible edits."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from demur.errors import DemurError, InputError
from demur.runtime import batching, decode, forward, layers, loading, next_words
from demur.runtime.base import REFUSAL_OPENINGS, ControlTokens, Decide, Progress, Runtime, States
from demur.runtime.chat import ChatFormat
from demur.runtime.layers import BlockEdit, Edit
from demur.types import RESPOND, Condition, Prompt, Reply, Score, Site

__all__ = ["REFUSAL_OPENINGS", "BlockEdit", "Edit", "LocalRuntime"]

CPU_PASS = 512
"""Padded tokens per pass on a processor, which is busy with that many; larger batches only add padding (4096
took twice as long on 64 prompts of 3 to 180 tokens). Decoding steps are not bound by it."""

PASS_BUDGET = 4096
"""Padded tokens per batch where nothing else is asked for."""
ANSWERS_MEMORY = 2**30
"""Bytes that keys and values of a batch of answers may take, if that is more than `PASS_BUDGET` tokens: a step of
many rows costs little more than one of few (SmolLM2 in float32 on two cores: 164 ms for 27 rows, 331 ms for 144).
"""

Result = TypeVar("Result")


class LocalRuntime(Runtime):
    """A transformers causal model with its tokenizer.

    Args:
        model: a `PreTrainedModel`; it is never changed, edits are hooks that live while a batch runs.
        tokenizer: its tokenizer.
        name: what to call it. fingerprint: identifies its bytes.
        control: names of its control tokens, if it has any.
        edits: changes of the forward pass, installed in this order.
        token_budget: padded tokens per batch; halved, for all views of the model, when memory runs out. By default
            4096, and for answers as many more as keys and values fit into `ANSWERS_MEMORY`.
        template: Jinja source of a chat template, instead of the tokenizer's.
        thinking: False closes the thinking block before the answer; None leaves it to the template.

    `notes` collects what a reader of results should know (a budget that was halved).

    >>> runtime = LocalRuntime.from_folder("smollm2")  # doctest: +SKIP
    >>> next(runtime.score([Prompt.of("How do I boil an egg?")])).p_refuse  # doctest: +SKIP
    0.11
    """

    capabilities = frozenset({"generate", "score", "prefill", "states", "intervene"})
    deterministic = True
    base: LocalRuntime | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        fingerprint: str | None = None,
        control: ControlTokens | None = None,
        edits: Iterable[Edit] = (),
        token_budget: int | None = None,
        template: str | None = None,
        thinking: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.fingerprint = model.eval(), tokenizer, name, fingerprint
        self.control, self.edits = control, tuple(edits)
        # one list for all views (of passes, of answers): what does not fit for one fits for none
        self._budget = [token_budget or PASS_BUDGET, token_budget or _answers_budget(model)]
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.notes: list[str] = []
        self.chat = ChatFormat(
            tokenizer,
            template=template,
            thinking=thinking,
            control_ids=control.ids.values() if control else (),
        )
        self._lock = threading.RLock()
        self._check_control()

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        fingerprint: str | None = None,
        dtype: str = "auto",
        device_map: Any = None,
        **options: Any,
    ) -> LocalRuntime:
        """Load a checkpoint folder (or a hub id that is cached) as transformers writes it.

        Args:
            path: the folder. dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own where
                the processor or accelerator computes in it natively, float32 otherwise.
            device_map: passed on to transformers. options: see the class.
        """
        model, tokenizer = loading.load(str(path), dtype, device_map)
        return cls(model, tokenizer, name=name or Path(path).name, fingerprint=fingerprint, **options)

    def with_edits(
        self, *edits: Edit, control: ControlTokens | None = None, name: str | None = None
    ) -> LocalRuntime:
        """This model with more edits: a view that shares weights and lock; this runtime stays as it is.

        The edits change the base under an adapter as well, since it may write the answers.

        >>> steered = runtime.with_edits(BlockEdit(12, lambda h, positions: h + v))  # doctest: +SKIP
        """
        view = copy.copy(self)
        view.edits, view.name, view.notes = (*self.edits, *edits), name or self.name, []
        view.base = self.base.with_edits(*edits) if self.base is not None else None
        if control is not None:
            view.control, ids = control, control.ids.values()
            old = self.chat
            view.chat = ChatFormat(
                self.tokenizer, template=old.template, thinking=old.thinking, control_ids=ids
            )
            view._check_control()
        return view

    @property
    def token_budget(self) -> int:
        """Padded tokens per batch, as far as memory has held them."""
        return self._budget[0]

    # --- the three verbs ------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """First-position probabilities, exact over the whole (extended) vocabulary, one pass a prompt.

        Raises:
            InputError: T not positive; a prompt that cannot be written or is longer than the model's context.
            CapabilityError: the model thinks before it answers.
        """
        if not T > 0:
            raise InputError(f"T={T}: the softmax temperature must be positive")
        condition = condition or Condition()
        self.chat.require_decision()
        count = _Counter(prompts, progress)
        for window in batching.windows(prompts):
            yield from self.score_rows([(p, self._render(p, condition)) for p in window], condition, T, count)

    def problem(self, prompt: Prompt, condition: Condition | None = None) -> str | None:
        """Why the prompt cannot be written for this model or does not fit its context, or None.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        self.chat.require_template()
        try:
            self._render(prompt, condition or Condition())
        except InputError as e:
            return str(e)
        return None

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers, `samples` for each prompt. The checkpoint's own sampling settings are not used.

        With `decide`, one scoring pass (T = 1, or the rule's `T` attribute) comes first; the category it
        names is put in front of the answer as its control token. Where the rule's `answers` attribute is
        "base" and the category is `respond`, `base` answers instead, to the bare prompt. Control tokens can open
        an answer and stand nowhere else: one that the prompt begins (a last message of the assistant) has none.
        """
        if samples < 1:
            raise InputError(f"samples={samples}: at least one answer per prompt")
        if decide is not None and self.control is None:
            raise InputError(f"{self.name!r} has no control tokens, so a decision rule has nothing to force")
        condition = condition or Condition()
        count = _Counter(prompts, progress)
        for window in batching.windows(prompts, decode.WINDOW):
            yield from decode.window(self, window, condition, samples, decide, count)

    def next_words(
        self,
        prompts: Iterable[Prompt],
        words: Sequence[str],
        template: str,
        *,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Probabilities of words as the first that follows, exact over the whole vocabulary. See the base class.

        Raises:
            InputError: the tokenizer has no token for a word, or one token begins two of them.
        """
        control_ids = self.control.ids.values() if self.control else ()
        chat = ChatFormat(self.tokenizer, template=template, control_ids=control_ids)
        firsts = dict(zip(words, next_words.token_ids(self.tokenizer, words), strict=True))
        count = _Counter(prompts, progress)
        for window in batching.windows(prompts):
            yield from decode.words(self, chat, window, firsts, count)

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Condition | None = None
    ) -> Iterator[States]:
        """Hidden states at `sites`, (len(sites), width) float32 for each prompt, in site order.

        Raises:
            InputError: no sites, a layer the model does not have, a position outside a prompt.
        """
        condition = condition or Condition()
        found = layers.find_layers(self.model)
        _check_sites(sites, len(found))
        heads = layers.find_projections(self.model, found) if any(s.part == "heads" for s in sites) else ()
        reader = forward.SiteReader(found, heads, sites)
        shared: list[forward.Prefix] = []
        for window in batching.windows(prompts):
            rows = [(p, self.chat.render(p.with_system(condition.system)).ids) for p in window]
            where = [[_place(s, p, ids) for s in sites] for p, ids in rows]
            for p, ids in rows:
                self.check_fits(p, ids, 0)

            def read(
                batch: list[int], prefix: forward.Prefix | None, ids: Any = rows, at: Any = where
            ) -> list[Tensor]:
                start = prefix.length if prefix else 0
                reader.start(torch.tensor([at[i] for i in batch]) - start)
                with reader.installed():
                    forward.run(
                        self.model,
                        [ids[i][1][start:] for i in batch],
                        stop=reader.last,
                        cache=prefix.expanded(len(batch)) if prefix else None,
                    )
                return list(reader.result())

            tensors = self.batched(
                [ids for _, ids in rows], read, first=min(map(min, where)), stop=reader.last, kept=shared
            )
            tensors.reverse()
            for p, _ in rows:
                yield States(p.id, tensors.pop().numpy())  # popped: what was handed out is not held here

    # --- what they share ------------------------------------------------------------------------------------

    @contextmanager
    def edited(self) -> Iterator[None]:
        """The model with this runtime's edits, alone, without gradients. Everything is taken off on exit."""
        with self._lock, torch.inference_mode(), ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.install(self.model))
            yield

    def batched(
        self,
        rows: Sequence[Sequence[int]],
        work: Callable[[list[int], forward.Prefix | None], Sequence[Result]],
        *,
        first: int | None = None,
        stop: Any = None,
        extra: int = 0,
        share: bool = True,
        kept: list[forward.Prefix] | None = None,
    ) -> list[Result]:
        """Run `work(batch of row indices, shared prefix)` over a window; results in row order.

        Args:
            rows: token ids. first: the lowest position that is read (the shared prefix ends before it).
            stop: the module after which passes end. extra: tokens a row will grow by.
            share: whether a shared prefix may be computed apart.
            kept: holds the prefix of the window before, which is used again where this one has the same.
        """
        if not rows:
            return []
        results: list[Result | None] = [None] * len(rows)
        with self.edited():
            prefix = self._prefix(rows, first, stop, kept) if share else None
            skip = prefix.length if prefix else 0
            lengths = [len(r) - skip + extra for r in rows]
            todo = batching.plan(lengths, self.budget(extra))
            while todo:
                batch = todo.pop(0)
                try:
                    done = work(batch, prefix)
                except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
                    todo = self._replan(e, batch, [i for b in (batch, *todo) for i in b], lengths, extra)
                    continue
                for i, result in zip(batch, done, strict=True):
                    results[i] = result
        return results  # type: ignore[return-value]

    def budget(self, extra: int) -> int:
        """Padded tokens for one pass; `extra` are those that each row will grow by."""
        on_cpu = layers.input_device(self.model).type == "cpu"
        return min(self.token_budget, CPU_PASS) if on_cpu and not extra else self._budget[bool(extra)]

    def _replan(
        self, error: BaseException, batch: list[int], rest: list[int], lengths: list[int], extra: int
    ) -> list[list[int]]:
        if not _out_of_memory(error):
            raise error
        if len(batch) == 1:
            raise DemurError(f"out of memory on a single prompt of {lengths[batch[0]]} tokens") from error
        failed = max(lengths[i] for i in batch) * len(batch)
        budget = max(1, min(self.budget(extra), failed) // 2)
        self._budget[bool(extra)] = budget
        self.notes.append(f"out of memory: token budget halved to {budget}")
        logging.getLogger("demur").warning("%s: %s", self.name, self.notes[-1])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [[rest[i] for i in b] for b in batching.plan([lengths[i] for i in rest], budget)]

    def _prefix(
        self, rows: Sequence[Sequence[int]], first: int | None, stop: Any, kept: list[forward.Prefix] | None
    ) -> forward.Prefix | None:
        limit = min(map(len, rows)) - 1
        length = min(batching.common_prefix(rows), limit if first is None else min(first, limit))
        if len(rows) < 4 or length < forward.PREFIX_FLOOR or not forward.prefix_fits(self.model, length):
            return None
        ids = list(rows[0][:length])
        if kept and kept[0].ids == ids:
            return kept[0]
        prefix = forward.Prefix(self.model, ids, stop)
        if kept is not None:
            kept[:] = [prefix]
        return prefix

    def _render(self, prompt: Prompt, condition: Condition) -> list[int]:
        ids = self.chat.render(prompt.with_system(condition.system)).ids
        self.check_fits(prompt, ids, 1)
        return ids

    def check_fits(self, prompt: Prompt, ids: Sequence[int], more: int) -> None:
        """Raise `InputError` when the prompt and `more` new tokens do not fit the model's context."""
        limit = getattr(layers.text_config(self.model), "max_position_embeddings", None)
        if limit and len(ids) + more > limit:
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens and needs room for {more} more; the context of "
                f"{self.name!r} is {limit} tokens. Shorten it, or take a model with a longer context"
            )

    def score_rows(
        self,
        rows: Sequence[tuple[Prompt, list[int]]],
        condition: Condition,
        T: float = 1.0,
        count: Callable[[int], None] = lambda _n: None,
    ) -> list[Score]:
        """Scores of one window of rendered prompts, in order; `count` is told of each finished batch."""

        def work(batch: list[int], prefix: forward.Prefix | None) -> list[Score]:
            start = prefix.length if prefix else 0
            cache = prefix.expanded(len(batch)) if prefix else None
            logits_BV = forward.run(self.model, [rows[i][1][start:] for i in batch], cache=cache)
            assert logits_BV is not None
            out = self._scores([rows[i][0].id for i in batch], logits_BV, condition.name, T)
            count(len(batch))
            return out

        return self.batched([ids for _, ids in rows], work)

    def _scores(self, ids: Sequence[str], logits_BV: Tensor, condition: str, T: float) -> list[Score]:
        z_BV = logits_BV.float() / T
        lse_B1 = z_BV.logsumexp(-1, keepdim=True)
        if self.control is None:
            mass = (z_BV[:, self.openings] - lse_B1).exp().sum(-1).clamp(max=1).tolist()
            return [
                Score(id=i, p_refuse=p, T=T, kind="first_token", condition=condition)
                for i, p in zip(ids, mass, strict=True)
            ]
        names = self.control.names
        columns = torch.tensor([self.control.ids[c] for c in names], device=z_BV.device)
        table = (z_BV[:, columns] - lse_B1).exp().double().tolist()
        best = {self.control.ids[c]: c for c in names}
        top = z_BV.argmax(-1).tolist()
        return [
            Score(
                id=i,
                p_refuse=min(1.0, sum(p for c, p in zip(names, row, strict=True) if c != RESPOND)),
                probabilities=dict(zip(names, row, strict=True)),
                off_control_mass=max(0.0, 1.0 - sum(row)),
                token=best.get(t),
                T=T,
                condition=condition,
            )
            for i, row, t in zip(ids, table, top, strict=True)
        ]

    @property
    def openings(self) -> list[int]:
        """Ids of the tokens that open usual refusals (`REFUSAL_OPENINGS`)."""
        firsts = {self.tokenizer.encode(text, add_special_tokens=False)[0] for text in REFUSAL_OPENINGS}
        return sorted(firsts)

    def _check_control(self) -> None:
        if self.control is None:
            return
        with self.edited():
            logits = forward.run(self.model, [[0]])
        assert logits is not None
        if bad := {c: i for c, i in self.control.ids.items() if not 0 <= i < logits.shape[-1]}:
            raise InputError(
                f"control tokens {bad} are outside the vocabulary of {self.name!r} (ids 0 to "
                f"{logits.shape[-1] - 1}); an adapter's control rows must be installed with its edits"
            )


class _Counter:
    """Adds up finished items for a progress callback."""

    def __init__(self, items: Any, progress: Progress | None) -> None:
        self.done, self.total = 0, len(items) if isinstance(items, Sized) else None
        self.progress = progress

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)


def _check_sites(sites: Sequence[Site], n: int) -> None:
    if not sites:
        raise InputError("no sites: name at least one layer and position to read")
    if bad := [s.layer for s in sites if not 0 <= s.layer < n]:
        raise InputError(f"layer {bad[0]}: this model has layers 0 to {n - 1}")
    if len({s.part for s in sites}) > 1:
        raise InputError(
            "sites mix part 'block' and part 'heads', whose widths differ; read them in two calls"
        )


def _place(site: Site, prompt: Prompt, ids: Sequence[int]) -> int:
    if not -len(ids) <= site.position < len(ids):
        raise InputError(
            f"position {site.position} is outside prompt {prompt.id!r}, which has {len(ids)} tokens"
        )
    return site.position % len(ids)


def _answers_budget(model: Any) -> int:
    """Tokens whose keys and values fit into `ANSWERS_MEMORY`, at least `PASS_BUDGET`."""
    config = layers.text_config(model)
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    except (AttributeError, TypeError):  # no attention, or heads that differ between layers
        return PASS_BUDGET
    return max(PASS_BUDGET, ANSWERS_MEMORY // size)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
