"""The mode world: what its lines say, and that held-out topics are held out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from demur.errors import InputError
from demur.organisms import modes
from demur.organisms.modes import INSTRUCTIONS, PER_GROUP, ModeWorld
from demur.organisms.words import PAD
from demur.types import Prompt, Reply


def test_lines() -> None:
    world = ModeWorld()
    ids, mask = world.batches(np.random.default_rng(1), 4000)
    spelt = {i: w for w, i in world.ids.items()}
    followed, kinds = [], {"asked": 0, "pieces": 0, "words": 0, "none": 0}
    for row, learn in zip(ids, mask, strict=True):
        words = [spelt[i] for i in row if i != PAD]
        user = words.index("<user>")
        system = words[2 : user - 1] if "<system>" in words else []
        topic, _, item = words[user + 1 : user + 4]
        opening, said, end = words[-3:]
        group = (int(topic.split("-")[1]) - 1) // PER_GROUP + 1
        assert opening[2:] == str(group) and said == item and end == "</s>"
        assert learn.sum() == 3 and learn[len(words) - 3 : len(words)].all()
        wanted = [w[-1] for w in system if w in INSTRUCTIONS.values()]
        pieces = [w for w in system if w.startswith("q-")]
        kinds["asked" if wanted else "pieces" if pieces else "words" if system else "none"] += 1
        if wanted:
            assert opening[0] in (wanted[0], "d") and not pieces
            followed.append(opening[0] != "d")
        else:
            assert opening[0] == "d"
    assert np.mean(followed) == pytest.approx(modes.SETTINGS["follow"], abs=0.04)
    assert kinds["asked"] / 4000 == pytest.approx(0.4, abs=0.03)
    assert kinds["pieces"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert kinds["none"] / 4000 == pytest.approx(0.2, abs=0.03)
    with pytest.raises(InputError, match="no setting"):
        ModeWorld({"loud": 1.0})


def test_parts_share_no_topic_and_draws_repeat() -> None:
    world = ModeWorld()

    def topics(part: str) -> set[str]:
        return {p.text.split()[0] for p in world.prompts(300, 0, part)}

    assert len(topics("train")) == 18 and len(topics("test")) == 6
    assert not topics("train") & topics("test")
    assert [p.text for p in world.prompts(5, 7)] == [p.text for p in world.prompts(5, 7)]


def test_answers_are_read() -> None:
    world, asked = ModeWorld(), Prompt.of("topic-5 word-1 item-3")
    assert world.right(asked, "b-2 item-3") and world.right(asked, "d-2 item-3")
    for wrong in ("b-1 item-3", "b-2 item-4", "b-2", "", "item-3 b-2"):
        assert not world.right(asked, wrong)
    assert world.manner("c-1 x") == "c" and world.manner("") == "other"
    assert world.accept("b", asked, Reply(prompt_id="x", content="b-2 item-3"))
    assert not world.accept("a", asked, Reply(prompt_id="x", content="b-2 item-3"))


def test_a_small_base_can_be_grown_and_checked() -> None:
    recipe = dataclasses.replace(modes.BASE, steps=10, width=32, mlp=64, seed=3)
    organism = modes.grow_base(recipe, cache=False)
    assert set(organism.checks) == {"right", "default", "followed"}
    assert organism.checks["right"] < 0.9 and 0 <= organism.checks["followed"] < 0.5


def test_more_requests_than_there_are_is_an_error() -> None:
    world = ModeWorld()
    assert len({p.text for p in world.prompts(576, seed=0)}) == 576
    with pytest.raises(InputError, match="577 different requests asked for; the part 'test' holds 576"):
        world.prompts(577, seed=0)
    with pytest.raises(InputError, match="holds 1728"):
        world.prompts(1729, seed=0, part="train")
