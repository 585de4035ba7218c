"""Where demur keeps what it downloads or converts: one folder, overridable, nothing elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The user's cache folder: `DEMUR_CACHE` when set, else the platform's own place. It may not exist yet.

    >>> cache_dir().is_absolute()
    True
    """
    override = os.environ.get("DEMUR_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("demur", appauthor=False))
