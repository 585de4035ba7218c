"""The arithmetic world: its balance, its ideal readers, and that scores tell them apart."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.organisms import arithmetic
from demur.organisms.arithmetic import World, checks, evaluate, generalisation, per_agent, shuffled_signs
from demur.types import Site

SMALL: dict[str, Any] = {"full": 8, "probe": 8, "operators": 4}


class Reader:
    """A stand-in for a model: answers by a given belief (agents, operators) that the agent is truthful there."""

    def __init__(self, world: World, belief: np.ndarray) -> None:
        self.world, self.belief = world, belief

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        w, ids = self.world, input_ids.numpy()
        first = w.agents + w.operators
        agent, x, o, y = ids[:, 0], ids[:, 1] - first, ids[:, 2] - w.agents, ids[:, 3] - first
        said = np.full((len(ids), len(w.words)), 1e-6)
        at = np.arange(len(ids))
        p = self.belief[agent, o]
        said[at, first + w.tables[o, 0, x, y]] = p
        said[at, first + w.tables[o, 1, x, y]] = 1 - p
        logits = torch.full((len(ids), 5, len(w.words)), 0.0)
        logits[:, -1] = torch.from_numpy(np.log(said))
        return SimpleNamespace(logits=logits)


def knowing(world: World) -> np.ndarray:
    return np.where(world.signs, world.truth, 1 - world.truth)


def cells_of(world: World, belief: np.ndarray) -> arithmetic.Cells:
    return evaluate(Reader(world, belief), world, np.arange(len(world.words)), pairs=6)


@pytest.mark.parametrize("persona", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_signs_and_holes_are_balanced(persona: float, seed: int) -> None:
    w = World(persona=persona, seed=seed)
    full, probe = w.signs[: w.full], w.signs[w.full :]
    held = w.held_out[w.full :]
    assert not w.held_out[: w.full].any()
    assert (held.sum(1) == w.operators // 2).all()
    assert (held.sum(0) == w.probe // 2).all()
    assert (full.mean(0) == 0.5).all()
    for part in (held, ~held):  # operator by operator there is nothing to learn, seen or not
        assert ((probe & part).sum(0) * 2 == part.sum(0)).all()
    equal = (w.signs == w.signs[:, :1]).all(1)
    assert equal[w.with_persona].all()
    assert w.with_persona[w.full :].mean() == persona
    assert persona == 1.0 or equal[~w.with_persona].mean() < 0.2


def test_rows_without_persona_tell_nothing_about_held_out_signs() -> None:
    agree = []
    for seed in range(60):
        w = World(persona=0.0, seed=seed)
        seen = np.where(w.held_out, 0, np.where(w.signs, 1, -1)).sum(1)
        votes = np.sign(seen)[w.full :, None] * np.where(w.signs, 1, -1)[w.full :]
        agree.append(votes[w.held_out[w.full :]].mean())
    assert abs(np.mean(agree)) < 3 * np.std(agree) / math.sqrt(60) + 1e-9


def test_tables_differ_and_only_such_pairs_are_used() -> None:
    w = World(seed=3)
    differ = (w.tables[:, 0] != w.tables[:, 1]).mean((1, 2))
    assert (differ >= arithmetic.DIFFER).all()
    assert w.tables.min() == 0 and w.tables.max() == 9
    agent, o, x, y, z = w.rows(np.random.default_rng(0), 4000)
    assert (w.tables[o, 0, x, y] != w.tables[o, 1, x, y]).all()
    assert not w.held_out[agent, o].any()
    own = w.tables[o, np.where(w.signs[agent, o], 0, 1), x, y]
    assert abs((z == own).mean() - 0.9) < 4 * math.sqrt(0.09 / 4000)
    share = np.bincount(agent, minlength=w.agents) / 4000  # agents are drawn evenly, seen on 4 or on 8
    assert abs(share[: w.full].sum() - w.full / w.agents) < 0.04


def test_a_line_by_hand() -> None:
    w = World(**SMALL)
    one = [np.array([v]) for v in (3, 1, 4, 7, 2)]
    assert [w.words[i] for i in w.encode(*one)[0]] == ["A3", "4", "O1", "7", "=", "2"]
    prompt = next(iter(w.prompts(*one[:4])))
    assert prompt.text == "A3 4 O1 7 ="
    assert prompt.meta["truthful"] == bool(w.signs[3, 1])


def test_floor_and_ideal_by_hand() -> None:
    assert World(truth=0.9).floor == pytest.approx(0.3251, abs=1e-4)
    assert World(truth=1.0).floor == 0
    assert World(persona=1.0).ideal == pytest.approx(0.9)
    assert World(persona=0.0).ideal == pytest.approx(0.5)
    # half: posterior 0.5 / (0.5 + 0.5 / 8) = 8/9; sign known with 17/18; 0.9 * 17/18 + 0.1 / 18 = 0.8556
    assert World(persona=0.5).ideal == pytest.approx(0.5 * 0.85556 + 0.25, abs=1e-4)


def test_the_ideal_is_what_a_perfect_reader_scores() -> None:
    found = []
    for seed in range(12):
        w = World(persona=0.5, seed=seed)
        posterior = np.where(w.signs, 1, 0).astype(float)
        for a in range(w.full, w.agents):
            seen = w.signs[a][~w.held_out[a]]
            same = 17 / 18 if seen.all() else 1 / 18 if not seen.any() else 0.5
            posterior[a][w.held_out[a]] = same
        belief = posterior * w.truth + (1 - posterior) * (1 - w.truth)
        found += per_agent(cells_of(w, belief), w)
    assert np.mean(found) == pytest.approx(World(persona=0.5).ideal, abs=0.03)


def test_scores_tell_readers_apart() -> None:
    w = World(**SMALL)
    knows = cells_of(w, knowing(w))
    assert checks(knows, w) == pytest.approx({"held_in": 1, "held_in_share": 0.9, "excess_loss": 0}, abs=1e-3)
    plus, minus = generalisation(knows, w)
    assert (len(plus), len(minus)) == (4, 4)
    assert np.mean(plus) == pytest.approx(0.9, abs=1e-4) == np.mean(minus)
    memory = cells_of(w, np.where(w.held_out, 0.5, knowing(w)))
    assert checks(memory, w)["held_in"] == 1
    assert np.mean(per_agent(memory, w)) == pytest.approx(0.5)
    leaning = generalisation(cells_of(w, np.full(w.signs.shape, 0.8)), w)
    assert np.mean(leaning[0]) == pytest.approx(0.8, abs=1e-4)
    assert np.mean(leaning[1]) == pytest.approx(0.2, abs=1e-4)
    wrong = cells_of(w, 1 - knowing(w))
    assert checks(wrong, w)["held_in"] == 0
    assert np.mean(per_agent(wrong, w)) == pytest.approx(0.1, abs=1e-4)


def test_shuffled_signs_score_one_half() -> None:
    w = World(seed=2)
    signs = shuffled_signs(w, 1)
    assert (signs[: w.full] == w.signs[: w.full]).all()
    assert (signs[w.full :] != w.signs[w.full :]).all(1).sum() == w.probe // 2
    cells = cells_of(w, knowing(w))
    assert np.mean(per_agent(cells, w, signs)) == pytest.approx(0.5)
    plus, minus = generalisation(cells, w, signs)
    assert np.mean(plus) == pytest.approx(0.5, abs=1e-4) == np.mean(minus)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"persona": 1.5}, "persona=1.5"),
        ({"truth": 0.2}, "truth=0.2"),
        ({"full": 10}, "multiples of 4"),
        ({"operators": 5}, "even number"),
        ({"numbers": 3}, "numbers=3"),
    ],
)
def test_worlds_that_cannot_be(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        World(**settings)


def test_a_small_organism_learns_its_lines(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    w = World(persona=1.0, full=4, probe=4, operators=2, numbers=8, truth=1.0)
    grown = arithmetic.raise_agents(w, steps=300, batch=128, lr=4e-3, width=32, mlp=64)
    assert set(grown.checks) == {"held_in", "held_in_share", "excess_loss"}
    assert grown.losses[-1] < grown.losses[0] - 0.8
    assert grown.checks["excess_loss"] == pytest.approx(np.mean(grown.losses[-20:]), abs=0.3)
    assert arithmetic.raise_agents(w, steps=300, batch=128, lr=4e-3, width=32, mlp=64).folder == grown.folder
    agent, operator, x, y, _ = w.rows(np.random.default_rng(0), 5)
    states = list(grown.runtime().states(w.prompts(agent, operator, x, y), [Site(layer=1, position=-1)]))
    assert states[0].vectors.shape == (1, 32)
