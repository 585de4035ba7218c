"""Prompts: the packaged corpus, loaders of public sets, splits, the overlap check, house taxonomies.

from demur import prompts

test = prompts.core("test")
parts = prompts.split(my_prompts, {"fit": 0.6, "calibrate": 0.2, "test": 0.2}, seed=0)
report = prompts.overlap(parts["fit"], test)
"""

from demur.prompts.corpus import CATEGORIES, PARTS, core
from demur.prompts.loaders import (
    LoadedSet,
    benign_alpaca,
    coconot,
    coconot_preferences,
    refusal_tokens_eval,
    temporal,
    xstest,
)
from demur.prompts.overlaps import OverlapPair, OverlapReport, normalise, overlap
from demur.prompts.splits import GENERAL, row_of, split, stratified
from demur.prompts.taxonomy import Taxonomy, in_house

__all__ = [
    "CATEGORIES",
    "GENERAL",
    "PARTS",
    "LoadedSet",
    "OverlapPair",
    "OverlapReport",
    "Taxonomy",
    "benign_alpaca",
    "coconot",
    "coconot_preferences",
    "core",
    "in_house",
    "normalise",
    "overlap",
    "refusal_tokens_eval",
    "row_of",
    "split",
    "stratified",
    "temporal",
    "xstest",
]
