"""The rules of the vLLM processor against `calibrate.decide`, and its classes on hand-made batches (no vLLM)."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from demur.calibrate.decide import decide
from demur.control.refusal_tokens import RefusalTokens as LocalRule
from demur.errors import InputError, MismatchError, RefusalLowering
from demur.files import dump_operating_point
from demur.serve import vllm_processor as vp
from demur.types import OperatingPoint, Threshold

VOCAB = 40
IDS = {"safety": 33, "humanizing": 31, "incomplete": 35, "respond": 37}
NAMES = ["humanizing", "safety", "incomplete", "respond"]  # in id order


def point(rule: str = "threshold", T: float = 1.0, **taus: Any) -> OperatingPoint:
    cut = {c: t if isinstance(t, Threshold) else Threshold(tau=t) for c, t in taus.items()}
    return OperatingPoint(id=f"{rule}-{T}", thresholds=cut, rule=rule, T=T)  # type: ignore[arg-type]


def expected(op: OperatingPoint, logits: torch.Tensor) -> list[int]:
    """What the local rule forces, -1 for the model's own choice."""
    z = logits.double() / op.T
    P = torch.softmax(z, -1)[:, [IDS[n] for n in NAMES]].numpy()
    steered = LocalRule(op).cuts(NAMES)
    best = [NAMES[i] for i in P[:, :-1].argmax(1)]
    chosen = decide(P, NAMES, steered, op.rule)
    return [IDS[NAMES[i]] if b in steered else -1 for b, i in zip(best, chosen, strict=True)]


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("rule", ["compare", "threshold", "total_mass", "bias"])
@pytest.mark.parametrize(
    "taus",
    [
        {},
        {"safety": 0.2},
        {"safety": 0.3, "humanizing": 0.5, "incomplete": 0.05},
        {"safety": -1.0, "incomplete": 0.0, "humanizing": 1.01},
        {"safety": Threshold(tau=0.1, mode="shadow"), "humanizing": 0.4},
    ],
)
def test_same_decisions_as_calibrate(rule: str, taus: dict[str, Any], T: float) -> None:
    op = point(rule, T, **taus)
    rng = np.random.default_rng(7)
    logits = torch.tensor(rng.normal(size=(3000, VOCAB)), dtype=torch.float32)
    logits[:, list(IDS.values())] += torch.tensor(rng.normal(3, 1.5, size=(3000, 4)), dtype=torch.float32)
    got = vp.Rule.of(op, IDS).choose(logits).tolist()
    want = expected(op, logits)
    assert got == want
    if rule == "threshold" and len(taus) == 3 and -1.0 not in taus.values():
        assert len(set(got)) == 4  # all four tokens come up: the comparison is not empty


def test_a_bias_that_contradicts_its_tau_is_refused() -> None:
    with pytest.raises(InputError, match="disagree"):
        vp.Rule.of(point("bias", safety=Threshold(tau=0.9, bias=0.0)), IDS)


# --- the folder that is served -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokens = {c: {"id": i, "text": None} for c, i in IDS.items()}
    (tmp_path / "control_tokens.yaml").write_text(yaml.safe_dump({"tokens": tokens}))
    (tmp_path / "demur.json").write_text('{"fingerprint": "merged", "source_fingerprint": "base+adapter"}')
    dump_operating_point(point(safety=0.5, humanizing=0.5), tmp_path / "operating_point.yaml")
    vp.read_settings.cache_clear()
    return tmp_path


def settings(folder: Path, **lines: Any) -> vp.Settings:
    (folder / "serve.yaml").write_text(yaml.safe_dump(lines))
    return vp.read_settings(str(folder / "serve.yaml"))


def test_what_the_folder_holds_is_used(folder: Path) -> None:
    dial = vp.Dial(str(folder), "cpu")
    assert dial.columns.tolist() == [31, 33, 35, 37]
    assert dial.point.steered == ("humanizing", "safety")


def test_points_of_other_models_and_looser_ones_are_refused(folder: Path) -> None:
    def other(tau: float, model: str) -> Path:
        op = OperatingPoint(id="o", thresholds={"safety": Threshold(tau=tau)}, model_fingerprint=model)
        dump_operating_point(op, folder / "other.yaml")
        vp.read_settings.cache_clear()
        return folder

    with pytest.raises(MismatchError, match="calibrated on the model stranger"):
        vp.Dial(str(other(0.1, "stranger")), "cpu", None, settings(folder, operating_point="other.yaml"))
    vp.Dial(str(other(0.1, "base+adapter")), "cpu", None, settings(folder, operating_point="other.yaml"))
    with pytest.raises(RefusalLowering, match="allow_refusal_lowering"):
        vp.Dial(str(other(0.9, "merged")), "cpu", None, settings(folder, operating_point="other.yaml"))
    vp.read_settings.cache_clear()
    allowed = settings(folder, operating_point="other.yaml", allow_refusal_lowering=True)
    assert vp.Dial(str(folder), "cpu", None, allowed).point.id == "o"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("tokens: {safety: {text: '[refuse]'}, respond: {id: 3}}", "expected `tokens"),
        ("tokens: {safety: {id: 3}, respond: {id: 3}}", "expected `tokens"),
        ("nothing", "expected `tokens"),
    ],
)
def test_files_that_do_not_fit_say_so(folder: Path, tokens: str, words: str) -> None:
    (folder / "control_tokens.yaml").write_text(tokens)
    with pytest.raises(InputError, match=words):
        vp.Dial(str(folder), "cpu")


def test_two_points_of_one_name_are_refused(folder: Path) -> None:
    dump_operating_point(point(safety=0.4), folder / "same.yaml")
    with pytest.raises(InputError, match="same id"):
        vp.Dial(str(folder), "cpu", None, settings(folder, overrides=["same.yaml"]))


def test_unknown_settings_and_missing_points_say_so(folder: Path) -> None:
    with pytest.raises(InputError, match="unknown point"):
        settings(folder, point="x.yaml")
    (folder / "operating_point.yaml").unlink()
    with pytest.raises(InputError, match="DEMUR_VLLM names none"):
        vp.Dial(str(folder), "cpu")


# --- requests ----------------------------------------------------------------------------------------------------


@dataclass
class Params:
    extra_args: dict[str, Any] | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: Any = None
    allowed_token_ids: list[int] | None = None
    repetition_penalty: float = 1.0


def test_requests_may_name_only_what_the_file_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump_operating_point(point("compare"), folder / "lenient.yaml")
    settings(folder, overrides=["lenient.yaml"])
    monkeypatch.setenv(vp.SETTINGS_ENV, str(folder / "serve.yaml"))
    vp.RefusalTokens.validate_params(Params())
    vp.RefusalTokens.validate_params(Params({vp.ARGUMENT: "compare-1.0"}))
    for name in ("strict", "", 7, ["compare-1.0"]):
        with pytest.raises(InputError, match=r"requests may name compare-1\.0"):
            vp.RefusalTokens.validate_params(Params({vp.ARGUMENT: name}))
    monkeypatch.delenv(vp.SETTINGS_ENV)
    with pytest.raises(InputError, match="no operating point"):
        vp.RefusalTokens.validate_params(Params({vp.ARGUMENT: "compare-1.0"}))


@pytest.mark.parametrize(
    "params", [Params(structured_outputs={"json": "{}"}), Params(allowed_token_ids=[1, 2])]
)
def test_requests_that_would_hide_the_first_position_are_refused(params: Params) -> None:
    for cls in (vp.RefusalTokens, vp.RefusalTokensV2):
        with pytest.raises(InputError, match="first token"):
            cls.validate_params(params)


# --- the V1 interface --------------------------------------------------------------------------------------------


@dataclass
class Update:
    added: list[Any] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    moved: list[Any] = field(default_factory=list)
    batch_size: int = 0


def config(folder: Path) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(model=str(folder), dtype=torch.float32))


def logits_for(*winners: str | int, n: int = VOCAB) -> torch.Tensor:
    """Rows whose likeliest token is the given control token (p about 0.9) or id."""
    z = torch.zeros(len(winners), n)
    for row, w in enumerate(winners):
        z[row, IDS[w] if isinstance(w, str) else w] = 6.0
    return z


def test_v1_decides_once_and_forbids_control_tokens_behind_it(folder: Path) -> None:
    processor = vp.RefusalTokens(config(folder), torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    a, b = [], [5]  # the second was preempted within its answer
    processor.update_state(Update(added=[(0, Params(), [1, 2], a), (1, Params(), [1, 2], b)]))
    out = processor.apply(logits_for("safety", "safety"))
    assert out[0].argmax() == IDS["safety"] and torch.isinf(out[0]).sum() == VOCAB - 1
    assert torch.isinf(out[1, list(IDS.values())]).all() and torch.isinf(out[1]).sum() == len(IDS)
    processor.update_state(None)
    again = processor.apply(logits_for("safety", "safety"))  # no token yet: a chunk of a long prompt
    assert again[0].argmax() == IDS["safety"]
    a.append(-1)  # asynchronous scheduling: the id is not known, the position is
    out = processor.apply(logits_for("safety", "safety"))
    assert torch.isinf(out[:, list(IDS.values())]).all() and not processor.fresh


def test_v1_below_the_threshold_it_responds_and_unsteered_rows_are_the_models(folder: Path) -> None:
    processor = vp.RefusalTokens(config(folder), torch.device("cpu"), False)
    processor.update_state(Update(added=[(i, Params(), [1], []) for i in range(3)]))
    z = logits_for("safety", "incomplete", 4)
    z[0, IDS["safety"]] = 2.0  # likeliest, but p = 0.16
    z[1, 3] = 7.0
    kept = z[1].clone()
    out = processor.apply(z)
    assert out[0].argmax() == IDS["respond"]
    assert torch.equal(out[1], kept)  # "incomplete" is not steered
    assert out[2].argmax() == IDS["respond"]


def test_v1_follows_requests_that_leave_and_move(folder: Path) -> None:
    swap, one_way = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")
    processor = vp.RefusalTokens(config(folder), torch.device("cpu"), False)
    lists: list[list[int]] = [[], [], []]
    processor.update_state(Update(added=[(i, Params(), [1], lists[i]) for i in range(3)]))
    lists[1].append(9)
    processor.update_state(Update(moved=[(0, 1, swap)]))
    out = processor.apply(logits_for("safety", "safety", "safety"))
    assert [bool(torch.isinf(row).sum() == VOCAB - 1) for row in out] == [False, True, True]
    processor.update_state(Update(removed=[0], moved=[(2, 0, one_way)]))
    assert sorted(processor.fresh) == [0, 1]
    processor.update_state(Update(removed=[1], added=[(1, Params(), [1], [3])]))
    assert sorted(processor.fresh) == [0]


def test_v1_no_bias_of_a_client_moves_the_decision(folder: Path) -> None:
    processor = vp.RefusalTokens(config(folder), torch.device("cpu"), False)
    bias = {IDS["safety"]: -100.0, 3: 100.0, IDS["incomplete"]: 50.0}
    processor.update_state(Update(added=[(0, Params(logit_bias=bias), [1], [])]))
    z = logits_for("safety")
    for i, b in bias.items():  # vLLM adds it before processors run
        z[0, i] += b
    assert processor.apply(z)[0].argmax() == IDS["safety"]
    # where the choice is the model's own, no control token is pushed either
    processor.update_state(Update(added=[(0, Params(logit_bias={IDS["safety"]: 100.0}), [1], [])]))
    z = logits_for("incomplete")
    z[0, IDS["safety"]] += 100.0
    assert processor.apply(z)[0].argmax() == IDS["incomplete"]


def test_v1_each_request_is_under_its_own_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = {c: Threshold(tau=1.01) for c in ("safety", "humanizing", "incomplete")}
    dump_operating_point(OperatingPoint(id="never", thresholds=never), folder / "never.yaml")
    settings(folder, overrides=["never.yaml"], allow_refusal_lowering=True)
    monkeypatch.setenv(vp.SETTINGS_ENV, str(folder / "serve.yaml"))
    processor = vp.RefusalTokens(config(folder), torch.device("cpu"), False)
    params = [Params(), Params({vp.ARGUMENT: "never"}), Params()]
    processor.update_state(Update(added=[(i, p, [1], []) for i, p in enumerate(params)]))
    out = processor.apply(logits_for("safety", "safety", "humanizing"))
    assert out.argmax(1).tolist() == [IDS["safety"], IDS["respond"], IDS["humanizing"]]


# --- the newer interface -----------------------------------------------------------------------------------------


def test_v2_rows_are_not_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = OperatingPoint(id="never", thresholds={"safety": Threshold(tau=1.01)})
    dump_operating_point(never, folder / "never.yaml")
    settings(folder, overrides=["never.yaml"], allow_refusal_lowering=True)
    monkeypatch.setenv(vp.SETTINGS_ENV, str(folder / "serve.yaml"))
    lengths = np.array([4, 0, 7, 5])
    states = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=4,
        prompt_len=SimpleNamespace(np=lengths, gpu=torch.tensor(lengths)),
    )
    processor = vp.RefusalTokensV2(config(folder), states)
    for slot, params in ((2, Params()), (0, Params()), (3, Params({vp.ARGUMENT: "never"}))):
        assert processor.add_request(slot, params)
    processor.apply_staged_writes()
    order = np.array([2, 0, 3])  # batch positions -> slots
    ctx = SimpleNamespace(
        expanded_idx_mapping=torch.tensor(order),
        idx_mapping_np=order,
        pos=torch.tensor([6, 8, 4]),  # slot 2 and 3 at their prompts' last token, slot 0 within its answer
        seq_lens_upper_bound_np=np.array([7, 9, 5]),
    )
    out = processor.apply(logits_for("safety", "safety", "safety"), ctx)
    assert out[0].argmax() == IDS["safety"] and torch.isinf(out[0]).sum() == VOCAB - 1
    assert torch.isinf(out[1]).sum() == len(IDS)
    assert out[2].argmax() == IDS["respond"]
    ctx.pos, ctx.seq_lens_upper_bound_np = ctx.pos + 1, ctx.seq_lens_upper_bound_np + 1
    out = processor.apply(logits_for("safety", "safety", "safety"), ctx)
    assert torch.isinf(out[:, list(IDS.values())]).all() and math.isfinite(out[0, 0])


def test_v2_refuses_what_it_cannot_undo() -> None:
    for params in (Params(logit_bias={3: 1.0}), Params(repetition_penalty=1.1)):
        with pytest.raises(InputError, match="through the gateway"):
            vp.RefusalTokensV2.validate_params(params)


def test_importing_it_is_light() -> None:
    code = (
        "import sys\nfor name in ('scipy', 'transformers', 'typer', 'fastapi', 'sklearn'):\n"
        "    sys.modules[name] = None\nimport demur.serve.vllm_processor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
