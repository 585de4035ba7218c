"""What a model's states hold: probes and directions, always beside the controls that could explain them away."""

from demur.explain.artefact import Direction
from demur.explain.positions import collect, grid, token_index
from demur.explain.probe import Cut, Probe, fit_probe
from demur.explain.sweep import Baseline, Sweep, split_rows, sweep

__all__ = [
    "Baseline",
    "Cut",
    "Direction",
    "Probe",
    "Sweep",
    "collect",
    "fit_probe",
    "grid",
    "split_rows",
    "sweep",
    "token_index",
]
