"""From names to runtimes, on tiny models in folders; a recipe that saves one stands in for smollm2."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from demur import models
from demur.control.refusal_tokens import RefusalTokens
from demur.errors import InputError, MismatchError, MissingExtra, RefusalLowering
from demur.files import dump_operating_point
from demur.flows.load import control_for, load_runtime
from demur.models import store
from demur.runtime.openai import OpenAIRuntime
from demur.train.adapter import save_adapter
from demur.types import OperatingPoint, Prompt, Threshold
from tests.models.builtin import Builder
from tests.runtime.tiny import tiny_control, tiny_model, tiny_runtime, tiny_tokenizer

PROMPT = Prompt.of("how do i boil a egg ?")


def save_tiny(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    store._checked.clear()


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny(Builder):
        def convert(self, source: Path, target: Path, say: store.Say) -> None:
            save_tiny(target)

    monkeypatch.setitem(models.RECIPES, "smollm2", Tiny().recipe("smollm2"))


@pytest.fixture
def adapter(builtin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control rows without LoRA, trained on the tiny built-in; installed as the default's adapter."""
    rows, control = tiny_control(tiny_model())
    base = load_runtime("smollm2")
    folder = tmp_path / "adapter"
    save_adapter(
        folder,
        peft_config={"r": 1, "lora_alpha": 1},
        lora={},
        rows={"input": rows.input_rows, "output": rows.output_rows},
        about={"control_tokens": dict(control.ids), "base_fingerprint": base.fingerprint},
    )
    monkeypatch.setattr(models, "_adapter_path", lambda name: folder)
    return folder


def test_folder(tmp_path: Path) -> None:
    runtime = load_runtime(save_tiny(tmp_path / "m"), dtype="float32")
    assert runtime.fingerprint == models.fingerprint_folder(tmp_path / "m")
    assert runtime.control is None
    (mine,) = runtime.score([PROMPT])
    (same,) = tiny_runtime().score([PROMPT])
    assert mine.p_refuse == pytest.approx(same.p_refuse, abs=1e-7)


def test_builtin_is_float32_and_default_has_the_adapter(adapter: Path) -> None:
    base, default = load_runtime("smollm2"), load_runtime()
    assert (base.name, base.dtype, base.control) == ("smollm2", "float32", None)
    assert default.name == "demur-smollm2"
    assert default.control is not None
    assert default.control.textless
    assert default.fingerprint != base.fingerprint
    assert load_runtime(base_only=True).fingerprint == base.fingerprint
    assert load_runtime(adapter=adapter).fingerprint == default.fingerprint


def test_the_operating_point_that_lies_beside_the_adapter(adapter: Path) -> None:
    assert load_runtime().shipped_point is None
    point = OperatingPoint(id="shipped", thresholds={"safety": Threshold(tau=0.4)})
    dump_operating_point(point, adapter / "operating_point.yaml")
    runtime = load_runtime()
    assert runtime.shipped_point == load_runtime(adapter=adapter).shipped_point == point
    assert load_runtime(base_only=True).shipped_point is load_runtime("smollm2").shipped_point is None
    lax = OperatingPoint(id="lax", thresholds={"safety": Threshold(tau=0.9)})
    with pytest.raises(RefusalLowering, match="'shipped'"), RefusalTokens(lax).on(runtime):
        pass
    with RefusalTokens(lax, allow_refusal_lowering=True).on(runtime) as dialled:
        assert dialled.shipped_point == point


def test_an_adapter_for_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(MismatchError, match="trained on the base"):
        load_runtime(other, adapter=adapter)


def test_endpoint() -> None:
    runtime = load_runtime("http://localhost:1/v1#m")
    assert isinstance(runtime, OpenAIRuntime)
    for options in ({"adapter": "a"}, {"dtype": "float32"}, {"control_tokens": "x"}, {"revision": "r"}):
        with pytest.raises(InputError, match="cannot be applied to an endpoint"):
            load_runtime("http://localhost:1/v1#m", **options)  # type: ignore[arg-type]


def test_a_folder_with_its_own_control_tokens(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    (folder / "control_tokens.yaml").write_text(
        "tokens:\n  refuse: {text: sorry}\n  respond: {text: 'yes'}\n"
    )
    runtime = load_runtime(folder)
    assert runtime.control is not None
    assert runtime.control.names == ("refuse", "respond")
    assert not runtime.control.textless
    (score,) = runtime.score([PROMPT])
    assert set(score.probabilities) == {"refuse", "respond"}
    assert score.p_refuse == pytest.approx(score.probabilities["refuse"])


def test_control_for_unknown_checkpoints_is_none() -> None:
    assert control_for("org/x", SimpleNamespace()) is None


def test_contradictions(adapter: Path) -> None:
    with pytest.raises(InputError, match="choose one"):
        load_runtime(adapter=adapter, base_only=True)
    with pytest.raises(InputError, match="brings its own control tokens"):
        load_runtime(control_tokens="refusal-tokens-single")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"demur\[local\]"):
        load_runtime("org/model")
