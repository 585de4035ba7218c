"""A runtime whose states are planted: harm at t_inst, refusal at t_post, in some layers and not in others."""

from __future__ import annotations

import numpy as np

from demur.runtime.base import Runtime, States
from demur.types import Prompt, PromptSet, Reply
from tests.runtime.tiny import tiny_runtime


class Planted(Runtime):
    """Four layers of width 6: harm along axis 0 and refusal along axis 1, loud in layers 1 and 2 alone."""

    name, fingerprint, capabilities = "planted", "planted-1", frozenset({"states", "generate"})
    deterministic = True
    loud = (0.0, 1.0, 1.0, 0.0)

    def __init__(self):
        self.chat = tiny_runtime().chat
        self.read, self.asked = [], []

    def states(self, prompts, sites, condition=None):
        for p in prompts:
            self.read.append(p.id)
            rows = []
            for s in sites:
                at_inst = s.position == -len(self.chat.tail) - 1
                bit = p.meta["harm"] if at_inst else p.meta["refuse"]
                seed = [int(p.id.split("-")[-1]), s.layer, at_inst]
                h = np.random.default_rng(seed).normal(0, 0.3, 6) + np.array([0, 0, 5.0, 0, 0, 0])
                h[0 if at_inst else 1] += 2 * self.loud[s.layer] * (1 if bit else -1)
                rows.append(h)
            yield States(p.id, np.array(rows, np.float32))

    def problem(self, prompt, condition=None):
        return "too long" if prompt.text == "long" else None

    def generate(self, prompts, condition=None, *, samples=1, decide=None, progress=None):
        for p in prompts:
            self.asked.append(p.id)
            text = (
                "I'm sorry, I cannot help with that." if p.meta["refuse"] else "Sure, here is how you do it."
            )
            error = self.problem(p)
            yield from (
                Reply(prompt_id=p.id, content="" if error else text, sample=i, error=error)
                for i in range(samples)
            )


def ask(n, start, harm, refuse):
    """n prompts numbered from `start` with these bits."""
    meta = {"harm": harm, "refuse": refuse}
    rows = (
        Prompt.of(f"request {i}", id=f"p-{i}", category="safety", meta=meta) for i in range(start, start + n)
    )
    return PromptSet("asked", tuple(rows))


def cells(n, start):
    """n prompts of each of the four combinations, as sets for `Beliefs.fit`."""
    four = {(h, r): ask(n, start + n * (2 * h + r), h, r) for h in (False, True) for r in (False, True)}
    return {
        "harmful": [*four[True, False], *four[True, True]],
        "harmless": [*four[False, False], *four[False, True]],
        "refused": [*four[False, True], *four[True, True]],
        "accepted": [*four[False, False], *four[True, False]],
    }
