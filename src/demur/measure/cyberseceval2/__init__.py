"""False refusals next to violations in security work, each rate with the matcher or judge that made it.

`FalseRefusals` and `Injection` run on public cases, `Interpreter` and `Mitre` on the user's own requests, and
`trade_off` shows both sides of a policy for several models. A failed call and an unreadable verdict are in no
rate and are counted.
"""

from __future__ import annotations

from demur.measure.asking import Remembered
from demur.measure.cyberseceval2.abuse import Interpreter, Mitre
from demur.measure.cyberseceval2.cases import frr_prompts, injection_cases, user_cases
from demur.measure.cyberseceval2.frr import HEAD, MATCHERS, FalseRefusals
from demur.measure.cyberseceval2.injection import Injection
from demur.measure.cyberseceval2.tradeoff import Point, load_points, trade_off
from demur.types import Card

CARD = Card(
    slug="cyberseceval2",
    title="False refusals next to violations in security work",
    room="measure",
    tier="lab",
    paper="CyberSecEval 2: A Wide-Ranging Cybersecurity Evaluation Suite for Large Language Models",
    url="https://arxiv.org/abs/2404.13161",
    files=(
        "measure/cyberseceval2/__init__.py",
        "measure/cyberseceval2/abuse.py",
        "measure/asking.py",
        "measure/cyberseceval2/cases.py",
        "measure/cyberseceval2/frr.py",
        "measure/cyberseceval2/injection.py",
        "measure/cyberseceval2/tradeoff.py",
    ),
    needs=("generate",),
    summary="False refusal rate by matcher and task, prompt injection, violations, and the trade-off of the two.",
    replicate="cyberseceval2",
)

__all__ = [
    "CARD",
    "HEAD",
    "MATCHERS",
    "FalseRefusals",
    "Injection",
    "Interpreter",
    "Mitre",
    "Point",
    "Remembered",
    "frr_prompts",
    "injection_cases",
    "load_points",
    "trade_off",
    "user_cases",
]
