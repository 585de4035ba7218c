"""Two beliefs about a request, read before the answer: is it harmful, and will it be refused?

Harmfulness is read at `t_inst`, the last token of the request, refusal at `t_post`, the last token that the chat
template writes behind it. At each layer a state leans to the nearer of two centres,

    leaning(h) = cos(h, mean of harmful) - cos(h, mean of harmless)

(likewise refused and accepted), and a belief is its mean over a window of layers. Where the two disagree, the
model refuses what it takes for harmless (over-refusal) or answers what it takes for harmful.

Reference: Zhao et al. 2025, arXiv 2507.11878. There a layer is named by its input; here by its output, so their
layer k + 1 is our layer k and the constant layer of embeddings at `t_post` does not occur.
"""

from demur.explain.harmfulness.behaviour import by_behaviour
from demur.explain.harmfulness.beliefs import Axis, Belief, Beliefs, Leanings
from demur.explain.harmfulness.fitting import AXES, NOT_IDENTIFIABLE, leaning
from demur.types import Card

CARD = Card(
    slug="harmfulness-vs-refusal",
    title="Harmfulness and refusal as separate beliefs",
    room="explain",
    tier="lab",
    paper="LLMs Encode Harmfulness and Refusal Separately",
    url="https://arxiv.org/abs/2507.11878",
    files=(
        "explain/harmfulness/__init__.py",
        "explain/harmfulness/beliefs.py",
        "explain/harmfulness/fitting.py",
        "explain/harmfulness/behaviour.py",
        "control/steering.py",
        "control/inversion.py",
        "control/latent_guard.py",
        "control/latent_guard_report.py",
        "organisms/beliefs.py",
    ),
    needs=("states",),
    summary="What the model takes for harmful and what it is about to refuse, and an input guard on the first.",
    replicate="harmfulness-vs-refusal",
)

__all__ = ["AXES", "NOT_IDENTIFIABLE", "Axis", "Belief", "Beliefs", "Leanings", "by_behaviour", "leaning"]
