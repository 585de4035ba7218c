"""Judges give each reply one label on the refusal scale, and each has a measured error.

>>> from demur import judges
>>> judges.available()
['first_token/control-v1', 'rules/cyberseceval-v1', 'rules/demur-v1', 'rules/xstest-v1']
"""

from __future__ import annotations

from demur.errors import InputError
from demur.judges.agreement import (
    Agreement,
    LabelledReply,
    measure_agreement,
    measured_error,
    token_text_agreement,
)
from demur.judges.base import PREREAD, Judge, preread, verdict
from demur.judges.first_token import FirstToken
from demur.judges.rules import CyberSecEvalRule, DemurRule, XSTestRule

__all__ = [
    "PREREAD",
    "Agreement",
    "CyberSecEvalRule",
    "DemurRule",
    "FirstToken",
    "Judge",
    "LabelledReply",
    "XSTestRule",
    "available",
    "get",
    "measure_agreement",
    "measured_error",
    "preread",
    "token_text_agreement",
    "verdict",
]

_JUDGES: dict[str, Judge] = {j.id: j for j in (FirstToken(), CyberSecEvalRule(), DemurRule(), XSTestRule())}


def available() -> list[str]:
    """Ids of the judges that ship with demur, sorted."""
    return sorted(_JUDGES)


def get(id: str) -> Judge:
    """The judge with this id.

    Raises:
        InputError: unknown id; the message lists the known ones.
    """
    if id not in _JUDGES:
        raise InputError(f"judge {id!r} is not known; use one of {', '.join(available())}")
    return _JUDGES[id]
