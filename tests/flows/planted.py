"""A tiny local model whose states are made up: harmfulness and refusing stand where they were planted."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from demur import prompts
from demur.flows.explain_fit import is_harmful
from demur.runtime.base import States
from demur.runtime.local import LocalRuntime
from demur.types import Prompt, Score, Site
from tests.runtime.tiny import CATEGORIES, tiny_control, tiny_model, tiny_tokenizer

WIDTH = 32
SIZES = {"train": 90, "select": 40, "calibrate": 40, "test": 60}


@cache
def core_texts() -> tuple[frozenset[str], frozenset[str]]:
    """Texts of the packaged prompts that are harmful, and of those to refuse."""
    rows = [p for part in ("train", "select", "calibrate", "test") for p in prompts.core(part)]
    return frozenset(p.text for p in rows if is_harmful(p)), frozenset(
        p.text for p in rows if p.should_refuse
    )


def harmful(prompt: Prompt) -> bool:
    return prompt.text in core_texts()[0] or "bomb" in prompt.text.split()


def refuses(prompt: Prompt) -> bool:
    return prompt.text in core_texts()[1] or bool({"bomb", "sorry"} & set(prompt.text.split()))


class Planted(LocalRuntime):
    """Harmfulness is planted at `t_inst`, refusing at `t_post`, both from layer 1 on; all else is noise.

    Args:
        declines: whether it declines what should be refused, and whether that stands in its states.
    """

    def __init__(self, *, declines: bool = True, control: bool = True) -> None:
        model = tiny_model()
        rows, names = tiny_control(model)
        self.declines, self.read = declines, 0
        super().__init__(
            model,
            tiny_tokenizer(),
            name="planted",
            fingerprint=f"planted-{declines}",
            control=names if control else None,
            edits=(rows,) if control else (),
        )

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Any = None
    ) -> Iterator[States]:
        inst = -len(self.chat.tail) - 1
        for prompt in prompts:
            self.read += 1
            out = np.zeros((len(sites), WIDTH), np.float32)
            for row, site in zip(out, sites, strict=True):
                seed = zlib.crc32(f"{prompt.text}/{site.layer}/{site.position}".encode())
                row[:] = np.random.default_rng(seed).normal(size=WIDTH)
                row[5] += 4
                if site.layer and site.position == inst:
                    row[0] += 6 if harmful(prompt) else -6
                if site.layer and site.position == -1 and self.declines:
                    row[1] += 6 if refuses(prompt) else -6
            yield States(prompt.id, out)

    def score(self, prompts: Iterable[Prompt], condition: Any = None, **options: Any) -> Iterator[Score]:
        for prompt in prompts:
            p = 0.9 if self.declines and refuses(prompt) else 0.05
            table = dict.fromkeys(CATEGORIES, 0.0) | {"safety": p, "respond": 0.95 - p}
            yield Score(id=prompt.id, p_refuse=p, probabilities=table, off_control_mass=0.05, token="safety")
