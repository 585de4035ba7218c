"""Model organisms: small transformers trained from scratch on synthetic worlds whose truth is known."""

from __future__ import annotations

from demur.organisms.base import Organism, Recipe, UnfitOrganism, grow
from demur.organisms.words import vocabulary, word_tokenizer

__all__ = ["Organism", "Recipe", "UnfitOrganism", "grow", "vocabulary", "word_tokenizer"]
