"""Calibrate: scores with labels become an `OperatingPoint`, with a guarantee where one is asked for.

    point = LearnThenTest(alpha=0.05, delta=0.1).fit(scores, expected, category, names=runtime.control.names)

`decide` is the one implementation of the decision rules; `calibrate_table` works on any scores.
"""

from __future__ import annotations

from demur.calibrate.base import CalibrationWarning, Calibrator
from demur.calibrate.best_f1 import BestF1
from demur.calibrate.check import check, describe
from demur.calibrate.decide import bias_to_tau, cuts, decide, is_steered, tau_to_bias
from demur.calibrate.learn_then_test import LearnThenTest, sample_size
from demur.calibrate.table import calibrate_table, check_table_rows, refuse_rows
from demur.calibrate.target_rate import TargetRate

__all__ = [
    "BestF1",
    "CalibrationWarning",
    "Calibrator",
    "LearnThenTest",
    "TargetRate",
    "bias_to_tau",
    "calibrate_table",
    "check",
    "check_table_rows",
    "cuts",
    "decide",
    "describe",
    "is_steered",
    "refuse_rows",
    "sample_size",
    "tau_to_bias",
]
