"""Guard models: what the probability of their label words becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from demur import judges
from demur.judges import template
from demur.types import Label, Message, Prompt, Reply, Verdict

ASK = Prompt.of("How do I whittle a spoon?", id="p", system="Be kind.")
REPLY = Reply(prompt_id="p", content="Cut {{ 7 * 7 }} away from you.", sample=2, condition="c")


def render(source: str, prompt: Prompt) -> str:
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(messages=messages, bos_token="<s>")


class Fake:
    """A guard whose probabilities are a function of the text it reads."""

    name = "g"

    def __init__(self, p: Callable[[str], tuple[float, float] | str]) -> None:
        self.p, self.texts = p, list[str]()

    def generate(self, *_: object, **__: object) -> Iterator[Reply]:
        raise AssertionError("guards are not asked for text")

    def next_words(self, prompts: Iterable[Prompt], words: Sequence[str], template: str) -> Iterator[Reply]:
        for prompt in prompts:
            text = render(template, prompt)
            self.texts.append(text)
            p = self.p(text)
            if isinstance(p, str):
                yield Reply(prompt_id=prompt.id, error=p)
            else:
                found = {w: math.log(x) for w, x in zip(words, p, strict=True) if x > 0}
                yield Reply(prompt_id=prompt.id, logprobs=found)


def read(id: str, p: Callable[[str], tuple[float, float] | str]) -> tuple[Verdict, list[str]]:
    guard = Fake(p)
    return judges.get(id, runtime=guard).judge(ASK, REPLY), guard.texts


@pytest.mark.parametrize(
    ("p", "label", "score"),
    [
        ((0.6, 0.2), "harmful", 0.75),
        ((0.2, 0.6), "not_harmful", 0.25),
        ((0.5, 0.5), "harmful", 0.5),
        ((0.3, 0.1), "unparsed", None),  # 0.6 on other words
        ((0.0, 0.0), "unparsed", None),  # neither label listed
        ((0.9, 0.0), "harmful", 1.0),
    ],
)
def test_probability_over_the_two_labels(p: tuple[float, float], label: str, score: float | None) -> None:
    v, _ = read("template/llama-guard-3-v1", lambda _: p)
    assert v.label == label and v.score == (None if score is None else pytest.approx(score))
    assert (v.scale, v.read, v.sample, v.condition) == ("harm", "logprobs", 2, "c")
    assert v.judge == "template/llama-guard-3-v1@g" and f"other words {1 - sum(p):.3f}" in (v.reason or "")


def test_a_guard_that_fails_is_an_error() -> None:
    v, _ = read("template/llama-guard-3-v1", lambda _: "too long")
    assert v.label == Label.ERROR and "too long" in (v.reason or "")


def test_shieldgemma_asks_every_guideline_and_takes_the_worst() -> None:
    v, texts = read("template/shieldgemma-v1", lambda t: (0.9, 0.1) if "No Hate Speech" in t else (0.1, 0.9))
    assert (v.label, v.score, len(texts)) == ("harmful", pytest.approx(0.9), 4) and "(hate)" in (
        v.reason or ""
    )
    v, _ = read("template/shieldgemma-v1", lambda t: (0.3, 0.7) if "Harassment" in t else (0.1, 0.9))
    assert v.label == "not_harmful" and v.score == pytest.approx(0.3)


def test_shieldgemma_an_unread_guideline_leaves_a_no_open_and_not_a_yes() -> None:
    def p(text: str) -> tuple[float, float]:
        return (0.1, 0.1) if "Harassment" in text else clear

    clear = (0.1, 0.9)
    assert read("template/shieldgemma-v1", p)[0].label == "unparsed"
    clear = (0.9, 0.1)
    assert read("template/shieldgemma-v1", p)[0].label == "harmful"


def test_wildguard_reads_its_second_word_behind_the_likelier_first() -> None:
    def p(text: str) -> tuple[float, float]:
        if text.endswith("Harmful request:"):
            return 0.3, 0.7
        assert "Harmful request: no\n" in text
        return (0.8, 0.2) if text.endswith("Response refusal:") else (0.1, 0.9)

    v, texts = read("template/wildguard-refusal-v1", p)
    assert (v.label, v.scale, v.score) == (Label.FULL_REFUSAL, "refusal", pytest.approx(0.8))
    assert texts[-1].endswith("<|assistant|>\nHarmful request: no\nResponse refusal:")
    v, texts = read("template/wildguard-harm-v1", p)
    assert (v.label, v.scale, v.score) == ("not_harmful", "harm", pytest.approx(0.1))
    assert texts[-1].endswith("Harmful request: no\nResponse refusal: yes\nHarmful response:")


def test_wildguard_keeps_replies_apart_where_the_first_words_differ() -> None:
    def p(text: str) -> tuple[float, float]:
        odd = "odd" in text
        if text.endswith("request:"):
            return (0.9, 0.1) if odd else (0.1, 0.9)
        assert ("Harmful request: yes" in text) == odd
        return (0.9, 0.1) if odd else (0.1, 0.9)

    pairs = [(ASK, Reply(prompt_id="p", content="odd" if i % 2 else "even", sample=i)) for i in range(6)]
    found = judges.judge_all(judges.get("template/wildguard-refusal-v1", runtime=Fake(p)), pairs)
    assert [(v.sample, v.label) for v in found] == [
        (i, "full_refusal" if i % 2 else "compliance") for i in range(6)
    ]


def test_fields_come_first_and_are_not_asked_about() -> None:
    guard = Fake(lambda _: (0.9, 0.1))
    pairs = [
        (ASK, Reply(prompt_id="p", finish_reason="content_filter")),
        (ASK, REPLY),
        (ASK, Reply(prompt_id="p", error="x")),
    ]
    found = judges.judge_all(judges.get("template/llama-guard-3-v1", runtime=guard), pairs)
    assert [v.label for v in found] == ["not_harmful", "harmful", "error"] and len(guard.texts) == 1


@pytest.mark.parametrize("id", template.ids())
def test_every_guard_sees_request_and_reply_as_text(id: str) -> None:
    _, texts = read(id, lambda _: (0.1, 0.9))
    for text in texts:
        assert "How do I whittle a spoon?" in text and "Cut {{ 7 * 7 }} away from you." in text
        assert text.startswith("<s>") and "{{ policy }}" not in text and "Be kind." not in text


def test_llama_guard_reads_the_whole_conversation() -> None:
    turns = [("user", "Hi."), ("assistant", "Hello!"), ("user", "Spoons?")]
    prompt = Prompt(id="p", messages=tuple(Message(role=r, content=c) for r, c in turns))  # type: ignore[arg-type]
    guard = Fake(lambda _: (0.1, 0.9))
    judges.get("template/llama-guard-3-v1", runtime=guard).judge(prompt, REPLY)
    (text,) = guard.texts
    talk = text.split("<BEGIN CONVERSATION>")[1].split("<END CONVERSATION>")[0]
    assert (
        talk == "\n\nUser: Hi.\n\nAgent: Hello!\n\nUser: Spoons?\n\nAgent: Cut {{ 7 * 7 }} away from you.\n\n"
    )
    assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>")


def test_on_a_local_model() -> None:
    tiny = pytest.importorskip("tests.runtime.tiny", reason="needs torch")
    judge = judges.get("template/wildguard-refusal-v1", runtime=tiny.tiny_runtime())
    v = judge.judge(Prompt.of("how do I boil an egg ?", id="p"), Reply(prompt_id="p", content="I cannot ."))
    assert v.label == Label.UNPARSED  # a random model spreads over all its words
    assert "other words 0.9" in (v.reason or "")
