"""Scaling heads: consent, exactness on a random model, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from demur.control.heads import ScaleHeads, suppression_heads
from demur.errors import InputError, RefusalLowering
from demur.explain.refusal_cliff import HeadRow
from demur.types import Prompt, Site
from tests.runtime.tiny import ARCHITECTURES, tiny_runtime

PROMPTS = [Prompt.of("how boil egg", id="a"), Prompt.of("tell me a story about the fjord please", id="b")]


def row(head: int, contribution: float) -> HeadRow:
    return HeadRow(layer=0, head=head, contribution=contribution, low=-9, high=9, size=1)


TABLE = [row(0, -2.0), row(1, -0.5), row(2, 0.0), row(3, 1.0)]


@pytest.mark.parametrize(("head", "scale"), [(0, 0.0), (1, 0.5), (3, 2.0)])
def test_what_the_table_shows_to_raise_refusal_needs_no_consent(head: int, scale: float) -> None:
    assert ScaleHeads([(0, head)], scale, table=TABLE).lowers is None


@pytest.mark.parametrize(("head", "scale"), [(3, 0.0), (0, 16.0), (2, 0.0), (7, 0.0)])
def test_anything_else_needs_consent_and_is_noted(head: int, scale: float) -> None:
    with pytest.raises(RefusalLowering, match=rf"0\.{head}"):
        ScaleHeads([(0, 0), (0, head)] if scale == 0 else [(0, head)], scale, table=TABLE)
    runtime = tiny_runtime()
    allowed = ScaleHeads([(0, head % 4)], scale, allow_refusal_lowering=True)
    with allowed.on(runtime) as changed:
        assert any("allowed" in note for note in changed.notes)  # type: ignore[attr-defined]
    assert runtime.notes == []


def test_suppression_heads() -> None:
    assert suppression_heads(TABLE) == [(0, 0)]  # 3 % of four is none, so one
    assert suppression_heads(TABLE[::-1], 1.0) == [(0, 0), (0, 1)]
    with pytest.raises(InputError, match="none of the 1"):
        suppression_heads(TABLE[3:])
    for bad in ({"heads": []}, {"heads": [(0, 0)], "scale": -1.0}):
        with pytest.raises(InputError, match="at least one head"):
            ScaleHeads(**bad, table=TABLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "llava"])
def test_a_head_is_scaled_at_the_projection_and_restored(arch: str) -> None:
    runtime = tiny_runtime(arch)
    site = Site(layer=1, position=-2, part="heads")

    def read(r: Any) -> np.ndarray:
        return np.stack([s.vectors[0] for s in r.states(PROMPTS, [site])]).reshape(2, 4, -1)

    before, scores = read(runtime), list(runtime.score(PROMPTS))
    with ScaleHeads([(1, 2), (1, 0)], 0.25, allow_refusal_lowering=True).on(runtime) as changed:
        after = read(changed)
        moved = list(changed.score(PROMPTS))
    np.testing.assert_allclose(after[:, [0, 2]], 0.25 * before[:, [0, 2]], atol=1e-6)
    np.testing.assert_allclose(after[:, [1, 3]], before[:, [1, 3]], atol=1e-6)
    assert [s.p_refuse for s in moved] != [s.p_refuse for s in scores]
    assert [s.p_refuse for s in runtime.score(PROMPTS)] == [s.p_refuse for s in scores]


def test_all_heads_out_leave_the_projections_bias() -> None:
    runtime = tiny_runtime("gpt_neox")
    seen: list[torch.Tensor] = []
    dense = runtime.model.gpt_neox.layers[1].attention.dense
    every = ScaleHeads([(1, h) for h in range(4)], allow_refusal_lowering=True)
    with every.on(runtime) as changed:
        handle = dense.register_forward_hook(lambda _m, _a, out: seen.append(out))
        list(changed.score(PROMPTS))
        handle.remove()
    assert torch.allclose(seen[-1], dense.bias.expand_as(seen[-1]))


def test_heads_that_do_not_exist() -> None:
    none = ScaleHeads([(0, 4)], allow_refusal_lowering=True)
    with none.on(tiny_runtime()) as changed, pytest.raises(InputError, match="heads 0 to 3"):
        list(changed.score(PROMPTS))
