"""What run.json says about a run: prompts, model, versions; names without machine paths or keys."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import demur
from demur.files import public_name as public_name
from demur.runtime.base import Runtime
from demur.types import SCHEMA_VERSION, PromptSet


def base_config(
    kind: str, prompts: PromptSet, judge: str, seed: int, runtime: Runtime | None = None
) -> dict[str, Any]:
    """The part of the configuration that all cards have."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "prompts": set_config(prompts),
        "judge": judge,
        "seed": seed,
        "versions": versions(runtime),
    }


def set_config(prompts: PromptSet) -> dict[str, Any]:
    """A prompt set by name, size and hash."""
    return {"name": public_name(prompts.name), "n": len(prompts), "hash": prompts.hash}


def model_config(runtime: Runtime) -> dict[str, Any]:
    """A runtime by name, bytes, control tokens, and the fields that its requests carry."""
    control = runtime.control
    return {
        "name": public_name(runtime.name),
        "runtime": type(runtime).__name__,
        "fingerprint": runtime.fingerprint,
        "dtype": runtime.dtype,
        "control": list(control.names) if control else [],
        "control_ids": dict(control.ids) if control else {},
        "deterministic": runtime.deterministic,
        **({"request": dict(runtime.request)} if runtime.request else {}),
    }


def versions(runtime: Runtime | None = None) -> dict[str, str]:
    """Versions of what the numbers depend on; torch and transformers where the model ran in this process."""
    local = ("torch", "transformers") if runtime and "states" in runtime.capabilities else ()
    used = {name: metadata.version(name) for name in ("numpy", "scipy", *local)}
    return {"demur": demur.__version__, "python": platform.python_version(), **used}
