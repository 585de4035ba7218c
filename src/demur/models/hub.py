"""Models of the Hugging Face hub: cached folder first, network only for what is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from demur.errors import DataUnavailable, InputError, MissingExtra
from demur.models.fingerprint import weight_files
from demur.models.store import Say

# No pickled weights, and none of the other frameworks' copies.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.yaml"]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "*consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def looks_like_hub_id(name: str) -> bool:
    """True for `owner/name` or a bare repository name."""
    return bool(_HUB_ID.fullmatch(name))


def hub_folder(name: str, *, revision: str | None = None, refresh: bool = False, say: Say) -> Path:
    """The local snapshot of a hub model, downloaded when needed.

    A complete snapshot in the hub's cache is used without any network attempt; `refresh` asks the hub again.

    Raises:
        MissingExtra: huggingface_hub is not installed. InputError: a name that the hub does not allow.
        DataUnavailable: unknown, gated, or no network and not in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra(f"the hub model {name!r}", "local") from None
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise InputError(f"{name}: no such folder, and no name that the hub allows ({e})") from None

    options: dict[str, Any] = {"revision": revision, "allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
    if not refresh:
        try:
            cached = Path(snapshot_download(name, local_files_only=True, **options))
        except (LocalEntryNotFoundError, FileNotFoundError):
            cached = None
        if cached is not None and _complete(cached):
            return cached
    say(f"downloading {name} from the hub")
    try:
        folder = Path(snapshot_download(name, **options))
    except Exception as e:  # which transport errors come through differs between versions of the hub client
        raise DataUnavailable(_why(name, revision, e)) from e
    if not (folder / "config.json").is_file():
        raise InputError(f"{name}: the repository has no config.json, so it is no transformers model")
    weight_files(folder)
    return folder


def _complete(folder: Path) -> bool:
    try:
        weight_files(folder)
    except InputError:
        return False
    return (folder / "config.json").is_file()


def _why(name: str, revision: str | None, error: Exception) -> str:
    kind = type(error).__name__
    at = f" at revision {revision!r}" if revision else ""
    if kind == "GatedRepoError":
        return f"{name} is gated: accept its terms on its hub page, then run `hf auth login`"
    if kind == "RevisionNotFoundError":
        return f"{name} has no revision {revision!r}"
    if kind == "RepositoryNotFoundError":
        return (
            f"the hub has no model {name!r} that you may read; check the spelling, or `hf auth login` "
            "for private ones"
        )
    first = (str(error).strip().splitlines() or [kind])[0]
    return (
        f"{name}{at} is not in the hub cache and could not be downloaded ({kind}: {first}). Check the "
        "network "
        "(HF_HUB_OFFLINE must be unset), or download it elsewhere and pass the folder"
    )
