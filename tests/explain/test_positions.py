import copy

import numpy as np
import pytest
import torch

from demur.errors import CapabilityError, InputError
from demur.explain import collect, fit_probe, grid, token_index
from demur.explain.probe import Probe
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Message, Prompt
from tests.runtime.tiny import tiny_runtime

TEXTS = ["how do I boil an egg", "write a letter to my cat", "bomb", "what is the capital of france ?"]
PROMPTS = [Prompt.of(t, id=str(i)) for i, t in enumerate(TEXTS)]


def by_hand(runtime, prompt, layer, index):
    ids = runtime.chat.render(prompt).ids
    with torch.inference_mode():
        # a copy: transformers leaves its capture hooks on a model, and this one is shared with other tests
        out = copy.deepcopy(runtime.model)(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[layer + 1][0, index].float().numpy()


def test_names_mean_the_last_user_token_and_the_last_template_token():
    runtime = tiny_runtime()
    assert (token_index(runtime, "t_post"), token_index(runtime, "last"), token_index(runtime, -4)) == (
        -1,
        -1,
        -4,
    )
    for prompt in PROMPTS:
        ids = runtime.chat.render(prompt).ids
        last = runtime.tokenizer.convert_ids_to_tokens(ids)[token_index(runtime, "t_inst")]
        assert last == prompt.text.split()[-1]
    with pytest.raises(InputError, match="t_inst, t_post, last"):
        token_index(runtime, "middle")
    with pytest.raises(CapabilityError, match="no chat template"):
        token_index(ScriptedRuntime(lambda p: "no"), "t_inst")


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_collect_equals_a_plain_forward_pass(arch):
    runtime = tiny_runtime(arch)
    seen = []
    sites = grid([0, 1], ["t_inst", "t_post"])
    states = collect(runtime, PROMPTS, sites, progress=lambda done, total: seen.append((done, total)))
    assert list(states) == sites and seen == [(i, 4) for i in range(1, 5)]
    for (layer, name), X in states.items():
        assert X.shape == (4, 32) and X.dtype == np.float32
        want = [by_hand(runtime, p, layer, token_index(runtime, name)) for p in PROMPTS]
        assert pytest.approx(np.stack(want), abs=1e-4) == X


def test_collect_in_half_precision_and_under_a_condition():
    runtime = tiny_runtime()
    site = (1, "t_post")
    full, half = collect(runtime, PROMPTS, [site]), collect(runtime, PROMPTS, [site], dtype="float16")
    assert half[site].dtype == np.float16 and half[site] == pytest.approx(full[site], abs=5e-3)
    told = collect(runtime, PROMPTS, [site], Condition(system="be brief"))
    assert np.abs(told[site] - full[site]).max() > 1e-3
    heads = collect(runtime, PROMPTS, [site], part="heads")
    assert heads[site].shape == (4, 32) and not np.allclose(heads[site], full[site])


def test_collect_refuses_what_it_cannot_mean():
    runtime = tiny_runtime()
    begun = Prompt(
        id="b", messages=(Message(role="user", content="egg"), Message(role="assistant", content="I"))
    )
    with pytest.raises(InputError, match="ends with a message of the assistant"):
        collect(runtime, [begun], [(0, "t_inst")])
    assert collect(runtime, [begun], [(0, "last")])[0, "last"].shape == (1, 32)
    with pytest.raises(InputError, match="0 prompts"):
        collect(runtime, [], [(0, -1)])
    with pytest.raises(InputError, match="at 0 sites"):
        collect(runtime, PROMPTS, [])
    with pytest.raises(InputError, match="named twice"):
        collect(runtime, PROMPTS, [(0, -1), (0, -1)])
    with pytest.raises(InputError, match="layer 9"):
        collect(runtime, PROMPTS, [(9, -1)])
    with pytest.raises(CapabilityError, match="states"):
        collect(ScriptedRuntime(lambda p: "no"), PROMPTS, [(0, -1)])


def test_values_beyond_half_precision_are_an_error_not_infinity():
    from demur.runtime.local import BlockEdit

    runtime = tiny_runtime().with_edits(BlockEdit(1, lambda h, positions: h * 1e6))
    assert np.isfinite(collect(runtime, PROMPTS, [(1, -1)])[1, -1]).all()
    with pytest.raises(InputError, match="65504"):
        collect(runtime, PROMPTS, [(1, -1)], dtype="float16")


def test_from_states_to_a_saved_probe(tmp_path):
    runtime = tiny_runtime()
    words = ["egg", "fjord", "letter", "cat", "dog", "story", "poem", "sum", "number", "capital"]
    prompts = [Prompt.of(f"{a} {w}", id=f"{a}{w}") for w in words for a in ("red", "bomb")]
    y = np.array([p.text.startswith("bomb") for p in prompts])
    X = collect(runtime, prompts, [(2, "t_post")])[2, "t_post"]
    probe = fit_probe(X[:14], y[:14], site=(2, "t_post"), fingerprint=runtime.fingerprint)
    assert ((probe.score(X[14:]) > 0) == y[14:]).mean() >= 5 / 6
    probe.save(tmp_path / "p.safetensors")
    assert Probe.load(tmp_path / "p.safetensors", fingerprint=runtime.fingerprint).site == (2, "t_post")
