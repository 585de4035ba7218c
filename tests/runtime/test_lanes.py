"""Rows that come and go against plain generation and plain forward passes, in every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError
from demur.runtime.lanes import Lanes, _drawn
from demur.runtime.layers import find_layers, first_tensor, hooked
from demur.runtime.local import BlockEdit, LocalRuntime
from demur.types import Condition, Prompt, Site
from tests.runtime.test_architectures import PROMPTS
from tests.runtime.tiny import ARCHITECTURES, CATEGORIES, tiny_model, tiny_runtime

N = 20
SUFFIX = [7, 5]  # <|end|> <|assistant|>


@pytest.fixture(params=sorted(ARCHITECTURES))
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rows_of(runtime: LocalRuntime) -> list[list[int]]:
    return [runtime.chat.render(p).ids for p in PROMPTS]


def alone(runtime: LocalRuntime, ids: list[int], n: int = N, forced: bool = False) -> list[int]:
    """Greedy tokens of one row, each from a full forward pass over all that came before."""
    out: list[int] = []
    control = list(runtime.control.ids.values()) if runtime.control else []
    with runtime.edited():
        for k in range(n):
            logits = runtime.model(input_ids=torch.tensor([ids + out]), use_cache=False).logits[0, -1].clone()
            if k or forced:
                logits[control] = -torch.inf
            out.append(int(logits.argmax()))
    return out


def grown(lanes: Lanes, n: int) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {key: [] for key in lanes.keys}
    for _ in range(n):
        for key, token in lanes.step().items():
            said[key].append(token)
    return said


def test_rows_say_what_each_says_alone(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    lanes, rows = Lanes(runtime), rows_of(runtime)
    keys = lanes.join_all([(ids, Condition(), n % 2 == 1) for n, ids in enumerate(rows)])
    said = grown(lanes, N)
    assert [said[k] for k in keys] == [alone(runtime, ids, N, n % 2 == 1) for n, ids in enumerate(rows)]


def test_joining_and_leaving_changes_nobody_else(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    rows, lanes = rows_of(runtime), Lanes(runtime)
    joins = {0: (1, 3), 3: (4,), 7: (0, 2), 12: (4,)}  # short ones first, then longer than what is there
    leaves = {5: (1,), 9: (0, 2), 14: (3,)}  # keys, numbered as they joined
    said: dict[int, list[int]] = {}
    prompt: dict[int, list[int]] = {}
    for step in range(N):
        for n in joins.get(step, ()):
            key = lanes.join(rows[n], Condition())
            said[key], prompt[key] = [], rows[n]
        lanes.leave(*leaves.get(step, ()))
        for key, token in lanes.step().items():
            said[key].append(token)
    assert lanes.keys == (4, 5)
    assert [len(tokens) for tokens in said.values()] == [9, 5, 6, 7, 13, 8]
    for key, tokens in said.items():
        assert tokens == alone(runtime, prompt[key], len(tokens)), key


def test_agrees_with_generate(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    condition = Condition(max_new_tokens=6)
    lanes, rows = Lanes(runtime), rows_of(runtime)
    keys = lanes.join_all([(ids, condition, False) for ids in rows])
    said = grown(lanes, 6)
    for key, reply in zip(keys, runtime.generate(PROMPTS, condition), strict=True):
        ids = said[key]
        cut = next((k for k, t in enumerate(ids) if t in lanes.ends), len(ids))
        body = ids[:cut]
        first = next((c for c, i in runtime.control.ids.items() if body and body[0] == i), None)
        assert first == reply.control_token
        assert runtime.chat.split(body[1:] if first else body)[0] == reply.content


def test_peek_equals_a_full_pass_and_leaves_no_trace(arch: str) -> None:
    runtime = tiny_runtime(arch, control=True)
    sites = [Site(layer=k, position=p) for k in (0, 1) for p in (-1, -3)]
    lanes, rows = Lanes(runtime), rows_of(runtime)
    keys = lanes.join_all([(ids, Condition(), False) for ids in rows])
    said: dict[int, list[int]] = {k: [] for k in keys}
    for step in range(N):
        for key, token in lanes.step().items():
            said[key].append(token)
        if step in (0, 4, 11, 18):
            asked = keys[::-1] if step % 2 else [keys[3], keys[1]]
            found = lanes.peek(asked, SUFFIX, sites)
            want = np.stack(
                [full_states(runtime, [*rows[keys.index(k)], *said[k], *SUFFIX], sites) for k in asked]
            )
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, want, atol=2e-5, rtol=1e-5)
            ahead = lanes.look_ahead(asked, SUFFIX, 3)
            for k, got in zip(asked, ahead, strict=True):
                full = alone(runtime, [*rows[keys.index(k)], *said[k], *SUFFIX], 3)
                assert got == full[: len(got)]
                assert len(got) == 3 or got[-1] in lanes.ends
    assert [said[k] for k in keys] == [alone(runtime, ids) for ids in rows]


def full_states(runtime: LocalRuntime, ids: list[int], sites: list[Site]) -> np.ndarray:
    seen: dict[int, torch.Tensor] = {}
    blocks = find_layers(runtime.model)
    with (
        runtime.edited(),
        hooked(
            *(
                b.register_forward_hook(lambda _m, _a, out, k=k: seen.update({k: first_tensor(out)[0]}))
                for k, b in enumerate(blocks)
            )
        ),
    ):
        runtime.model(input_ids=torch.tensor([ids]), use_cache=False)
    return np.stack([seen[s.layer][s.position].numpy() for s in sites])


def test_heads_are_read_too() -> None:
    runtime = tiny_runtime()
    lanes, rows = Lanes(runtime), rows_of(runtime)
    keys = lanes.join_all([(ids, Condition(), False) for ids in rows[:2]])
    found = lanes.peek(keys, SUFFIX, [Site(layer=1, part="heads")])
    [want] = runtime.states([Prompt.of("x")], [Site(layer=1, part="heads")])
    assert found.shape == (2, 1, want.vectors.shape[-1])


def test_edits_are_in_force_and_see_true_positions() -> None:
    seen: list[list[int]] = []

    def fn(h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append(positions[:, -1].tolist())
        return h + 0.5 * positions[..., None]

    runtime = tiny_runtime().with_edits(BlockEdit(1, fn))
    lanes, rows = Lanes(runtime), rows_of(runtime)
    lanes.join_all([(ids, Condition(), False) for ids in rows[:3]])
    said = grown(lanes, 8)
    assert seen[-1] == [len(ids) + 6 for ids in rows[:3]]
    assert list(said.values()) == [alone(runtime, ids, 8) for ids in rows[:3]]
    assert not any(m._forward_hooks for m in find_layers(runtime.model))


def test_a_prompt_that_begins_another_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.runtime import forward

    runtime = tiny_runtime()
    base, passed = rows_of(runtime)[2], []
    real = forward.run

    def counted(model: object, rows: list[list[int]], **options: object) -> object:
        passed.extend(map(len, rows))
        return real(model, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "run", counted)
    lanes = Lanes(runtime)
    cuts = [len(base), 9, 1, 12, len(base)]
    lanes.join_all([(base[:n], Condition(), False) for n in cuts])
    assert passed == [len(base) - 1]
    assert list(grown(lanes, 6).values()) == [alone(runtime, base[:n], 6) for n in cuts]


def test_rows_of_one_token() -> None:
    runtime = tiny_runtime()
    lanes = Lanes(runtime)
    lanes.join([1], Condition())
    lanes.join([9], Condition())
    assert list(grown(lanes, 5).values()) == [alone(runtime, [1], 5), alone(runtime, [9], 5)]
    lanes.join(rows_of(runtime)[0], Condition())
    assert len(lanes.step()) == 3


def test_leaving_frees_memory_and_many_rows_hold_no_more() -> None:
    runtime = tiny_runtime()
    lanes, rows = Lanes(runtime), rows_of(runtime)
    held = []
    for _ in range(6):
        keys = lanes.join_all([(ids, Condition(), False) for ids in rows])
        grown(lanes, 40)
        held.append(lanes.bytes)
        lanes.leave(*keys[1:])
        assert lanes.bytes < held[-1] / 3
        lanes.leave(keys[0])
        assert lanes.bytes == 0
        assert len(lanes) == 0
        assert lanes.step() == {}
    assert len(set(held)) == 1


def test_sampling_is_the_rows_own() -> None:
    runtime = tiny_runtime(control=True)
    rows, hot = rows_of(runtime), Condition(temperature=1.5, top_p=0.9, seed=3)
    lanes = Lanes(runtime)
    a, greedy, b, other = lanes.join_all(
        [(rows[0], c, True) for c in (hot, Condition(), hot, Condition(temperature=1.5, seed=4))]
    )
    said = grown(lanes, 12)
    assert said[a] == said[b] != said[other]
    assert said[greedy] == alone(runtime, rows[0], 12, forced=True)
    single = Lanes(runtime)
    key = single.join(rows[0], hot, forced=True)
    assert grown(single, 12)[key] == said[a]
    assert not set(said[a]) & set(runtime.control.ids.values())


def test_nucleus_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = torch.Generator().manual_seed(0)
    kept = {_drawn(logits, Condition(temperature=1.0, top_p=0.6), draws) for _ in range(200)}
    assert kept == {0, 1}  # 0.5 is not yet 0.6, 0.5 + 0.3 is
    assert {_drawn(logits, Condition(temperature=1.0, top_p=0.5), draws) for _ in range(50)} == {0}
    draws = torch.Generator().manual_seed(1)
    share = np.mean([_drawn(logits, Condition(temperature=0.5), draws) == 0 for _ in range(4000)])
    assert share == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)  # p squared


class Push:
    """Lifts the last `n` ids above all others."""

    def __init__(self, n: int) -> None:
        self.n = n

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        def push(_m: object, _a: object, z: torch.Tensor) -> torch.Tensor:
            return torch.cat([z[..., : -self.n] - 1e4, z[..., -self.n :]], -1)

        with hooked(model.get_output_embeddings().register_forward_hook(push)):
            yield


def test_control_tokens_open_an_undecided_answer_only() -> None:
    runtime = tiny_runtime(control=True).with_edits(Push(len(CATEGORIES)))
    lanes, ids = Lanes(runtime), rows_of(runtime)[0]
    keys = lanes.join_all([(ids, Condition(), False), (ids, Condition(), True)])
    said = grown(lanes, 3)
    control = set(runtime.control.ids.values())
    assert said[keys[0]][0] in control
    assert not control & {*said[keys[0]][1:], *said[keys[1]]}
    ahead = lanes.look_ahead(keys, SUFFIX, 2)  # a header has been written: the first place is open again
    assert all(row[0] in control and row[1] not in control for row in ahead)


def test_a_failed_step_can_be_repeated() -> None:
    fail = [False]

    def fn(h: torch.Tensor, _p: torch.Tensor) -> torch.Tensor:
        if fail[0]:
            raise RuntimeError("no memory")
        return h

    runtime = tiny_runtime().with_edits(BlockEdit(1, fn))
    lanes, ids = Lanes(runtime), rows_of(runtime)[0]
    key = lanes.join(ids, Condition())
    first = lanes.step()[key]
    fail[0] = True
    with pytest.raises(RuntimeError):
        lanes.step()
    fail[0] = False
    assert [first, *grown(lanes, 4)[key]] == alone(runtime, ids, 5)


def test_what_cannot_be_done_is_refused() -> None:
    runtime = tiny_runtime()
    lanes, ids = Lanes(runtime), rows_of(runtime)[0]
    with pytest.raises(InputError, match="at least one token"):
        lanes.join([], Condition())
    with pytest.raises(InputError, match="256 tokens"):
        lanes.join(ids, Condition(max_new_tokens=250))
    key = lanes.join(ids, Condition())
    with pytest.raises(InputError, match="positions run from -3"):
        lanes.peek([key], SUFFIX, [Site(layer=0, position=-4)])
    with pytest.raises(InputError, match="no row 7"):
        lanes.peek([7], SUFFIX, [Site(layer=0)])
    with pytest.raises(InputError, match="at least one token"):
        lanes.look_ahead([key], SUFFIX, 0)
    assert lanes.peek([], SUFFIX, [Site(layer=0)]).shape[0] == 0
    assert lanes.look_ahead([], SUFFIX, 2) == []


def test_recurrent_states_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_model()
    config = AutoConfig.for_model(
        "qwen3_next",
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        vocab_size=model.config.vocab_size,
        layer_types=["linear_attention", "full_attention"],
    )
    runtime = LocalRuntime(AutoModelForCausalLM.from_config(config), tiny_runtime().tokenizer, name="hybrid")
    with pytest.raises(CapabilityError, match="Linear"):
        Lanes(runtime)


def test_vanishing_temperature_and_top_p_take_the_likeliest() -> None:
    logits, draws = torch.tensor([1.0, 3.0, 2.0]), torch.Generator().manual_seed(0)
    for condition in (Condition(temperature=1e-45), Condition(temperature=1.0, top_p=1e-300)):
        assert _drawn(logits, condition, draws) == 1
