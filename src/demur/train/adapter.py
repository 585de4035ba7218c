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
from demur.files import load_operating_point, write_atomic
from demur.runtime.base import ControlTokens, Runtime
from demur.types import OperatingPoint

LORA_FILE, ROWS_FILE, ABOUT_FILE = "adapter_model.safetensors", "control_rows.safetensors", "demur.json"
POINT_FILE = "operating_point.yaml"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights, control rows and the recipe that made them.

    The folder holds stock PEFT files (`adapter_config.json`, `adapter_model.safetensors`), so PEFT loads the
    LoRA part unchanged, `control_rows.safetensors` with `input` and `output`, both (K, d), `demur.json`, and
    maybe `operating_point.yaml`: thresholds that ship with the weights.

    Attributes:
        lora: {module name: (A (r, d_in), B (d_out, r))}, float32. scale: alpha / r.
        input_rows, output_rows: (K, d) float32, or None for an adapter without control tokens.
        control: category -> id, ids following on the base vocabulary. about: recipe and provenance.
        fingerprint: identifies weights, scale and control tokens. shipped_point: of operating_point.yaml.

    >>> adapter = Adapter.load("my-adapter")  # doctest: +SKIP
    >>> tuned = adapter.attach(runtime)  # doctest: +SKIP
    """

    lora: Mapping[str, tuple[Any, Any]]
    scale: float
    input_rows: Any = None
    output_rows: Any = None
    control: ControlTokens | None = None
    base_fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    shipped_point: OperatingPoint | None = None

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read an adapter folder.

        Raises:
            InputError: the folder lacks a file, or its files contradict one another.
            MissingExtra: safetensors or torch are not installed.
        """
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise MissingExtra("Loading an adapter", "local") from None
        folder = Path(path)
        for name in ("adapter_config.json", LORA_FILE, ABOUT_FILE):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder}: no {name}; an adapter folder holds adapter_config.json, {LORA_FILE} and "
                    f"{ABOUT_FILE}"
                )
        config, about = _read_json(folder / "adapter_config.json"), _read_json(folder / ABOUT_FILE)
        weights = load_file(folder / LORA_FILE)
        rows = load_file(folder / ROWS_FILE) if (folder / ROWS_FILE).is_file() else {}
        lora = {}
        for key in weights:
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
                lora[name] = (weights[key].float(), weights[key.replace("lora_A", "lora_B")].float())
        ids = about.get("control_tokens") or {}
        first = min(ids.values(), default=0)
        gaps = sorted(ids.values()) != [first + i for i in range(len(ids))]
        if ids and (gaps or {len(rows.get(part, ())) for part in ("input", "output")} != {len(ids)}):
            raise InputError(
                f"{folder}: {ABOUT_FILE} names the control tokens {ids}; {ROWS_FILE} must hold one row for "
                "each, and their ids must follow one another"
            )
        scale = config["lora_alpha"] / config["r"]
        return cls(
            lora,
            scale,
            rows["input"].float() if ids else None,
            rows["output"].float() if ids else None,
            ControlTokens(ids=ids) if ids else None,
            about.get("base_fingerprint"),
            about,
            _digest(folder, scale, ids),
            load_operating_point(folder / POINT_FILE) if (folder / POINT_FILE).is_file() else None,
        )

    def attach(self, runtime: Any, *, name: str | None = None) -> Any:
        """A second runtime on the same base: LoRA and control rows are in force only while it computes.

        Raises:
            MismatchError: the adapter was trained on another base. CapabilityError: not a local runtime.
        """
        from demur.runtime.control_rows import ControlRows

        if not hasattr(runtime, "with_edits"):
            raise CapabilityError(
                f"an adapter needs a local model; {runtime.name!r} is a {type(runtime).__name__}"
            )
        if self.base_fingerprint and runtime.fingerprint != self.base_fingerprint:
            raise MismatchError(
                f"this adapter was trained on the base {self.base_fingerprint}, {runtime.name!r} is "
                f"{runtime.fingerprint}: its directions mean nothing there. Load the base it names, or train "
                "anew"
            )
        edits: list[Any] = [LoraEdit(self.lora, self.scale)] if self.lora else []
        if self.control is not None:
            edits.append(ControlRows(self.input_rows, self.output_rows, min(self.control.ids.values())))
        view = runtime.with_edits(*edits, control=self.control, name=name)
        # without the base's fingerprint nothing identifies the sum of both
        view.fingerprint = f"{runtime.fingerprint}+{self.fingerprint}" if runtime.fingerprint else None
        view.shipped_point, view.base = self.shipped_point, runtime
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
                shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
                if module is None or shape != (A.shape[1], B.shape[0]):
                    raise MismatchError(
                        f"adapter weights for {name} ({A.shape[1]} to {B.shape[0]}) fit no linear module of "
                        "this model; they were made for another one"
                    )
                handle = module.register_forward_hook(self._hook(name, module))
                stack.callback(handle.remove)
            yield

    def _hook(self, name: str, module: Any) -> Any:
        import torch

        weight = module.weight
        key = (name, weight.device, weight.dtype)
        if key not in self._cast:
            A, B = self.lora[name]
            at = {"device": weight.device, "dtype": weight.dtype}
            with torch.inference_mode(False):  # kept for later passes, with gradients or without
                self._cast[key] = (A.to(**at), (B * self.scale).to(**at))
        A, B = self._cast[key]

        def add(_module: Any, args: tuple[Any, ...], out: Any) -> Any:
            low = args[0] @ A.T
            if torch.is_grad_enabled():
                return out + low @ B.T
            out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), B.T)  # in place: a pass less
            return out

        return add


def save_adapter(
    folder: Path,
    *,
    peft_config: Mapping[str, Any],
    lora: Mapping[str, Any],
    rows: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> None:
    """Write an adapter folder: weights in half precision, JSON files readable, each file atomic.

    Args:
        peft_config: content of adapter_config.json. lora: tensors under PEFT's names.
        rows: `input` and `output`, (K, d) each, or None. about: content of demur.json.
    """
    import torch
    from safetensors.torch import save

    def half(tensors: Mapping[str, Any]) -> bytes:
        small = {k: v.detach().to(torch.float16).contiguous() for k, v in tensors.items()}
        return bytes(save(small, metadata={"format": "pt"}))

    write_atomic(folder / LORA_FILE, half(lora))
    if rows:
        write_atomic(folder / ROWS_FILE, half(rows))
    else:  # those of an earlier adapter in the same folder
        (folder / ROWS_FILE).unlink(missing_ok=True)
    (folder / POINT_FILE).unlink(missing_ok=True)  # its thresholds were for those too
    write_atomic(folder / "adapter_config.json", json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
    write_atomic(folder / ABOUT_FILE, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, expected an object")
    return data


def _digest(folder: Path, scale: float, ids: Mapping[str, int]) -> str:
    """Everything that shapes an answer: weights, their scale, and which row means what."""
    h = hashlib.sha256(json.dumps([scale, sorted(ids.items())]).encode())
    for name in (LORA_FILE, ROWS_FILE):
        if (folder / name).is_file():
            h.update((folder / name).read_bytes())
    return "adapter:" + h.hexdigest()[:16]
