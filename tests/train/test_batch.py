"""Batches, the shared prefix and the loss, against hand calculations and plain forward passes."""

from __future__ import annotations

import copy
from math import log
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from demur.train.batch import alike, collate, forward, teach, token_loss
from demur.train.refusal_tokens import Recipe, Row
from tests.runtime.tiny import ARCHITECTURES, tiny_control, tiny_model

NAMES = ("safety", "humanizing", "respond")


def test_collate_by_hand() -> None:
    rows = [Row([9, 8, 3, 4], "safety", [5, 6], own=True), Row([9, 8, 7], "respond", [])]
    batch = collate(rows, NAMES, 100)
    assert batch["prefix"].tolist() == [[9, 8]]
    assert batch["input_ids"].tolist() == [[3, 4, 100, 5, 6], [7, 102, 0, 0, 0]]
    assert batch["row"].tolist() == [0, 0, 0, 1]
    assert batch["at"].tolist() == [1, 2, 3, 0]  # the last prompt token decides the control token
    assert batch["targets"].tolist() == [100, 5, 6, 102]
    assert batch["control"].tolist() == [True, False, False, True]
    assert batch["own"].tolist() == [False, True, True, False]


def test_collate_without_control_tokens_and_without_a_shared_start() -> None:
    batch = collate([Row([1, 2], None, [5, 6]), Row([3], None, [7], own=True)], (), 100)
    assert batch["prefix"].shape == (1, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [3, 7, 0, 0]]
    assert batch["at"].tolist() == [1, 2, 0] and batch["targets"].tolist() == [5, 6, 7]
    assert not batch["control"].any() and batch["own"].tolist() == [False, False, True]


def test_collate_keeps_a_prompt_token_where_one_prompt_starts_another() -> None:
    batch = collate([Row([1, 2], "respond", []), Row([1, 2, 3], "respond", [])], NAMES, 100)
    assert batch["prefix"].tolist() == [[1]]
    assert batch["at"].tolist() == [0, 1]
    assert collate([Row([1, 2], "safety", [])] * 2, NAMES, 100)["input_ids"].tolist() == [[2, 100]] * 2


def told(targets: list[int], control: str, own: str) -> dict[str, torch.Tensor]:
    """A batch's targets and marks; "x" is True."""
    marks = {"control": control, "own": own}
    return {"targets": torch.tensor(targets)} | {
        k: torch.tensor([c == "x" for c in v]) for k, v in marks.items()
    }


def test_token_loss_by_hand() -> None:
    """Probabilities of the targets: control 1/2 and 1/4; answers 1/2, 1/8 and 1/4."""
    p = torch.tensor([1 / 2, 1 / 2, 1 / 8, 1 / 4, 1 / 4])
    shift = torch.tensor([[3.0], [3.0], [-2.0], [0.0], [1.0]])  # changes nothing
    logits = torch.stack([p, 1 - p], dim=-1).log() + shift
    recipe = Recipe(control_weight=2.0, answer_weight=0.5)
    loss, control = token_loss(logits, told([0] * 5, "x..x.", "....."), recipe)
    assert float(control) == pytest.approx((1 + 2) / 2 * log(2))
    assert float(loss) == pytest.approx(2 * 1.5 * log(2) + 0.5 * (1 + 3 + 2) / 3 * log(2))
    plain, none = token_loss(logits, told([0] * 5, ".....", "....."), recipe)
    assert float(plain) == pytest.approx(0.5 * (1 + 1 + 3 + 2 + 2) / 5 * log(2)) and float(none) == 0


def test_token_loss_without_answers_is_the_control_loss() -> None:
    loss, control = token_loss(torch.zeros(2, 4), told([1, 2], "xx", ".."), Recipe())
    assert float(loss) == float(control) == pytest.approx(log(4))


def test_own_answers_are_held_to_the_base_by_hand() -> None:
    """Row 0 has an own answer; base (1/2, 1/2) against model (1/4, 1/4, 1/2): a divergence of ln 2 per token."""
    model = torch.tensor([0.25, 0.25, 0.5]).log().expand(5, 3)
    recipe = Recipe(control_weight=1.0, answer_weight=0.5, keep_weight=3.0)
    batch = told([2, 0, 1, 2, 0], "x..x.", ".xx..")
    loss, control = token_loss(model, batch, recipe, torch.zeros(2, 2))
    assert float(control) == pytest.approx(log(2))
    assert float(loss) == pytest.approx(log(2) + 0.5 * log(4) + 3 * log(2))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_the_teacher_sees_prompt_and_answer_without_the_control_token(arch: str) -> None:
    model = tiny_model(arch)
    rows_edit, control = tiny_control(model)
    rows = rows_behind(5, rows_edit.first_id)
    rows[1].own = True
    asked = teach(collate(rows, control.names, rows_edit.first_id))
    assert asked is not None
    bare = teach(collate([Row(r.prompt, None, r.answer or [3], r.own) for r in rows], (), 0))
    assert bare is not None
    with torch.no_grad():
        ours, same = forward(model, asked).logits, forward(model, bare).logits
        plain = model(input_ids=torch.tensor([[*rows[1].prompt, *rows[1].answer]])).logits[0]
    want = plain[len(rows[1].prompt) - 1 : -1]
    assert ours.shape == want.shape == same.shape
    assert (ours - want).abs().max() < 1e-4 and (same - want).abs().max() < 1e-4
    assert teach(collate(rows[:1], control.names, rows_edit.first_id)) is None


def rows_behind(prefix: int, first_id: int) -> list[Row]:
    start = [1, *(5 + i % 60 for i in range(prefix - 1))]
    return [
        Row([*start, 30, 31, 32], "safety", [40, 41]),
        Row([*start, 33], "respond", [42, 43, 44, 45]),
        Row([*start, 34, 35], "humanizing", []),
    ]


@pytest.mark.parametrize("prefix", [5, 20])  # 20 is longer than the sliding window of gemma3 and mistral
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_shared_prefix_equals_the_plain_forward(arch: str, prefix: int) -> None:
    rows_edit, control = tiny_control(tiny_model(arch))
    first, names = rows_edit.first_id, control.names
    rows = rows_behind(prefix, first)
    batch = collate(rows, names, first)
    assert batch["prefix"].shape[1] == prefix

    def gradients(losses: Any) -> tuple[Any, dict[str, Any]]:
        model = copy.deepcopy(tiny_model(arch)).requires_grad_(True)
        with rows_edit.install(model):
            logits = losses(model)
        loss, _ = token_loss(logits, batch, Recipe())
        loss.backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def plain(model: Any) -> Any:
        out = []
        for row in rows:
            ids = [*row.prompt, first + names.index(row.control), *row.answer]
            out.append(model(input_ids=torch.tensor([ids])).logits[0, len(row.prompt) - 1 : -1])
        return torch.cat(out)

    ours, our_grads = gradients(lambda model: forward(model, batch).logits)
    theirs, their_grads = gradients(plain)
    assert (ours - theirs).abs().max() < 1e-4
    assert our_grads.keys() == their_grads.keys() and len(our_grads) > 5
    scale = max(float(g.abs().max()) for g in their_grads.values())
    for name, grad in their_grads.items():
        assert (our_grads[name] - grad).abs().max() < 1e-4 * scale, name


def test_alike_keeps_every_row_and_saves_padding() -> None:
    sizes = {"a": 20, "b": 9, "c": 2, "d": 1}
    rows = [
        Row([1] * (3 + (7 * i) % 50), "respond", [0] * (i % 5), system=s)
        for s, n in sizes.items()
        for i in range(n)
    ]
    parts = alike(rows)
    assert sorted(id(row) for part in parts for row in part) == sorted(id(row) for row in rows)
    systems = [sorted({row.system for row in part}) for part in parts]
    assert systems == [["a"]] * 3 + [["b"]] * 2 + [["c", "d"]]

    def padded(part: list[Row]) -> int:
        return len(part) * max(len(row.prompt) + len(row.answer) for row in part)

    assert sum(padded(part) for part in parts) < 0.8 * padded(rows)


@pytest.mark.parametrize("n", [1, 7, 8, 400])
def test_alike_with_few_and_many_rows(n: int) -> None:
    parts = alike([Row([1] * (1 + i % 13), None, []) for i in range(n)])
    assert sum(map(len, parts)) == n and all(parts)
