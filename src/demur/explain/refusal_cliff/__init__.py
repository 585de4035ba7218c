"""A refusal score token by token through a model's thinking, how far it falls before the answer, and who pushes it.

Three questions about a model that thinks first. Does its state mean to refuse while it thinks (`trace`)? How much
of that is lost at the tokens that close the thinking (`cliff`)? Which attention heads write against refusal there
(`head_table`)? The answer to the third is tested with `demur.control.heads`; the second ranks training data in
`demur.train.cliff_selection`. What the model says when its thinking is cut short is in `demur.measure.truncation`.
"""

from __future__ import annotations

from demur.explain.refusal_cliff.heads import (
    HeadRow,
    KeptNorm,
    contributions,
    head_table,
    rises,
    similar_heads,
)
from demur.explain.refusal_cliff.shuffled import shuffled_curve, shuffled_drops, shuffled_traces
from demur.explain.refusal_cliff.text import Encoded, Markup, Thought, cut, encode, load_thoughts, states
from demur.explain.refusal_cliff.tracing import (
    Cliff,
    CliffProbes,
    Point,
    Reader,
    Trace,
    cliff,
    curve,
    fit_probes,
    summarise,
    trace,
)
from demur.types import Card

CARD = Card(
    slug="refusal-cliff",
    title="Where refusal drops after thinking",
    room="explain",
    tier="lab",
    paper="Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?",
    url="https://arxiv.org/abs/2510.06036",
    files=(
        "explain/refusal_cliff/",
        "control/heads.py",
        "measure/truncation.py",
        "train/cliff_selection.py",
        "organisms/cliff.py",
    ),
    needs=("states", "intervene"),
    summary="A refusal score through a model's thinking, its fall before the answer, the attention heads "
    "behind it, and training prompts ranked by it.",
    replicate="refusal-cliff",
)

__all__ = [
    "Cliff",
    "CliffProbes",
    "Encoded",
    "HeadRow",
    "KeptNorm",
    "Markup",
    "Point",
    "Reader",
    "Thought",
    "Trace",
    "cliff",
    "contributions",
    "curve",
    "cut",
    "encode",
    "fit_probes",
    "head_table",
    "load_thoughts",
    "rises",
    "shuffled_curve",
    "shuffled_drops",
    "shuffled_traces",
    "similar_heads",
    "states",
    "summarise",
    "trace",
]
