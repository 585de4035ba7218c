"""From a model name to a Runtime: built-in, folder, hub id or endpoint, with adapter and control tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demur import models
from demur.errors import InputError, MissingExtra
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
    say: Callable[[str], None] | None = None,
) -> Runtime:
    """Load a model by name and return the Runtime to ask.

    Args:
        model: `demur-smollm2` (default), `smollm2` (the same base, bare), a model folder, a hub id, or an
            endpoint as `http(s)://host/v1#model`.
        dtype: float32 for the built-in models (their operating points are made for it); elsewhere "auto", the
            checkpoint's own where the hardware has it natively.
        adapter: folder of a trained adapter to put on top.
        base_only: leave the built-in adapter out.
        control_tokens: preset name or YAML file for a checkpoint whose control tokens are in its own
        vocabulary;
            known checkpoints and folders with a `control_tokens.yaml` need none.
        revision: of a hub model. device_map: as in transformers. say: receives a line before long steps.

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
        from demur.runtime.openai import OpenAIRuntime

        return OpenAIRuntime(*remote)
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise MissingExtra(f"running the model {name!r} here", "local")
    files = models.resolve(name, revision=revision, say=say or _silent)
    return _local(files, dtype, adapter, control_tokens, device_map)


def control_for(model: str | Path, tokenizer: Any, preset: str | Path | None = None) -> ControlTokens | None:
    """The control tokens of a published checkpoint, or None when it has none that we know.

    They have text, so `textless` is False and every entrance sanitises. See `demur.models.control_ids`.
    """
    ids = models.control_ids(model, tokenizer, preset)
    return ControlTokens(ids=ids, textless=False) if ids else None


def _local(
    files: models.ModelFiles,
    dtype: str | None,
    adapter: str | Path | None,
    preset: str | Path | None,
    device_map: Any,
) -> Runtime:
    from demur.runtime.local import LocalRuntime

    runtime = LocalRuntime.from_folder(
        files.path,
        name=files.name,
        fingerprint=files.fingerprint,
        dtype=dtype or files.dtype or "auto",
        device_map=device_map,
    )
    if (on_top := adapter if adapter is not None else files.adapter) is not None:
        from demur.train.adapter import Adapter

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
    return runtime.with_edits(control=control) if control else runtime


def _silent(_: str) -> None:
    return
