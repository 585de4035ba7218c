"""Where a model runs: local (transformers with hooks), OpenAI-compatible endpoints, or scripted for tests."""

from demur.runtime.base import Capability, ControlTokens, Decide, Intervention, Progress, Runtime, States

__all__ = ["Capability", "ControlTokens", "Decide", "Intervention", "Progress", "Runtime", "States"]
