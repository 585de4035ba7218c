"""Adapter folders, and the LoRA edit against PEFT's own forward pass."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

from demur.control import RefusalTokens
from demur.errors import CapabilityError, InputError, MismatchError
from demur.files import dump_operating_point
from demur.runtime.local import BlockEdit
from demur.runtime.scripted import ScriptedRuntime
from demur.train.adapter import (
    ABOUT_FILE,
    LORA_FILE,
    POINT_FILE,
    ROWS_FILE,
    Adapter,
    LoraEdit,
    save_adapter,
)
from demur.types import Condition, OperatingPoint, Prompt, Threshold
from tests.runtime.tiny import tiny_control, tiny_model, tiny_runtime

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
PROMPT = Prompt.of("how do i boil a egg ?")
IDS = torch.tensor([[1, 4, 20, 30, 40, 7, 5]])


def write(folder: Path, arch: str = "llama", about: dict[str, Any] | None = None, alpha: int = 6) -> Path:
    """A random LoRA (r = 3) on every linear layer with six control rows, as training writes it."""
    model = copy.deepcopy(tiny_model(arch))
    config = peft.LoraConfig(
        r=3, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned = peft.get_peft_model(model, config)
    lora = {k: v for k, v in peft.get_peft_model_state_dict(tuned).items() if ".lora_" in k}
    plain = {k: (sorted(v) if isinstance(v, set) else v) for k, v in config.to_dict().items()}
    rows, control = tiny_control(tiny_model(arch))
    save_adapter(
        folder,
        peft_config={k: v for k, v in plain.items() if v is None or isinstance(v, (str, int, float, list))},
        lora=lora,
        rows={"input": rows.input_rows, "output": rows.output_rows},
        about={"control_tokens": dict(control.ids), "base_fingerprint": f"tiny-{arch}-0"} | (about or {}),
    )
    return folder


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gemma3", "phi3"])
def test_lora_edit_equals_peft_and_leaves_the_base_bit_equal(arch: str, tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path, arch))
    assert adapter.scale == 6 / 3
    base = tiny_model(arch)
    with torch.inference_mode():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(input_ids=IDS).logits
        before = base(input_ids=IDS).logits
        with LoraEdit(adapter.lora, adapter.scale).install(base):
            ours = base(input_ids=IDS).logits
        after = base(input_ids=IDS).logits
    assert (before - theirs).abs().max() > 0.1, "this adapter changes too little to test anything"
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(before, after)


def test_half_precision_is_all_that_saving_loses(tmp_path: Path) -> None:
    rows, control = tiny_control(tiny_model())
    adapter = Adapter.load(write(tmp_path, about={"recipe": {"rank": 3}}))
    assert adapter.control is not None and dict(adapter.control.ids) == dict(control.ids)
    assert torch.equal(adapter.input_rows, rows.input_rows.half().float())
    assert torch.equal(adapter.output_rows, rows.output_rows.half().float())
    assert adapter.base_fingerprint == "tiny-llama-0" and adapter.about["recipe"] == {"rank": 3}
    again = Adapter.load(write(tmp_path / "again"))
    assert adapter.lora.keys() == again.lora.keys()
    for name, (A, B) in adapter.lora.items():
        assert A.shape[0] == B.shape[1] == 3
        assert torch.equal(A, again.lora[name][0]) and torch.equal(B, again.lora[name][1])
    assert adapter.fingerprint == again.fingerprint


def test_fingerprint_knows_weights_scale_and_meaning(tmp_path: Path) -> None:
    one = Adapter.load(write(tmp_path / "1"))
    ids = dict(one.control.ids) if one.control else {}
    swapped = ids | {"safety": ids["respond"], "respond": ids["safety"]}
    other = Adapter.load(write(tmp_path / "2", alpha=12))
    renamed = Adapter.load(write(tmp_path / "3", about={"control_tokens": swapped}))
    elsewhere = Adapter.load(write(tmp_path / "4", "phi3"))
    assert len({a.fingerprint for a in (one, other, renamed, elsewhere)}) == 4


def test_attached_runtime_is_a_second_one(tmp_path: Path) -> None:
    base = tiny_runtime()
    (before,) = base.score([PROMPT])
    with Adapter.load(write(tmp_path)).on(base) as tuned:
        (score,) = tuned.score([PROMPT])
        (during,) = base.score([PROMPT])
        (reply,) = tuned.generate([PROMPT], Condition(max_new_tokens=3))
    assert score.kind == "control" and set(score.probabilities) == set(tuned.control.names)
    assert during == before == next(base.score([PROMPT]))
    assert reply.error is None
    assert base.control is None and base.fingerprint == "tiny-llama-0"
    assert tuned.fingerprint.startswith("tiny-llama-0+adapter:")


def test_behind_respond_the_base_answers_where_the_point_says_so(tmp_path: Path) -> None:
    base = tiny_runtime()
    tuned = Adapter.load(write(tmp_path)).attach(base)
    prompts = [Prompt.of(f"how do i boil a {thing} ?", id=thing) for thing in ("egg", "fish", "bread")]
    condition = Condition(max_new_tokens=6)

    def say(runtime: Any, category: str, answers: Any = "base") -> list[str]:
        every = {c: Threshold(tau=1.01 if category == "respond" else 0.0) for c in tuned.control.refuse}
        point = OperatingPoint(id="x", thresholds=every, answers=answers)
        with RefusalTokens(point).on(runtime) as dialled:
            replies = list(dialled.generate(prompts, condition))
        assert all((r.control_token == "respond") == (category == "respond") for r in replies)
        return [r.content for r in replies]

    own = [r.content for r in base.generate(prompts, condition)]
    assert say(tuned, "respond") == own != say(tuned, "respond", "model")
    assert say(tuned, "refused") == say(tuned, "refused", "model")

    def doubled(h_BTd: torch.Tensor, _positions: Any) -> torch.Tensor:
        return h_BTd * -2

    steered = tuned.with_edits(BlockEdit(0, doubled))  # steering reaches whoever answers
    other = [r.content for r in base.with_edits(BlockEdit(0, doubled)).generate(prompts, condition)]
    assert say(steered, "respond") == other != own
    with pytest.raises(InputError, match=r"answers: base.*none"):
        say(tiny_runtime(control=True), "respond")
    rule = RefusalTokens(OperatingPoint(id="x", thresholds={}, answers="base"))
    with pytest.raises(InputError, match="lets the base answer"):
        list(tiny_runtime(control=True).generate(prompts, decide=rule))


def test_the_operating_point_travels_with_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path)
    point = OperatingPoint(id="shipped", thresholds={"safety": Threshold(tau=0.25)})
    dump_operating_point(point, folder / POINT_FILE)
    tuned = Adapter.load(folder).attach(tiny_runtime())
    assert tuned.shipped_point == point and tiny_runtime().shipped_point is None
    write(tmp_path)  # other weights in the same folder: the thresholds were not made for them
    assert Adapter.load(folder).shipped_point is None and not (folder / POINT_FILE).exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path))
    with pytest.raises(MismatchError, match="trained on the base tiny-llama-0"):
        adapter.attach(tiny_runtime(seed=1))
    with pytest.raises(MismatchError, match="trained on the base"):  # twice on one base
        adapter.attach(adapter.attach(tiny_runtime()))
    with pytest.raises(CapabilityError, match="local model"):
        adapter.attach(ScriptedRuntime({"*": "x"}))


def test_without_any_fingerprint_none_is_made_up(tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path, about={"base_fingerprint": None}))
    runtime = tiny_runtime()
    runtime.fingerprint = None
    assert adapter.attach(runtime).fingerprint is None


def test_weights_that_fit_no_module_take_all_hooks_off(tmp_path: Path) -> None:
    adapter, base = Adapter.load(write(tmp_path)), tiny_runtime()
    good = next(iter(adapter.lora.items()))
    for name, wrong in (("model.nothing", good[1]), (good[0], (good[1][0][:, :-1], good[1][1]))):
        edit = LoraEdit({good[0]: good[1], name: wrong} if name != good[0] else {name: wrong}, 1.0)
        with pytest.raises(MismatchError, match="fit no linear module"), edit.install(base.model):
            pass
    with pytest.raises(MismatchError), LoraEdit({"model.norm": good[1]}, 1.0).install(base.model):
        pass
    assert not any(m._forward_hooks for m in base.model.modules())


def test_incomplete_or_contradictory_folders(tmp_path: Path) -> None:
    folder = write(tmp_path)
    about = json.loads((folder / ABOUT_FILE).read_text())
    ids = about["control_tokens"]

    def loading(**changes: Any) -> None:
        (folder / ABOUT_FILE).write_text(json.dumps(about | changes))
        Adapter.load(folder)

    loading()
    with pytest.raises(InputError, match="one row for each"):
        loading(control_tokens={k: v for k, v in ids.items() if k != "safety"} | {"other": 999})
    with pytest.raises(InputError, match="one row for each"):
        loading(control_tokens=dict(list(ids.items())[-2:]))
    (folder / ROWS_FILE).unlink()
    with pytest.raises(InputError, match="one row for each"):
        loading()
    (folder / ABOUT_FILE).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Adapter.load(folder)
    (folder / ABOUT_FILE).write_text("[]")
    with pytest.raises(InputError, match="expected an object"):
        Adapter.load(folder)
    (folder / LORA_FILE).unlink()
    with pytest.raises(InputError, match=f"no {LORA_FILE}"):
        Adapter.load(folder)


def test_rows_of_an_earlier_adapter_do_not_stay(tmp_path: Path) -> None:
    write(tmp_path)
    save_adapter(tmp_path, peft_config={"r": 1, "lora_alpha": 1}, lora={}, rows=None, about={})
    adapter = Adapter.load(tmp_path)
    assert not (tmp_path / ROWS_FILE).exists() and adapter.control is None and adapter.input_rows is None
    assert adapter.attach(tiny_runtime()).control is None
