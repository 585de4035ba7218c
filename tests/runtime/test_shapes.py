"""Each documented answer shape lands in exactly one verdict class."""

import json
from pathlib import Path
from typing import Any

import pytest

from demur import judges
from demur.runtime import shapes
from demur.types import Label, Prompt, Reply

FOLDER = Path(__file__).parents[1] / "fixtures" / "shapes"
FIXTURES = sorted(FOLDER.glob("*.json"))


def build(fixture: dict[str, Any]) -> Reply:
    if fixture["form"] == "error":
        return shapes.reply_from_error(fixture["status"], fixture["body"], "p", condition="c", sample=2)
    build_one = {
        "openai": shapes.reply_from_openai,
        "anthropic": shapes.reply_from_anthropic,
        "gemini": shapes.reply_from_gemini,
    }[fixture["form"]]
    return build_one(fixture["body"], "p", condition="c", sample=2)


def load(name: str) -> Reply:
    return build(json.loads((FOLDER / f"{name}.json").read_text()))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_each_shape_has_one_verdict(path: Path) -> None:
    fixture = json.loads(path.read_text())
    reply = build(fixture)
    assert (reply.prompt_id, reply.condition, reply.sample) == ("p", "c", 2)
    found = judges.preread(reply)
    assert (found.label if found else None) == fixture["expected"], reply
    if found:
        assert found.judge == judges.PREREAD
        assert (found.prompt_id, found.condition, found.sample) == ("p", "c", 2)
    else:
        assert reply.content.strip()
    final = judges.get("rules/demur-v1").judge(Prompt.of("What is a fjord?"), reply)
    assert final.label == (fixture["expected"] or Label.COMPLIANCE)


def test_every_class_without_text_is_covered() -> None:
    expected = {json.loads(p.read_text())["expected"] for p in FIXTURES}
    assert expected == {None, "full_refusal", "blocked", "error", "truncated", "empty", "compliance"}


def test_azure_names_the_filters_that_fired() -> None:
    assert load("azure_filter_prompt").finish_reason_raw == "content_filter: jailbreak, violence"


def test_reasoning_is_kept_apart_from_the_answer() -> None:
    for name in ("vllm_reasoning_content", "vllm_reasoning", "think_inline", "think_opened_in_template"):
        reply = load(name)
        assert reply.content == "A narrow inlet.", name
        assert reply.reasoning is not None and "They ask" in reply.reasoning


def test_usage_and_raw_stop_reason_are_kept() -> None:
    reply = load("anthropic_text")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason, reply.finish_reason_raw) == (
        9,
        8,
        "stop",
        "end_turn",
    )


def test_an_unknown_stop_reason_stays_unknown() -> None:
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "sunspots"}]}
    reply = shapes.reply_from_openai(body, "p")
    assert (reply.finish_reason, reply.finish_reason_raw) == ("unknown", "sunspots")


def test_talking_about_think_tags_is_no_thinking() -> None:
    text = "Use <think> and </think> around the reasoning."
    assert shapes.split_thinking(text) == (None, text)
