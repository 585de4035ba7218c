"""Control rows: refused where they do not fit, soft-capped like the rest, gone afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from demur.errors import InputError, MismatchError
from demur.runtime.base import ControlTokens
from demur.runtime.chat import ChatFormat
from demur.runtime.control_rows import ControlRows
from demur.types import Condition, Prompt
from tests.runtime.tiny import CATEGORIES, SMALL, tiny_control, tiny_model, tiny_runtime


def test_vocabulary_grows_only_while_installed() -> None:
    runtime = tiny_runtime()
    size = runtime.model.get_input_embeddings().weight.shape[0]
    rows, names = tiny_control(runtime.model)
    ids = torch.tensor([[1, 9, 10]])
    before = runtime.model(input_ids=ids).logits
    with runtime.with_edits(rows, control=names).edited():
        during = runtime.model(input_ids=ids).logits
    after = runtime.model(input_ids=ids).logits
    assert during.shape[-1] == size + 6
    assert torch.equal(during[..., :size], before)  # the base's own logits do not move
    assert torch.equal(before, after)
    with pytest.raises(IndexError):
        runtime.model(input_ids=torch.tensor([[size]]))


def test_rows_may_replace_padding_rows() -> None:
    runtime = tiny_runtime()
    size, width = runtime.model.get_input_embeddings().weight.shape
    rows = ControlRows(torch.ones(2, width), torch.ones(2, width), size - 3)
    before = runtime.model(input_ids=torch.tensor([[1, 9]])).logits
    with runtime.with_edits(rows).edited():
        logits = runtime.model(input_ids=torch.tensor([[1, 9]])).logits
    assert logits.shape[-1] == size
    same = [i for i in range(size) if i not in (size - 3, size - 2)]
    assert torch.equal(logits[..., same], before[..., same])
    assert torch.equal(logits[..., size - 3], logits[..., size - 2])


def test_soft_capping_applies_to_control_logits() -> None:
    config = AutoConfig.for_model(
        "gemma2",
        **{**SMALL, "head_dim": 8, "vocab_size": 40, "final_logit_softcapping": 2.0, "pad_token_id": 0},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = ControlRows(torch.ones(2, 32), 100 * torch.ones(2, 32), 40)
    with rows.install(model), torch.inference_mode():
        logits = model(input_ids=torch.tensor([[1, 41]])).logits
    assert logits.shape[-1] == 42
    assert logits[..., 40:].abs().max() <= 2.0


@pytest.mark.parametrize(
    ("shape_in", "shape_out", "first", "error"),
    [
        ((2, 32), (3, 32), 0, InputError),
        ((2, 31), (2, 31), 0, MismatchError),
        ((2, 32), (2, 32), 1, MismatchError),
    ],
)
def test_rows_that_do_not_fit(
    shape_in: tuple[int, int], shape_out: tuple[int, int], first: int, error: type[Exception]
) -> None:
    runtime = tiny_runtime()
    size = runtime.model.get_input_embeddings().weight.shape[0]
    with (
        pytest.raises(error),
        runtime.with_edits(ControlRows(torch.zeros(shape_in), torch.zeros(shape_out), size + first)).edited(),
    ):
        pass


def test_names_without_rows_are_refused() -> None:
    size = tiny_model().get_input_embeddings().weight.shape[0]
    with pytest.raises(InputError, match="outside the vocabulary"):
        tiny_runtime().with_edits(control=ControlTokens(ids={"safety": size, "respond": size + 1}))


def test_generate_emits_control_tokens_at_the_first_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    size, width = model.get_input_embeddings().weight.shape
    names = ControlTokens(ids={c: size + i for i, c in enumerate(CATEGORIES)})
    loud = torch.zeros(6, width)
    # an unembedding row along the final state makes its token win everywhere it is allowed
    runtime = tiny_runtime()
    with torch.inference_mode():
        ids = torch.tensor([runtime.chat.render(Prompt.of("how do i boil an egg ?")).ids])
        final = model.model(input_ids=ids).last_hidden_state[0, -1]
    loud[2] = 50 * final
    steered = runtime.with_edits(ControlRows(torch.zeros(6, width), loud, size), control=names)
    answers: list[list[int]] = []
    split = ChatFormat.split
    monkeypatch.setattr(
        ChatFormat, "split", lambda self, ids, begun: answers.append(list(ids)) or split(self, ids, begun)
    )
    reply = next(iter(steered.generate([Prompt.of("how do i boil an egg ?")], Condition(max_new_tokens=8))))
    assert (reply.control_token, reply.control_forced) == ("unsupported", False)
    assert next(iter(steered.score([Prompt.of("how do i boil an egg ?")]))).token == "unsupported"
    forced = next(
        iter(
            steered.generate(
                [Prompt.of("how do i boil an egg ?")],
                Condition(max_new_tokens=8),
                decide=lambda _p, _s: "respond",
            )
        )
    )
    assert (forced.control_token, forced.control_forced) == ("respond", True)
    assert [len(ids) for ids in answers] == [
        7,
        8,
    ]  # the natural control token is one of eight, the forced is not
    assert max(max(ids) for ids in answers) < size
    bare = next(iter(runtime.generate([Prompt.of("how do i boil an egg ?")], Condition(max_new_tokens=8))))
    assert (bare.control_token, bare.logprobs) == (None, {})
    for r in (reply, forced):
        assert set(r.content.split()) <= set(runtime.tokenizer.get_vocab())
        assert set(r.logprobs) <= set(CATEGORIES)
