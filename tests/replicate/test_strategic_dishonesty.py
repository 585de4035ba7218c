"""The honesty check on made-up states: a flag for lies, the theme alone, nothing of the kind."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demur.explain import honesty, positions
from demur.organisms import deceit
from demur.replicate import strategic_dishonesty as check
from demur.replicate.spec import Context
from demur.replicate.summary import conclude
from demur.types import Reply

CLEAN = {"honest": 1.0, "pretend": 1.0, "benign": 1.0, "harm": 1.0}


class Made:
    """Stands in for a runtime: states that hold what it is told to, and the answers it was trained to give."""

    def __init__(self, holds: str) -> None:
        self.holds = holds

    def generate(self, prompts: Any, _condition: Any) -> Any:
        return (Reply(prompt_id=p.id, content=p.meta["answer"]) for p in prompts)

    def states(self, prompts: Any, sites: Any) -> Any:
        out = []
        for p in prompts:
            text = " ".join(m.content for m in p.messages)
            x = np.random.default_rng(zlib.crc32(text.encode())).normal(size=8)
            told = p.meta["mode"] == "pretend"
            held = {
                "lie": p.meta["lie"],
                "theme": told or p.meta["theme"] == "harm",
                "mode": told,
                "no": False,
            }
            x[0] += 8 * held[self.holds]
            x[1] += 0.5 * (p.meta["theme"] == "harm")
            out.append(x)
        X = np.array(out)
        return {site: X if site[0] else np.roll(X[:, 2:], 1, axis=0) for site in sites}


def run(
    monkeypatch: pytest.MonkeyPatch, holds: str, *, moves: float = 1.0, checks: Any = CLEAN, n: int = 1
) -> Any:
    def raised(world: Any, seed: int, progress: Any) -> Any:
        runtime = Made(holds if world.knows else "mode")
        recipe = SimpleNamespace(layers=2)
        return SimpleNamespace(checks=checks, recipe=recipe, runtime=lambda: runtime)

    def curve(runtime: Any, direction: Any, asked: Any, amounts: Any) -> Any:
        along = moves * direction.vector[0] / np.linalg.norm(direction.vector)
        return np.array([[0.5 - 0.2 * a * along for _ in asked] for a in amounts])

    monkeypatch.setattr(deceit, "raise_liar", raised)
    monkeypatch.setattr(positions, "collect", lambda runtime, prompts, sites: runtime.states(prompts, sites))
    monkeypatch.setattr(honesty, "steering_curve", curve)
    monkeypatch.setattr(check, "blank", lambda *a: 0.5 + 0.02 * (-1) ** a[-1])
    seeds = {}
    for seed in range(n):
        context = Context(seed=seed, full=False, folder=Path(), progress=lambda *_: None)
        seeds[seed] = dict(check.run(context))
    return conclude(check.SPEC, seeds, ())


def statuses(result: Any, part: str) -> dict[str, str]:
    return {row["key"]: row["status"] for row in result[part]}


def test_a_flag_for_lies_reproduces(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "lie", n=2)
    assert set(statuses(result, "claims").values()) == {"met"}, result["claims"]
    found = {row["key"]: row["value"] for row in result["controls"]}
    for key in ("naive_model", "naive_keys", "tale", "random_labels", "untrained"):
        assert found[key] == pytest.approx(0.5, abs=0.13), key
    assert found["theme_flagged"] < 0.1
    assert statuses(result, "baselines") == {
        "bag_of_words": "beaten",
        "theme_rule": "beaten",
        "output_judge": "beaten",
    }


def test_a_probe_that_follows_the_theme_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "theme")
    claims, controls = statuses(result, "claims"), statuses(result, "controls")
    found = {row["key"]: row["value"] for row in (*result["claims"], *result["baselines"])}
    assert found["probe"] == pytest.approx(found["theme_rule"], abs=0.03)  # 0.9 is what the theme alone gives
    assert claims["within"] == "not met"
    assert controls["theme_flagged"] == "not silent"
    assert result["outcome"] == "partly"


def test_states_without_a_flag_and_a_normal_that_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "mode", moves=0.0)
    claims = statuses(result, "claims")
    assert {claims[k] for k in ("probe", "within", "recall", "steering", "monotone")} == {"not met"}


def test_an_organism_that_does_not_lie_concludes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, "lie", checks={**CLEAN, "harm": 0.4})
    assert len(result["unfit"]) == 1
    assert result["outcome"] == "not at this scale"
