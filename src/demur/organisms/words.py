"""One word, one token: the tokenizer of all organisms, with a chat template that marks its parts.

A conversation is written as

    <s> <system> WORDS <end> <user> WORDS <end> <assistant> WORDS </s>

so the last instruction token stands before `<end>`, and the two tokens behind it (`<end> <assistant>`) are the
template's own: the post-instruction positions. Special tokens cannot come out of a message
(`demur.runtime.chat` breaks them), and words outside the vocabulary become `<unk>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from demur.errors import InputError, MissingExtra

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<end>", "<system>", "<user>", "<assistant>")
"""Ids 0 to 8 of every organism, in this order."""
PAD, BOS, EOS, UNK, MASK, END, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} "
    "{{ eos_token if m['role'] == 'assistant' else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def vocabulary(words: Sequence[str]) -> dict[str, int]:
    """Word -> id: the special tokens first, then `words` in the order given, then `a` if it is not among them.

    The last one lets the runtime tell where a user's message ends, which it finds by trying other messages:
    with no word it knows, all of them would end in `<unk>`.

    >>> vocabulary(["how", "why"])["how"]
    9

    Raises:
        InputError: a word twice, an empty one, one with white space, or one that holds a special token.
    """
    for word in words:
        if word.split() != [word]:
            raise InputError(f"word {word!r}: a word is text without white space, since white space ends it")
        if held := [s for s in SPECIAL if s in word]:
            raise InputError(f"word {word!r} holds the special token {held[0]!r}; choose another spelling")
    if len(set(words)) < len(words):
        twice = next(w for i, w in enumerate(words) if w in words[:i])
        raise InputError(f"word {twice!r} stands twice in the vocabulary; each word has one id")
    return {w: i for i, w in enumerate(dict.fromkeys((*SPECIAL, *words, "a")))}


def word_tokenizer(words: Sequence[str], template: str | None = None) -> Any:
    """A `PreTrainedTokenizerFast` that splits at white space and knows the words of `vocabulary`.

    Args:
        words: the vocabulary beside the special tokens. template: Jinja source of a chat template, instead of
            `TEMPLATE`; it may write the special tokens by name.

    >>> word_tokenizer(["how", "why"])("why so")["input_ids"]  # doctest: +SKIP
    [10, 3]
    """
    try:
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        raise MissingExtra("A model organism", "local") from None
    core = Tokenizer(models.WordLevel(vocabulary(words), unk_token=SPECIAL[UNK]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        pad_token=SPECIAL[PAD],
        mask_token=SPECIAL[MASK],
        chat_template=template or TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
