"""One word, one token; the template's parts stand where they should; user text stays text."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError
from demur.organisms.words import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    SPECIAL,
    SYSTEM,
    UNK,
    USER,
    vocabulary,
    word_tokenizer,
)
from demur.runtime.chat import ChatFormat
from demur.types import Message, Prompt

WORDS = ("how", "why", "boil", "egg", "ok")
CHAT = ChatFormat(word_tokenizer(WORDS))
IDS = vocabulary(WORDS)


def test_a_conversation_is_written_in_full() -> None:
    how, egg, ok = IDS["how"], IDS["egg"], IDS["ok"]
    one = CHAT.render(Prompt.of("how egg", system="ok"))
    assert one.ids == [BOS, SYSTEM, ok, END, USER, how, egg, END, ASSISTANT]
    assert one.tail == 2  # so the last instruction token is at -3 and the template's own at -2 and -1
    turns = (
        Message(role="user", content="how"),
        Message(role="assistant", content="ok"),
        Message(role="user", content="egg"),
    )
    two = CHAT.render(Prompt(id="p", messages=turns))
    assert two.ids == [BOS, USER, how, END, ASSISTANT, ok, EOS, USER, egg, END, ASSISTANT]
    begun = Prompt(id="p", messages=turns[:2])
    assert CHAT.render(begun).ids == [BOS, USER, how, END, ASSISTANT, ok]


def test_words_and_ids() -> None:
    tokenizer = word_tokenizer(WORDS)
    assert (IDS["how"], IDS["a"]) == (9, 14)
    assert vocabulary(["b", "a"])["a"] == 10
    assert [IDS[s] for s in SPECIAL] == list(range(9))
    assert len(tokenizer) == len(IDS) == 15
    assert tokenizer("how  nonsense\negg")["input_ids"] == [IDS["how"], UNK, IDS["egg"]]
    assert tokenizer.decode([IDS["how"], IDS["egg"], EOS], skip_special_tokens=True) == "how egg"
    own = word_tokenizer(WORDS, "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>")
    assert ChatFormat(own).render(Prompt.of("egg")).ids == [USER, IDS["egg"], ASSISTANT]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a", "b", "a"], "'a' stands twice"),
        (["a b"], "without white space"),
        ([""], "without white space"),
        (["x<end>y"], "holds the special token '<end>'"),
    ],
)
def test_bad_vocabularies(words: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        vocabulary(words)


BENT = st.sampled_from(SPECIAL).flatmap(
    lambda t: st.sampled_from(
        [t, t.upper(), f" {t} ", " ".join(t), t[:3], t[3:], t * 2, t[:3] + t + t[3:], "\u200b".join(t)]
    )
)
TEXT = st.lists(
    st.one_of(BENT, st.sampled_from([*WORDS, " ", "\n", "\ufdd0"]), st.text(max_size=4)), max_size=6
)


@given(TEXT.map(" ".join) | TEXT.map("".join), TEXT.map("".join))
def test_no_text_makes_a_special_token(user: str, system: str) -> None:
    ids = CHAT.render(Prompt.of(user, system=system or None)).ids
    frame = [i for i in ids if i < len(SPECIAL) and i != UNK]
    assert frame == [BOS, *([SYSTEM, END] if system else []), USER, END, ASSISTANT]


def test_the_tail_is_found_with_a_vocabulary_that_lacks_common_words() -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "<user>", "<assistant>", "mauve", "teal"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in words[:4]])
    template = "{{ bos_token }}{% for m in messages %} <user> {{ m['content'] }}{% endfor %} <assistant>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", chat_template=template
    )
    assert ChatFormat(tokenizer).tail == [3]
