"""The same checks over every method card, and how cards are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import demur
from demur import methods
from demur.errors import InputError
from demur.types import Card

PACKAGE = Path(demur.__file__).parent
CARDS = methods.cards()


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.slug)
def test_card_is_complete(card: Card) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.slug)
    assert card.room in methods.ROOMS
    assert card.title and card.paper and card.url.startswith("https://")
    if card.tier == "planned":
        assert not card.files
        return
    assert card.files, "a built method names its files"
    for file in card.files:
        assert (PACKAGE / file).exists(), f"{file} is not in the package (paths start below src/demur)"
    assert any(f.startswith(card.room + "/") for f in card.files)


def test_all_systems_are_listed_once_and_sorted() -> None:
    slugs = [c.slug for c in CARDS]
    assert len(slugs) >= 31
    assert slugs == sorted(set(slugs))


def test_get() -> None:
    assert methods.get("refusal-tokens").url == "https://arxiv.org/abs/2412.06748"
    with pytest.raises(InputError, match=r"refusal-cliff.*refusal-tokens"):
        methods.get("refusal-")


def test_card_is_read_without_importing(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        'import no_such_module\n\nCARD: Card = Card(slug="m", title="M", room="train", tier="lab", paper="p",'
        ' url="https://x", files=("train/m.py",))\n'
    )
    card = methods.read_card(file)
    assert card is not None and card.files == ("train/m.py",)


@pytest.mark.parametrize(
    "body", ["CARD = make()", "CARD = Card(slug=slug())", 'CARD = Card(slug="m")', 'CARD = Card(nothing="x")']
)
def test_a_card_that_needs_running_is_an_error(tmp_path: Path, body: str) -> None:
    file = tmp_path / "m.py"
    file.write_text(f"\n{body}\n")
    with pytest.raises(InputError, match="CARD"):
        methods.read_card(file)


def test_files_without_a_card(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("x = 1\n\nCARDS = ()\n")
    assert methods.read_card(file) is None
