"""Answers that fake compliance: whether a model prefers them, which judges take them for real, who notices.

Each part works on a model or on answers of your own: the choice between refusing, complying and faking
(`choose`); judges before answers that are known to be fake (`fooled_report`); sums that a model can do, in another
theme (`solve`); an honesty probe as a monitor (`monitor_report`, `demur.explain.honesty`), also of what judges
accept (`accepted_report`); and a judge model that reads the reasoning (`ReasoningMonitor`), beside that probe.
"""

from demur.measure.strategic_dishonesty.accepted import accepted_report
from demur.measure.strategic_dishonesty.choice import (
    Choice,
    choice_prompts,
    choice_report,
    choose,
    parse_letter,
)
from demur.measure.strategic_dishonesty.detectors import detectors_report, load_flags, reasoning_report
from demur.measure.strategic_dishonesty.fooled import Known, fooled_report, load_known
from demur.measure.strategic_dishonesty.monitoring import monitor_report
from demur.measure.strategic_dishonesty.problems import Problem, load_problems, load_theme, make_problems
from demur.measure.strategic_dishonesty.reasoning import Reading, ReasoningMonitor
from demur.measure.strategic_dishonesty.themes import Outcome, outcome_of, solve, themes_report
from demur.types import Card

CARD = Card(
    slug="strategic-dishonesty",
    title="Answers that fake compliance",
    room="measure",
    tier="lab",
    paper="Strategic Dishonesty Can Undermine AI Safety Evaluations of Frontier LLMs",
    url="https://arxiv.org/abs/2509.18058",
    files=(
        "measure/strategic_dishonesty/__init__.py",
        "measure/strategic_dishonesty/accepted.py",
        "measure/strategic_dishonesty/choice.py",
        "measure/strategic_dishonesty/detectors.py",
        "measure/strategic_dishonesty/fooled.py",
        "measure/strategic_dishonesty/monitoring.py",
        "measure/strategic_dishonesty/problems.py",
        "measure/strategic_dishonesty/reasoning.py",
        "measure/strategic_dishonesty/themes.py",
        "explain/honesty/__init__.py",
        "explain/honesty/fitting.py",
        "explain/honesty/monitor.py",
        "explain/honesty/states.py",
        "organisms/deceit.py",
    ),
    needs=(),
    summary="Shares of refusing, complying and faking, judges that fakes fool, and an honesty probe as a monitor.",
    replicate="strategic-dishonesty",
)

__all__ = [
    "CARD",
    "Choice",
    "Known",
    "Outcome",
    "Problem",
    "Reading",
    "ReasoningMonitor",
    "accepted_report",
    "choice_prompts",
    "choice_report",
    "choose",
    "detectors_report",
    "fooled_report",
    "load_flags",
    "load_known",
    "load_problems",
    "load_theme",
    "make_problems",
    "monitor_report",
    "outcome_of",
    "parse_letter",
    "reasoning_report",
    "solve",
    "themes_report",
]
