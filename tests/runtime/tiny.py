"""Random models of a few thousand weights in every supported architecture, with a word-level tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from demur.runtime.base import ControlTokens
from demur.runtime.control_rows import ControlRows
from demur.runtime.local import LocalRuntime

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = """
how what why where do does can i you we the a an to of in is are my your boil egg fjord write letter cat dog
tell me about please thanks yes no sorry cannot help with that red blue green one two three four five bomb
story poem sum number capital france norway weather today tomorrow system prompt be brief polite I'm As
Unfortunately Sorry I assistant user ? . ! ,
""".split()  # noqa: SIM905
SPECIAL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
CATEGORIES = ("safety", "humanizing", "unsupported", "indeterminate", "incomplete", "respond")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 4, "head_dim": 12}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **MLA}),
    "llava": ("llava", {}),
}


@cache
def tiny_tokenizer() -> Any:
    """Words split at white space; roles and end are special tokens; unknown words are `<unk>`."""
    vocab = {w: i for i, w in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def tiny_model(arch: str = "llama", seed: int = 0) -> Any:
    """A random float32 model; the same object for the same arguments, so tests must leave it as it was."""
    kind, extra = ARCHITECTURES[arch]
    vocab = len(tiny_tokenizer()) + 4  # like real ones: padding rows behind the tokenizer
    ids = {"vocab_size": vocab, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 7}
    if arch == "llava":
        text = {"model_type": "llama", **SMALL, **ids}
        config = AutoConfig.for_model(
            "llava", text_config=text, vision_config=VISION, image_token_index=vocab - 1
        )
    else:
        config = AutoConfig.for_model(kind, **{**SMALL, **ids, **extra})
    auto = AutoModelForImageTextToText if arch == "llava" else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases away from 1 and 0, so that leaving one out shows
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_control(model: Any, seed: int = 0) -> tuple[ControlRows, ControlTokens]:
    """Six control rows behind the model's vocabulary, and their names."""
    size, width = model.get_input_embeddings().weight.shape
    noise = torch.Generator().manual_seed(seed)
    rows = [0.3 * torch.randn(6, width, generator=noise) for _ in range(2)]
    return ControlRows(*rows, size), ControlTokens(ids={c: size + i for i, c in enumerate(CATEGORIES)})


def tiny_runtime(arch: str = "llama", seed: int = 0, control: bool = False, **options: Any) -> LocalRuntime:
    """A local runtime over a tiny random model, with six random control rows on request."""
    model = tiny_model(arch, seed)
    if not control:
        return LocalRuntime(
            model, tiny_tokenizer(), name=f"tiny-{arch}", fingerprint=f"tiny-{arch}-{seed}", **options
        )
    rows, names = tiny_control(model, seed)
    return LocalRuntime(
        model,
        tiny_tokenizer(),
        name=f"tiny-{arch}",
        fingerprint=f"tiny-{arch}-{seed}",
        control=names,
        edits=(rows,),
        **options,
    )
