import copy

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demur import models as models_of_demur
from demur.errors import CapabilityError, DemurError, InputError
from demur.explain import collect, fit_probe, grid, show_positions, state_store, token_index
from demur.explain.probe import Probe
from demur.runtime import batching
from demur.runtime.local import LocalRuntime
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Message, Prompt
from tests.runtime.test_chat import tokenizer
from tests.runtime.tiny import tiny_model, tiny_runtime

TEXTS = ["how do I boil an egg", "write a letter to my cat", "bomb", "what is the capital of france ?"]
PROMPTS = [Prompt.of(t, id=str(i)) for i, t in enumerate(TEXTS)]
WINDOWS = batching.windows


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


def test_states_on_disk_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(state_store, "WINDOW", 2)
    monkeypatch.setattr(batching, "windows", lambda items, size=2: WINDOWS(items, 2))
    runtime, sites = tiny_runtime(), grid([0, 2])
    whole = collect(runtime, PROMPTS, sites, store=tmp_path / "whole")

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(runtime, PROMPTS, sites, store=tmp_path / "cut", progress=stop)
    seen = []
    again = collect(
        runtime, PROMPTS, sites, store=tmp_path / "cut", progress=lambda done, _: seen.append(done)
    )
    assert seen == [3, 4]  # the second window is done anew as a whole
    plain = collect(runtime, PROMPTS, sites)
    for site in sites:
        assert isinstance(again[site], np.memmap)
        assert (np.asarray(again[site]) == whole[site]).all() and (whole[site] == plain[site]).all()
    files = [(tmp_path / d / "states.npy").read_bytes() for d in ("whole", "cut")]
    assert files[0] == files[1]
    for runtime_, prompts, other in [
        (tiny_runtime("gpt_neox"), PROMPTS, "model, fingerprint"),
        (runtime, PROMPTS[:3], "prompts"),
    ]:
        with pytest.raises(InputError, match=f"other {other}"):
            collect(runtime_, prompts, sites, store=tmp_path / "cut")
    (tmp_path / "cut" / "states.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="no whole store"):
        collect(runtime, PROMPTS, sites, store=tmp_path / "cut")


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


def runtime_of(kind, **options):
    return LocalRuntime(tiny_model(), tokenizer(kind), name=kind, **options)


def text_of(tokens, name):
    return "".join(t.text for t in tokens if name in t.names)


@pytest.mark.parametrize(
    ("kind", "tail"),
    [
        ("smollm2", "<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3", "<|im_end|>\n<|im_start|>assistant\n"),
        ("deepseek_r1", "<｜Assistant｜><think>\n"),
        ("gpt_oss", "<|end|><|start|>assistant"),
    ],
)
def test_the_tokens_of_a_prompt_and_whose_text_they_hold(kind, tail):
    runtime = runtime_of(kind)
    prompt = Prompt.of("What is a user?\n", system="user: be brief")
    tokens = show_positions(runtime, prompt)
    assert [t.id for t in tokens] == runtime.chat.render(prompt).ids
    assert [t.index for t in tokens] == list(range(len(tokens))) == [t.end + len(tokens) for t in tokens]
    assert text_of(tokens, "system") == "user: be brief"
    # SmolLM2's own template and the others write the message as it is; its last character is the line end
    assert text_of(tokens, "prompt") == "What is a user?\n"
    assert [t.text for t in tokens if "t_inst" in t.names] == ["\n"]
    ending = [t for t in tokens if t.end >= -len(runtime.chat.tail)]
    assert "".join(t.text for t in ending) == tail
    assert [t.names[1] for t in ending] == [*(f"t_post-{k}" for k in range(len(ending) - 1, 0, -1)), "t_post"]
    assert ending[-1].names == ("template", "t_post", "last")
    for t in tokens:
        for name in t.names[1:]:
            assert token_index(runtime, name) == t.end
    with pytest.raises(InputError, match="writes"):
        token_index(runtime, f"t_post-{len(ending)}")


def test_a_begun_answer_and_a_typed_control_token():
    runtime = runtime_of("smollm2")
    begun = Prompt(
        id="b", messages=(Message(role="user", content="egg"), Message(role="assistant", content="I"))
    )
    tokens = show_positions(runtime, begun)
    assert tokens[-1].names == ("assistant", "last") and not text_of(tokens, "t_inst")
    # the text of the prompt is not the text the tokenizer would read, so nobody can say whose a token is
    typed = show_positions(runtime, Prompt.of("say <|im_end|> now"))
    assert text_of(typed, "t_inst") == "w" and not text_of(typed, "prompt")


def test_a_template_that_runs_into_the_message_has_no_t_inst():
    letters = {c: i for i, c in enumerate(["<s>", *"abcdefghijklmnopqrstuvwxyz?.7ĠQI"])}
    core = Tokenizer(models.BPE(vocab={**letters, "?.": len(letters)}, merges=[("?", ".")], unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    glued = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<s>", chat_template="{{ messages[-1].content }}.a"
    )
    runtime = LocalRuntime(tiny_model(), glued, name="glued")
    assert token_index(runtime, "t_post") == -1
    with pytest.raises(CapabilityError, match="no boundary"):
        show_positions(runtime, Prompt.of("why"))
    with pytest.raises(CapabilityError, match="no boundary"):
        collect(runtime, PROMPTS, [(0, "t_inst")])


def test_a_template_without_a_system_role_says_so():
    picky = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    runtime = runtime_of("smollm2", template=picky + "{{ messages[-1].content }}<|im_end|>")
    assert text_of(show_positions(runtime, Prompt.of("egg")), "t_inst") == "g"
    with pytest.raises(InputError, match="System role not supported"):
        show_positions(runtime, Prompt.of("egg", system="be brief"))
    with pytest.raises(InputError, match="System role not supported"):
        collect(runtime, PROMPTS, [(0, -1)], Condition(system="be brief"))


def test_a_position_outside_the_prompt_and_a_prompt_beyond_the_context():
    runtime = tiny_runtime()
    with pytest.raises(InputError, match="position -99 is outside prompt '0'"):
        collect(runtime, PROMPTS, [(0, -99)])
    with pytest.raises(InputError, match="context"):
        collect(runtime, [Prompt.of("egg " * 300)], [(0, -1)])


@pytest.mark.model
def test_the_tokens_of_smollm2():
    try:
        tokens = AutoTokenizer.from_pretrained(models_of_demur.resolve("smollm2").path)
    except DemurError as e:
        pytest.skip(f"no SmolLM2 weights here: {e}")
    found = show_positions(
        LocalRuntime(tiny_model(), tokens, name="smollm2"), Prompt.of("How do I boil an egg?")
    )
    assert [t.text for t in found if "prompt" in t.names] == ["How", " do", " I", " boil", " an", " egg", "?"]
    assert [t.names[1:] for t in found[-7:]] == [
        ("t_inst",),
        ("t_post-5",),
        ("t_post-4",),
        ("t_post-3",),
        ("t_post-2",),
        ("t_post-1",),
        ("t_post", "last"),
    ]
