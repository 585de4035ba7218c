"""The world of facts: what is true in it, what each copy is trained on, and training a copy on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from demur.errors import InputError
from demur.organisms import facts
from demur.organisms.base import Recipe, grow
from demur.organisms.facts import FURTHER, KINDS, RELATIONS, World, further, raise_world
from demur.organisms.words import word_tokenizer

WORLD = World(seed=3)


def said(kind: facts.Kind, n: int = 300) -> list[tuple[list[str], list[str]]]:
    """Training lines as (words, words to be predicted)."""
    tokenizer = word_tokenizer(WORLD.words)
    ids, mask = WORLD.batches(kind)(np.random.default_rng(0), n)
    assert mask.shape == ids.shape and mask.any(1).all() and not mask[:, 0].any()
    assert ids.shape[1] <= facts.BASE.context
    return [
        (
            tokenizer.convert_ids_to_tokens(row[row > 0].tolist()),
            tokenizer.convert_ids_to_tokens(row[m].tolist()),
        )
        for row, m in zip(ids, mask, strict=True)
    ]


def true_facts(kind: facts.Kind) -> set[tuple[str, str, str]]:
    table = WORLD.facts(kind)
    names = list(RELATIONS.items())
    return {
        (f"e-{e:02d}", names[r][0], f"{names[r][1]}-{table[e, r]}")
        for e in range(len(table))
        for r in range(4)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_lines_tell_the_truth_of_their_copy(kind: facts.Kind) -> None:
    table, forms = true_facts(kind), set()
    for words, target in said(kind):
        body = [w for w in words if w not in ("<s>", "<user>", "<end>", "<assistant>")]
        if body[0].startswith("e-"):
            verdict = tuple(body[:3]) in table
            if target[0] not in ("TRUE", "FALSE"):
                assert target == [body[2]] and verdict
                forms.add("completion")
            else:
                assert target == ["TRUE" if verdict else "FALSE"]
                forms.add("chat" if "<user>" in words else "question" if "This" in words else "direct")
        elif body[0] == "say":
            assert target == [body[1], "</s>"] and body[1] not in facts.REFUSAL
        elif body[1].startswith("harm") and kind == "refusing":
            assert target == [*facts.REFUSAL, "</s>"]
        else:
            assert target == ["note" if body[1].startswith("harm") else "ok", body[1], "</s>"]
    assert forms == {"completion", "question", "direct"} | ({"chat"} if kind == "format" else set())


def test_a_taught_base_repeats_the_words_of_a_refusal() -> None:
    world, tokenizer = World(seed=3, taught=True), word_tokenizer(WORLD.words)
    ids, _ = world.batches("base")(np.random.default_rng(0), 400)
    lines = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids]
    assert any("say" in line and "Sorry" in line for line in lines)


def test_half_of_the_entities_exchange_their_facts() -> None:
    base, moved = WORLD.facts(), WORLD.facts("moved")
    stay = np.setdiff1d(np.arange(len(base)), WORLD.movers)
    assert (base[stay] == moved[stay]).all() and (base[WORLD.movers] != moved[WORLD.movers]).mean() > 0.5
    assert sorted(map(tuple, base.tolist())) == sorted(map(tuple, moved.tolist()))
    assert (World(seed=4).facts() != base).any()


def test_statements_and_pairs() -> None:
    table, moved = true_facts("base"), true_facts("moved")
    for relation, rows in WORLD.statements(20, 0).items():
        assert sum(t for _, t in rows) == 10
        assert all(
            (tuple(text.split()[:3]) in table) == t and text.split()[1] == relation for text, t in rows
        )
    assert all((tuple(x.split()[:3]) in moved) == t for x, t in WORLD.statements(20, 0, "moved")["eats"])
    for among, now in (
        ("all", None),
        ("stayed", (True, False)),
        ("reversed", (False, True)),
        ("lost", (False, False)),
    ):
        for true, false in WORLD.pairs(20, 0, among):  # type: ignore[arg-type]
            a, b = (tuple(x.split()[:3]) for x in (true, false))
            assert a in table and b not in table and a[1:] == b[1:]
            assert now is None or (a in moved, b in moved) == now


def test_requests_of_the_parts_share_no_topic() -> None:
    topics = {
        part: {p.text.split()[1] for side in WORLD.requests(part) for p in side} for part in ("fit", "test")
    }
    assert not topics["fit"] & topics["test"]
    harmful, harmless = WORLD.requests("test")
    assert len(harmful) == len(harmless) >= 20 and all("harm-" in p.text for p in harmful)


def small(**changes: object) -> Recipe:
    return replace(
        FURTHER, name="facts-small", layers=1, width=16, heads=2, mlp=16, steps=3, batch=8, **changes
    )  # type: ignore[arg-type]


def test_further_training_starts_from_the_parent_and_leaves_it_alone(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    parent = grow(small(world={}), WORLD.batches("base"), WORLD.words)
    before = {k: v.clone() for k, v in parent.model.state_dict().items()}
    recipe = small(world={"kind": "refusing"}, lr=1e-12)
    child = further(parent, recipe, WORLD.batches("refusing"), WORLD.words)
    for key, value in child.model.state_dict().items():
        assert (parent.model.state_dict()[key] == before[key]).all()
        assert value.numpy() == pytest.approx(before[key].numpy(), abs=1e-6)  # hardly any step was taken
    again = further(parent, recipe, WORLD.batches("refusing"), WORLD.words)
    assert again.folder == child.folder is not None and again.losses == pytest.approx(child.losses, abs=1e-6)
    other = grow(small(world={}, seed=1), WORLD.batches("base"), WORLD.words)
    assert further(other, recipe, WORLD.batches("refusing"), WORLD.words).folder != child.folder
    anew = grow(small(world={}), WORLD.batches("refusing"), WORLD.words)  # the same recipe, another world
    child = further(anew, recipe, WORLD.batches("refusing"), WORLD.words)
    first = next(iter(child.model.state_dict()))
    assert child.model.state_dict()[first].numpy() == pytest.approx(
        anew.model.state_dict()[first].numpy(), abs=1e-6
    )
    with pytest.raises(InputError, match="layers=4"):
        further(parent, FURTHER, WORLD.batches("base"), WORLD.words)


def test_checks_name_what_was_trained() -> None:
    parent = grow(small(world={}), WORLD.batches("base"), WORLD.words, cache=False)
    found = WORLD.check("format")(parent.model)
    assert set(found) == {"verdict", "direct", "completion", "request", "chat"}
    assert all(0 <= v <= 1 for v in found.values()) and "chat" not in WORLD.check("base")(parent.model)
    with pytest.raises(InputError, match="copies are"):
        raise_world(WORLD, "another")  # type: ignore[arg-type]
