"""demur inside Inspect: a scorer that carries its judge's error, a model provider, and tasks.

    inspect eval demur/over_refusal --model openai/gpt-4o-mini
    inspect eval demur/should_refuse --model demur/demur-smollm2

Inspect loads this package by its entry point; nothing else in demur imports it. Needs the extra `inspect`.
"""

from __future__ import annotations

import importlib.util

from demur.errors import MissingExtra

if importlib.util.find_spec("inspect_ai") is None:
    raise MissingExtra("demur.inspect", "inspect")

from demur.inspect.provider import DemurModel
from demur.inspect.scoring import rates, refusal
from demur.inspect.tasks import over_refusal, should_refuse

__all__ = ["DemurModel", "over_refusal", "rates", "refusal", "should_refuse"]
