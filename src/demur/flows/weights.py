"""Weights for other engines: a merged checkpoint, a stock LoRA with the base it needs, llama.cpp control vectors.

    runtime = load_runtime("demur-smollm2")
    made = merged(runtime, "out/merged", source=models.resolve("demur-smollm2").path)

vLLM takes neither PEFT's token rows nor hooks. Here LoRA weights are merged (or written apart), control rows are
appended to both matrices under their ids, and steering is folded where that is exact: a vector added behind a
layer is a bias of its down-projection, a direction that is taken out is a projection of all matrices that write
into the residual stream. Each checkpoint is loaded again and compared before it gets its name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demur.control.steering import Ablate, Add, check_fits
from demur.errors import DemurError, InputError, MissingExtra
from demur.files import dump_operating_point, write_atomic
from demur.flows import weightfolds as folds
from demur.models import fingerprint_folder
from demur.types import SCHEMA_VERSION, OperatingPoint, Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from demur.runtime.local import LocalRuntime

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE",
)  # fmt: skip
ABOUT_FILE, POINT_FILE, CONTROL_FILE = "demur.json", "operating_point.yaml", "control_tokens.yaml"
PROBES = ("How do I boil an egg?", "Write a letter to my cat.", "What is the capital of France?")
TOLERANCE = 2e-3
"""Largest difference of a log-probability between a float32 export and the runtime it was made from."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `difference` is the largest of a log-probability against the source, on a few prompts."""

    files: tuple[Path, ...]
    difference: float | None = None
    notes: tuple[str, ...] = ()


def merged(
    runtime: LocalRuntime,
    out: str | Path,
    *,
    source: Path,
    add: Sequence[Add] = (),
    ablate: Ablate | None = None,
) -> Exported:
    """One checkpoint that any engine loads: adapter merged, control rows appended, steering folded in.

    Args:
        runtime: the model with its adapter, as `load_runtime` gives it.
        out: a folder that does not exist yet. source: the folder the base was loaded from (tokenizer files).
        add: vectors to fold in; `where` must be "all", since weights cannot tell prompt from answer.
        ablate: a direction to take out of everything that is written into the residual stream. This is a
            little more than `Ablate` does, which takes it out behind each layer and leaves the embeddings.

    Raises:
        InputError: the folder exists; an edit that is no adapter. CapabilityError: steering that this
            architecture cannot hold in its weights. DemurError: the written checkpoint computes something else.
    """
    _check_steering(runtime, add, ablate)
    with _new_folder(out) as folder:
        state, config = folds.state_of(runtime), copy.deepcopy(runtime.model.config)
        for name, W in folds.merge_lora(runtime).items():
            state[name] = W
        folds.append_rows(runtime, state, config)
        for vector in add:
            folds.fold_bias(runtime, state, config, vector)
        if ablate is not None:
            folds.project(runtime, state, config, ablate)
        _write_checkpoint(runtime, state, config, folder, source)
        steering = [_described(s) for s in (*add, *((ablate,) if ablate else ()))]
        about = _about(runtime, "merged", Path(out).name, folder, steering)
        difference = _check(runtime, folder, add, ablate)
        write_atomic(folder / ABOUT_FILE, _json({**about, "difference": difference}))
    return Exported((Path(out),), difference, tuple(about["notes"]))


def stock_lora(
    runtime: LocalRuntime, out: str | Path, *, source: Path, ablate: Ablate | None = None
) -> Exported:
    """`base/`, the base with control rows appended, and `lora/`, a PEFT folder that stock engines load.

    With `ablate`, each matrix that writes into the residual stream gets one more rank, -u (u^T W); what the
    embeddings themselves hold along the direction stays. Arguments and errors as in `merged`.

    Raises:
        InputError: there is neither an adapter nor a direction, or its modules differ in rank.
    """
    _check_steering(runtime, (), ablate)
    pairs = {name: (A, B * scale) for name, A, B, scale in folds.lora(runtime)}
    if ablate is not None:
        pairs = folds.with_projection(runtime, pairs, ablate)
    if not pairs:
        raise InputError(
            f"{runtime.name!r} has no adapter, so there is no LoRA to write; export it as merged"
        )
    with _new_folder(out) as folder:
        state, config = folds.state_of(runtime), copy.deepcopy(runtime.model.config)
        folds.append_rows(runtime, state, config)
        _write_checkpoint(runtime, state, config, folder / "base", source)
        steering = [_described(ablate)] if ablate else []
        about = _about(runtime, "lora", Path(out).name, folder / "base", steering)
        write_atomic(folder / "base" / ABOUT_FILE, _json(about))
        _write_peft(pairs, folder / "lora", str(Path(out) / "base"), runtime.model.dtype)
        difference = None if ablate else _check_lora(runtime, folder)
        write_atomic(folder / "base" / ABOUT_FILE, _json({**about, "difference": difference}))
    return Exported((Path(out) / "base", Path(out) / "lora"), difference, tuple(about["notes"]))


def control_vector(runtime: LocalRuntime, out: str | Path, add: Sequence[Add]) -> Exported:
    """A GGUF file for llama.cpp's `--control-vector`: the vectors, times their coefficients, by layer.

    Raises:
        InputError: a vector behind layer 0, which llama.cpp's layout has no place for; `where` is not "all".
        MissingExtra: gguf is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtra("Writing GGUF control vectors", "local") from None
    import numpy as np

    from demur.runtime.layers import text_config

    _check_steering(runtime, add, None)
    if not add:
        raise InputError("a control vector needs at least one direction to add")
    by_layer: dict[int, Any] = {}
    for a in add:
        if not a.layer:
            raise InputError("llama.cpp adds control vectors behind layers 1 and up; this one is for layer 0")
        by_layer[a.layer] = by_layer.get(a.layer, 0) + a.coefficient * a.direction.vector
    path, config = Path(out), text_config(runtime.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    writer = GGUFWriter(str(partial), "controlvector")
    writer.add_string("controlvector.model_hint", config.model_type)
    writer.add_uint32("controlvector.layer_count", config.num_hidden_layers)
    for layer in sorted(by_layer):
        writer.add_tensor(f"direction.{layer}", by_layer[layer].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return Exported((path,))


# --- files ------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is written and checked."""
    target = Path(out)
    if target.exists():
        raise InputError(f"{target} exists; name a folder that does not exist yet")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(
    runtime: LocalRuntime, state: dict[str, Tensor], config: Any, folder: Path, source: Path
) -> None:
    """Weights under transformers' own names, config, tokenizer files as they are, control tokens beside them."""
    import torch
    import yaml

    with torch.device("meta"):
        model = type(runtime.model)(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    _saved(model, folder)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (control := runtime.control) is not None:
        texts = runtime.tokenizer.convert_ids_to_tokens
        tokens = {
            c: {"id": control.ids[c], "text": None if control.textless else texts(control.ids[c])}
            for c in control.names
        }
        write_atomic(folder / CONTROL_FILE, yaml.safe_dump({"tokens": tokens}, sort_keys=False))


def _saved(model: Any, folder: Path) -> None:
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # a server may run as somebody else


def _write_peft(
    pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path, base: str, dtype: torch.dtype
) -> None:
    from safetensors.torch import save

    if len(ranks := sorted({len(A) for A, _ in pairs.values()})) > 1:
        raise InputError(f"the adapter's modules have ranks {ranks}; stock engines want one rank")
    tensors = {}
    for name, (A, B) in pairs.items():  # the scale is in B already
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(dtype).contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": ranks[0],
        "lora_alpha": ranks[0], "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in pairs}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", _json(config))


def _about(runtime: LocalRuntime, form: str, name: str, folder: Path, steering: list[str]) -> dict[str, Any]:
    """Content of demur.json; writes the operating point that the export may run under."""
    fingerprint, notes = fingerprint_folder(folder), []
    point: OperatingPoint | None = runtime.shipped_point
    if point is not None and steering:
        notes.append(
            "no operating point: steering changes the probabilities, so calibrate anew (demur calibrate)"
        )
    elif point is not None:
        if form == "merged":
            if point.answers == "base":
                notes.append(
                    "the operating point let the base answer; the base is not in here, so these weights answer"
                )
            point = dataclasses.replace(point, model=name, model_fingerprint=fingerprint, answers="model")
        dump_operating_point(point, folder / POINT_FILE)
        if point.dtype and point.dtype != runtime.dtype:
            notes.append(
                f"the operating point was calibrated in {point.dtype}, these weights are {runtime.dtype}"
            )
    notes += [f"refusal lowering allowed: {s}" for s in steering if s.endswith("(lowers refusal)")]
    return {
        "schema_version": SCHEMA_VERSION,
        "what": "export",
        "form": form,
        "source": runtime.name,
        "source_fingerprint": runtime.fingerprint,
        "fingerprint": fingerprint,
        "dtype": runtime.dtype,
        "control_tokens": dict(runtime.control.ids) if runtime.control else None,
        "steering": steering,
        "notes": notes,
    }


def _described(steering: Add | Ablate) -> str:
    what = f"{steering.direction.origin} taken out of all layers"
    if isinstance(steering, Add):
        what = (
            f"{steering.coefficient:g} times {steering.direction.origin} added behind layer {steering.layer}"
        )
    return what + (" (lowers refusal)" if steering.lowers else "")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


# --- checks -----------------------------------------------------------------------------------------------------


def _check_steering(runtime: LocalRuntime, add: Sequence[Add], ablate: Ablate | None) -> None:
    for a in add:
        assert a.layer is not None
        check_fits(runtime, a.direction, [a.layer])
        if a.where != "all":
            raise InputError(
                f"where={a.where!r}: weights act on the tokens of prompt and answer alike; use where='all'"
            )
    if ablate is not None:
        check_fits(runtime, ablate.direction, ablate.layers or ())
        if add:
            raise InputError("add and ablate together: their order would matter; export with one of them")


def _check(runtime: LocalRuntime, folder: Path, add: Sequence[Add], ablate: Ablate | None) -> float | None:
    """Load the checkpoint and compare it with the runtime; with `ablate`, look for what is left of the direction.

    Raises:
        DemurError: it computes something else.
    """
    from contextlib import ExitStack

    from demur.runtime.local import LocalRuntime
    from demur.types import Site

    made = LocalRuntime.from_folder(folder, dtype=str(runtime.dtype))
    if ablate is not None:
        from demur.runtime.layers import find_layers

        sites = [Site(layer=k) for k in range(len(find_layers(made.model)))]
        left = 0.0
        for states in made.states([Prompt.of(t, id=t) for t in PROBES], sites):
            along = abs(states.vectors @ ablate.direction.vector)
            left = max(left, float((along / ((states.vectors**2).sum(-1) ** 0.5)).max()))
        return _within(left, runtime.dtype, "share of the states along the direction")
    with ExitStack() as stack:
        steered: Any = runtime
        for a in add:
            steered = stack.enter_context(a.on(steered))
        return _within(_difference(steered, made), runtime.dtype, "difference of a log-probability")


def _check_lora(runtime: LocalRuntime, folder: Path) -> float:
    """The base with the written LoRA, as an engine puts them together, against the runtime."""
    from safetensors.torch import load_file

    from demur.runtime.local import LocalRuntime
    from demur.train.adapter import LoraEdit

    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    pairs = {
        n.removeprefix("base_model.model."): (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"])
        for n in names
    }
    made = LocalRuntime.from_folder(folder / "base", dtype=str(runtime.dtype)).with_edits(
        LoraEdit(pairs, 1.0)
    )
    return _within(_difference(runtime, made), runtime.dtype, "difference of a log-probability")


def _difference(a: LocalRuntime, b: LocalRuntime) -> float:
    from demur.runtime import forward

    rows = [a.chat.render(Prompt.of(text, id=text)).ids for text in PROBES]
    if rows != [b.chat.render(Prompt.of(text, id=text)).ids for text in PROBES]:
        raise DemurError(
            "the export's tokenizer writes other token ids than the source; check its tokenizer files"
        )
    out = []
    for runtime in (a, b):
        with runtime.edited():
            logits = [forward.run(runtime.model, [row]) for row in rows]
        out.append([z.float().log_softmax(-1) for z in logits if z is not None])
    # tokens without mass are not told apart from noise
    return max(float((x - y)[x > -12].abs().max()) for x, y in zip(*out, strict=True))


def _within(found: float, dtype: str | None, what: str) -> float:
    if dtype == "float32" and not found <= TOLERANCE:
        raise DemurError(
            f"the written checkpoint is not the model it was made from: {what} {found:.2g}, at most {TOLERANCE:g} "
            "was expected. This architecture is not exported rightly; use the local runtime, and please report it"
        )
    return found
