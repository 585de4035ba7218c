"""Cells of a patch map against single full passes, the shape of pairs, and maps compared by hand calculations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.explain.post_training.maps import binned, likeness, pearson, shuffled, split_half
from demur.explain.post_training.statements import Pair
from demur.explain.post_training.tracing import align, answer_ids, margins, trace
from demur.organisms.words import word_tokenizer
from demur.runtime.layers import BlockEdit, find_layers, first_tensor, with_first
from demur.runtime.local import LocalRuntime
from tests.runtime.tiny import tiny_runtime

WORDS = """Oslo Bergen Rome Milan Bari Paris Lyon is in Norway Italy France . This statement is: TRUE FALSE
yes no the""".split()  # noqa: SIM905
COUNTRIES = {"Norway": ("Oslo", "Bergen"), "Italy": ("Rome", "Milan", "Bari"), "France": ("Lyon",)}
CITIES = {city: country for country, cities in COUNTRIES.items() for city in cities}
PAIRS = [
    Pair(true=f"the {a} is in {x} .", false=f"the {b} is in {x} .")
    for a, x in CITIES.items()
    for b, y in CITIES.items()
    if x != y
]
BEFORE = "the Paris is in France . This statement is: TRUE the Paris is in Italy . This statement is: FALSE "


def runtime(arch: str = "llama", words: bool = True) -> LocalRuntime:
    made: LocalRuntime = tiny_runtime(arch)
    if words:
        made = made.with_edits()
        made.tokenizer = word_tokenizer(WORDS)
    return made


def narrow() -> LocalRuntime:
    """A model of another width."""
    from demur.organisms.base import Recipe
    from demur.organisms.training import build
    from demur.organisms.words import vocabulary

    recipe = Recipe(name="narrow", world={}, layers=3, width=16, heads=2, mlp=16, steps=1, batch=1)
    return LocalRuntime(build(recipe, len(vocabulary(WORDS))).eval(), word_tokenizer(WORDS), name="narrow")


def naive(r: LocalRuntime, source: LocalRuntime, aligned: Any, i: int, layer: int, column: int) -> float:
    """Two full passes over one pair, with one cell replaced by hand."""
    at, kept = aligned.start + column, {}

    def keep(_m: Any, _a: Any, out: Any) -> None:
        kept["h"] = first_tensor(out).clone()

    def put(_m: Any, _a: Any, out: Any) -> Any:
        h = first_tensor(out).clone()
        h[0, at] = kept["h"][0, at]
        return with_first(out, h)

    with source.edited():
        handle = find_layers(source.model)[layer].register_forward_hook(keep)
        source.model(input_ids=torch.tensor(aligned.true[i : i + 1]))
        handle.remove()
    with r.edited():
        handle = find_layers(r.model)[layer].register_forward_hook(put)
        logits = r.model(input_ids=torch.tensor(aligned.false[i : i + 1])).logits[0, -1]
        handle.remove()
    yes, no = aligned.answers[i].tolist()
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gemma3", "mistral", "olmo2"])
def test_cells_are_what_full_passes_give(arch: str) -> None:
    r = runtime(arch)
    aligned = align(r.tokenizer, PAIRS, before=BEFORE)
    found = trace(r, aligned)
    assert found.cells.shape == (len(aligned.pairs), 3, len(aligned.columns))
    for i, layer, column in [
        (0, 0, 1),
        (3, 1, 4),
        (5, 2, 8),
        (7, 2, 2),
        (9, 0, 0),
        (len(aligned.pairs) - 1, 1, 1),
    ]:
        expected = naive(r, r, aligned, i, layer, column)
        assert found.cells[i, layer, column] == pytest.approx(expected, abs=2e-4)
    assert found.cells[:, -1, -1] == pytest.approx(found.true, abs=2e-4)  # the last state decides
    assert found.cells[:, :, 0] == pytest.approx(np.repeat(found.false[:, None], 3, 1), abs=1e-9)
    assert np.abs(found.true - found.false).max() > 1e-3
    assert "forward" not in vars(find_layers(r.model)[0])  # nothing is left behind


def test_states_of_another_model_and_edits_of_this_one() -> None:
    r = runtime()
    with torch.no_grad():
        push = torch.randn(32, generator=torch.Generator().manual_seed(0))
    other = r.with_edits(BlockEdit(1, lambda h, at: h + (at == 24)[..., None] * push))
    aligned = align(r.tokenizer, PAIRS, before=BEFORE)
    for target, source in ((r, other), (other, r)):
        found = trace(target, aligned, source=source)
        for i, layer, column in [(0, 0, 1), (2, 1, 8), (4, 2, 8), (6, 1, 5)]:
            expected = naive(target, source, aligned, i, layer, column)
            assert found.cells[i, layer, column] == pytest.approx(expected, abs=2e-4)
    plain, steered = trace(r, aligned), trace(other, aligned)
    assert np.abs(plain.cells - steered.cells).max() > 1e-2


def test_margins_without_a_copy() -> None:
    r = runtime()
    aligned = align(r.tokenizer, PAIRS)
    found, (true, false) = trace(r, aligned), margins(r, aligned)
    assert true == pytest.approx(found.true, abs=1e-5) and false == pytest.approx(found.false, abs=1e-5)


# --- pairs ------------------------------------------------------------------------------------------------------


def test_columns_and_roles() -> None:
    aligned = align(word_tokenizer(WORDS), PAIRS, before=BEFORE)
    assert aligned.columns == ("the", "s1", "is", "in", "o1", ".", "This", "statement", "is:")
    assert [r for r in aligned.roles if r != "other"] == ["subject", "object"]
    assert aligned.start == 20 and aligned.subject == 1


def test_the_commonest_shape_is_kept() -> None:
    long = Pair(true="the Oslo Bergen is in Norway .", false="the Rome Bari is in Norway .")
    uneven = Pair(true="the Oslo is in Norway .", false="the Rome Bari is in Norway .")
    aligned = align(word_tokenizer(WORDS), [long, uneven, *PAIRS])
    assert len(aligned.pairs) == len(PAIRS) and aligned.left_out == 2
    assert align(word_tokenizer(WORDS), PAIRS, most=20).pairs[1] == PAIRS[len(PAIRS) // 20]


def test_pairs_to_be_completed() -> None:
    rows = [Pair(true=f"the {a} is in", false=f"the {b} is in", answers=(f" {x}", f" {y}"))
            for a, x in CITIES.items() for b, y in CITIES.items() if x != y]  # fmt: skip
    tokenizer = word_tokenizer(WORDS)
    aligned = align(tokenizer, rows)
    assert aligned.columns == ("the", "s1", "is", "in") and "object" not in aligned.roles
    assert tokenizer.convert_ids_to_tokens(aligned.answers[0].tolist()) == ["Norway", "Italy"]


def test_pairs_that_cannot_be_traced() -> None:
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(InputError, match="5 of 5 pairs"):
        align(tokenizer, PAIRS[:5])
    for true, false in (("Oslo is in Norway .", "Oslo is in Italy ."), ("Oslo is", "Oslo is")):
        with pytest.raises(InputError, match="differ in their subject"):
            align(tokenizer, [Pair(true=true, false=false)])
    assert answer_ids(tokenizer, "the", (" yes", " yes")) is None


def test_models_of_another_width() -> None:
    aligned = align(word_tokenizer(WORDS), PAIRS)
    other = narrow()
    with pytest.raises(InputError, match="different layers or widths"):
        trace(runtime(), aligned, source=other)


# --- maps -------------------------------------------------------------------------------------------------------


def test_twenty_bins() -> None:
    x = np.array([0.0, 0.99, 1.0, 9.99, 10.0, 10.5, 11.0, 19.0, 20.0])
    assert binned(x).tolist() == [0, 0, 0, 0, 0.1, 0.1, 0.2, 1.0, 1.0]
    assert binned(np.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]


def test_pearson_by_hand() -> None:
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert pearson([[1, 2]], [[5, 3]]) == pytest.approx(-1)
    assert pearson([1, 1], [1, 2]) is None


def test_likeness_tells_places_apart() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(scale=0.3, size=(40, 6, 4))
    a[:, 1, 2] += 8
    b = a + rng.normal(scale=0.3, size=a.shape)
    c = rng.normal(scale=0.3, size=a.shape)
    c[:, 4, 3] += 2
    same, moved = (likeness(a, x, ["other", "subject", "subject", "object"]) for x in (b, c))
    assert same.pearson is not None and same.low is not None and same.ceiling is not None
    assert same.pearson > 0.98 and same.low > 0.95 and same.ceiling > 0.98 and same.difference == 0
    assert moved.pearson is not None and abs(moved.pearson) < 0.3
    assert moved.difference == moved.difference_key == 1.0
    assert moved.spans[0] / moved.spans[1] == pytest.approx(4, rel=0.2)
    assert likeness(a, c, ["other"] * 4).difference_key == 0
    assert 0 < (shuffled(a.mean(0), a.mean(0)) or 0) < 0.3
    assert (split_half(rng.normal(size=(40, 6, 4))) or 0) < 0.5


def test_flat_maps_are_undefined_and_not_nan() -> None:
    flat = likeness(np.ones((20, 2, 2)), np.ones((20, 2, 2)), ["other", "subject"])
    assert flat.pearson is None and flat.low is None and flat.ceiling is None and flat.shuffled is None
    assert not math.isnan(flat.difference)
    with pytest.raises(InputError, match="columns"):
        likeness(np.ones((20, 2, 2)), np.ones((20, 2, 2)), ["other"])
