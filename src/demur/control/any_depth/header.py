"""The tokens that end an answer and open a new one, computed from the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from demur.errors import InputError

if TYPE_CHECKING:
    from demur.runtime.chat import ChatFormat


@dataclass(frozen=True, slots=True)
class Header:
    """What is put behind an unfinished answer.

    Attributes:
        ids: end of the assistant's turn, then the header of the next one up to where an answer would start.
        read: index in `ids` of the token whose state the probe reads. text: `ids` as text.
    """

    ids: tuple[int, ...]
    read: int
    text: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.read < len(self.ids):
            raise InputError(f"read={self.read}: the header has tokens 0 to {len(self.ids) - 1}")

    @property
    def probe(self) -> tuple[int, ...]:
        """The header cut behind the token that is read."""
        return self.ids[: self.read + 1]


@lru_cache(maxsize=16)
def header_of(chat: ChatFormat, *, read: str | None = None, extra: str = "") -> Header:
    r"""The header of a chat template, with the token that the probe reads.

    Read is the role's word (`assistant`, `model`) where the template writes one as text, the last token that is
    no white space where the header closes a thinking block or opens a channel, or is all special tokens.

    Args:
        chat: how the model's conversations are written. read: text of the token to read instead; it must be in
            the header. extra: plain text behind the header, for models that were trained with some.

    Raises:
        InputError: a template that does not end answers in one way, or no token `read` in its header.
        CapabilityError: the model thinks before it answers (load it with thinking=False).

    >>> header_of(runtime.chat).text  # doctest: +SKIP
    '<|im_end|>\n<|im_start|>assistant\n'
    """
    from demur.runtime.depths import header_ids

    chat.require_decision()
    ids = header_ids(chat)
    if extra:
        ids += chat.tokenizer.encode(extra, add_special_tokens=False, split_special_tokens=True)
    words = [chat.tokenizer.decode([i]).strip() for i in ids]
    text = chat.tokenizer.decode(ids)
    if read is not None:
        places = [k for k, word in enumerate(words) if word == read.strip()]
        if not places:
            raise InputError(
                f"no token {read!r} in the header {text!r}, whose tokens are {', '.join(filter(None, words))}"
            )
        return Header(tuple(ids), places[-1], text)
    filled = [k for k, word in enumerate(words) if word]
    special = set(chat.tokenizer.added_tokens_decoder)
    spoken = [k for k in filled if ids[k] not in special and any(c.isalpha() for c in words[k])]
    closed = words[filled[-1]] == "</think>" or "<|channel|>" in words
    return Header(tuple(ids), filled[-1] if closed or not spoken else spoken[-1], text)
