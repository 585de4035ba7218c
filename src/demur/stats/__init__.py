"""Statistics shared by all rooms: intervals, agreement, curves, calibration, judge-error correction, pairs.

Thin layers over numpy and scipy.special; nothing here knows of models or prompts. Undefined values are
None (or NaN inside arrays), never zero.
"""

from __future__ import annotations

from demur.stats.agreement import cohen_kappa, sensitivity_specificity
from demur.stats.calibration import Reliability, ece, reliability
from demur.stats.correction import WeakJudgeWarning, rogan_gladen
from demur.stats.curves import TAUS, Curve, auroc, auroc_interval, curve
from demur.stats.intervals import bootstrap_interval, proportion_interval, rate, share_interval, upper_bound
from demur.stats.paired import PairedTest, mcnemar, minimum_detectable_difference, paired_interval

__all__ = [
    "TAUS",
    "Curve",
    "PairedTest",
    "Reliability",
    "WeakJudgeWarning",
    "auroc",
    "auroc_interval",
    "bootstrap_interval",
    "cohen_kappa",
    "curve",
    "ece",
    "mcnemar",
    "minimum_detectable_difference",
    "paired_interval",
    "proportion_interval",
    "rate",
    "reliability",
    "rogan_gladen",
    "sensitivity_specificity",
    "share_interval",
    "upper_bound",
]
