"""A wrapped runtime hands on everything but the answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from demur.runtime.base import Runtime
from demur.runtime.wrapped import WrappedRuntime
from demur.types import Prompt, Reply, Site
from tests.runtime.tiny import tiny_runtime

PROMPTS = [Prompt.of("the river", id="a"), Prompt.of("a city", id="b")]


class Silent(WrappedRuntime):
    def generate(self, prompts: Iterable[Prompt], condition: Any = None, **_: Any) -> Iterator[Reply]:
        yield from (Reply(prompt_id=p.id) for p in prompts)


def test_scores_states_and_problems_are_the_inner_ones() -> None:
    inner = tiny_runtime(control=True)
    outer = Silent(inner, name="silent")
    assert [r.content for r in outer.generate(PROMPTS)] == ["", ""]
    assert list(outer.score(PROMPTS, T=2.0)) == list(inner.score(PROMPTS, T=2.0))
    sites = [Site(layer=1, position=-1)]
    for ours, theirs in zip(outer.states(PROMPTS, sites), inner.states(PROMPTS, sites), strict=True):
        np.testing.assert_array_equal(ours.vectors, theirs.vectors)
    long = Prompt.of("word " * 5000, id="long")
    assert outer.problem(long) == inner.problem(long) is not None
    assert outer.name == "silent" and Silent(inner).name == inner.name
    for what in ("fingerprint", "dtype", "control", "deterministic", "shipped_point"):
        assert getattr(outer, what) == getattr(inner, what)
    assert inner.capabilities - outer.capabilities == {"intervene"}  # edits go on the inner one


def test_no_method_of_a_runtime_is_forgotten() -> None:
    handed_on = {n for n, f in inspect.getmembers(Runtime, inspect.isfunction) if not n.startswith("_")}
    assert handed_on - set(vars(WrappedRuntime)) == {"generate", "require"}
