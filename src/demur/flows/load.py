"""From a model name to a Runtime: built-in, folder, hub id or endpoint, with adapter and control tokens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from demur import models
from demur.errors import InputError, MissingExtra
from demur.files import load_operating_point, read_text
from demur.runtime.base import ControlTokens, Runtime


def load_runtime(
    model: str | Path | None = None,
    *,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    base_only: bool = False,
    control_tokens: str | Path | None = None,
    revision: str | None = None,
    device_map: Any = None,
    request: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Runtime:
    """Load a model by name and return the Runtime to ask.

    Args:
        model: `demur-smollm2` (default), `smollm2` (the same base, bare), a model folder, a hub id, an
            endpoint as `http(s)://host/v1#model`, or `vllm:FOLDER?key=value&...`, a folder in vLLM's engine.
        dtype: float32 for the built-in models (their operating points are made for it); elsewhere "auto", the
            checkpoint's own where the hardware has it natively.
        adapter: folder of a trained adapter to put on top.
        base_only: leave the built-in adapter out.
        control_tokens: preset name or YAML file for a checkpoint whose control tokens are in its own
        vocabulary;
            known checkpoints and folders with a `control_tokens.yaml` need none.
        revision: of a hub model. device_map: as in transformers. say: receives a line before long steps.
        request: of an endpoint: `timeout`, `concurrency`, `retries`, `top_logprobs` (see `OpenAIRuntime`), and
            fields that every request carries, e.g. {"timeout": 300, "reasoning_effort": "low"}.

    >>> runtime = load_runtime("smollm2")  # doctest: +SKIP

    Raises:
        InputError, DataUnavailable, MissingExtra, MismatchError (adapter made for another base).
    """
    name = str(model) if model is not None else models.DEFAULT_MODEL
    if base_only and adapter is not None:
        raise InputError(f"an adapter ({adapter}) and the bare base model were both asked for; choose one")
    if base_only or adapter is not None:
        name = models.ADAPTED.get(name, name)  # another adapter replaces the built-in one
    if (remote := models.endpoint(name)) is not None:
        local_only = {
            "adapter": adapter,
            "control_tokens": control_tokens,
            "dtype": dtype,
            "revision": revision,
        }
        given = [k for k, v in local_only.items() if v is not None]
        if given:
            raise InputError(
                f"{name}: {', '.join(given)} cannot be applied to an endpoint; the server decides those"
            )
        return _endpoint(name, remote, request or {})
    if request:
        raise InputError(
            f"{name} is no endpoint, so {', '.join(request)} cannot be set for its requests; leave --request "
            "(request=) out, or name an endpoint URL#model"
        )
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise MissingExtra(f"running the model {name!r} here", "local")
    if name.startswith("vllm:"):
        return _vllm(name, dtype, adapter, control_tokens, say or _silent)
    files = models.resolve(name, revision=revision, say=say or _silent)
    return _local(files, dtype, adapter, control_tokens, device_map)


OWN_OPTION: Mapping[str, str] = {
    "model": "what stands after the # of the endpoint",
    "messages": "made from the prompts",
    "stream": "not supported, answers are read whole",
    "n": "set by --samples",
    "temperature": "set by --temperature",
    "seed": "set by --seed",
    "max_tokens": "set by --max-new-tokens",
}
"""Fields of a request that have one place already, where runs record them. None takes such a field out."""

SETTINGS: Mapping[str, tuple[type, ...]] = {
    "timeout": (int, float),
    "concurrency": (int,),
    "retries": (int,),
    "top_logprobs": (int,),
}
"""What `request` says about the requests themselves; everything else is a field of them."""


def _endpoint(name: str, remote: tuple[str, str], request: Mapping[str, Any]) -> Runtime:
    from demur.runtime.openai import OpenAIRuntime

    for key, types in SETTINGS.items():
        if key in request and type(request[key]) not in types:
            raise InputError(f"{name}: {key}={request[key]!r} must be a number, e.g. {key}=8")
    for key, instead in OWN_OPTION.items():
        if request.get(key) is not None:
            raise InputError(f"{name}: {key}={request[key]!r} in a request is {instead}")
    settings = {k: v for k, v in request.items() if k in SETTINGS}
    return OpenAIRuntime(
        *remote, **settings, extra_body={k: v for k, v in request.items() if k not in SETTINGS}
    )


def control_for(model: str | Path, tokenizer: Any, preset: str | Path | None = None) -> ControlTokens | None:
    """The control tokens of a published checkpoint, or None when it has none that we know.

    Unless all ids lie beyond the tokenizer they have text: `textless` is False and every entrance sanitises.
    See `demur.models.control_ids`.
    """
    ids = models.control_ids(model, tokenizer, preset)
    return ControlTokens(ids=ids, textless=min(ids.values()) >= len(tokenizer)) if ids else None


def _vllm(
    name: str,
    dtype: str | None,
    adapter: str | Path | None,
    preset: str | Path | None,
    say: Callable[[str], None],
) -> Runtime:
    from transformers import AutoTokenizer

    from demur.runtime.vllm import VLLMRuntime, parse_name
    from demur.train.adapter import POINT_FILE

    if adapter is not None:
        raise InputError(
            f"{name}: merge the adapter first (demur models export --to merged), vLLM loads folders"
        )
    folder, engine = parse_name(name)
    files = models.resolve(folder, say=say)
    if files.adapter is not None:
        raise InputError(
            f"{name}: export the model first (demur models export {folder} --to merged -o FOLDER)"
        )
    control = control_for(
        files.path, AutoTokenizer.from_pretrained(files.path, trust_remote_code=False), preset
    )
    if dtype is None and (about := files.path / "demur.json").is_file():
        dtype = json.loads(read_text(about)).get(
            "dtype"
        )  # vLLM's own default would turn float32 into bfloat16
    engine = {**({"dtype": dtype} if dtype else {}), **engine}
    runtime = VLLMRuntime(files.path, name=name, fingerprint=files.fingerprint, control=control, **engine)
    if control is not None and preset is None and (point := files.path / POINT_FILE).is_file():
        runtime.shipped_point = load_operating_point(point)
    return runtime


def _local(
    files: models.ModelFiles,
    dtype: str | None,
    adapter: str | Path | None,
    preset: str | Path | None,
    device_map: Any,
) -> Runtime:
    from demur.runtime.local import LocalRuntime
    from demur.train.adapter import POINT_FILE, Adapter

    runtime = LocalRuntime.from_folder(
        files.path,
        name=files.name,
        fingerprint=files.fingerprint,
        dtype=dtype or files.dtype or "auto",
        device_map=device_map,
    )
    if (on_top := adapter if adapter is not None else files.adapter) is not None:
        if preset is not None:
            raise InputError(
                f"adapter {on_top} brings its own control tokens; leave control_tokens={str(preset)!r} out"
            )
        tuned: Runtime = Adapter.load(on_top).attach(runtime)
        return tuned
    if files.builtin and preset is None:
        return runtime
    where = files.path if (files.path / "control_tokens.yaml").is_file() else files.name
    control = control_for(where, runtime.tokenizer, preset)
    if control is None:
        return runtime
    view = runtime.with_edits(control=control)
    if preset is None and (point := files.path / POINT_FILE).is_file():
        view.shipped_point = load_operating_point(point)
    return view


def _silent(_: str) -> None:
    return
