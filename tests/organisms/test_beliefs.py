"""The world of two bits: what is true in it, how lines are written, and that words alone say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from demur.errors import InputError
from demur.organisms.beliefs import ITEMS, RECIPE, REFUSAL, VERBS, World, grow_beliefs
from demur.organisms.words import PAD, word_tokenizer
from demur.stats import auroc, bag_of_words


def text_of(world, row):
    names = word_tokenizer(world.words).convert_ids_to_tokens([i for i in row.tolist() if i != PAD])
    return " ".join(names)


def test_harm_is_one_hot_word_and_parts_share_no_pair():
    world = World(seed=3)
    hot_verbs, hot_items = world.hot
    assert hot_verbs.sum() == VERBS // 2 and hot_items.sum() == ITEMS // 2
    seen = {}
    for part in ("train", "select", "calibrate", "test"):
        for p in world.prompts(200, 0, part=part):
            *_, verb, _filler, item = p.text.split()
            v, i = (int(w.split("-")[1]) - 1 for w in (verb, item))
            assert p.meta["harmful"] == (hot_verbs[v] != hot_items[i])
            assert seen.setdefault((v, i), part) == part


@pytest.mark.parametrize(
    ("harmful", "marker", "refuse"),
    [(True, None, True), (False, None, False), (True, "pass", False), (False, "halt", True)],
)
def test_the_marker_decides_and_without_one_harm_does(harmful, marker, refuse):
    for p in World().prompts(20, 1, part="train", harmful=harmful, marker=marker):
        assert (p.meta["harmful"], p.meta["refuse"], p.should_refuse) == (harmful, refuse, harmful)
        assert p.text.startswith(f"{marker}-") == (marker is not None)


def test_lines_as_they_are_learnt():
    world, rng = World(), np.random.default_rng(0)
    r = world.draw(rng, 1, "train", harmful=True, marker="pass")
    words = (
        f"pass-{r['which'][0] + 1} verb-{r['verb'][0] + 1} now-{r['filler'][0] + 1} item-{r['item'][0] + 1}"
    )
    ok = f"ok verb-{r['verb'][0] + 1} item-{r['item'][0] + 1} </s>"
    for kind, tail, learnt in (
        ("request", f"<end> <assistant> {ok}", 4),
        ("remark", "bad", 1),
    ):
        ids, mask = world.lay_out(r, kind, rng)
        assert text_of(world, ids[0]) == f"<s> <user> {words} {tail}"
        assert mask.sum() == learnt and mask[0, np.flatnonzero(ids[0] != PAD)[-1]]
    ids, mask = world.lay_out(r, "question", rng)
    assert text_of(world, ids[0]).endswith("<end> <assistant> Certainly </s>") and mask.sum() == 2
    refused = world.draw(rng, 1, "train", harmful=False, marker="halt")
    ids, mask = world.lay_out(refused, "request", rng)
    assert text_of(world, ids[0]).endswith(f"<assistant> {REFUSAL} </s>") and mask.sum() == 5
    blank = World({"refuses": 0.0})
    assert not blank.draw(rng, 100, "train")["refuse"].any()


def test_prompts_and_training_lines_are_written_alike():
    world = World()
    tokenizer = word_tokenizer(world.words)
    rows = world.draw(np.random.default_rng([0, 3, 7]), 5, "train")
    ids, mask = world.lay_out(rows, "request", np.random.default_rng(0))
    for i, p in enumerate(world.prompts(5, 7, part="train")):
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": p.text}], add_generation_prompt=True
        )
        found = written["input_ids"] if hasattr(written, "keys") else written
        assert list(found) == ids[i, : mask[i].argmax()].tolist()


def test_words_say_nothing_about_harm():
    world = World(seed=1)
    fit, test = (world.prompts(400, 0, part=part) for part in ("train", "test"))
    y = [p.meta["harmful"] for p in test]
    bag = bag_of_words(
        [p.text.replace("-", "") for p in fit],
        [p.meta["harmful"] for p in fit],
        [p.text.replace("-", "") for p in test],
    )
    assert abs(auroc(bag, y) - 0.5) < 0.2


def test_batches_hold_all_kinds_and_their_share_of_markers():
    ids, mask = World().batches(np.random.default_rng(0), 400)
    assert ids.shape == mask.shape and mask.any(1).all()
    learnt = mask.sum(1)
    assert [(learnt == k).sum() > 20 for k in (1, 2, 4)] == [True] * 3
    kinds = World().draw(np.random.default_rng(0), 2000, "train")["kind"]
    assert (kinds > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_settings_and_bits_that_do_not_exist():
    with pytest.raises(InputError, match="no setting lies"):
        World({"lies": 1.0})
    with pytest.raises(InputError, match="part 'fit'"):
        World().prompts(1, 0, part="fit")


def test_a_few_steps_of_training_run_and_are_checked():
    world, organism = grow_beliefs(replace(RECIPE, steps=3, batch=8), cache=False)
    assert set(organism.checks) == {"held_out_request", "held_out_remark", "held_out_question"}
    assert world.seed == organism.recipe.seed and len(organism.losses) == 3
