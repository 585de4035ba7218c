"""demur: measure, explain, calibrate and guard refusal in language models.

This is the front door. Importing it loads neither torch nor transformers; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_TYPES = "demur.types"

__all__ = [
    "Condition",
    "Label",
    "Message",
    "OperatingPoint",
    "Prompt",
    "PromptSet",
    "Reply",
    "Report",
    "Score",
    "Site",
    "Threshold",
    "Verdict",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_TYPES), name)
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
