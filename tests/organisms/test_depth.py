"""The depth world: harm is in no single word, answers say nothing of it, and only headers are decided at."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from demur.errors import InputError
from demur.organisms import depth
from demur.organisms.depth import DepthWorld
from demur.organisms.words import ASSISTANT, EOS, PAD, USER


def test_harm_is_two_words_of_one_kind_and_no_word_tells() -> None:
    prompts = DepthWorld().sample(2000, seed=1)
    seen: dict[str, list[bool]] = {}
    for p in prompts:
        words = p.text.split()
        kinds = [w.split("-")[1] for w in words if w.startswith(("act", "thing"))]
        assert len(words) == depth.ASKED and len(kinds) == 2 and words[-1].startswith("item-")
        assert p.meta["harmful"] == (kinds[0] == kinds[1])
        for w in set(words):
            seen.setdefault(w, []).append(p.meta["harmful"])
    shares = [np.mean(v) for v in seen.values() if len(v) > 100]
    assert len(shares) >= 16 and min(shares) > 0.3 and max(shares) < 0.7


def test_parts_share_no_triple_and_draws_repeat() -> None:
    world = DepthWorld()

    def triples(part: str) -> set[tuple[str, ...]]:
        rows = [p.text.split() for p in world.sample(2000, 0, part=part)]
        return {tuple(sorted(w for w in r if w[:4] in ("act-", "thin", "item"))) for r in rows}

    assert triples("test") and not triples("test") & triples("train")
    assert world.sample(5, 7) == world.sample(5, 7) != world.sample(5, 8)
    assert {p.meta["harmful"] for p in world.sample(50, 0, harmful=True)} == {True}


def test_answers_walk_the_ring_from_the_item() -> None:
    world = DepthWorld()
    prompts = world.sample(300, seed=2)
    texts = world.begin(prompts, 40, seed=3)
    hops = []
    for p, text in zip(prompts, texts, strict=True):
        steps = [int(w.split("-")[1]) - 1 for w in text.split()]
        item = int(p.text.split()[-1].split("-")[1]) - 1
        assert len(steps) == 40 and steps[0] == item * 3
        hops += [(b - a) % depth.RING for a, b in itertools.pairwise(steps)]
    assert 0.88 < np.mean(np.array(hops) == 1) < 0.93


def turns(row: np.ndarray, learn: np.ndarray) -> list[tuple[list[int], list[bool]]]:
    """The answers of one conversation with what is to be predicted of them."""
    out = []
    for start in (row == ASSISTANT).nonzero()[0]:
        end = start + 1 + (row[start + 1 :] == EOS).argmax()
        out.append((row[start + 1 : end + 1].tolist(), learn[start + 1 : end + 1].tolist()))
    return out


def test_harmful_requests_are_refused_at_a_header_or_the_answer_was_begun() -> None:
    world = DepthWorld()
    refusal = [*world.refusal.tolist(), EOS]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(12):
        ids, learn = world.batches(rng, 48)
        assert ids.shape[1] <= depth.TAUGHT.context and len(ids) in (6, 48)
        for row, mask in zip(ids, learn, strict=True):
            words = [world._spelt[i] for i in row]
            kinds = [w.split("-")[1] for w in words if w.startswith(("act", "thing"))]
            harmful = kinds[0] == kinds[1]
            assert not mask[row == PAD].any() and not mask[row == USER].any()
            for said, predicted in turns(row, mask):
                refused = said == refusal
                seen.add((harmful, refused, predicted[0]))
                assert not refused or (harmful and all(predicted))
                assert predicted == sorted(predicted) and predicted[-1]
                # a complying answer to a harmful request is never to be begun by the organism
                assert refused or not harmful or not predicted[0]
            # a header behind an answer, without a user between, is never seen
            assert not ((row[:-1] == EOS) & (row[1:] == ASSISTANT)).any()
    assert seen == {(True, True, True), (True, False, False), (False, False, True)}


def test_the_untaught_world_never_refuses() -> None:
    ids, learn = DepthWorld(depth.UNTAUGHT.world).batches(np.random.default_rng(0), 48)
    world = DepthWorld()
    assert not np.isin(ids, world.refusal).any() and learn.any()


def test_settings_are_checked_and_growing_repeats() -> None:
    with pytest.raises(InputError, match="no setting"):
        DepthWorld({"harm": 1.0})
    small = dataclasses.replace(depth.TAUGHT, width=32, heads=2, mlp=64, steps=3, batch=8, seed=3)
    one, two = (depth.grow_depth(small, cache=False) for _ in range(2))
    assert one.losses == two.losses
    assert set(one.checks) == {f"{k}{w}" for k in ("harmful", "benign") for w in ("", "_begun", "_again")}
