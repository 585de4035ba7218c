"""Routers are found in every family, and each mode does what a hand calculation or edited weights say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from demur.errors import CapabilityError, InputError
from demur.runtime.layers import ExpertEdit, ExpertMode, Router, find_routers
from tests.runtime.moe import MOE, moe_model
from tests.runtime.tiny import tiny_model

IDS = torch.tensor([[9, 12, 15, 20, 31], [40, 11, 10, 9, 8]])
MODES: tuple[ExpertMode, ...] = ("post_topk_renorm", "pre_topk", "output_gain", "force")


class HandMade(nn.Module):
    """Four experts, two chosen, weights normalised and then scaled as DeepSeek-V3 does; logits are the input."""

    def __init__(self, scale: float = 1.0, bias: tuple[float, ...] = (0, 0, 0, 0)) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.eye(4)), scale
        self.bias = torch.tensor(bias, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(x, self.weight)
        shares = logits.softmax(-1)
        indices = (shares + self.bias).topk(2, dim=-1).indices
        weights = shares.gather(1, indices)
        return logits, weights / weights.sum(-1, keepdim=True) * self.scale, indices


def routed(
    experts: list[int], mode: ExpertMode, gain: float = 0.0, scale: float = 1.0, **more: Any
) -> dict[int, float]:
    """Expert -> weight of one token with logits 2, 1, 0, -1."""
    module = HandMade(scale, **more)
    hook = ExpertEdit([], mode, gain)._hook(Router(0, module, 4, 2), experts)
    logits, weights, indices = module(torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    hook.remove()
    assert logits.tolist() == [[2, 1, 0, -1]]
    return dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))


HIGH = 1 / (1 + torch.e**-1)  # softmax of two logits one apart
LOW = 1 - HIGH


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_modes_on_a_hand_made_router(scale: float) -> None:
    def like(**of: float) -> Any:
        return pytest.approx({int(k[1:]): scale * v for k, v in of.items()}, abs=1e-6)

    def go(experts: list[int], mode: ExpertMode, gain: float = 0.0) -> dict[int, float]:
        return routed(experts, mode, gain, scale)

    assert go([], "post_topk_renorm") == like(e0=HIGH, e1=LOW)
    assert go([0], "post_topk_renorm") == like(e0=0, e1=1)  # nobody moves in, the other takes it all
    assert go([0, 1], "post_topk_renorm") == like(e0=0, e1=0)
    assert go([3], "post_topk_renorm") == go([], "post_topk_renorm")  # not chosen anyway: same bits
    assert go([0], "pre_topk") == like(e1=HIGH, e2=LOW)  # the third moves in
    assert go([0, 1], "pre_topk") == like(e2=HIGH, e3=LOW)
    assert go([0], "output_gain") == like(e0=0, e1=LOW)
    assert go([0], "output_gain", 0.5) == like(e0=HIGH / 2, e1=LOW)
    assert go([3], "force") == like(e0=0.5, e3=0.5)  # in place of the smaller one
    assert go([1], "force") == like(e0=0.5, e1=0.5)  # chosen already, now as much as the largest
    assert go([2, 3], "force") == like(e2=0.5, e3=0.5)


def test_a_bias_for_the_choice_does_not_bring_a_barred_expert_back() -> None:
    assert set(routed([0], "pre_topk", bias=(9, 0, 0, 0))) == {1, 2}
    assert set(routed([], "pre_topk", bias=(0, 0, 0, 9))) == {3, 0}


def logits(model: Any, *edits: ExpertEdit) -> torch.Tensor:
    from contextlib import ExitStack

    with ExitStack() as stack, torch.inference_mode():
        for edit in edits:
            stack.enter_context(edit.install(model))
        return model(input_ids=IDS, use_cache=False).logits.clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(MOE))
def test_every_family(kind: str) -> None:
    model = moe_model(kind)
    routers = find_routers(model)
    n = 8 if "n_routed_experts" in MOE[kind] else 4
    first = int(
        "first_k_dense_replace" in MOE[kind] or kind in ("ernie4_5_moe", "deepseek_v3", "deepseek_v2")
    )
    assert [(r.layer, r.experts, r.chosen) for r in routers] == [(k, n, 2) for k in range(first, 3)]
    plain = logits(model)
    assert torch.equal(logits(model, ExpertEdit([])), plain)
    assert torch.equal(logits(model, ExpertEdit([(1, 0)], "output_gain", 1.0)), plain)
    for mode in MODES:
        assert logits(model, ExpertEdit([(2, 0)], mode)).isfinite().all()
        every = [(r.layer, e) for r in routers for e in range(2)]
        assert (logits(model, ExpertEdit(every, mode)) - plain).abs().max() > 1e-4, mode
    assert torch.equal(logits(model), plain)  # nothing stays behind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(MOE))
def test_a_gain_of_zero_is_an_expert_without_output(kind: str) -> None:
    model = moe_model(kind)
    some = [(1, 0), (2, 1), (2, 3)]
    blank = copy.deepcopy(model)
    for router in find_routers(blank):
        block = next(m for m in blank.modules() if router.module in list(m.children()))
        mine = [expert for layer, expert in some if layer == router.layer]
        for name in ("down_proj", "down_proj_bias"):
            getattr(block.experts, name, torch.zeros(8)).data[mine] = 0
    torch.testing.assert_close(
        logits(model, ExpertEdit(some, "output_gain")), logits(blank), atol=1e-5, rtol=1e-4
    )


def test_barred_experts_follow_the_models_own_rules() -> None:
    model = moe_model("deepseek_v3")
    router = find_routers(model)[-1]
    seen: list[Any] = []

    def choices(*edits: ExpertEdit) -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        for edit in edits:
            stack = edit.install(model)
            with stack:
                handle = router.module.register_forward_hook(lambda _m, _a, out: seen.append(out))
                logits(model)
                handle.remove()
        return seen[0][1], seen[0][2]

    weights, indices = choices(ExpertEdit([(2, 0), (2, 1)], "pre_topk"))
    assert not torch.isin(indices, torch.tensor([0, 1])).any()
    torch.testing.assert_close(weights.sum(-1), torch.full((10,), 2.5))  # its scaling factor
    assert ((indices // 4).amax(-1) == (indices // 4).amin(-1)).all()  # still both from one group
    weights, _ = choices(ExpertEdit([(2, e) for e in range(3)]))
    total = weights.sum(-1)
    assert ((total - 2.5).abs().lt(1e-5) | (total == 0)).all()


def test_wrong_places_and_models() -> None:
    model = moe_model("deepseek_v3")
    for bad in [(0, 1), (1, 8), (3, 0)]:
        with pytest.raises(InputError, match="layers 1 to 2 have 8 each"):
            logits(model, ExpertEdit([bad]))
    with pytest.raises(InputError, match="at most 2"):
        logits(model, ExpertEdit([(1, 0), (1, 1), (1, 2)], "force"))
    with pytest.raises(InputError, match="at most 6"):
        logits(model, ExpertEdit([(1, e) for e in range(7)], "pre_topk"))
    with pytest.raises(CapabilityError, match="no router"):
        find_routers(tiny_model("llama"))
    with pytest.raises(CapabilityError, match="Llama4Router"):
        find_routers(moe_model("llama4_text", num_local_experts=4, num_experts_per_tok=1, head_dim=8))
