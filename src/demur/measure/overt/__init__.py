"""Over-refusal of image generators, beside how safely they treat harmful requests.

A backend draws (`DiffusersImages`, `EndpointImages`, `ScriptedImages`), `Overt` counts. Failed requests are sorted
out before any rate, every refusal has its stage, and twins are compared as pairs.
"""

from __future__ import annotations

from demur.measure.overt.backends import Backend, DiffusersImages, Kept, ScriptedImages
from demur.measure.overt.cases import load_cases, mini, own_pairs
from demur.measure.overt.drawing import Drawing, Fault, Picture, Stage, classify
from demur.measure.overt.endpoint import EndpointImages, VisionJudge
from demur.measure.overt.judging import ImageJudge, KeptJudge, LabelFile, majority, view
from demur.measure.overt.policies import Policy, flips, label, under, write_pairs
from demur.measure.overt.report import Overt
from demur.measure.overt.rewriting import Rewriting
from demur.measure.overt.scoring import macro, spearman, twins, youden
from demur.measure.overt.selection import Selection, select
from demur.types import Card

CARD = Card(
    slug="overt",
    title="Over-refusal of image generators",
    room="measure",
    tier="lab",
    paper="OVERT: A Benchmark for Over-Refusal Evaluation on Text-to-Image Models",
    url="https://arxiv.org/abs/2505.21347",
    files=(
        "measure/asking.py",
        "measure/overt/__init__.py",
        "measure/overt/backends.py",
        "measure/overt/cases.py",
        "measure/overt/drawing.py",
        "measure/overt/endpoint.py",
        "measure/overt/judging.py",
        "measure/overt/policies.py",
        "measure/overt/report.py",
        "measure/overt/rewriting.py",
        "measure/overt/scoring.py",
        "measure/overt/selection.py",
    ),
    needs=(),
    summary="Refused and safe image requests by category and stage, twins, policies, and what rewriting costs.",
    replicate="overt",
)

__all__ = [
    "CARD",
    "Backend",
    "DiffusersImages",
    "Drawing",
    "EndpointImages",
    "Fault",
    "ImageJudge",
    "Kept",
    "KeptJudge",
    "LabelFile",
    "Overt",
    "Picture",
    "Policy",
    "Rewriting",
    "ScriptedImages",
    "Selection",
    "Stage",
    "VisionJudge",
    "classify",
    "flips",
    "label",
    "load_cases",
    "macro",
    "majority",
    "mini",
    "own_pairs",
    "select",
    "spearman",
    "twins",
    "under",
    "view",
    "write_pairs",
    "youden",
]
