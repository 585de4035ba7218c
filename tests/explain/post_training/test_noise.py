"""Maps with noise on the subject: nothing without noise, everything with clean embeddings, full passes between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.explain.post_training import Noise, Pair, compare
from demur.explain.post_training.statements import unasked
from demur.explain.post_training.tracing import _margin, _Run, align, trace
from demur.runtime.layers import BlockEdit, find_layers, first_tensor, hooked, with_first
from demur.runtime.local import LocalRuntime
from tests.explain.post_training.test_tracing import BEFORE, CITIES, PAIRS, runtime

ARCHS = ["llama", "gpt_neox", "gemma3", "mistral", "olmo2"]
LONG = [
    Pair(true=f"the {a} {b} is in {x} .", false=f"the {b} {a} is in {x} .")
    for a, x in CITIES.items()
    for b, y in CITIES.items()
    if x != y
]
"""Subjects of two tokens."""


def noised(r: LocalRuntime, aligned: Any, noise: Noise) -> tuple[int, torch.Tensor]:
    return noise.drawn(r, aligned)[0]


def naive(r: LocalRuntime, aligned: Any, noise: Noise, i: int, layer: int | None, column: int) -> float:
    """Full passes over one pair, noise put in by hand, one cell replaced; no layer: none."""
    at, kept = aligned.start + column, {}
    first, added = noised(r, aligned, noise)

    def disturb(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        for k in range(added.shape[1]):
            out[0, first + k] += added[i, k]
        return out

    def keep(_m: Any, _a: Any, out: Any) -> None:
        kept["h"] = first_tensor(out).clone()

    def put(_m: Any, _a: Any, out: Any) -> Any:
        h = first_tensor(out).clone()
        h[0, at] = kept["h"][0, at]
        return with_first(out, h)

    ids = torch.tensor(aligned.true[i : i + 1])
    block = find_layers(r.model)[layer or 0]
    with r.edited(), torch.inference_mode():
        with hooked(block.register_forward_hook(keep)):
            r.model(input_ids=ids)
        handles = [r.model.get_input_embeddings().register_forward_hook(disturb)]
        handles += [] if layer is None else [block.register_forward_hook(put)]
        with hooked(*handles):
            logits = r.model(input_ids=ids).logits[0, -1]
    yes, no = aligned.answers[i].tolist()
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize("arch", ARCHS)
def test_cells_are_what_full_passes_give(arch: str) -> None:
    r, noise = runtime(arch), Noise(share=3.0, draws=1)
    aligned = align(r.tokenizer, LONG, before=BEFORE)
    assert aligned.roles[1:3] == ("subject", "subject")
    found = trace(r, aligned, noise=noise)
    last = len(aligned.pairs) - 1
    assert found.false[last] == pytest.approx(naive(r, aligned, noise, last, None, 0), abs=2e-4)
    for i, layer, column in [(0, 0, 1), (2, 0, 2), (3, 1, 5), (5, 2, 9), (7, 1, 2), (last, 1, 1)]:
        expected = naive(r, aligned, noise, i, layer, column)
        assert found.cells[i, layer, column] == pytest.approx(expected, abs=2e-4)
    assert np.abs(found.gain).max() > 1e-3
    assert found.cells[:, -1, -1] == pytest.approx(found.true, abs=2e-4)  # the last state decides
    assert not found.gain[:, :, 0].any()  # before the subject nothing was disturbed


def test_without_noise_the_map_is_zero() -> None:
    r = runtime()
    aligned = align(r.tokenizer, LONG, before=BEFORE)
    found = trace(r, aligned, noise=Noise(share=0.0, draws=2))
    assert found.gain == pytest.approx(np.zeros_like(found.gain), abs=1e-5)
    assert found.false == pytest.approx(found.true, abs=1e-5)


@pytest.mark.parametrize("before", ["", BEFORE])
@pytest.mark.parametrize("arch", ARCHS)
def test_clean_embeddings_of_the_noised_tokens_give_the_clean_run_back(arch: str, before: str) -> None:
    """Noise that reached any other token, through a wrong column or the shared prefix, would stay."""
    r = runtime(arch)
    aligned = align(r.tokenizer, LONG, before=before)
    rows, first = slice(0, 8), aligned.start + aligned.subject
    at, added = noised(r, aligned, Noise(share=3.0))
    tokens = added.shape[1]
    with r.edited(), torch.inference_mode():
        plain = r.model.get_input_embeddings()(torch.tensor(aligned.true[rows, at : at + tokens]))

    def restore(_m: Any, args: tuple[Any, ...]) -> Any:
        h = args[0].clone()
        behind = h.shape[1] - (
            aligned.true.shape[1] - at
        )  # a shared prefix came before, in a pass of one row
        if len(h) == len(plain):
            h[:, behind : behind + tokens] = plain
        return (h, *args[1:])

    clean = _Run(r, aligned.true[rows], first)
    disturbed = _Run(r, aligned.true[rows], first, (at, added[rows]))
    assert (disturbed.logits - clean.logits).abs().max() > 1e-3
    with hooked(find_layers(r.model)[0].register_forward_pre_hook(restore)):
        back = _Run(r, aligned.true[rows], first, (at, added[rows]))
    assert (_margin(back.logits, aligned, rows) == _margin(clean.logits, aligned, rows)).all()


def test_size_seeds_and_draws() -> None:
    r = runtime()
    aligned = align(r.tokenizer, LONG)
    at, one = noised(r, aligned, Noise(share=2.0, seed=4))
    width = one.shape[-1]
    ids = torch.tensor(aligned.true[:, at : at + 2])
    assert float(one.std() / r.model.get_input_embeddings()(ids).std()) == pytest.approx(2.0, rel=0.05)
    assert one.shape == (len(aligned.pairs), 2, width) and at == aligned.start + 1

    def cells(**settings: Any) -> Any:
        return trace(r, aligned, noise=Noise(share=2.0, **settings)).cells

    same, again, other = (cells(draws=1, seed=seed) for seed in (4, 4, 5))
    assert (same == again).all() and np.abs(same - other).max() > 1e-3
    draws = Noise(share=2.0, draws=2, seed=4).drawn(r, aligned)
    assert torch.equal(draws[0][1], one) and not torch.equal(draws[0][1], draws[1][1])
    single = [trace(r, aligned, noise=OneDraw(share=2.0, seed=4, which=k)).cells for k in range(2)]
    assert cells(draws=2, seed=4) == pytest.approx(np.mean(single, axis=0), abs=1e-6)


class OneDraw(Noise):
    """The draw number `which` alone."""

    def __init__(self, which: int, **settings: Any) -> None:
        super().__init__(draws=which + 1, **settings)

    def drawn(self, runtime: LocalRuntime, aligned: Any) -> list[tuple[int, torch.Tensor]]:
        return super().drawn(runtime, aligned)[-1:]


def test_states_of_another_model() -> None:
    r = runtime()
    push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    other = r.with_edits(BlockEdit(0, lambda h, _at: h + push))
    aligned = align(r.tokenizer, LONG, before=BEFORE)
    found = trace(r, aligned, source=other, noise=Noise(share=3.0))
    assert found.cells[:, -1, -1] == pytest.approx(trace(other, aligned).true, abs=2e-4)
    assert found.true == pytest.approx(trace(r, aligned).true, abs=1e-5)
    assert (
        np.abs(found.gain[:, :, 0]).max() > 1e-3
    )  # another model's states change cells before the subject too


@pytest.mark.parametrize(("share", "draws"), [(-0.1, 3), (float("nan"), 3), (float("inf"), 3), (1.0, 0)])
def test_bad_noise(share: float, draws: int) -> None:
    with pytest.raises(InputError, match="at least 0"):
        Noise(share=share, draws=draws)


def test_no_token_of_the_subject() -> None:
    r = runtime()
    aligned = align(r.tokenizer, PAIRS)
    nobody = replace(aligned, roles=tuple("other" for _ in aligned.roles))
    with pytest.raises(InputError, match="subject alone"):
        trace(r, nobody, noise=Noise(share=1.0))


def test_sentences_completed_instead() -> None:
    done = unasked(PAIRS)
    assert len(done) == len(PAIRS)
    assert done[0] == Pair(true="the Oslo is in", false="the Rome is in", answers=(" Norway", " Italy"))
    assert unasked(done) == done  # these have their answers
    with pytest.raises(InputError, match="true_answer and false_answer"):
        unasked(PAIRS[:1])


def test_a_comparison_with_noise_and_without_the_question() -> None:
    r = runtime()
    tuned = r.with_edits(BlockEdit(1, lambda h, _at: 1.1 * h), name="tuned")
    noise = Noise(share=3.0, draws=1)
    asked, done, plain = (
        compare(r, tuned, parts=["knowledge"], pairs=PAIRS, before=before, **settings).knowledge
        for before, settings in (
            (BEFORE, {"noise": noise}),
            ("", {"noise": noise, "question": False}),
            (BEFORE, {}),
        )
    )
    assert asked and done and plain
    assert "object" in asked.roles and done.columns[-1] == "in" and done.noise == noise
    aligned = align(r.tokenizer, PAIRS, before=BEFORE)
    found = trace(r, aligned, noise=noise)
    assert asked.margins["base"] == pytest.approx((found.true.mean(), found.false.mean()))
    assert (asked.right["base"].n, plain.right["base"].n) == (len(PAIRS), 2 * len(PAIRS))
    assert asked.right["base"].k == int((found.true > 0).sum())
    assert plain.noise is None and asked.margins["base"][0] == pytest.approx(plain.margins["base"][0])
