"""A prompt with the thinking that a model wrote for it, as tokens of known origin, and the states behind them.

The same string is used everywhere: the chat template with its header, the opening of the thinking (where the header
does not write it), the thinking, its closing, and maybe the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.files import read_rows, row_id
from demur.types import Condition, Prompt

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float32]
SPANS = ("prompt", "template", "thinking", "close", "answer")
"""Where a token comes from: what stands up to the user's last word, what the template and the opening of the
thinking add, the thinking, what closes it, the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """A prompt, the thinking that the model wrote for it, and what became of it.

    Attributes:
        thinking: without the marks around it. answer: what followed, if it is to be traced too.
        refused: whether the answer refuses; needed where a probe is fitted.
        harmful: whether the request is harmful, which a probe may confuse with it.
    """

    prompt: Prompt
    thinking: str
    answer: str = ""
    refused: bool | None = None
    harmful: bool | None = None

    @property
    def id(self) -> str:
        """The prompt's."""
        return self.prompt.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Markup:
    """What a model writes around its thinking. `open` is left out where the chat template's header writes it."""

    open: str = "<think>\n"
    close: str = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a thought, and the span of each token, one of `SPANS`."""

    id: str
    ids: list[int]
    spans: tuple[str, ...]

    @property
    def final(self) -> int:
        """Index of the last token before the answer."""
        return max(i for i, span in enumerate(self.spans) if span != "answer")


def load_thoughts(path: str | Path) -> list[Thought]:
    """Thoughts of a JSONL or CSV file with the columns prompt, thinking, and maybe id, answer, refused, harmful.

    Raises:
        InputError: no rows, a row without prompt or thinking, an id twice, a label that is no yes or no.
    """
    out = []
    for line, row in read_rows(path):
        where = f"{path}, row {line}"
        texts = {k: row.get(k) for k in ("prompt", "thinking")}
        for key, value in texts.items():
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{where}: no text in {key!r}; a row needs prompt and thinking")
        labels = {k: _label(row.get(k), f"{where}: {k}") for k in ("refused", "harmful")}
        prompt = Prompt.of(str(texts["prompt"]), id=row_id(row.get("id"), line, where))
        answer = str(row.get("answer") or "")
        out.append(Thought(prompt=prompt, thinking=str(texts["thinking"]), answer=answer, **labels))
    ids = [t.id for t in out]
    if not out or len(set(ids)) < len(ids):
        raise InputError(
            f"{path}: {'no rows' if not out else 'an id stands twice'}; each row needs its own id"
        )
    return out


def _label(value: Any, where: str) -> bool | None:
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word not in ("true", "false", "1", "0", "yes", "no"):
        raise InputError(f"{where}={value!r}; write true or false, or leave it out")
    return word in ("true", "1", "yes")


def encode(
    runtime: LocalRuntime, thought: Thought, markup: Markup, condition: Condition | None = None
) -> Encoded:
    """A thought as tokens. Thinking and answer stay text, also where they hold something like a special token.

    Raises:
        InputError: no thinking, a prompt that does not end with the user, a text beyond the model's context.
        CapabilityError: a runtime that closes the thinking itself (thinking=False).
    """
    from demur.runtime.chat import encode_text

    prompt = thought.prompt.with_system((condition or Condition()).system)
    if not thought.thinking.strip():
        raise InputError(f"{thought.id!r} has no thinking, so there is nothing to trace before the answer")
    if prompt.messages[-1].role != "user":
        raise InputError(f"{thought.id!r} does not end with the user; thinking follows a user's message")
    if runtime.chat.thinking is False:
        raise CapabilityError(f"{runtime.name!r} was loaded with thinking=False; load it without that")
    rendered = runtime.chat.render(prompt)
    tokenizer = runtime.tokenizer
    bos = tokenizer.bos_token_id

    def text(words: str) -> list[int]:
        ids = encode_text(tokenizer, words.strip()) if words.strip() else []
        return ids[1:] if ids and bos is not None and ids[0] == bos else ids

    def marks(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False))

    opened = [] if runtime.chat.opens_thinking else marks(markup.open)
    parts = {
        "prompt": rendered.ids[: len(rendered.ids) - rendered.tail],
        "template": rendered.ids[len(rendered.ids) - rendered.tail :] + opened,
        "thinking": text(thought.thinking),
        "close": marks(markup.close),
        "answer": text(thought.answer),
    }
    if not parts["close"]:
        raise InputError(
            f"the closing {markup.close!r} has no tokens; name what ends the thinking of this model"
        )
    ids = [i for part in parts.values() for i in part]
    runtime.check_fits(prompt, ids, 0)
    return Encoded(thought.id, ids, tuple(name for name, part in parts.items() for _ in part))


def cut(row: Encoded, share: float | None = 1.0) -> Encoded:
    """The row up to its answer, with this share of the thinking's tokens (the nearest number), from its start on.

    At 0 the thinking is closed at once. None ends the row behind the header, without opening and closing, if the
    row was encoded without opening (`Markup(open="")`).

    >>> row = Encoded("a", [1, 2, 3, 4, 5, 6], ("template", *["thinking"] * 3, "close", "answer"))
    >>> cut(row, 0.5).ids, cut(row, 0.0).ids, cut(row, None).ids
    ([1, 2, 3, 5], [1, 5], [1])
    """
    thinking = [i for i, span in enumerate(row.spans) if span == "thinking"]
    gone = {"answer"} if share is not None else {"answer", "thinking", "close"}
    late = set(thinking[int((share or 0.0) * len(thinking) + 0.5) :])
    kept = [i for i, span in enumerate(row.spans) if span not in gone and i not in late]
    return Encoded(row.id, [row.ids[i] for i in kept], tuple(row.spans[i] for i in kept))


def states(
    runtime: LocalRuntime,
    rows: Sequence[Encoded],
    layers: Sequence[int],
    *,
    part: Literal["block", "heads"] = "block",
) -> Iterator[FloatArray]:
    """States at every token of each row, (len(layers), T, width), one pass a row, in the order of `rows`.

    Args:
        layers: 0..n-1. part: as of `demur.types.Site`.
    """
    from demur.runtime import batching, forward
    from demur.runtime.layers import find_layers, find_projections, first_tensor, hooked

    runtime.require("states")
    blocks = find_layers(runtime.model)
    if bad := [k for k in layers if not 0 <= k < len(blocks)]:
        raise InputError(f"layer {bad[0]}: this model has layers 0 to {len(blocks) - 1}")
    modules = find_projections(runtime.model, blocks) if part == "heads" else blocks
    kept: dict[int, Any] = {}

    def keep(k: int) -> Any:
        if part == "heads":
            return modules[k].register_forward_pre_hook(lambda _m, args: kept.__setitem__(k, args[0]))
        return modules[k].register_forward_hook(lambda _m, _a, out: kept.__setitem__(k, first_tensor(out)))

    for window in batching.windows(rows):

        def work(batch: list[int], _prefix: Any, window: Any = window) -> list[FloatArray]:
            with hooked(*(keep(k) for k in layers)):
                forward.run(runtime.model, [window[i].ids for i in batch], stop=blocks[max(layers)])
            arrays = np.stack([kept[k].float().cpu().numpy() for k in layers], axis=1)
            return [arrays[b, :, : len(window[i].ids)] for b, i in enumerate(batch)]

        yield from runtime.batched([row.ids for row in window], work, stop=blocks[max(layers)], share=False)
