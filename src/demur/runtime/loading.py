"""Read a checkpoint folder with transformers; code that comes with a checkpoint is never run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from demur.errors import InputError


def load(path: str, dtype: str, device_map: Any) -> tuple[Any, Any]:
    """The model and tokenizer of a folder, as `LocalRuntime.from_folder` describes.

    Raises:
        InputError: a dtype that does not exist, or a folder that transformers cannot read.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path} is not a model that transformers can read ({str(e).splitlines()[0]}). Pass a folder "
            "with config.json, weights and tokenizer, or the id of a model on the hub"
        ) from None
    chosen = _native_dtype(config, device_map) if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise InputError(f"dtype {dtype!r}: use float32, bfloat16, float16 or auto")
    text_only = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = auto.from_pretrained(path, dtype=chosen, device_map=device_map, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{path}: transformers reads its config.json and fails on its weights or tokenizer "
            f"({type(e).__name__}: {' '.join(str(e).split())[:300]}). Save both with save_pretrained"
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return model.requires_grad_(False), tokenizer


def _native_dtype(config: Any, device_map: Any) -> torch.dtype:
    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if device_map is not None and torch.accelerator.is_available():
        return stored or torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if stored in (torch.bfloat16, torch.float16) and fast else torch.float32
