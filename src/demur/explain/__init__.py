"""What a model's states hold: probes and directions, always beside the controls that could explain them away."""

from demur.explain.artefact import Direction
from demur.explain.positions import TokenAt, collect, grid, show_positions, token_index
from demur.explain.probe import Cut, Probe, fit_probe
from demur.explain.sweep import Baseline, Sweep, split_rows, sweep
from demur.explain.sweep_report import sweep_report

__all__ = [
    "Baseline",
    "Cut",
    "Direction",
    "Probe",
    "Sweep",
    "TokenAt",
    "collect",
    "fit_probe",
    "grid",
    "show_positions",
    "split_rows",
    "sweep",
    "sweep_report",
    "token_index",
]
