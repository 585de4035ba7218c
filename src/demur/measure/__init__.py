"""Measurements: records of prompts, answers and verdicts in, a Report out."""

from demur.measure.refusal import Record, Refusal

__all__ = ["Record", "Refusal"]
