"""Growing is deterministic, kept by recipe, and says when an organism is not fit for use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from demur.errors import CapabilityError, InputError
from demur.organisms.base import Batches, Ids, Mask, Organism, Recipe, UnfitOrganism, grow
from demur.organisms.training import build, predict, schedule
from demur.organisms.words import BOS, EOS, MASK, PAD

WORDS = tuple("abcdefg")
FIRST = 9
TINY = Recipe(
    name="next-letter",
    world={"step": 1},
    layers=1,
    width=32,
    heads=2,
    mlp=64,
    context=12,
    steps=150,
    batch=32,
    lr=1e-2,
    warmup=10,
)


def batches(rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
    """<s> x y </s>, where y is the letter after x."""
    x = rng.integers(7, size=n)
    ids = np.stack([np.full(n, BOS), FIRST + x, FIRST + (x + 1) % 7, np.full(n, EOS)], axis=1).astype(
        np.int64
    )
    mask = np.zeros(ids.shape, dtype=bool)
    mask[:, 2] = True
    return ids, mask


def accuracy(model: Any) -> Mapping[str, float]:
    logits, targets = predict(model, *batches(np.random.default_rng(0), 64))
    return {"accuracy": float((logits.argmax(-1) == targets).float().mean()), "nothing": math.nan}


def weights(organism: Organism) -> dict[str, torch.Tensor]:
    return organism.model.state_dict()  # type: ignore[no-any-return]


def same(a: Organism, b: Organism) -> bool:
    return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))


def test_growing_twice_gives_the_same_bits() -> None:
    state = torch.get_rng_state()
    one = grow(TINY, batches, WORDS, check=accuracy, cache=False)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is left alone
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = grow(TINY, batches, WORDS, check=accuracy, cache=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert same(one, two)
    assert one.losses == two.losses
    assert len(one.losses) == TINY.steps
    assert not same(one, grow(replace(TINY, seed=1), batches, WORDS, cache=False))
    # it has learnt its world: from ln 16 (all words) to nearly nothing
    assert one.losses[0] == pytest.approx(math.log(16), abs=0.7)
    assert one.require("accuracy", at_least=0.99) == 1.0
    assert one.losses[-1] < 0.05


def test_a_grown_organism_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    made = grow(TINY, batches, WORDS, check=accuracy)
    assert made.folder is not None
    assert capfd.readouterr() == ("", "")  # no bars of others: what is shown is the caller's business
    assert made.folder.name == f"next-letter-{TINY.hash}"

    def explode(model: Any) -> Mapping[str, float]:
        raise AssertionError("trained again")

    kept = grow(TINY, batches, WORDS, check=explode)
    assert same(made, kept)
    assert kept.folder == made.folder
    assert kept.checks["accuracy"] == made.checks["accuracy"]
    assert math.isnan(kept.checks["nothing"])
    assert kept.losses == pytest.approx(made.losses, abs=1e-6)
    assert kept.model.training is False
    assert kept.runtime().fingerprint == made.runtime().fingerprint is not None
    about = json.loads((made.folder / "recipe.json").read_text())
    assert about["recipe"]["world"] == {"step": 1}
    assert (made.folder / "model.safetensors").is_file()


def test_a_changed_world_is_grown_anew() -> None:
    made = grow(TINY, batches, WORDS)

    def backwards(rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
        ids, mask = batches(rng, n)
        return ids[:, [0, 2, 1, 3]].copy(), mask

    other = grow(TINY, backwards, WORDS)
    assert other.folder == made.folder
    assert not same(made, other)
    assert not same(other, grow(TINY, batches, tuple("gfedcba")))


def test_a_stopped_run_leaves_nothing(tmp_path: Path) -> None:
    calls = iter(range(20))

    def stopping(rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return batches(rng, n)

    with pytest.raises(KeyboardInterrupt):
        grow(TINY, stopping, WORDS)
    assert [p.suffix for p in (tmp_path / "organisms").iterdir()] == [".lock"]


def test_a_broken_folder_is_grown_anew() -> None:
    folder = grow(TINY, batches, WORDS).folder
    assert folder is not None
    (folder / "recipe.json").write_text("{")
    assert grow(TINY, batches, WORDS, check=accuracy).checks["accuracy"] == 1.0


def test_only_marked_tokens_are_predicted_and_from_what_stands_before() -> None:
    model = build(TINY, 16).eval()
    ids = np.array([[BOS, 9, 10, EOS, PAD], [BOS, 11, 12, 13, EOS]])
    mask = np.array([[False, False, True, True, False], [False, False, False, False, True]])
    with torch.no_grad():
        logits, targets = predict(model, ids, mask)
        plain = model(torch.from_numpy(ids)).logits
    assert targets.tolist() == [10, EOS, EOS]
    torch.testing.assert_close(logits, torch.stack([plain[0, 1], plain[0, 2], plain[1, 3]]))


def test_an_encoder_sees_both_sides_and_not_the_marked_token() -> None:
    recipe = replace(TINY, kind="encoder", name="gap", steps=200)
    model = build(recipe, 16).eval()
    ids, mask = np.array([[BOS, 9, 10, EOS, PAD]]), np.array([[False, False, True, False, False]])
    with torch.no_grad():
        one, _ = predict(model, ids, mask)
        two, _ = predict(model, np.where(mask, 12, ids), mask)
        short, _ = predict(model, ids[:, :4], mask[:, :4])
        after, _ = predict(model, np.array([[BOS, 9, 10, 13, PAD]]), mask)
        hidden, _ = predict(model, np.array([[BOS, 9, MASK, EOS, PAD]]), mask)
    assert torch.equal(one, two)
    assert torch.equal(one, hidden)
    torch.testing.assert_close(one, short)
    assert not torch.allclose(one, after)

    def gaps(rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
        """<s> x y </s> with x hidden: only what stands behind it tells."""
        ids, mask = batches(rng, n)
        return ids, np.roll(mask, -1, axis=1)

    def right(model: Any) -> Mapping[str, float]:
        logits, targets = predict(model, *gaps(np.random.default_rng(0), 64))
        return {"accuracy": float((logits.argmax(-1) == targets).float().mean())}

    organism = grow(recipe, gaps, WORDS, check=right)
    organism.require("accuracy", at_least=0.99)
    assert same(organism, grow(recipe, gaps, WORDS))
    with pytest.raises(CapabilityError, match="encoder"):
        organism.runtime()


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = replace(TINY, steps=100, warmup=10)
    assert schedule(0, recipe) == pytest.approx(0.1)
    assert schedule(50, recipe) == pytest.approx(0.5)
    assert schedule(99, recipe) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert schedule(0, replace(recipe, warmup=0)) == 1.0


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int | None]] = []
    grow(replace(TINY, steps=60), batches, WORDS, cache=False, progress=lambda *state: seen.append(state))
    assert seen == [("grow next-letter", 50, 60), ("grow next-letter", 60, 60)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda ids, mask: (ids.astype(np.int32), mask), "no int64"),
        (lambda ids, mask: (ids, mask.astype(int)), "no boolean mask"),
        (lambda ids, mask: (ids, mask[:, :2]), "no boolean mask"),
        (lambda ids, mask: (ids + 20, mask), "vocabulary is 0 to 15"),
        (lambda ids, mask: (np.tile(ids, 4), np.tile(mask, 4)), "context is 12"),
        (lambda ids, mask: (ids, mask & False), "no token to predict"),
        (lambda ids, mask: (ids, ~mask), "marked first token"),
    ],
)
def test_bad_batches(change: Any, why: str) -> None:
    bad: Batches = lambda rng, n: change(*batches(rng, n))  # noqa: E731
    with pytest.raises(InputError, match=why):
        grow(TINY, bad, WORDS, cache=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "../up"}, "names a folder"),
        ({"steps": 0}, "steps=0"),
        ({"width": 30, "heads": 4}, "head widths"),
        ({"kind": "mixer"}, "decoder or encoder"),
        ({"world": {"x": {1, 2}}}, "plain JSON"),
        ({"world": {"x": math.nan}}, "plain JSON"),
    ],
)
def test_bad_recipes(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        replace(TINY, **change)


def test_the_hash_sees_every_setting() -> None:
    changes: list[dict[str, Any]] = [
        {"name": "x"}, {"world": {"step": 2}}, {"layers": 2}, {"width": 64}, {"heads": 4}, {"mlp": 65},
        {"context": 13}, {"steps": 151}, {"batch": 33}, {"lr": 0.02}, {"weight_decay": 0.2}, {"warmup": 11},
        {"seed": 1}, {"kind": "encoder"},
    ]  # fmt: skip
    hashes = {TINY.hash, *(replace(TINY, **c).hash for c in changes)}
    assert len(hashes) == len(changes) + 1
    two = replace(TINY, world={"a": 1, "b": [2]})
    assert two.hash == replace(TINY, world={"b": [2], "a": 1}).hash


def test_an_unfit_organism_says_so() -> None:
    organism = Organism(None, None, TINY, {"accuracy": 0.5, "loss": 2.0, "nothing": math.nan})
    assert organism.require("accuracy", at_least=0.5) == 0.5
    assert organism.require("loss", at_most=2.0) == 2.0
    with pytest.raises(UnfitOrganism, match=r"accuracy is 0\.500, the entry condition is at least 0.9"):
        organism.require("accuracy", at_least=0.9)
    with pytest.raises(UnfitOrganism, match=r"at most 1\.0"):
        organism.require("loss", at_most=1.0)
    with pytest.raises(UnfitOrganism):
        organism.require("nothing", at_least=0.0)
    with pytest.raises(InputError, match="it has accuracy, loss"):
        organism.require("acuracy", at_least=0.9)
