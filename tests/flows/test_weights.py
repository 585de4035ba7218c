"""Exports compute what the runtime computes: reloaded by transformers, PEFT and demur itself, on tiny models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import yaml
from safetensors.torch import load_file

from demur.control.refusal_tokens import RefusalTokens
from demur.control.steering import Ablate, Add
from demur.errors import CapabilityError, DemurError, InputError, RefusalLowering
from demur.flows import weights
from demur.flows.load import load_runtime
from demur.runtime import forward
from demur.runtime.base import ControlTokens
from demur.runtime.control_rows import ControlRows
from demur.runtime.layers import BlockEdit, find_layers
from demur.runtime.local import LocalRuntime
from demur.serve.engine import export_of
from demur.serve.pointfile import PointFile
from demur.train.adapter import LoraEdit
from demur.types import Condition, OperatingPoint, Prompt, Site, Threshold
from tests.runtime.tiny import CATEGORIES, tiny_model, tiny_runtime, tiny_tokenizer

PROMPTS = [
    Prompt.of(text, id=text) for text in ("how do i boil a egg ?", "write a story please", "tell me one sum")
]
MODULES = ("o_proj", "down_proj", "q_proj", "dense", "dense_4h_to_h")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def lora(model: Any, rank: int = 2) -> LoraEdit:
    noise = torch.Generator().manual_seed(5)
    pairs = {
        name: (
            0.4 * torch.randn(rank, m.in_features, generator=noise),
            0.4 * torch.randn(m.out_features, rank, generator=noise),
        )
        for name, m in model.named_modules()
        if name.rsplit(".", 1)[-1] in MODULES and isinstance(m, torch.nn.Linear)
    }
    assert pairs
    return LoraEdit(pairs, 1.5)


def adapted(arch: str = "llama", **options: Any) -> LocalRuntime:
    base = tiny_runtime(arch, control=True, **options)
    return base.with_edits(lora(base.model), name=f"{arch}+adapter")


def table(runtime: Any) -> np.ndarray:
    return np.array([list(s.probabilities.values()) for s in runtime.score(PROMPTS)])


def logits(runtime: LocalRuntime) -> Any:
    with runtime.edited():
        return torch.cat([forward.run(runtime.model, [runtime.chat.render(p).ids]) for p in PROMPTS])


@pytest.mark.parametrize("arch", ["llama", "olmo2", "gemma3", "gpt_neox", "mixtral", "llava"])
def test_a_merged_checkpoint_is_the_model_with_its_adapter(arch: str, source: Path, tmp_path: Path) -> None:
    runtime = adapted(arch)
    made = weights.merged(runtime, tmp_path / "out", source=source)
    back: Any = load_runtime(tmp_path / "out", dtype="float32")
    assert back.edits == () and back.control.ids == runtime.control.ids and back.control.textless
    assert abs(table(back) - table(runtime)).max() < 2e-5
    assert abs(table(tiny_runtime(arch, control=True)) - table(runtime)).max() > 1e-3, (
        "the adapter does nothing"
    )
    ask = Condition(max_new_tokens=6)
    assert [r.content for r in back.generate(PROMPTS, ask)] == [
        r.content for r in runtime.generate(PROMPTS, ask)
    ]
    assert made.difference is not None and made.difference < 1e-3
    assert abs(table(adapted(arch)) - table(runtime)).max() == 0, "the shared model was changed"


def test_files_beside_the_weights(source: Path, tmp_path: Path) -> None:
    runtime = adapted()
    runtime.shipped_point = OperatingPoint(
        id="p",
        thresholds={"safety": Threshold(tau=0.2)},
        model_fingerprint=runtime.fingerprint,
        dtype="float32",
        answers="base",
    )
    weights.merged(runtime, tmp_path / "out", source=source)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    tokens = yaml.safe_load((out / "control_tokens.yaml").read_text())["tokens"]
    assert {c: t["id"] for c, t in tokens.items()} == runtime.control.ids  # type: ignore[union-attr]
    about = json.loads((out / "demur.json").read_text())
    back: Any = load_runtime(out, dtype="float32")
    assert back.shipped_point.answers == "model" and "the base is not in here" in about["notes"][0]
    assert about["fingerprint"] == back.fingerprint and about["source_fingerprint"] == runtime.fingerprint
    assert (
        json.loads((out / "config.json").read_text())["vocab_size"] == max(runtime.control.ids.values()) + 1
    )  # type: ignore[union-attr]
    with RefusalTokens(back.shipped_point).on(back) as dialled:  # the point now names this checkpoint
        assert len(list(dialled.generate(PROMPTS[:1], Condition(max_new_tokens=2)))) == 1
    assert (out / "model.safetensors").stat().st_mode & 0o044


def test_rows_in_the_padding_stay_within_the_vocabulary(source: Path, tmp_path: Path) -> None:
    model = tiny_model("mistral")
    size, width = model.get_input_embeddings().weight.shape
    first = size - 4
    rows = ControlRows(*torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1)), first)
    control = ControlTokens(ids={"safety": first, "other": first + 1, "respond": first + 2})
    runtime = LocalRuntime(model, tiny_tokenizer(), name="padded", control=control, edits=(rows,))
    weights.merged(runtime, tmp_path / "out", source=source)
    back: Any = load_runtime(tmp_path / "out", dtype="float32")
    assert back.model.config.vocab_size == size
    assert abs(table(back) - table(runtime)).max() < 1e-6


@pytest.mark.parametrize("equal", [True, False])
def test_matrices_stay_tied_where_a_token_is_read_as_it_is_written(
    equal: bool, source: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    assert model.config.tie_word_embeddings
    size, width = model.get_input_embeddings().weight.shape
    rows = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    edit = ControlRows(rows, rows if equal else 2 * rows, size)
    control = ControlTokens(ids={c: size + i for i, c in enumerate(CATEGORIES)})
    runtime = LocalRuntime(model, tiny_tokenizer(), name="tied", control=control, edits=(edit,))
    weights.merged(runtime, tmp_path / "out", source=source)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not equal)
    back: Any = load_runtime(tmp_path / "out", dtype="float32")
    assert abs(table(back) - table(runtime)).max() < 1e-6


def test_stock_lora_is_read_by_peft_over_the_base_that_it_needs(source: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by an old name
        _stock_lora(peft, source, tmp_path)


def _stock_lora(peft: Any, source: Path, tmp_path: Path) -> None:
    runtime = adapted()
    runtime.shipped_point = OperatingPoint(
        id="p", thresholds={"safety": Threshold(tau=0.2)}, model_fingerprint=runtime.fingerprint
    )
    made = weights.stock_lora(runtime, tmp_path / "out", source=source)
    told = export_of(tmp_path / "out" / "base")
    assert told.rows_in_base and told.point is not None and told.fingerprint == runtime.fingerprint
    PointFile(told.point, runtime.control.names, fingerprint=told.fingerprint)  # a gateway can start on it
    back: Any = load_runtime(tmp_path / "out" / "base", dtype="float32")
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base") and config["r"] == 2
    names = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    assert not any("embed" in n or "lm_head" in n for n in names), "vLLM takes no token rows"
    tuned = peft.PeftModel.from_pretrained(back.model, tmp_path / "out" / "lora")
    with_lora = LocalRuntime(tuned.base_model.model, tiny_tokenizer(), name="peft", control=runtime.control)
    assert abs(table(with_lora) - table(runtime)).max() < 2e-5
    assert made.difference is not None and made.difference < 1e-3


def test_a_vector_behind_a_layer_is_a_bias(source: Path, tmp_path: Path) -> None:
    runtime = adapted()
    add = [
        Add(np.linspace(-1, 1, 32), layer=1, coefficient=2.0, where="all"),
        Add(np.ones(32), layer=1, coefficient=0.5, where="all"),
    ]
    weights.merged(runtime, tmp_path / "out", source=source, add=add)
    back: Any = load_runtime(tmp_path / "out", dtype="float32")
    assert back.model.config.mlp_bias
    with add[0].on(runtime) as once, add[1].on(once) as steered:
        assert abs(table(back) - table(steered)).max() < 2e-5
        ask = Condition(max_new_tokens=6)
        assert [r.content for r in back.generate(PROMPTS, ask)] == [
            r.content for r in steered.generate(PROMPTS, ask)
        ]
    assert abs(table(back) - table(runtime)).max() > 1e-3


def test_what_weights_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompt and answer alike"):
        weights.merged(adapted(), tmp_path / "a", source=source, add=[Add(np.ones(32), layer=1)])
    with pytest.raises(CapabilityError, match="no place for a bias"):
        weights.merged(
            adapted("qwen2"), tmp_path / "b", source=source, add=[Add(np.ones(32), layer=1, where="all")]
        )
    ablate = Ablate(np.ones(32), allow_refusal_lowering=True)
    for arch in ("gemma3", "gpt_neox", "mixtral"):  # norms behind the writers, biases, experts
        with pytest.raises(CapabilityError, match="would not be exact"):
            weights.merged(adapted(arch), tmp_path / "c", source=source, ablate=ablate)
    with pytest.raises(InputError, match="order"):
        add = [Add(np.ones(32), layer=1, where="all")]
        weights.merged(adapted(), tmp_path / "d", source=source, add=add, ablate=ablate)
    edited = adapted().with_edits(BlockEdit(1, lambda h, _p: h + 1))
    with pytest.raises(InputError, match="BlockEdit"):
        weights.merged(edited, tmp_path / "e", source=source)
    with pytest.raises(InputError, match="no adapter"):
        weights.stock_lora(tiny_runtime(control=True), tmp_path / "f", source=source)
    (tmp_path / "g").mkdir()
    with pytest.raises(InputError, match="exists"):
        weights.merged(adapted(), tmp_path / "g", source=source)
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"source", "cache", "g"}, "a failed export leaves something behind"


def test_lowering_refusal_needs_consent() -> None:
    with pytest.raises(RefusalLowering):
        Ablate(np.ones(32))
    with pytest.raises(RefusalLowering):
        Add(np.ones(32), layer=1, coefficient=-1.0, where="all")


def test_a_tokenizer_that_reads_otherwise_from_the_folder_is_noticed(source: Path, tmp_path: Path) -> None:
    # transformers picks Qwen2's own tokenizer class for this folder, and this one is none of that
    with pytest.raises(DemurError, match="tokenizer"):
        weights.merged(adapted("qwen2"), tmp_path / "out", source=source)


def every_write_without(runtime: LocalRuntime, u: Any) -> Any:
    """The model whose embeddings, attention and MLP outputs have no part along u, by hooks."""

    def take_out(_m: Any, _a: Any, out: Any) -> Any:
        return out - (out @ u)[..., None] * u

    modules = [runtime.model.get_input_embeddings()]
    for layer in find_layers(runtime.model):
        modules += [layer.self_attn.o_proj, layer.mlp.down_proj]
    handles = [m.register_forward_hook(take_out) for m in modules]
    try:
        with runtime.edited():  # LoRA hooks come behind these, so they are asked for again below
            return torch.cat([forward.run(runtime.model, [runtime.chat.render(p).ids]) for p in PROMPTS])
    finally:
        for h in handles:
            h.remove()


def test_ablation_is_a_projection_of_all_that_writes(source: Path, tmp_path: Path) -> None:
    runtime = tiny_runtime("llama")
    vector = np.linspace(-1, 2, 32)
    ablate = Ablate(vector, allow_refusal_lowering=True)
    made = weights.merged(runtime, tmp_path / "out", source=source, ablate=ablate)
    back: Any = load_runtime(tmp_path / "out", dtype="float32")
    u = torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)
    want = every_write_without(runtime, u)
    assert (logits(back) - want).abs().max() < 1e-4 < (logits(runtime) - want).abs().max()
    for states in back.states(PROMPTS, [Site(layer=k) for k in range(3)]):
        assert abs(states.vectors @ u.numpy()).max() < 1e-4
    assert any("lowers refusal" in note or "allowed" in note for note in made.notes)


def test_ablation_as_one_more_rank(source: Path, tmp_path: Path) -> None:
    runtime = adapted()
    vector = np.linspace(-1, 2, 32)
    ablate = Ablate(vector, allow_refusal_lowering=True)
    weights.stock_lora(runtime, tmp_path / "out", source=source, ablate=ablate)
    pairs = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    u = torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)
    modules = dict(runtime.model.named_modules())
    merged = {}
    for key in pairs:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = pairs[key.replace("lora_A", "lora_B")]
            assert len(pairs[key]) == 3
            merged[name] = modules[name].weight + B @ pairs[key]
    writers = [n for n in merged if n.endswith(("o_proj", "down_proj"))]
    assert len(writers) == 6
    assert max(float((u @ merged[n]).abs().max()) for n in writers) < 1e-5
    A, B = runtime.edits[-1].lora["model.layers.0.self_attn.q_proj"]  # type: ignore[attr-defined]
    assert torch.allclose(
        merged["model.layers.0.self_attn.q_proj"],
        modules["model.layers.0.self_attn.q_proj"].weight + 1.5 * B @ A,
        atol=1e-5,
    )


def test_control_vectors_in_llama_cpps_layout(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    runtime = tiny_runtime("llama")
    add = [
        Add(np.arange(32.0), layer=1, coefficient=0.5, where="all"),
        Add(np.ones(32), layer=2, where="all"),
        Add(np.ones(32), layer=2, coefficient=2.0, where="all"),
    ]
    weights.control_vector(runtime, tmp_path / "v.gguf", add)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    assert found.keys() == {"direction.1", "direction.2"}
    assert np.allclose(found["direction.1"], 0.5 * np.arange(32)) and np.allclose(found["direction.2"], 3.0)
    assert found["direction.1"].dtype == np.float32
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    with pytest.raises(InputError, match="layer 0"):
        weights.control_vector(runtime, tmp_path / "w.gguf", [Add(np.ones(32), layer=0, where="all")])


def test_an_export_that_computes_something_else_gets_no_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = weights.folds.merge_lora

    def wrong(runtime: LocalRuntime) -> dict[str, Any]:
        return {name: W * 1.05 for name, W in merge(runtime).items()}

    monkeypatch.setattr(weights.folds, "merge_lora", wrong)
    with pytest.raises(DemurError, match="not the model it was made from"):
        weights.merged(adapted(), tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
