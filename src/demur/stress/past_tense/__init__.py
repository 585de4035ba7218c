"""Does a refusal survive when only the tense changes? Prompts in other tenses, and what that does to rates.

`PastTense().apply(prompts)` gives each prompt in the present (untouched), past and future, and a paraphrase that
stays in the present and changes as many words: a gap that the paraphrase shows too is not about tense.
"""

from __future__ import annotations

from demur.stress.past_tense.grammar import TENSES, word_edits
from demur.stress.past_tense.model import ModelRewriter
from demur.stress.past_tense.report import gap_report, success_at
from demur.stress.past_tense.rules import Left, Reworded, reword
from demur.stress.past_tense.scores import delta_report, drawn, tense_delta
from demur.stress.past_tense.sets import PastTense, TenseSet, augment
from demur.types import Card

CARD = Card(
    slug="past-tense",
    title="Requests reworded into the past",
    room="stress",
    tier="lab",
    paper="Does Refusal Training in LLMs Generalize to the Past Tense?",
    url="https://arxiv.org/abs/2407.11969",
    files=(
        "stress/past_tense/__init__.py",
        "stress/past_tense/clauses.py",
        "stress/past_tense/english.yaml",
        "stress/past_tense/grammar.py",
        "stress/past_tense/model.py",
        "stress/past_tense/report.py",
        "stress/past_tense/rules.py",
        "stress/past_tense/scores.py",
        "stress/past_tense/sets.py",
        "stress/past_tense/verbs.py",
    ),
    needs=(),
    summary="The same prompts in the past, the future and an equal paraphrase: refusal gaps, attempts, a defence.",
    replicate="past-tense",
)

__all__ = [
    "CARD",
    "TENSES",
    "Left",
    "ModelRewriter",
    "PastTense",
    "Reworded",
    "TenseSet",
    "augment",
    "delta_report",
    "drawn",
    "gap_report",
    "reword",
    "success_at",
    "tense_delta",
    "word_edits",
]
