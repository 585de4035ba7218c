from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demur.runtime.chat import ChatFormat
from demur.serve.textstream import TextStream


def byte_chat(template: str = "{{ messages[0]['content'] }}") -> ChatFormat:
    """A tokenizer whose tokens are single bytes: every character outside ASCII comes in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<end>", "<think>", "</think>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.add_tokens(["<think>", "</think>"])
    return ChatFormat(tokenizer, template=template)


CHAT = byte_chat()
THINKING = byte_chat("{{ messages[0]['content'] }}{# <think></think> #}{{ '<think></think>' if false }}")


def fed(chat: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, TextStream]:
    stream = TextStream(chat, stop)
    pieces, thoughts = [], ""
    for i in ids:
        if stream.stopped:
            break
        content, reasoning = stream.add(i)
        pieces.append(content)
        thoughts += reasoning
    content, reasoning = stream.end()
    return [*pieces, content], thoughts + reasoning, stream


def encode(text: str) -> list[int]:
    return list(CHAT.tokenizer.encode(text, add_special_tokens=False))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    pieces, _, _ = fed(CHAT, encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in p for p in pieces)


@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes_add_up_to_the_whole_decoding(values: list[int]) -> None:
    ids = [3 + v for v in values]
    pieces, _, _ = fed(CHAT, ids)
    assert "".join(pieces) == CHAT.split(ids)[0]


def test_text_is_shown_at_once() -> None:
    pieces, _, _ = fed(CHAT, encode("abc"))
    assert pieces == ["a", "b", "c", ""]
    pieces, _, _ = fed(CHAT, encode("aé水b"))
    assert pieces == ["a", "", "é", "", "", "水", "b", ""]


def test_an_incomplete_character_at_the_end_is_shown_broken() -> None:
    ids = encode("水")[:2]
    assert "".join(fed(CHAT, ids)[0]) == CHAT.tokenizer.decode(ids)


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_cut_at_the_first_and_nothing_has_to_be_taken_back(text: str, stops: list[str]) -> None:
    pieces, _, stream = fed(CHAT, encode(text), tuple(stops))
    # the stop that is complete first ends the answer
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if ends:
        seen = text[: min(ends)]
        want = seen[: min(seen.find(s) for s in stops if s in seen)]
    else:
        want = text
    assert "".join(pieces) == want and stream.stopped == bool(ends)


def test_what_may_become_a_stop_is_held_back() -> None:
    pieces, _, _ = fed(CHAT, encode("xENxEND"), ("END",))
    assert pieces == ["x", "", "", "ENx", "", "", "", ""]


def test_a_stop_across_characters_in_parts() -> None:
    pieces, _, stream = fed(CHAT, encode("a水é!"), ("水é",))
    assert "".join(pieces) == "a" and stream.stopped


def test_reasoning_is_told_apart() -> None:
    think, close = CHAT.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    ids = [think, *encode("why é"), close, *encode("so 水.")]
    pieces, thought, _ = fed(THINKING, ids)
    assert thought == "why é" and "".join(pieces) == "so 水."
    assert THINKING.split(ids) == ("so 水.", "why é")


def test_a_tokenizer_that_strips_the_first_space() -> None:
    """As SentencePiece decoders do: pieces must keep the spaces between words."""
    words = ["▁a", "▁b", "c", "▁", "▁d"]

    def decode(ids: list[int], **_: Any) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    chat = SimpleNamespace(
        tokenizer=SimpleNamespace(decode=decode), template="", split=lambda ids: (decode(ids), None)
    )
    for ids in ([0, 1, 2], [0, 3, 4], [3, 1, 3, 3, 4], [3, 3, 2]):
        pieces, _, _ = fed(chat, ids)
        assert "".join(pieces) == decode(ids), ids


@pytest.mark.parametrize("stop", [(), ("",)])
def test_no_stop_text_stops_nothing(stop: tuple[str, ...]) -> None:
    assert "".join(fed(CHAT, encode("abc"), stop)[0]) == "abc"
