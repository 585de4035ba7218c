"""The place world: what it asks and answers, that no answer leaks between its parts, and that growth repeats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.organisms import experts
from demur.organisms.experts import PlaceWorld, grow_experts, planted_expert
from demur.organisms.words import PAD

SMALL = dataclasses.replace(experts.RECIPE, layers=2, width=32, mlp=32, steps=4, batch=16)


def test_questions_and_answers() -> None:
    world = PlaceWorld()
    parts = {part: world.questions(part) for part in ("train", "test")}
    assert [len(p) for p in parts.values()] == [648, 216]
    pairs = [
        {(p.meta["topic"], next(w for w in p.text.split() if w in world.days)) for p in of if "day" in p.text}
        for of in parts.values()
    ]
    assert not pairs[0] & pairs[1]
    for p in parts["test"]:
        words = p.text.split()
        assert p.meta["topic"] in words and p.meta["closed"] == p.meta["topic"].startswith("closed")
        assert p.meta["refused"] == (p.meta["closed"] and p.meta["template"] != "where")
        last = p.meta["answer"].split()[-1]
        assert last == "no" if p.meta["refused"] else last in (*words, *world.sides)
    assert world.sample(5, 1) == world.sample(5, 1) != world.sample(5, 2)
    with pytest.raises(InputError, match="216 different"):
        world.sample(217, 0)


def test_lay_out_marks_the_answer() -> None:
    world = PlaceWorld()
    some = world.sample(8, 0)
    ids, mask = world.lay_out(some)
    spelt = list(world.ids)
    for p, row, m in zip(some, ids, mask, strict=True):
        assert " ".join(spelt[i] for i in row[m]) == f"{p.meta['answer']} </s>"
        assert not m[row == PAD].any()
    prompt, last = experts._spans(ids, some)
    assert all(
        " ".join(spelt[i] for i in row[m]) == "? <end> <assistant>" for row, m in zip(ids, last, strict=True)
    )
    assert (prompt.sum(1) == mask.argmax(1)).all()


def test_planted_experts_vary_and_are_not_in_the_first_layer() -> None:
    found = {planted_expert(dataclasses.replace(experts.RECIPE, seed=s)) for s in range(40)}
    assert {layer for layer, _ in found} == {1, 2} and len({e for _, e in found}) > 8


@pytest.mark.parametrize("kind", ["planted", "topic"])
def test_growth_repeats_and_is_kept(
    kind: experts.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    first = grow_experts(kind, SMALL)
    again = grow_experts(kind, SMALL, cache=False)
    assert first.losses == again.losses and len(first.losses) == 4
    monkeypatch.setattr(experts, "_train", None)  # from now on only what was kept
    kept = grow_experts(kind, SMALL)
    for a, b in zip(first.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert kept.checks == first.checks and kept.folder is not None
    assert not any(p.requires_grad for p in kept.model.parameters())


def test_the_runtime_reads_the_refusal_exactly() -> None:
    organism = grow_experts("planted", SMALL, cache=False)
    runtime, world = experts.runtime_of(organism), PlaceWorld()
    prompt = world.sample(1, 0)[0]
    ids, mask = world.lay_out([prompt])
    with torch.inference_mode():
        logits = organism.model(input_ids=torch.from_numpy(ids)).logits[0]
    share = logits[int(np.flatnonzero(mask[0])[0]) - 1].softmax(-1)[world.ids["sorry"]]
    assert next(runtime.score([prompt])).p_refuse == pytest.approx(float(share), abs=1e-6)
