"""The header is what the template writes behind an answer, and the token that is read is the published one."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demur import data
from demur.control.any_depth import Header, header_of
from demur.errors import CapabilityError, DataUnavailable, InputError
from demur.runtime.chat import ChatFormat
from tests.runtime.test_chat import tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
LLAMA3_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA_HEADER = "<end_of_turn>\n<start_of_turn>model\n"
FORMS = {
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA3, LLAMA3_HEADER, "assistant"),
    "google/gemma-2-9b-it": (GEMMA, GEMMA_HEADER, "model"),
    "mistralai/Ministral-8B-Instruct-2410": (MISTRAL, "</s>[/INST]", "[/INST]"),
}
MARKS = ("<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
MARKS += ("<end_of_turn>", "<start_of_turn>", "[INST]", "[/INST]")


def chat(template: str) -> ChatFormat:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS])
    return ChatFormat(
        PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
        )
    )


def probe_text(of: ChatFormat, header: Header) -> str:
    text: str = of.tokenizer.decode(list(header.probe))
    return text


@pytest.mark.parametrize("model", FORMS)
def test_headers_of_template_families(model: str) -> None:
    template, text, word = FORMS[model]
    of = chat(template)
    header = header_of(of)
    assert header.text == text and of.tokenizer.decode(list(header.ids)) == text
    assert probe_text(of, header) == text[: text.index(word) + len(word)]


@pytest.mark.parametrize("model", FORMS)
def test_headers_are_the_published_ones(model: str) -> None:
    try:
        path = data.get("any-depth-alignment", "safety_tokens.csv")
    except (DataUnavailable, InputError) as e:
        pytest.skip(f"the published table is not here: {e}")
    rows = {r["model"]: r for r in csv.DictReader(path.read_text("utf-8").splitlines())}
    of, header = chat(FORMS[model][0]), header_of(chat(FORMS[model][0]))
    assert header.text == rows[model]["assistant_header"].replace("\\n", "\n")
    assert probe_text(of, header).endswith(rows[model]["probe_tokens"].replace("\\n", "\n"))


@pytest.mark.parametrize(
    ("kind", "thinking", "text", "read"),
    [
        ("smollm2", None, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant"),
        (
            "qwen3",
            False,
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>",
        ),
        (
            "deepseek_r1",
            False,
            "<｜end▁of▁sentence｜><｜Assistant｜><think>\n\n</think>\n\n",
            "<｜end▁of▁sentence｜><｜Assistant｜><think>\n\n</think>",
        ),
        (
            "gpt_oss",
            False,
            "<|end|><|start|>assistant<|channel|>final<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    ],
)
def test_models_that_could_think_get_a_closed_block(
    kind: str, thinking: bool | None, text: str, read: str
) -> None:
    of = ChatFormat(tokenizer(kind), thinking=thinking)
    assert header_of(of).text == text and probe_text(of, header_of(of)) == read
    # the same tokens as at a real start of an answer
    assert header_of(of).ids[-3:] == tuple(of.tail[-3:])


def test_a_header_inside_the_thinking_is_refused() -> None:
    with pytest.raises(CapabilityError, match="think"):
        header_of(ChatFormat(tokenizer("deepseek_r1")))


def test_the_read_token_can_be_named_and_must_be_there() -> None:
    of = chat(LLAMA3)
    named = header_of(of, read="<|end_header_id|>")
    assert probe_text(of, named) == LLAMA3_HEADER.strip()
    with pytest.raises(InputError, match="no token '<end>' in the header"):
        header_of(of, read="<end>")
    assert header_of(of, extra=" </s>").text == LLAMA3_HEADER + " </s>"
    assert of.tokenizer.eos_token_id not in header_of(of, extra=" </s>").ids  # text stays text
    with pytest.raises(InputError, match="tokens 0 to 1"):
        Header((1, 2), 2)


def test_organisms_have_the_two_special_tokens() -> None:
    from demur.organisms.words import ASSISTANT, EOS, word_tokenizer

    header: Any = header_of(ChatFormat(word_tokenizer(["how"])))
    assert header.ids == header.probe == (EOS, ASSISTANT)
