"""Scaling heads: consent, exactness on a random model, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from demur.control.heads import ScaleHeads, suppression_heads
from demur.errors import CapabilityError, InputError, RefusalLowering
from demur.explain.refusal_cliff import HeadRow, KeptNorm
from demur.runtime.layers import HeadEdit, find_layers, find_projections, hooked
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Prompt, Site
from tests.runtime.tiny import ARCHITECTURES, tiny_runtime

PROMPTS = [Prompt.of("how boil egg", id="a"), Prompt.of("tell me a story about the fjord please", id="b")]


def row(head: int, contribution: float) -> HeadRow:
    return HeadRow(layer=0, head=head, contribution=contribution, low=-9, high=9, size=1)


TABLE = [row(0, -2.0), row(1, -0.5), row(2, 0.0), row(3, 1.0)]


@pytest.mark.parametrize(("head", "scale"), [(0, 0.0), (1, 0.5), (3, 2.0)])
def test_what_the_table_shows_to_raise_refusal_needs_no_consent(head: int, scale: float) -> None:
    assert ScaleHeads([(0, head)], scale, table=TABLE).lowers is None


@pytest.mark.parametrize(("head", "scale"), [(3, 0.0), (0, 16.0), (2, 0.0), (7, 0.0)])
def test_anything_else_needs_consent_and_is_noted(head: int, scale: float) -> None:
    with pytest.raises(RefusalLowering, match=rf"0\.{head}"):
        ScaleHeads([(0, 0), (0, head)] if scale == 0 else [(0, head)], scale, table=TABLE)
    runtime = tiny_runtime()
    allowed = ScaleHeads([(0, head % 4)], scale, allow_refusal_lowering=True)
    with allowed.on(runtime) as changed:
        assert any("allowed" in note for note in changed.notes)  # type: ignore[attr-defined]
    assert runtime.notes == []


def test_suppression_heads() -> None:
    assert suppression_heads(TABLE) == [(0, 0)]  # 3 % of four is none, so one
    assert suppression_heads(TABLE[::-1], 1.0) == [(0, 0), (0, 1)]
    with pytest.raises(InputError, match="none of the 1"):
        suppression_heads(TABLE[3:])
    for bad in ({"heads": []}, {"heads": [(0, 0)], "scale": -1.0}):
        with pytest.raises(InputError, match="at least one head"):
            ScaleHeads(**bad, table=TABLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "llava"])
def test_a_head_is_scaled_at_the_projection_and_restored(arch: str) -> None:
    runtime = tiny_runtime(arch)
    site = Site(layer=1, position=-2, part="heads")

    def read(r: Any) -> np.ndarray:
        return np.stack([s.vectors[0] for s in r.states(PROMPTS, [site])]).reshape(2, 4, -1)

    before, scores = read(runtime), list(runtime.score(PROMPTS))
    with ScaleHeads([(1, 2), (1, 0)], 0.25, allow_refusal_lowering=True).on(runtime) as changed:
        after = read(changed)
        moved = list(changed.score(PROMPTS))
    np.testing.assert_allclose(after[:, [0, 2]], 0.25 * before[:, [0, 2]], atol=1e-6)
    np.testing.assert_allclose(after[:, [1, 3]], before[:, [1, 3]], atol=1e-6)
    assert [s.p_refuse for s in moved] != [s.p_refuse for s in scores]
    assert [s.p_refuse for s in runtime.score(PROMPTS)] == [s.p_refuse for s in scores]


def test_all_heads_out_leave_the_projections_bias() -> None:
    runtime = tiny_runtime("gpt_neox")
    seen: list[torch.Tensor] = []
    dense = runtime.model.gpt_neox.layers[1].attention.dense
    every = ScaleHeads([(1, h) for h in range(4)], allow_refusal_lowering=True)
    with every.on(runtime) as changed:
        handle = dense.register_forward_hook(lambda _m, _a, out: seen.append(out))
        list(changed.score(PROMPTS))
        handle.remove()
    assert torch.allclose(seen[-1], dense.bias.expand_as(seen[-1]))


def test_heads_that_do_not_exist() -> None:
    none = ScaleHeads([(0, 4)], allow_refusal_lowering=True)
    with none.on(tiny_runtime()) as changed, pytest.raises(InputError, match="heads 0 to 3"):
        list(changed.score(PROMPTS))


# --- the norm kept ----------------------------------------------------------------------------------------------


def written(runtime: Any, layer: int, prompt: Prompt = PROMPTS[1]) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters a layer's output projection and what it writes, (T, width) each, for one prompt."""
    projection = find_projections(runtime.model, find_layers(runtime.model))[layer]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids = torch.tensor([runtime.chat.render(prompt).ids])
    with (
        runtime.edited(),
        hooked(projection.register_forward_hook(lambda _m, args, out: seen.append((args[0][0], out[0])))),
    ):
        runtime.model(input_ids=ids, use_cache=False)
    return seen[-1]


def kept(runtime: Any, scales: dict[tuple[int, int], float]) -> Any:
    return runtime.with_edits(KeptNorm(HeadEdit(scales)))


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "llava"])
def test_a_kept_norm_is_that_of_each_token_and_of_changed_layers_only(arch: str) -> None:
    runtime = tiny_runtime(arch)
    scales = {(1, 0): 0.0, (1, 2): 0.25}
    _, before = written(runtime, 1)
    heads, free = written(runtime.with_edits(HeadEdit(scales)), 1)
    heads_kept, after = written(kept(runtime, scales), 1)
    assert torch.equal(heads, heads_kept)
    assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(after, free * (before.norm(dim=-1) / free.norm(dim=-1))[:, None], atol=1e-6)
    ratios = before.norm(dim=-1) / free.norm(dim=-1)
    assert ratios.max() / ratios.min() > 1.02  # one factor for all tokens would be another thing
    module = find_projections(runtime.model, find_layers(runtime.model))[2]
    into, out = written(kept(runtime, scales), 2)
    assert torch.allclose(out, module(into), atol=1e-6)


def test_nothing_is_kept_of_nothing_and_a_factor_of_one_changes_nothing() -> None:
    runtime = tiny_runtime()  # its projection has no bias
    assert (written(kept(runtime, {(1, h): 0.0 for h in range(4)}), 1)[1] == 0).all()
    same = kept(runtime, {(1, 0): 1.0})
    assert torch.allclose(written(same, 2)[1], written(runtime, 2)[1], atol=1e-6)


def test_a_row_does_not_feel_those_beside_it_nor_their_padding() -> None:
    """One norm over the batch, as published, would fail here."""
    runtime = tiny_runtime()
    long = Prompt.of("please tell me a story about norway , france and the weather today . be brief", id="c")
    with ScaleHeads([(0, 1), (2, 3)], keep_norm=True, allow_refusal_lowering=True).on(runtime) as changed:
        some = [*PROMPTS, long]
        together = [s.p_refuse for s in changed.score(some)]
        np.testing.assert_allclose(
            together, [next(iter(changed.score([p]))).p_refuse for p in some], rtol=1e-4
        )
        asked = Condition(max_new_tokens=6)  # rows padded on the left, and a cache
        said = [r.content for r in changed.generate(some, asked)]
        assert said == [next(iter(changed.generate([p], asked))).content for p in some]
        whole = torch.tensor([changed.chat.render(long).ids])
        with changed.edited():
            at_once = changed.model(input_ids=whole, use_cache=False).logits[0, -1]
            first = changed.model(input_ids=whole[:, :-3], use_cache=True)
            behind = changed.model(input_ids=whole[:, -3:], past_key_values=first.past_key_values)
        assert torch.allclose(at_once, behind.logits[0, -1], atol=1e-4)


def test_a_kept_norm_leaves_nothing_behind() -> None:
    runtime = tiny_runtime()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in runtime.model.modules())

    before, n = [s.p_refuse for s in runtime.score(PROMPTS)], hooks()
    with ScaleHeads([(1, 2)], keep_norm=True, allow_refusal_lowering=True).on(runtime) as changed:
        assert "norm kept" in changed.name
        assert [s.p_refuse for s in changed.score(PROMPTS)] != before
    assert [s.p_refuse for s in runtime.score(PROMPTS)] == before and hooks() == n
    with pytest.raises(InputError, match="heads 0 to 3"):
        list(kept(runtime, {(9, 0): 0.0}).score(PROMPTS))
    assert hooks() == n


def test_a_kept_norm_is_that_under_all_other_edits() -> None:
    from demur.train.adapter import LoraEdit

    runtime, noise = tiny_runtime(), torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=noise), torch.randn(32, 4, generator=noise)
    tuned = runtime.with_edits(LoraEdit({"model.layers.1.self_attn.o_proj": (A, B)}, 0.5))
    norm, bare = (written(r, 1)[1].norm(dim=-1) for r in (tuned, runtime))
    assert not torch.allclose(norm, bare, rtol=0.05)
    assert torch.allclose(written(kept(tuned, {(1, 0): 0.0}), 1)[1].norm(dim=-1), norm, rtol=1e-5)
    # twice on one layer: still the norm that it has without either, and both scalings in force
    twice = kept(kept(tuned, {(1, 0): 0.0}), {(1, 1): 0.5})
    into, out = written(twice, 1)
    want, _ = written(tuned.with_edits(HeadEdit({(1, 0): 0.0, (1, 1): 0.5})), 1)
    assert torch.allclose(out.norm(dim=-1), norm, rtol=1e-5) and torch.allclose(into, want, atol=1e-6)


def test_readers_of_heads_see_them_scaled() -> None:
    runtime, site = tiny_runtime(), [Site(layer=1, position=-2, part="heads")]
    before, after = (
        np.stack([s.vectors[0] for s in r.states(PROMPTS, site)]).reshape(2, 4, -1)
        for r in (runtime, kept(runtime, {(1, 2): 0.25}))
    )
    np.testing.assert_allclose(after[:, 2], 0.25 * before[:, 2], atol=1e-6)
    np.testing.assert_allclose(after[:, [0, 1, 3]], before[:, [0, 1, 3]], atol=1e-6)


def test_a_kept_norm_needs_a_local_model_and_consent() -> None:
    """What the other heads of the layer write is rescaled, and the table does not show where that leads."""
    with pytest.raises(RefusalLowering, match=r"0\.0.*norm kept"):
        ScaleHeads([(0, 0)], table=TABLE, keep_norm=True)
    allowed = ScaleHeads([(0, 0)], table=TABLE, keep_norm=True, allow_refusal_lowering=True)
    with pytest.raises(CapabilityError), allowed.on(ScriptedRuntime({})):
        pass
