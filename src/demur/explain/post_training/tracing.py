"""Causal tracing: copy the state of a true statement into the run of a false or a noised one, cell by cell.

A cell is a layer and a token. Copying the output of block l at token t leaves everything before t and everything
up to block l as it was, so only the blocks behind l run again, only on the tokens from t on, on top of the kept
keys and values of the false run; pairs are batched, and the labelled examples before them are computed once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from demur.errors import InputError
from demur.explain.post_training.noise import Noise, adding
from demur.explain.post_training.results import Role
from demur.explain.post_training.statements import ANSWERS, SUFFIX, Pair
from demur.runtime import forward
from demur.runtime.layers import find_layers, first_tensor, hooked, with_first

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]
Stage = Callable[[str, int, int | None], None]
LEAST = 20
"""Fewer pairs than this give no map worth comparing."""
TOGETHER = 32
"""Pairs in one pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """Pairs whose statements have the same shape in one tokenizer.

    Attributes:
        true, false: token ids (n, T): what comes before, statement, question. start: first token of the statement.
        columns, roles: of the tokens from `start` on. subject: first token that may differ, counted from 0.
        answers: (n, 2) ids of the two answers. pairs: those that are traced; left_out: how many have another shape.
    """

    true: npt.NDArray[np.int64]
    false: npt.NDArray[np.int64]
    start: int
    columns: tuple[str, ...]
    roles: tuple[Role, ...]
    subject: int
    answers: npt.NDArray[np.int64]
    pairs: tuple[Pair, ...]
    left_out: int


def align(
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    before: str = "",
    most: int | None = None,
    least: int = LEAST,
) -> Aligned:
    """The pairs whose two statements split into tokens alike, and like most of the others.

    Alike means: the same number of tokens before the subject, in it, and up to the last word. Of several shapes
    the commonest is kept, and of its pairs `most`, evenly spread over the list.

    Args:
        before: examples, ending where the statement begins. Behind a pair without answers of its own stands
            the question, whose answers are TRUE and FALSE.

    Raises:
        InputError: fewer than `least` pairs are left, or a pair does not end with the same word, or does not
            differ before it.

    >>> aligned = align(runtime.tokenizer, load_pairs(), before=FEW_SHOT)  # doctest: +SKIP
    >>> aligned.columns  # doctest: +SKIP
    ('The', 'city', 'of', 's1', 's2', 's3', 'is', 'in', 'Egypt', '.', 'This', 'statement', 'is', ':')
    """
    shapes: dict[tuple[int, ...], list[tuple[Pair, list[int], list[int], tuple[int, int]]]] = {}
    for pair in pairs:
        suffix = SUFFIX if pair.answers is None else ""
        both = [_tokens(tokenizer, before, text, suffix, span) for text, span in _spans(pair)]
        answers = answer_ids(tokenizer, before + pair.true + suffix, pair.answers or ANSWERS)
        if both[0][1] == both[1][1] and answers is not None:
            shapes.setdefault(both[0][1], []).append((pair, both[0][0], both[1][0], answers))
    shape, kept = max(shapes.items(), key=lambda kv: len(kv[1]), default=((), []))
    if len(kept) < least:
        raise InputError(
            f"{len(kept)} of {len(pairs)} pairs split into tokens alike; a map needs at least {least}. Both "
            "statements of a pair need a subject of the same number of tokens, and pairs the same sentence, "
            "and their answers must begin with different tokens"
        )
    left_out = len(pairs) - len(kept)
    if most is not None and len(kept) > most:
        kept = [kept[i * len(kept) // most] for i in range(most)]
    start, *bounds, total = shape
    words, roles = _columns(tokenizer, kept[0][1][start:total], [b - start for b in bounds])
    return Aligned(
        true=np.array([row[1] for row in kept]),
        false=np.array([row[2] for row in kept]),
        start=start,
        columns=words,
        roles=roles,
        subject=bounds[0] - start,
        answers=np.array([row[3] for row in kept]),
        pairs=tuple(row[0] for row in kept),
        left_out=left_out,
    )


def _columns(
    tokenizer: Any, ids: Sequence[int], bounds: Sequence[int]
) -> tuple[tuple[str, ...], tuple[Role, ...]]:
    """Names and roles of the tokens: s1, s2 ... in the subject, o1 ... in the object, else their text."""
    words = [tokenizer.decode([i]).strip() or repr(tokenizer.decode([i])) for i in ids]
    roles: list[Role] = ["other"] * len(words)
    s1, s2, o1, o2 = bounds
    parts: tuple[tuple[Role, int, int], ...] = (("subject", s1, s2), ("object", o1, o2))
    for role, first, last in parts:
        for i in range(first, last):
            words[i], roles[i] = f"{role[0]}{i - first + 1}", role
    return tuple(words), tuple(roles)


def answer_ids(tokenizer: Any, context: str, answers: tuple[str, str]) -> tuple[int, int] | None:
    """The first token of each answer behind `context`; None where they are the same or merge with what precedes."""
    head = plain_ids(tokenizer, context)
    whole = [plain_ids(tokenizer, context + answer) for answer in answers]
    if any(ids[: len(head)] != head or len(ids) == len(head) for ids in whole):
        return None
    yes, no = (ids[len(head)] for ids in whole)
    return None if yes == no else (yes, no)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of raw text, as the tokenizer itself begins it; special tokens in it stay text."""
    ids: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids


def _spans(pair: Pair) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Characters of the subject (where the two differ, in whole words) and of the object, in both texts.

    The object is the last word of a statement; a sentence to be completed has none.
    """
    a, b = pair.true.split(), pair.false.split()
    shorter = min(len(a), len(b))
    head = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    tail = next((i for i in range(shorter - head) if a[-1 - i] != b[-1 - i]), shorter - head)
    out = []
    for text in (pair.true, pair.false):
        words = [m.span() for m in re.finditer(r"\S+", text)]
        last = max((k for k, w in enumerate(words) if re.search(r"\w", text[slice(*w)])), default=0)
        if head + tail >= shorter or last < len(words) - tail:
            raise InputError(
                f"pair {pair.true!r}, {pair.false!r}: they must differ in their subject and end with the same word"
            )
        object_ = words[last] if pair.answers is None else (len(text), len(text))
        end = object_[0] + len(text[slice(*object_)].rstrip(".!?;:,\"'"))
        out.append((text, (words[head][0], words[len(words) - tail - 1][1], object_[0], end)))
    return out


def _tokens(
    tokenizer: Any, before: str, text: str, suffix: str, span: tuple[int, int, int, int]
) -> tuple[list[int], tuple[int, ...]]:
    """Ids and shape: token indices of statement start, subject and object bounds, and the end."""
    made = tokenizer(before + text + suffix, split_special_tokens=True, return_offsets_mapping=True)
    ends = [b for _, b in made["offset_mapping"]]
    full = "".join((before, text, suffix))

    def at(char: int) -> int:
        """Tokens that end at or before a character, white space behind a token aside."""
        return sum(b <= char or not full[char:b].strip() for b in ends)

    edges = [at(len(before) + c) for c in (0, *span)]
    return made["input_ids"], (*edges, len(ends))


# --- tracing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A patch map for each pair.

    Attributes:
        cells: (n, layers, columns) logit(first answer) - logit(second) after the copy. false, true: (n,) the same
            in the runs without a copy. With noise, `false` is the noised true run, and it and `cells` are means
            over the draws.
    """

    cells: FloatArray
    false: FloatArray
    true: FloatArray

    @property
    def gain(self) -> FloatArray:
        """What the copy changes, (n, layers, columns): cells - false."""
        return self.cells - self.false[:, None, None]


def trace(
    runtime: LocalRuntime,
    aligned: Aligned,
    *,
    source: LocalRuntime | None = None,
    noise: Noise | None = None,
    progress: Stage | None = None,
    label: str = "tracing",
) -> Trace:
    """Patch every cell of every pair. With `source`, the true states are those of that model.

    With `noise`, the run that is patched is not the false statement's but the true one's, the embeddings of its
    subject disturbed; the false statement only gives the second answer.

    Tokens before the subject are the same in both runs, so copying them within one model changes nothing; these
    cells hold the false run's value. With another `source` they are patched too.

    Raises:
        InputError: the source has other layers or another width; noise and no token of the subject.
        CapabilityError: blocks that cannot be told.
    """
    blocks = find_layers(runtime.model)
    n, T = aligned.true.shape
    first = aligned.start + (aligned.subject if source is None else 0)
    draws = [None] if noise is None else noise.drawn(runtime, aligned)
    ids = aligned.false if noise is None else aligned.true
    cells = np.zeros((n, len(blocks), T - aligned.start))
    margins = np.zeros((2, n))
    done, passes = count(1), -(-n // TOGETHER) * len(draws) * (T - first)

    def tell() -> None:
        if progress is not None:
            progress(label, next(done), passes)

    for begin in range(0, n, TOGETHER):
        rows = slice(begin, min(begin + TOGETHER, n))
        of_true = _Run(source or runtime, aligned.true[rows], first)
        if (len(of_true.states), of_true.states[0].shape[-1]) != (len(blocks), _width(runtime)):
            raise InputError(
                "the two models have different layers or widths, so states cannot be carried over"
            )
        own = of_true if source is None else _Run(runtime, aligned.true[rows], first)
        margins[1, rows] = _margin(own.logits, aligned, rows)
        for draw in draws:
            run = _Run(runtime, ids[rows], first, draw and (draw[0], draw[1][rows]))
            found, plain = _patched(runtime, run, of_true, aligned, rows, first, tell)
            cells[rows] += found / len(draws)
            margins[0, rows] += plain / len(draws)
    return Trace(cells=cells, false=margins[0], true=margins[1])


def _patched(
    runtime: LocalRuntime,
    run: _Run,
    of_true: _Run,
    aligned: Aligned,
    rows: slice,
    first: int,
    tell: Callable[[], None],
) -> tuple[FloatArray, FloatArray]:
    """Every cell of the pairs in `rows` (B, layers, columns), and their run without a copy (B,)."""
    layers, T = len(run.blocks), aligned.true.shape[1]
    plain = _margin(run.logits, aligned, rows)
    cells = np.empty((len(plain), layers, T - aligned.start))
    cells[:] = plain[:, None, None]
    with runtime.edited():
        for t in range(first, T):
            for layer in range(layers):
                if layer == layers - 1 and t < T - 1:
                    continue  # nothing behind the last block looks at other tokens
                logits = run.patched(layer, t, of_true.states[layer][:, t - of_true.first])
                cells[:, layer, t - aligned.start] = _margin(logits, aligned, rows)
            tell()
    return cells, plain


def _margin(logits_BV: Tensor, aligned: Aligned, rows: slice) -> FloatArray:
    """logit(first answer) - logit(second) (B,) of the pairs in `rows`."""
    yes, no = torch.from_numpy(aligned.answers[rows]).to(logits_BV.device).T[:, :, None]
    found: FloatArray = (logits_BV.gather(1, yes) - logits_BV.gather(1, no)).double().cpu().numpy()[:, 0]
    return found


def _width(runtime: LocalRuntime) -> int:
    return int(runtime.model.get_input_embeddings().weight.shape[1])


class _Run:
    """One pass over rows of equal length, with what patched passes start from.

    `states[l]` (B, T - first, D) are the outputs of block l from token `first` on. `noise` is a token not before
    `first` and what is added to the embeddings from there on, (B, tokens, D); patched passes start behind them.
    """

    def __init__(
        self,
        runtime: LocalRuntime,
        rows: npt.NDArray[np.int64],
        first: int,
        noise: tuple[int, Tensor] | None = None,
    ) -> None:
        self.rows, self.model = rows, runtime.model
        self.blocks = find_layers(runtime.model)
        self.states: list[Tensor] = []
        self.rest: list[Any] = []
        # a window that slides cannot be cut; then each patched pass runs over whole rows
        self.cache = _cache(self.model) if forward.prefix_fits(self.model, rows.shape[1]) else None
        self.first = first = first if self.cache is not None else 0
        same = (rows == rows[0]).all(0)
        shared = min(first, len(same) if same.all() else int(np.argmin(same)))
        with runtime.edited(), ExitStack() as stack:
            if shared >= forward.PREFIX_FLOOR:
                self.cache = forward.Prefix(self.model, rows[0, :shared].tolist(), None).expanded(len(rows))
            else:
                shared = 0
            stack.enter_context(
                hooked(*(b.register_forward_hook(self._keep(first - shared)) for b in self.blocks))
            )
            if noise is not None:
                embed = self.model.get_input_embeddings()
                stack.enter_context(hooked(embed.register_forward_hook(adding(noise[0] - shared, noise[1]))))
            logits = forward.run(self.model, rows[:, shared:].tolist(), cache=self.cache)
        assert logits is not None
        self.logits = logits

    def _keep(self, first: int) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            self.states.append(first_tensor(output)[:, first:])
            self.rest.append(output[1:] if isinstance(output, tuple) else None)

        return keep

    def patched(self, layer: int, t: int, states_BD: Tensor) -> Tensor:
        """Logits (B, V) with the output of block `layer` at token t replaced; the edits must be installed."""
        begin = t if self.cache is not None else 0
        h = self.states[layer][:, begin - self.first :].clone()
        h[:, t - begin] = states_BD.to(h)
        cache = None if self.cache is None else self._cut(begin, layer)
        with _from_block(self.blocks, layer, h, self.rest[layer]):
            logits = forward.run(self.model, self.rows[:, begin:].tolist(), cache=cache)
        assert logits is not None
        return logits

    def _cut(self, length: int, layer: int) -> DynamicCache:
        """Keys and values before token `length` for the blocks that run, and for one block of each kind, which
        tells the model how much came before."""
        fresh, seen = _cache(self.model), set()
        assert self.cache is not None
        for i, (old, new) in enumerate(zip(self.cache.layers, fresh.layers, strict=True)):
            if i > layer or type(old) not in seen:
                new.update(old.keys[:, :, :length], old.values[:, :, :length])
                seen.add(type(old))
        return fresh


def _cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


@contextmanager
def _from_block(blocks: Sequence[Any], layer: int, h_BTD: Tensor, rest: Any) -> Iterator[None]:
    """Let the blocks up to `layer` do nothing and that one put out `h_BTD`, whatever hooks it has."""

    def skip(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states if rest is None else (hidden_states, *rest)

    def put(_module: Any, _args: Any, output: Any) -> Any:
        return with_first(output, h_BTD)

    before = [b.__dict__.get("forward") for b in blocks[: layer + 1]]
    try:
        for block in blocks[: layer + 1]:
            block.forward = skip
        with hooked(blocks[layer].register_forward_hook(put)):
            yield
    finally:
        for block, old in zip(blocks, before, strict=False):
            if old is None:
                del block.forward
            else:
                block.forward = old


def margins(runtime: LocalRuntime, aligned: Aligned) -> tuple[FloatArray, FloatArray]:
    """logit(first answer) - logit(second) (n,) of the true and of the false statements, without any copy."""
    out = np.empty((2, len(aligned.pairs)))
    for begin in range(0, len(aligned.pairs), TOGETHER):
        rows = slice(begin, begin + TOGETHER)
        for k, ids in enumerate((aligned.true, aligned.false)):
            run = _Run(runtime, ids[rows], ids.shape[1])
            out[k, rows] = _margin(run.logits, aligned, rows)
    return out[0], out[1]
