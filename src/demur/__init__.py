"""demur: does a language model refuse what it should, and only that; why; can the dial be turned; does it hold?

This is the front door. Importing it loads neither torch nor transformers; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Condition": "demur.types",
    "Label": "demur.types",
    "Message": "demur.types",
    "OperatingPoint": "demur.types",
    "Prompt": "demur.types",
    "PromptSet": "demur.types",
    "Reply": "demur.types",
    "Report": "demur.types",
    "Score": "demur.types",
    "Site": "demur.types",
    "Threshold": "demur.types",
    "Verdict": "demur.types",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'demur' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from demur.types import (
        Condition,
        Label,
        Message,
        OperatingPoint,
        Prompt,
        PromptSet,
        Reply,
        Report,
        Score,
        Site,
        Threshold,
        Verdict,
    )
