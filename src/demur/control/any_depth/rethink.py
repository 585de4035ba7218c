"""Let the model start over for a few tokens behind a re-injected header, and stop if it would refuse there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demur.control.any_depth.answers import Answer, FloatArray, encoded
from demur.control.any_depth.header import header_of
from demur.judges.base import positive
from demur.judges.rules import DemurRule
from demur.types import RESPOND, Condition, Prompt, Reply

if TYPE_CHECKING:
    from demur.runtime.lanes import Lanes
    from demur.runtime.local import LocalRuntime

ROWS = 16
"""Answers that are read side by side."""


@dataclass(frozen=True, slots=True)
class Rethink:
    """Stops an answer when the model, asked to start again where it stands, declines.

    Nothing is fitted. Declining is what `rules/demur-v1` calls so, for every model alike, or a control token of a
    refuse category, where the model has such tokens.

    Args:
        look: tokens to read ahead, greedy.
    """

    look: int = 20

    name = "any-depth-rethink"
    threshold = 0.5

    def fits(self, runtime: LocalRuntime) -> None:
        """Raise unless the template has a header to put behind an answer."""
        header_of(runtime.chat)

    def read(self, lanes: Lanes, keys: Sequence[int]) -> list[float]:
        """1.0 for rows that decline behind the header, 0.0 for the others, in the order of `keys`."""
        runtime = lanes.runtime
        said = lanes.look_ahead(keys, header_of(runtime.chat).ids, self.look)
        return [float(declines(runtime, ids, lanes.ends)) for ids in said]

    def scores(self, runtime: LocalRuntime, answers: Sequence[Answer], depths: Sequence[int]) -> FloatArray:
        """1.0 or 0.0 for finished answers cut at some depths, (answers, depths); NaN where one is shorter."""
        from demur.runtime.lanes import Lanes

        out = np.full((len(answers), len(depths)), np.nan)
        texts = [encoded(runtime, a) for a in answers]
        for k, depth in enumerate(depths):
            rows = [n for n, (_, said) in enumerate(texts) if len(said) >= depth]
            for start in range(0, len(rows), ROWS):
                some, lanes = rows[start : start + ROWS], Lanes(runtime)
                keys = lanes.join_all(
                    [([*texts[n][0], *texts[n][1][:depth]], Condition(), True) for n in some]
                )
                out[some, k] = self.read(lanes, keys)
        return out


def declines(runtime: LocalRuntime, ids: Sequence[int], ends: Sequence[int] = ()) -> bool:
    """Whether the first tokens of an answer decline."""
    names = {i: c for c, i in runtime.control.ids.items()} if runtime.control else {}
    if ids and ids[0] in names:
        if names[ids[0]] != RESPOND:
            return True
        ids = ids[1:]
    text, _ = runtime.chat.split([i for i in ids if i not in ends])
    verdict = DemurRule().judge(Prompt.of(""), Reply(prompt_id="header", content=text, finish_reason="stop"))
    return bool(positive(verdict))
