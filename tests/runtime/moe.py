"""Random mixture-of-experts models of some thousand weights, one for each form of router that is read."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.runtime.tiny import MLA, SMALL, tiny_tokenizer

FOUR: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DENSE_FIRST: dict[str, Any] = {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": {**FOUR, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**FOUR, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8},
    "olmoe": FOUR,
    "deepseek_v2": {**MLA, **ROUTED, "topk_group": 1},
    "deepseek_v3": {**MLA, **ROUTED, "routed_scaling_factor": 2.5},
    "glm4_moe": {**DENSE_FIRST, "n_group": 1, "topk_group": 1},
    "dots1": {**DENSE_FIRST, "n_group": 1, "topk_group": 1},
    "gpt_oss": {**LOCAL, "head_dim": 8},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
    },
    "phimoe": LOCAL,
}


@cache
def moe_model(kind: str, **more: Any) -> Any:
    """A float32 model; the same object for the same arguments, so tests must leave it as it was."""
    ids = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 7}
    config = AutoConfig.for_model(kind, **{**SMALL, **ids, **MOE.get(kind, {}), **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            if "gate.weight" in name or "router.weight" in name:
                parameter.data.normal_(0, 0.5)
    return model.eval().requires_grad_(False)
