"""Stop an answer at any depth: put the assistant's header into it, and see what the model makes of that.

A chat model mostly decides at the header of its turn whether to refuse, and seldom goes back on that. Run behind
an unfinished answer, on a copy of the state, the same header makes it decide again, with the answer in view. Three
readers: a linear probe on one hidden state there (`HeaderProbe`), a few tokens read ahead (`Rethink`), and, where
the model has control tokens, their refuse mass (`RefuseMass`).

probe = HeaderProbe.fit(runtime, answers, select=others).calibrated(scores, harmful, fpr=0.05)
with AnyDepth(probe, every=32).on(runtime) as checked:
    replies = list(checked.generate(prompts))
"""

from __future__ import annotations

from demur.control.any_depth.answers import Answer, load_answers, states_at
from demur.control.any_depth.header import Header, header_of
from demur.control.any_depth.intervention import AnyDepth, Halt, Watched
from demur.control.any_depth.mass import RefuseMass
from demur.control.any_depth.probe import DEPTHS, HeaderProbe
from demur.control.any_depth.rates import DepthRate, depth_rates
from demur.control.any_depth.rethink import Rethink, declines
from demur.control.any_depth.threshold import answer_cut, per_answer
from demur.types import Card

CARD = Card(
    slug="any-depth-alignment",
    title="Refusal at any depth by header re-injection",
    room="control",
    tier="lab",
    paper="Any-Depth Alignment: Unlocking Innate Safety Alignment of LLMs to Any-Depth",
    url="https://arxiv.org/abs/2510.18081",
    files=("control/any_depth/", "measure/depth.py", "organisms/depth.py"),
    needs=("generate", "states"),
    summary="Checks while an answer is written: the assistant header is run behind it on the side, and a probe or "
    "a short look ahead says whether to stop.",
    replicate="any-depth-alignment",
)

__all__ = [
    "DEPTHS",
    "Answer",
    "AnyDepth",
    "DepthRate",
    "Halt",
    "Header",
    "HeaderProbe",
    "RefuseMass",
    "Rethink",
    "Watched",
    "answer_cut",
    "declines",
    "depth_rates",
    "header_of",
    "load_answers",
    "per_answer",
    "states_at",
]
