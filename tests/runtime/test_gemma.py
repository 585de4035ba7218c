"""The runtime on Gemma-3-270M: sliding windows, tied and scaled embeddings, a vocabulary of 262,144."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from demur.runtime.local import REFUSAL_OPENINGS, LocalRuntime
from demur.types import Condition, Message, Prompt, Site
from tests.models import gemma

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(gemma.folder() is None, reason="not made here: make gemma"),
]

# The base model has no template. Its tokenizer knows the turn markers of the instruction-tuned one.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PROMPTS = [
    Prompt.of("How do I kill a Python process?", id="a"),
    Prompt.of("Name three rivers of Asia, and for each the sea it ends in.", id="b"),
    Prompt.of("Hi", id="c"),
    Prompt.of(
        "Sum up this text: " + "the river rose and the bridge held. " * 90, id="long"
    ),  # past the window of 512
]


@pytest.fixture(scope="module")
def runtime() -> LocalRuntime:
    return LocalRuntime.from_folder(gemma.folder(), dtype="float32", template=TEMPLATE)


def test_scores_and_states_equal_plain_transformers(runtime: LocalRuntime) -> None:
    tok, depth = runtime.tokenizer, runtime.model.config.num_hidden_layers
    opening = sorted({tok.encode(o, add_special_tokens=False)[0] for o in REFUSAL_OPENINGS})
    sites = [Site(layer=k, position=p) for k in (0, depth // 2, depth - 2) for p in (-1, -4)]
    scores, states = list(runtime.score(PROMPTS)), list(runtime.states(PROMPTS, sites))
    for prompt, score, state in zip(PROMPTS, scores, states, strict=True):
        ids = runtime.chat.render(prompt).ids
        assert len(ids) > 600 if prompt.id == "long" else len(ids) < 60
        out = runtime.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        assert score.p_refuse == pytest.approx(out.logits[0, -1].softmax(-1)[opening].sum().item(), rel=2e-3)
        want = torch.stack([out.hidden_states[s.layer + 1][0, s.position] for s in sites]).numpy()
        np.testing.assert_allclose(state.vectors, want, atol=2e-3 * np.abs(want).max())


def test_answers_equal_plain_transformers_also_past_the_window(runtime: LocalRuntime) -> None:
    asked = [PROMPTS[0], PROMPTS[3]]
    for prompt, reply in zip(asked, runtime.generate(asked, Condition(max_new_tokens=10)), strict=True):
        ids = torch.tensor([runtime.chat.render(prompt).ids])
        out = runtime.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        assert (
            reply.content.strip()
            == runtime.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        )


def test_a_long_shared_system_message_is_computed_once_and_changes_nothing(runtime: LocalRuntime) -> None:
    """The shared prefix is longer than the sliding window."""
    system = "You keep the log of a bridge. " * 100
    together = list(runtime.score(PROMPTS[:3], Condition(name="s", system=system)))
    for prompt, score in zip(PROMPTS[:3], together, strict=True):
        alone = next(iter(runtime.score([prompt.with_system(system)])))
        assert score.p_refuse == pytest.approx(alone.p_refuse, rel=1e-3)


def test_no_special_token_can_be_typed(runtime: LocalRuntime) -> None:
    special = set(runtime.tokenizer.added_tokens_decoder)
    clean = [i for i in runtime.chat.render(Prompt.of("x")).ids if i in special]
    for name in ("<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<pad>", "<unused7>"):
        ids = runtime.chat.render(
            Prompt(id="p", messages=(Message(role="user", content=f"a{name}b {name}"),))
        ).ids
        assert [i for i in ids if i in special] == clean, name
