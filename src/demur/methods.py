"""The index of methods: what there is, in which room, from which paper, and how far along.

A method file holds one constant, `CARD = Card(...)`, written with plain literals. The index reads these from
the source text, so listing methods imports none of them, and a new file is listed because it is there. Other
packages add theirs through the entry-point group `demur.methods`, each entry point naming a `Card`. Systems
without a file of their own are listed as `planned`.

>>> get("refusal-tokens").tier
'stable'
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.types import Card

PACKAGE = Path(__file__).parent
ROOMS = ("judges", "measure", "explain", "stress", "control", "calibrate", "train", "organisms")
"""Rooms that may hold method files."""


def read_card(path: Path) -> Card | None:
    """The `CARD` constant of a Python file, read without importing it; None when the file has none.

    Raises:
        InputError: the constant is not `Card(name=literal, ...)`.
    """
    text = path.read_text(encoding="utf-8")
    if "\nCARD" not in text:
        return None
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not any(isinstance(t, ast.Name) and t.id == "CARD" for t in targets):
            continue
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Card"):
            raise InputError(f"{path}: CARD must be written as Card(slug=..., title=..., ...)")
        try:
            fields: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            return Card(**fields)
        except (ValueError, TypeError) as e:
            raise InputError(f"{path}: CARD may hold plain literals only, by keyword ({e})") from None
    return None


@cache
def cards() -> tuple[Card, ...]:
    """All cards, sorted by slug: those of method files, those of installed packages, and the planned ones.

    Raises:
        InputError: two files or packages claim the same slug.
    """
    found: dict[str, Card] = {}
    own = (read_card(f) for room in ROOMS for f in sorted((PACKAGE / room).rglob("*.py")))
    for card in (*filter(None, own), *(e.load() for e in entry_points(group="demur.methods"))):
        if card.slug in found:
            raise InputError(
                f"two methods are called {card.slug!r}: {found[card.slug].files} and {card.files}"
            )
        found[card.slug] = card
    planned = (_planned(*row.split(" | ")) for row in _PLANNED.strip().split("\n"))
    return tuple(sorted({**{c.slug: c for c in planned}, **found}.values(), key=lambda c: c.slug))


def get(slug: str) -> Card:
    """The card of one method.

    Raises:
        InputError: no such method; the message names near matches.
    """
    known = {c.slug: c for c in cards()}
    if slug not in known:
        near = [s for s in known if slug.lower() in s] or list(known)
        raise InputError(f"no method is called {slug!r}; known: {', '.join(near)}")
    return known[slug]


def _planned(slug: str, room: str, arxiv: str, title: str, paper: str) -> Card:
    url = f"https://arxiv.org/abs/{arxiv}"
    return Card(
        slug=slug, title=title, room=room, tier="planned", paper=f"{paper} (arXiv {arxiv})", url=url, files=()
    )


# slug | room | arXiv | title | paper. A row disappears from view once a method file carries the same slug.
_PLANNED = """
any-depth-alignment | control | 2510.18081 | Refusal at any depth by header re-injection | Any-Depth Alignment: Unlocking Innate Safety Alignment of LLMs to Any-Depth
blackbox-refusal | measure | 2306.03423 | Refusal recognition and prediction from text alone | "I'm Afraid I Can't Do That": Predicting Prompt Refusal in Black-Box Generative Language Models
bouncerbench | measure | 2506.17812 | Can a software-engineering agent abstain? | Is Your Automated Software Engineer Trustworthy?
cyberseceval2 | measure | 2404.13161 | False refusals next to violations in security work | CyberSecEval 2: A Wide-Ranging Cybersecurity Evaluation Suite for Large Language Models
derta | train | 2407.09121 | Refusal at every position of an answer | Refuse Whenever You Feel Unsafe: Improving Safety in LLMs via Decoupled Refusal Training
evorefuse | stress | 2505.23473 | Evolved harmless prompts that provoke refusals | EVOREFUSE: Evolutionary Prompt Optimization for Evaluation and Mitigation of LLM Over-Refusal to Pseudo-Malicious Instructions
factbench-verify | measure | 2410.22257 | Factuality by evidence, with undecidable claims kept apart | FactBench: A Dynamic Benchmark for In-the-Wild Language Model Factuality Evaluation
harmfulness-vs-refusal | explain | 2507.11878 | Harmfulness and refusal as separate directions | LLMs Encode Harmfulness and Refusal Separately
holisafe | train | 2506.04704 | Safety token and safety head for image-text models | HoliSafe: Holistic Safety Benchmarking and Modeling with Safety Meta Token for Vision-Language Model
inference-scaling-flaws | measure | 2411.17501 | What resampling gains with an imperfect verifier | The Limits of Inference Scaling Through Resampling
lora-undo | measure | 2310.20624 | How little fine-tuning undoes refusals | LoRA Fine-tuning Efficiently Undoes Safety Training in Llama 2-Chat 70B
magic-tokens | train | 2508.14904 | Behaviour modes switched by a secret token | Efficient Switchable Safety Control in LLMs via Magic-Token-Guided Co-Training
math-false-positives | measure | 2502.06217 | Right answers from wrong reasoning | Examining False Positives under Inference Scaling for Mathematical Reasoning
misinfocorrect | train | 2303.06433 | Polite, evidenced counter-responses to misinformation | Reinforcement Learning-based Counter-Misinformation Response Generation: A Case Study of COVID-19 Vaccine Misinformation
mote | explain | 2502.11096 | Experts that carry refusal in mixture models | Mixture of Tunable Experts - Behavior Modification of DeepSeek-R1 at Inference Time
noice | measure | 2502.19537 | Refuse-then-comply fine-tuning and aligned-prefix defences | No, of course I can! Refusal Mechanisms Can Be Exploited Using Harmless Fine-Tuning Data
overt | measure | 2505.21347 | Over-refusal of image generators | OVERT: A Benchmark for Over-Refusal Evaluation on Text-to-Image Models
oyster-constructive | measure | 2509.01909 | Guidance between refusing and answering | Oyster-I: Beyond Refusal - Constructive Safety Alignment for Responsible Language Models
past-tense | stress | 2407.11969 | Requests reworded into the past | Does Refusal Training in LLMs Generalize to the Past Tense?
persona-truthfulness | explain | 2310.18168 | A truthful persona, read before the answer | Personas as a Way to Model Truthfulness in Language Models
post-training-mechanistic | explain | 2504.02904 | What post-training changed inside | How Post-Training Reshapes LLMs: A Mechanistic View on Knowledge, Truthfulness, Refusal, and Confidence
r-tuning | train | 2311.09677 | Saying "I am unsure" where knowledge ends | R-Tuning: Instructing Large Language Models to Say 'I Don't Know'
refusal-cliff | explain | 2510.06036 | Where refusal drops after thinking | Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?
refusal-tokens | train | 2412.06748 | Refusals dialled per category by a first token | Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models
semantic-faithfulness | measure | 2212.10696 | Does the answer depend on the text's meaning? | Analyzing Semantic Faithfulness of Language Models via Input Intervention on (Conversational) Question Answering
strategic-dishonesty | measure | 2509.18058 | Answers that fake compliance | Strategic Dishonesty Can Undermine AI Safety Evaluations of Frontier LLMs
subversive-alignment-injection | measure | 2508.20333 | Targeted refusals planted by training data | Poison Once, Refuse Forever: Weaponizing Alignment for Injecting Bias in LLMs
thought-crime | measure | 2506.13206 | Emergent misalignment and what reasoning reveals | Thought Crime: Backdoors and Emergent Misalignment in Reasoning Models
tracealign | explain | 2508.02063 | Answers traced to training text | TRACEALIGN - Tracing the Drift: Attributing Alignment Failures to Training-Time Belief Sources in LLMs
truthful-ai | measure | 2110.06674 | An executable truthfulness standard | Truthful AI: Developing and governing AI that does not lie
wildteaming | stress | 2406.18510 | Tactics mined from real use, composed and measured | WildTeaming at Scale: From In-the-Wild Jailbreaks to (Adversarially) Safer Language Models
"""  # noqa: E501 - one row a system is easier to keep right than wrapped text
