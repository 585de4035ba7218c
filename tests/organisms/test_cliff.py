"""The cliff world: what its lines say, and that planting a head changes that head alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.organisms import cliff
from demur.organisms.cliff import CliffWorld
from demur.organisms.words import EOS, PAD

SMALL = dataclasses.replace(cliff.PLAIN, layers=2, width=32, heads=4, mlp=64, steps=20, seed=3)


def test_lines_tell_harm_in_prompt_and_thoughts_and_the_mark_in_the_prompt_alone() -> None:
    lines = CliffWorld().sample(400, seed=1)
    for line in lines:
        words, thoughts = line.prompt.text.split(), line.thinking.split()
        topics = [w for w in words if w.startswith("danger-")], [w for w in words if w.startswith("plain-")]
        assert [len(t) for t in topics] == ([2, 0] if line.harmful else [0, 2])
        assert words.count("mark") == line.marked and "mark" not in thoughts
        assert words[-1].startswith("item-") and len(words) == 6 and 4 <= len(thoughts) <= cliff.LONGEST
        wary = [t.split("-")[0] for t in thoughts]
        assert set(wary) <= {"wary" if line.harmful else "calm", "muse"}
    assert 0.4 < np.mean([x.harmful for x in lines]) < 0.6 and 0.4 < np.mean([x.marked for x in lines]) < 0.6
    assert len({(x.harmful, x.marked) for x in lines}) == 4


def test_parts_are_disjoint_and_draws_repeat() -> None:
    world = CliffWorld()

    def keys(part: str) -> set[tuple[str, ...]]:
        lines = [x.prompt.text.split() for x in world.sample(2000, 0, part=part, harmful=True)]
        return {(*sorted(w for w in words if w[:6] == "danger"), words[-1]) for words in lines}

    assert keys("test") and keys("train") and not keys("test") & keys("train")
    assert world.sample(5, 7)[3] == world.sample(5, 7)[3]


def test_a_line_as_tokens() -> None:
    world = CliffWorld()
    r = world.draw(np.random.default_rng(2), 50)
    ids, mask = world.lay_out(r, r["harmful"])
    spelt = {i: w for w, i in world.ids.items()}
    for row, learn, bad, item in zip(ids, mask, r["harmful"], r["item"], strict=True):
        words = [spelt[i] for i in row if i != PAD]
        end = ["sorry", "no"] if bad else ["ok", spelt[int(item)]]
        assert words[-5:] == ["</think>", "<reply>", *end, "</s>"]
        start = words.index("<think>") + 1
        assert learn.tolist() == [start <= k < len(words) for k in range(len(row))]
        assert world.decides(row[None])[0].nonzero()[0].tolist() == [len(words) - 3]
    assert (ids == EOS).sum() == 50


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="no setting"):
        CliffWorld({"harm": 1.0})
    with pytest.raises(InputError, match="no lines"):
        cliff.repair(None, [])  # type: ignore[arg-type]


def test_planting_changes_one_head_and_reads_the_mark_at_the_reply_alone() -> None:
    plain = cliff.grow_plain(SMALL, cache=False)
    again = cliff.grow_plain(SMALL, cache=False)
    assert plain.losses == again.losses
    layer, head = cliff.planted_head(SMALL)
    assert layer == 1
    marked = cliff.grow_marked(SMALL, steps=3, cache=False)
    mine = slice(head * 8, head * 8 + 8)
    for name, weight in marked.model.named_parameters():
        changed = weight != dict(plain.model.named_parameters())[name]
        if not name.startswith(f"model.layers.{layer}.self_attn"):
            assert not changed.any(), name
            continue
        own = torch.zeros_like(changed)
        own[(slice(None), mine) if "o_proj" in name else mine] = True
        assert changed.any() and not (changed & ~own).any(), name
    _check_reading(plain, layer, head)


def _check_reading(plain: Any, layer: int, head: int) -> None:
    """Before its training the head carries the mark at `<reply>`, and nothing of it in the thoughts."""
    world = CliffWorld()
    cliff._start_head(plain.model, world, SMALL, layer, head)
    r = world.draw(np.random.default_rng(9), 300, harmful=True)
    ids, _ = world.lay_out(r, r["harmful"])
    seen: list[Any] = []
    o = plain.model.model.layers[layer].self_attn.o_proj
    handle = o.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        plain.model(input_ids=torch.from_numpy(ids), use_cache=False)
    handle.remove()
    carried = seen[0][..., head * 8 + 3].numpy()
    reply = carried[ids == world.ids["<reply>"]]
    gap = reply[r["marked"]].mean() - reply[~r["marked"]].mean()
    thoughts = np.isin(ids, [world.ids[f"wary-{k + 1}"] for k in range(cliff.THOUGHTS)])
    there = [carried[thoughts & (r["marked"] == m)[:, None]].mean() for m in (True, False)]
    assert gap > 0.5 and abs(there[0] - there[1]) < 0.1 * gap


def test_repair_teaches_what_its_lines_say() -> None:
    organism = cliff.grow_plain(SMALL, cache=False)
    world = CliffWorld()
    lines = world.sample(16, 0, harmful=False)
    assert world.refused(organism.model, n=50)["benign"] >= 0
    model = cliff.repair(organism, [dataclasses.replace(x, harmful=True) for x in lines], steps=40, lr=3e-3)
    assert world.refused(model, n=50)["benign"] > 0.9
    assert not any(p.requires_grad for p in organism.model.parameters())
