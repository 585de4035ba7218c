"""Trained weights as a value: a PEFT folder plus control rows, put on a shared base without touching it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demur.errors import CapabilityError, InputError, MismatchError, MissingExtra
from demur.files import write_atomic
from demur.runtime.base import ControlTokens, Runtime

LORA_FILE, ROWS_FILE, ABOUT_FILE = "adapter_model.safetensors", "control_rows.safetensors", "demur.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights, control rows and the recipe that made them.

    The folder holds stock PEFT files (`adapter_config.json`, `adapter_model.safetensors`), so PEFT loads the LoRA
    part unchanged, `control_rows.safetensors` with `input` and `output`, both (K, d), and `demur.json`.

    Attributes:
        lora: {module name: (A (r, d_in), B (d_out, r))}; scale: alpha / r.
        input_rows, output_rows: (K, d) or None for an adapter without control tokens.
        control: category -> id, ids following on the base vocabulary. about: recipe and provenance.
    """

    lora: Mapping[str, tuple[Any, Any]]
    scale: float
    input_rows: Any = None
    output_rows: Any = None
    control: ControlTokens | None = None
    base_fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read an adapter folder.

        Raises:
            InputError: the folder lacks a file. MissingExtra: safetensors or torch are not installed.
        """
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise MissingExtra("Loading an adapter", "local") from None
        folder = Path(path)
        for name in ("adapter_config.json", LORA_FILE, ABOUT_FILE):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: no {name}; an adapter folder holds adapter_config.json, {LORA_FILE} and {ABOUT_FILE}")
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        about = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
        weights = load_file(folder / LORA_FILE)
        rows = load_file(folder / ROWS_FILE) if (folder / ROWS_FILE).is_file() else {}
        lora = {}
        for key in weights:
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                lora[name] = (weights[key].float(), weights[key.replace("lora_A", "lora_B")].float())
        control = ControlTokens(ids=about["control_tokens"]) if about.get("control_tokens") else None
        return cls(
            lora,
            config["lora_alpha"] / config["r"],
            rows["input"].float() if rows else None,
            rows["output"].float() if rows else None,
            control,
            about.get("base_fingerprint"),
            about,
            _digest(folder),
        )

    def attach(self, runtime: Any, *, name: str | None = None) -> Any:
        """A second runtime on the same base: LoRA and control rows are in force only while it computes.

        Raises:
            MismatchError: the adapter was trained on another base. CapabilityError: not a local runtime.
        """
        from demur.runtime.control_rows import ControlRows

        if not hasattr(runtime, "with_edits"):
            raise CapabilityError(f"an adapter needs a local model; {runtime.name!r} is a {type(runtime).__name__}")
        if self.base_fingerprint and runtime.fingerprint != self.base_fingerprint:
            raise MismatchError(
                f"this adapter was trained on the base {self.base_fingerprint}, {runtime.name!r} is "
                f"{runtime.fingerprint}: its directions mean nothing there. Load the base it names, or train anew"
            )
        edits: list[Any] = [LoraEdit(self.lora, self.scale)] if self.lora else []
        if self.control is not None:
            edits.append(ControlRows(self.input_rows, self.output_rows, min(self.control.ids.values())))
        view = runtime.with_edits(*edits, control=self.control, name=name)
        view.fingerprint = f"{runtime.fingerprint}+{self.fingerprint}"
        return view

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """`with adapter.on(base) as tuned:`; the base is the same before, during and after."""
        yield self.attach(runtime)


class LoraEdit:
    """Adds scale * B A x to linear modules while installed (LoRA, arXiv 2106.09685, section 4.1).

    The base weights are not merged, so that leaving restores them exactly and views can share one model.
    """

    def __init__(self, lora: Mapping[str, tuple[Any, Any]], scale: float) -> None:
        self.lora, self.scale = lora, scale
        self._cast: dict[tuple[str, Any, Any], tuple[Any, Any]] = {}

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook every named module.

        Raises:
            MismatchError: a module is missing or has another shape.
        """
        modules = dict(model.named_modules())
        with ExitStack() as stack:
            for name, (A, B) in self.lora.items():
                module = modules.get(name)
                if module is None or (module.in_features, module.out_features) != (A.shape[1], B.shape[0]):
                    raise MismatchError(f"adapter weights for {name} ({A.shape[1]} to {B.shape[0]}) fit no module of this model")
                handle = module.register_forward_hook(self._hook(name, module))
                stack.callback(handle.remove)
            yield

    def _hook(self, name: str, module: Any) -> Any:
        weight = module.weight
        key = (name, weight.device, weight.dtype)
        if key not in self._cast:
            A, B = self.lora[name]
            self._cast[key] = (A.to(weight.device, weight.dtype), (B * self.scale).to(weight.device, weight.dtype))
        A, B = self._cast[key]

        def add(_module: Any, args: tuple[Any, ...], out: Any) -> Any:
            return out + (args[0] @ A.T) @ B.T

        return add


def save_adapter(
    folder: Path,
    *,
    peft_config: Mapping[str, Any],
    lora: Mapping[str, Any],
    rows: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> None:
    """Write an adapter folder: weights in half precision, JSON files readable, each file atomic."""
    import torch
    from safetensors.torch import save

    def half(tensors: Mapping[str, Any]) -> bytes:
        return bytes(save({k: v.detach().to(torch.float16).contiguous() for k, v in tensors.items()}, metadata={"format": "pt"}))

    write_atomic(folder / LORA_FILE, half(lora))
    if rows:
        write_atomic(folder / ROWS_FILE, half(rows))
    write_atomic(folder / "adapter_config.json", json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / ABOUT_FILE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _digest(folder: Path) -> str:
    h = hashlib.sha256()
    for name in (LORA_FILE, ROWS_FILE):
        if (folder / name).is_file():
            h.update((folder / name).read_bytes())
    return "adapter:" + h.hexdigest()[:16]
