"""The persona check on made-up organisms: readers that know the persona, that memorise, and states that hold it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demur.organisms import arithmetic
from demur.organisms.arithmetic import Cells, World
from demur.replicate import persona_truthfulness as check
from demur.replicate.spec import Context
from demur.replicate.summary import conclude

SHARE = {"persona": 0.9, "none": 0.5, "half": 0.68, "coin": 0.5}


def states_of(world: World, seed: int, strength: float) -> check.States:
    """Random states; the second layer holds the agent's sign on the operator, `strength` spreads apart."""
    rng = np.random.default_rng(seed)
    agent, operator, _ = (g.ravel() for g in np.indices((world.agents, world.operators, check.LINES)))
    sign = np.where(world.signs[agent, operator], 1.0, -1.0)

    def layer(held: float) -> Any:
        x = rng.normal(size=(len(agent), 16))
        x[:, 0] += held * sign
        return x

    before = {(0, -1): layer(0.0), (1, -2): layer(0.0), (1, -1): layer(strength)}
    rows = rng.normal(size=(world.agents + world.operators, 8))
    embedding = np.concatenate([rows[agent], rows[world.agents + operator]], axis=1)
    return check.States(agent, operator, before, before, embedding)


def test_a_sign_in_the_states_is_read_and_trivial_rules_fail() -> None:
    world = World(probe=32, seed=1)
    out = check.read_signs(states_of(world, 0, 3.0), world)
    assert out["probe_f1"].value is not None and out["probe_f1"].value > 0.97
    assert out["probe_accuracy"].n == world.probe
    for key in ("agent_f1", "operator_f1"):  # one answer for all: F1 of one class is 0, of the other 2/3
        assert out[key].value == pytest.approx(1 / 3, abs=0.01)
    assert out["embedding_f1"].value < 0.75
    assert out["anywhere_f1"].value > 0.97
    assert out["probe_random"].value == pytest.approx(0.5, abs=0.06)


def test_states_without_the_sign_give_chance() -> None:
    world = World(persona=0.0, seed=2)
    out = check.read_signs(states_of(world, 0, 0.0), world)
    assert out["probe_accuracy"].value == pytest.approx(0.5, abs=0.08)


def run(
    monkeypatch: pytest.MonkeyPatch, share: dict[str, float], *, held_in: float = 0.99, n: int = 2
) -> dict[str, Any]:
    """The check with readers that give the own interpretation `share` on held-out cells."""
    arm_of = {(s["persona"], s.get("truth", 0.9)): arm for arm, s in check.ARMS.items()}

    def raised(world: World, seed: int) -> Any:
        arm = arm_of[world.persona, world.truth]
        tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda words: list(range(len(words))))
        checks = {"held_in": held_in, "excess_loss": 0.02}
        return SimpleNamespace(model=arm, tokenizer=tokenizer, checks=checks)

    def cells(arm: str, world: World, ids: Any, *, seed: int) -> Cells:
        noise = np.random.default_rng([seed, len(arm)]).normal(0, 0.05, world.signs.shape)
        one = np.ones(world.signs.shape)
        return Cells(np.where(world.held_out, share[arm] + noise, 0.9), one, one, 0.33 * one)

    monkeypatch.setattr(check, "_raise_all", lambda *_: None)
    monkeypatch.setattr(arithmetic, "raise_agents", raised)
    monkeypatch.setattr(arithmetic, "evaluate", cells)
    strength = {"persona": 3.0 if share["persona"] > 0.6 else 0.0}
    monkeypatch.setattr(
        check, "collect_states", lambda o, w, seed: states_of(w, seed, strength.get(o.model, 0.0))
    )
    seeds = {}
    for seed in range(n):
        context = Context(seed=seed, full=False, folder=Path(), progress=lambda *_: None)
        seeds[seed] = dict(check.run(context))
    return conclude(check.SPEC, seeds, ())


def statuses(result: dict[str, Any], part: str) -> dict[str, str]:
    return {row["key"]: row["status"] for row in result[part]}


def test_readers_that_know_the_persona_reproduce(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, SHARE, n=5)
    assert set(statuses(result, "claims").values()) == {"met"}
    assert set(statuses(result, "controls").values()) == {"silent"}, result["controls"]
    assert set(statuses(result, "baselines").values()) == {"beaten"}
    assert result["outcome"] == "reproduced"


def test_readers_that_memorise_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, dict.fromkeys(SHARE, 0.5))
    assert result["outcome"] == "not at this scale"


def test_a_reader_that_knows_what_cannot_be_known_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, {**SHARE, "none": 0.62})
    assert statuses(result, "controls")["r_none"] == "not silent"
    assert result["outcome"] == "partly"


def test_an_untrained_organism_concludes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, SHARE, held_in=0.7)
    assert len(result["unfit"]) == 2
    assert result["outcome"] == "not at this scale"
