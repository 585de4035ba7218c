"""What post-training changed inside a model: facts, truth, refusal and confidence, base against tuned."""

from __future__ import annotations

from demur.explain.post_training.comparison import PARTS, compare
from demur.explain.post_training.noise import Noise
from demur.explain.post_training.results import (
    Comparison,
    Confidence,
    Knowledge,
    Likeness,
    Neuron,
    Nie,
    Refusal,
    Steered,
    Transfer,
    Truth,
)
from demur.explain.post_training.statements import FEW_SHOT, Pair, Statement, load_pairs, load_statements

__all__ = [
    "FEW_SHOT",
    "PARTS",
    "Comparison",
    "Confidence",
    "Knowledge",
    "Likeness",
    "Neuron",
    "Nie",
    "Noise",
    "Pair",
    "Refusal",
    "Statement",
    "Steered",
    "Transfer",
    "Truth",
    "compare",
    "load_pairs",
    "load_statements",
]
