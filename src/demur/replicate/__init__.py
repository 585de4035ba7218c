"""One check for each system: an effect was seen, its control was silent, the trivial rule was beaten or reported.

`replicate(slug)` runs a check; a new system is one file in this folder (see `spec.py`).
"""

from demur.replicate.harness import replicate
from demur.replicate.render import overview, page, report
from demur.replicate.spec import Anchor, Baseline, Claim, Context, Control, Spec, Value, find, slugs
from demur.replicate.store import read_results, stale

__all__ = [
    "Anchor",
    "Baseline",
    "Claim",
    "Context",
    "Control",
    "Spec",
    "Value",
    "find",
    "overview",
    "page",
    "read_results",
    "replicate",
    "report",
    "slugs",
    "stale",
]
