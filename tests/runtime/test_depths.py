"""Headers at all depths in one pass against one plain forward pass per depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.runtime import depths as module
from demur.runtime.chat import ChatFormat
from demur.runtime.depths import DepthRow, header_ids, header_scores, header_states
from demur.runtime.local import BlockEdit
from demur.types import Site
from tests.runtime.test_chat import tokenizer
from tests.runtime.test_lanes import full_states
from tests.runtime.tiny import ARCHITECTURES, tiny_model, tiny_runtime, tiny_tokenizer

GRID = [0, 1, 3, 7, 12]
SUFFIX = [7, 5]
ROWS = [
    DepthRow([1, 4, 9, 12, 7, 5], [10, 11, 13, 9, 22, 8, 14, 30, 9, 9, 11, 40]),
    DepthRow([1, 4, 17, 7, 5], [20, 21, 9]),  # ends before the deeper ones
]
SITES = [Site(layer=k, position=p) for k in (0, 2) for p in (-1, -2, -3)]


@pytest.fixture(params=sorted(ARCHITECTURES))
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("way", ["packed", "wound", "apart"])
def test_states_equal_a_pass_per_depth(arch: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tiny_runtime(arch, control=True)
    if way == "packed":
        assert module._packs(runtime.model)
    long = max(len(r.prompt) + len(r.answer) for r in ROWS) + len(SUFFIX)
    if way == "packed" and arch in ("mistral", "gemma3"):  # a window of 16
        assert module._way(runtime.model, long) == "wound"
        assert module._way(runtime.model, 16) == "packed"
    else:
        monkeypatch.setattr(module, "_way", lambda *_: way)
    found = header_states(runtime, ROWS, GRID, SUFFIX, SITES)
    assert found.shape == (2, 5, len(SITES), 32)
    assert found.dtype == np.float32
    for row, of_row in zip(ROWS, found, strict=True):
        for d, states in zip(GRID, of_row, strict=True):
            if d > len(row.answer):
                assert np.isnan(states).all()
                continue
            want = full_states(runtime, [*row.prompt, *row.answer[:d], *SUFFIX], SITES)
            np.testing.assert_allclose(states, want, atol=1e-5 * max(1, np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("way", ["packed", "wound", "apart"])
def test_scores_equal_softmax_of_a_pass_per_depth(
    arch: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tiny_runtime(arch, control=True)
    if way != "packed":
        monkeypatch.setattr(module, "_way", lambda *_: way)
    order = [12, 0, 3]
    found = header_scores(runtime, ROWS[:1], order, SUFFIX, T=2.0)[0]
    for d, got in zip(order, found, strict=True):
        ids = [*ROWS[0].prompt, *ROWS[0].answer[:d], *SUFFIX]
        with runtime.edited():
            p = (runtime.model(input_ids=torch.tensor([ids])).logits[0, -1] / 2).softmax(-1)
        want = [p[runtime.control.ids[c]].item() for c in runtime.control.names]
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-7)


def test_chosen_ids_and_refusal_openings() -> None:
    runtime = tiny_runtime()
    whole = header_scores(runtime, ROWS, [0, 2], SUFFIX, ids=range(tiny_model().config.vocab_size))
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    openings = header_scores(runtime, ROWS, [0, 2], SUFFIX)
    np.testing.assert_allclose(openings, whole[..., runtime.openings], rtol=1e-6)


def test_positions_are_those_of_the_depth() -> None:
    def fn(h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return h + 0.3 * positions[..., None]

    runtime = tiny_runtime().with_edits(BlockEdit(0, fn))
    found = header_states(runtime, ROWS[:1], [2, 9], SUFFIX, [Site(layer=2)])[0]
    for d, got in zip([2, 9], found, strict=True):
        ids = [*ROWS[0].prompt, *ROWS[0].answer[:d], *SUFFIX]
        np.testing.assert_allclose(got, full_states(runtime, ids, [Site(layer=2)]), atol=1e-4)


def test_a_model_that_goes_its_own_way_with_masks_is_found_out() -> None:
    runtime = tiny_runtime(seed=5)

    def deaf(self: object, *args: object, **kwargs: object) -> object:
        kwargs["attention_mask"] = None  # looks at everything before it, whatever it is told
        return real(*args, **kwargs)

    real = runtime.model.forward
    assert module._tried(runtime.model)
    runtime.model.forward = lambda *a, **k: deaf(None, *a, **k)
    try:
        assert not module._tried(runtime.model)
    finally:
        del runtime.model.forward


@pytest.mark.parametrize(
    ("kind", "thinking", "header"),
    [
        ("smollm2", None, "<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3", False, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("deepseek_r1", False, "<｜end▁of▁sentence｜><｜Assistant｜><think>\n\n</think>\n\n"),
        ("gpt_oss", False, "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("trimmed", None, " [/INST]"),
    ],
)
def test_headers_of_known_templates(kind: str, thinking: bool | None, header: str) -> None:
    found = tokenizer(kind)
    assert found.decode(header_ids(ChatFormat(found, thinking=thinking))) == header


def test_the_header_is_the_templates_own() -> None:
    tokenizer = tiny_tokenizer()
    name = tokenizer.convert_ids_to_tokens
    assert name(header_ids(ChatFormat(tokenizer))) == ["<|end|>", "<|assistant|>"]
    # a template that opens no answer: what stands between request and answer takes the header's place
    bare = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|> {{ m['content'] }} <|tool|>"
        "{% else %} {{ m['content'] }} <|end|>{% endif %}{% endfor %}"
    )
    assert name(header_ids(ChatFormat(tokenizer, template=bare))) == ["<|end|>", "<|tool|>"]
    once = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(InputError, match="no header"):
        header_ids(ChatFormat(tokenizer, template=once))
    moody = (
        "{% for m in messages %}<|user|> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}"
        "{% if messages[-1]['content'] | length > 3 %}<|end|>{% endif %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match="2 ways"):
        header_ids(ChatFormat(tokenizer, template=moody))


def test_what_cannot_be_read_is_refused() -> None:
    runtime = tiny_runtime()
    with pytest.raises(InputError, match="positions run from -3"):
        header_states(runtime, ROWS, GRID, SUFFIX, [Site(layer=0, position=-4)])
    with pytest.raises(InputError, match="depths count"):
        header_scores(runtime, ROWS, [-1], SUFFIX)
    with pytest.raises(InputError, match="256 tokens"):
        header_scores(runtime, [DepthRow([1] * 200, [1] * 80)], [80], SUFFIX)
    assert np.isnan(header_scores(runtime, ROWS[1:], [9], SUFFIX)).all()
