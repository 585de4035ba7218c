"""Statistics shared by all rooms: intervals, agreement, curves, calibration, judge-error correction, pairs.

Thin layers over numpy and scipy.special; nothing here knows of models or prompts. Undefined values are
None (or NaN inside arrays), never zero.
"""

from __future__ import annotations

from demur.stats.agreement import cohen_kappa, sensitivity_specificity
from demur.stats.calibration import Reliability, ece, reliability
from demur.stats.controls import (
    Null,
    Silence,
    always,
    bag_of_words,
    keyword,
    length_rule,
    majority,
    never,
    random_direction,
    random_directions,
    random_labels,
    shuffled,
    silent,
    topic_only,
)
from demur.stats.correction import (
    CellEstimates,
    Estimate,
    WeakJudgeWarning,
    corrected_change,
    from_cells,
    labels_needed,
    prediction_powered,
    rogan_gladen,
)
from demur.stats.curves import TAUS, Curve, auroc, auroc_interval, curve
from demur.stats.intervals import bootstrap_interval, proportion_interval, rate, share_interval, upper_bound
from demur.stats.paired import PairedTest, mcnemar, minimum_detectable_difference, paired_interval

__all__ = [
    "TAUS",
    "CellEstimates",
    "Curve",
    "Estimate",
    "Null",
    "PairedTest",
    "Reliability",
    "Silence",
    "WeakJudgeWarning",
    "always",
    "auroc",
    "auroc_interval",
    "bag_of_words",
    "bootstrap_interval",
    "cohen_kappa",
    "corrected_change",
    "curve",
    "ece",
    "from_cells",
    "keyword",
    "labels_needed",
    "length_rule",
    "majority",
    "mcnemar",
    "minimum_detectable_difference",
    "never",
    "paired_interval",
    "prediction_powered",
    "proportion_interval",
    "random_direction",
    "random_directions",
    "random_labels",
    "rate",
    "reliability",
    "rogan_gladen",
    "sensitivity_specificity",
    "share_interval",
    "shuffled",
    "silent",
    "topic_only",
    "upper_bound",
]
