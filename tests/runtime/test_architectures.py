"""Every architecture against plain transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from demur.runtime.layers import find_layers, first_tensor, hooked
from demur.runtime.local import BlockEdit, LocalRuntime
from demur.types import Condition, Prompt, Site
from tests.runtime.tiny import ARCHITECTURES, CATEGORIES, tiny_control, tiny_model, tiny_runtime

TEXTS = (
    "how do i boil an egg ?",
    "tell me about the fjord",
    "write a letter to my cat please , one two three four five red blue green",
    "no",
    "what is the capital of france ? what is the capital of norway ? " * 3,
)
PROMPTS = [
    Prompt.of(text, id=f"p{i}", system="you are polite and brief , a system") for i, text in enumerate(TEXTS)
]
ARCHS = sorted(ARCHITECTURES)
N = 3


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def plain_forward(
    runtime: LocalRuntime, prompt: Prompt
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits (T, V) and block outputs (T, D) and head inputs of one prompt, by hooks on the bare model."""
    model, blocks = runtime.model, find_layers(runtime.model)
    names = ("self_attn.o_proj", "attention.dense")
    heads_of = [
        next(block.get_submodule(n) for n in names if n in dict(block.named_modules())) for block in blocks
    ]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = [
        b.register_forward_hook(
            lambda _m, _a, out, k=k: seen.update({("b", k): first_tensor(out)[0].clone()})
        )
        for k, b in enumerate(blocks)
    ] + [
        h.register_forward_pre_hook(lambda _m, a, k=k: seen.update({("h", k): a[0][0].clone()}))
        for k, h in enumerate(heads_of)
    ]
    ids = torch.tensor([runtime.chat.render(prompt).ids])
    with hooked(*handles), torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    return logits, [seen["b", k] for k in range(N)], [seen["h", k] for k in range(N)]


def assert_close(got: np.ndarray, want: np.ndarray, noise: float = 1e-5) -> None:
    """Equal within `noise` of the largest state."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= noise * max(1.0, np.abs(want).max())


def test_states_equal_plain_hooks(arch: str) -> None:
    runtime = tiny_runtime(arch)
    sites = [Site(layer=k, position=p) for k in range(N) for p in (-1, -3, 4)]
    heads = [Site(layer=k, position=p, part="heads") for k in (0, 2) for p in (-1, 5)]
    got = list(runtime.states(PROMPTS, sites))
    got_heads = list(runtime.states(PROMPTS, heads))
    assert [s.prompt_id for s in got] == [p.id for p in PROMPTS]
    for prompt, blocks, inputs in zip(PROMPTS, got, got_heads, strict=True):
        _, h, o = plain_forward(runtime, prompt)
        want = torch.stack([h[s.layer][s.position] for s in sites]).numpy()
        assert_close(blocks.vectors, want)
        assert blocks.vectors.dtype == np.float32
        assert_close(inputs.vectors, torch.stack([o[s.layer][s.position] for s in heads]).numpy())


def test_probabilities_equal_softmax_of_full_logits(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    bare = tiny_runtime(arch)
    rows = runtime.edits[0]
    for T in (1.0, 2.0):
        for prompt, score in zip(PROMPTS, runtime.score(PROMPTS, T=T), strict=True):
            want = resized_logits(bare, rows, bare.chat.render(prompt).ids)
            p = (want / T).softmax(-1)
            for i, c in enumerate(CATEGORIES):
                assert score.probabilities[c] == pytest.approx(
                    p[rows.first_id + i].item(), rel=2e-3, abs=1e-7
                )
            assert score.p_refuse == pytest.approx(
                p[rows.first_id : rows.first_id + 5].sum().item(), rel=2e-3, abs=1e-7
            )
            assert score.off_control_mass == pytest.approx(1 - p[rows.first_id :].sum().item(), abs=1e-5)
            top = int(want.argmax()) - rows.first_id
            assert score.token == (CATEGORIES[top] if top >= 0 else None)


def resized_logits(bare: LocalRuntime, rows: Any, ids: list[int]) -> torch.Tensor:
    """Last logits of a copy of the model whose matrices really have the control rows."""
    model = copy.deepcopy(bare.model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied:
        model.config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    embed.weight = torch.nn.Parameter(torch.cat([embed.weight, rows.input_rows]), requires_grad=False)
    head.weight = torch.nn.Parameter(torch.cat([head.weight, rows.output_rows]), requires_grad=False)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def test_control_ids_inside_a_prompt_are_embedded(arch: str) -> None:
    bare = tiny_runtime(arch)
    rows, names = tiny_control(bare.model)
    ids = [*bare.chat.render(PROMPTS[0]).ids, names.ids["incomplete"], 12, names.ids["safety"]]
    with bare.with_edits(rows, control=names).edited():
        got = bare.model(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(got, resized_logits(bare, rows, ids), atol=1e-4, rtol=1e-4)


def test_edits_are_seen_and_taken_off(arch: str) -> None:
    runtime = tiny_runtime(arch)
    before = {k: v.clone() for k, v in runtime.model.state_dict().items()}
    sites = [Site(layer=k, position=p) for k in range(N) for p in (-1, -2)]
    plain = np.stack([s.vectors for s in runtime.states(PROMPTS, sites)])
    logits = plain_forward(runtime, PROMPTS[0])[0]
    steered = runtime.with_edits(BlockEdit(1, lambda h, _p: h + 1.0), BlockEdit(1, lambda h, _p: 2 * h))
    moved = np.stack([s.vectors for s in steered.states(PROMPTS, sites)])
    np.testing.assert_array_equal(moved[:, :2], plain[:, :2])  # below the edit: bit-equal
    np.testing.assert_allclose(moved[:, 2:4], 2 * (plain[:, 2:4] + 1), atol=1e-4, rtol=1e-5)
    assert np.abs(moved[:, 4:] - plain[:, 4:]).max() > 0.1
    assert torch.equal(plain_forward(runtime, PROMPTS[0])[0], logits)
    assert all(torch.equal(v, before[k]) for k, v in runtime.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in find_layers(runtime.model))


def test_batching_moves_results_by_float_noise_only(arch: str) -> None:
    together = tiny_runtime(arch, control=True)
    alone = tiny_runtime(arch, control=True, token_budget=1)
    sites = [Site(layer=2, position=-1)]
    for a, b in zip(together.score(PROMPTS), alone.score(PROMPTS), strict=True):
        single = next(iter(alone.score([next(p for p in PROMPTS if p.id == a.id)])))
        for c in CATEGORIES:
            assert a.probabilities[c] == pytest.approx(b.probabilities[c], rel=5e-3, abs=1e-6)
            assert a.probabilities[c] == pytest.approx(single.probabilities[c], rel=5e-3, abs=1e-6)
    for x, y in zip(together.states(PROMPTS, sites), alone.states(PROMPTS[:], sites), strict=True):
        np.testing.assert_allclose(x.vectors, y.vectors, atol=1e-4, rtol=1e-4)


def test_greedy_text_does_not_depend_on_the_batch(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    condition = Condition(max_new_tokens=6)
    together = list(runtime.generate(PROMPTS, condition))
    alone = [next(iter(runtime.generate([p], condition))) for p in PROMPTS]
    assert [r.content for r in together] == [r.content for r in alone]
    bare = tiny_model(arch)
    ids = tiny_runtime(arch).chat.render(PROMPTS[0]).ids
    plain = bare.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
    )
    reply = next(iter(tiny_runtime(arch).generate(PROMPTS[:1], condition)))
    assert reply.content == runtime.tokenizer.decode(plain[0, len(ids) :], skip_special_tokens=True)
