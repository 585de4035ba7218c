"""The embedded model itself. Skipped where its weights are not in the user's cache and cannot be had."""

from __future__ import annotations

import pytest

from demur import models
from demur.errors import DataUnavailable, MissingExtra
from demur.models import smollm2

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def files() -> models.ModelFiles:
    try:
        return models.resolve("smollm2")
    except (DataUnavailable, MissingExtra) as e:
        pytest.skip(f"smollm2 cannot be had here: {e}")


def test_the_bytes_are_the_pinned_ones(files: models.ModelFiles) -> None:
    assert files.fingerprint == smollm2.FINGERPRINT
    assert models.fingerprint_folder(files.path) == smollm2.FINGERPRINT
    assert models.verify("smollm2") == []


def test_it_loads_and_its_tokenizer_knows_the_template(files: models.ModelFiles) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(files.path)
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 30, 49152)
    assert not hasattr(config, "quantization_config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 2024"}], add_generation_prompt=True)[
        "input_ids"
    ]
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nHi 2024<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer.encode(" 2024", add_special_tokens=False)) == 5  # digits stay single tokens
