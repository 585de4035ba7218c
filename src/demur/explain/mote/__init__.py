"""Which experts of a mixture model fire on prompts that it refuses, and is that about refusal or about the topic?

maps = resonance_maps(runtime, prompts)
scores = score_experts(maps, labels, "refused")
null = permuted(maps, labels, k=10)

A map counts how often each routed expert is chosen over a prompt's tokens; an expert's score is its mean over one
class of prompts minus its mean over the rest. A high score shows that routing differs, not that the expert does
anything: `demur.control.experts` takes experts away, beside random ones that are used as often.
"""

from __future__ import annotations

from demur.explain.mote.maps import Expert, Maps, resonance_maps
from demur.explain.mote.rows import ANSWERED, REFUSED, Row, label_by_response, load_rows
from demur.explain.mote.scoring import (
    ExpertScores,
    TopicCheck,
    permuted,
    score_experts,
    top_used,
    topic_check,
    unrelated_labels,
)
from demur.types import Card

CARD = Card(
    slug="mote",
    title="Experts that carry refusal in mixture models",
    room="explain",
    tier="lab",
    paper="Mixture of Tunable Experts - Behavior Modification of DeepSeek-R1 at Inference Time",
    url="https://arxiv.org/abs/2502.11096",
    files=("explain/mote/", "control/experts.py", "organisms/experts.py"),
    needs=("states", "intervene"),
    summary="Experts ranked by how much more they are chosen on refused prompts, switched off or forced in beside "
    "matched random experts, with a check whether they follow the refusal or the topic.",
    replicate="mote",
)

__all__ = [
    "ANSWERED",
    "REFUSED",
    "Expert",
    "ExpertScores",
    "Maps",
    "Row",
    "TopicCheck",
    "label_by_response",
    "load_rows",
    "permuted",
    "resonance_maps",
    "score_experts",
    "top_used",
    "topic_check",
    "unrelated_labels",
]
