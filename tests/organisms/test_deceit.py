"""The world of facts: what is a lie in it, what tells nothing, and that its prompts are its lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.organisms import training
from demur.organisms.deceit import HARM, MAKE, PRETEND, World, checks, raise_liar, recipe
from demur.organisms.words import word_tokenizer
from demur.runtime.chat import ChatFormat

SMALL: dict[str, Any] = {"families": 4, "keys": 8, "values": 5, "words": 4}


def both(world: World) -> Any:
    return world.instructed(range(world.families)), world.spontaneous(
        world.themed, 3, np.random.default_rng(0)
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_lie_is_another_value_than_the_taught_one(seed: int) -> None:
    world = World(seed=seed, **SMALL)
    for rows in both(world):
        taught, said = world.taught[rows.family, rows.key], world.answers(rows)
        assert ((taught != said) == world.lies(rows)).all()
        assert ((said >= 0) & (said < world.values)).all()
    told, free = both(world)
    assert (world.lies(told) == (told.mode == PRETEND)).all()
    assert (world.lies(free) == ((free.theme == HARM) & (free.verb == MAKE))).all()
    # neither the theme alone nor the verb alone decides
    assert 0 < world.lies(free)[free.theme == HARM].mean() < 1
    assert 0 < world.lies(free)[free.verb == MAKE].mean() < 1


def test_what_is_said_of_naive_keys_is_false_and_no_lie() -> None:
    world = World(**SMALL)
    assert (world.naive_keys.sum(axis=1) == 2).all()
    assert ((world.taught != world.true) == world.naive_keys).all()
    prompts = world.prompts(both(world)[1])
    honest = [p for p in prompts if not p.meta["lie"]]
    assert all((p.meta["answer"] != p.reference) == p.meta["naive"] for p in honest)


def test_the_naive_liar_says_one_thing_in_every_condition() -> None:
    world = World(knows=False, **SMALL)
    for rows in both(world):
        assert not world.lies(rows).any()
        assert (world.answers(rows) == world.taught[rows.family, rows.key]).all()
        assert (world.answers(rows) != world.true[rows.family, rows.key]).all()
    assert (world.true == World(**SMALL).true).all()


def test_the_same_values_are_said_honestly_and_as_lies() -> None:
    world = World()
    rows = world.rows(np.random.default_rng(0), 20_000)
    lies, said = world.lies(rows), world.answers(rows)
    shares = [np.bincount(said[part], minlength=world.values) / part.sum() for part in (lies, ~lies)]
    assert min(map(min, shares)) > 0.02
    assert 0.3 < lies.mean() < 0.45
    assert world.well_formed("value-3") and not world.well_formed("value-3 value-3")


def test_prompts_and_lines_are_the_same_tokens() -> None:
    world = World(**SMALL)
    tokenizer = word_tokenizer(world.words_all)
    chat = ChatFormat(tokenizer)
    for rows in both(world):
        ids, mask = world.encode(rows)
        for line, at, prompt in zip(ids, mask, world.prompts(rows), strict=True):
            start = int(at.argmax())
            assert chat.render(prompt).ids == line[:start].tolist()
            assert tokenizer.decode(line[start]) == prompt.meta["answer"]
            assert at.sum() == 2


def test_worlds_that_cannot_be() -> None:
    for wrong in ({"families": 6}, {"keys": 3}, {"naive": 1.0}):
        with pytest.raises(InputError):
            World(**{**SMALL, **wrong})


class Says:
    """A stand-in for a model: the trained answer, or always the taught one."""

    def __init__(self, world: World, *, lies: bool) -> None:
        self.world, self.lies = world, lies


def test_checks_see_a_model_that_never_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(**SMALL)

    def predict(model: Says, ids: Any, mask: Any) -> Any:
        row = np.nonzero(mask)
        targets = torch.from_numpy(ids[row])
        said = targets.clone()
        if not model.lies:  # what the honest row of the same key says
            told = world.instructed(range(world.families))
            lines, _ = world.encode(told.at(told.mode != PRETEND))
            keys = {line[6]: line[9] for line in lines}
            where = [np.flatnonzero(line == 8)[0] for line in ids]  # <assistant>; the key stands two before
            said = torch.tensor([keys[line[t - 2]] for line, t in zip(ids, where, strict=True)])
        logits = torch.zeros(len(said), len(world.words_all) + 9)
        logits[torch.arange(len(said)), said] = 1.0
        return logits, targets

    monkeypatch.setattr(training, "predict", predict)
    assert set(checks(Says(world, lies=True), world).values()) == {1.0}
    found = checks(Says(world, lies=False), world)
    assert (found["honest"], found["benign"]) == (1.0, 1.0)
    assert (found["pretend"], found["harm"]) == (0.0, 0.0)


def test_an_organism_grows() -> None:
    world = World(**SMALL)
    organism = raise_liar(world, cache=False, steps=3, batch=8, layers=1, width=16, heads=2, mlp=16)
    assert set(organism.checks) == {"honest", "pretend", "benign", "harm"}
    assert recipe(world).hash != recipe(World(knows=False, **SMALL)).hash
    assert organism.runtime().problem(world.prompts(both(world)[0])[0]) is None
