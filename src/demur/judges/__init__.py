"""Judges give each reply one label, and each has a measured error.

Judges of the refusal scale give a `types.Label`; judges of harm give "harmful" or "not_harmful". An id names a
rule and its version for good.

>>> from demur import judges
>>> "rules/demur-v1" in judges.available(), "rubric/xstest-3way-v1" in judges.asking()
(True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from demur.errors import InputError
from demur.judges import classifier, human, rubric, rules, template
from demur.judges.agreement import (
    Agreement,
    material_warning,
    measure_agreement,
    measured_error,
    token_text_agreement,
)
from demur.judges.base import (
    FAKE_COMPLIANCE,
    HARMFUL,
    NOT_HARMFUL,
    PREREAD,
    Asked,
    Judge,
    Pair,
    attack_success,
    judge_all,
    positive,
    preread,
    verdict,
)
from demur.judges.classifier import Classifier
from demur.judges.compare import compare
from demur.judges.first_token import FirstToken
from demur.judges.labelled_sets import LabelledReply
from demur.judges.rules import CyberSecEvalRule, DemurRule, XSTestRule

__all__ = [
    "FAKE_COMPLIANCE",
    "HARMFUL",
    "NOT_HARMFUL",
    "PREREAD",
    "Agreement",
    "Asked",
    "Classifier",
    "CyberSecEvalRule",
    "DemurRule",
    "FirstToken",
    "Judge",
    "LabelledReply",
    "Pair",
    "XSTestRule",
    "asking",
    "asks",
    "attack_success",
    "available",
    "compare",
    "get",
    "judge_all",
    "material_warning",
    "measure_agreement",
    "measured_error",
    "positive",
    "preread",
    "token_text_agreement",
    "verdict",
]

_READY: dict[str, Judge] = {"first_token/control-v1": FirstToken(), **rules.RULES}
_LOADED: dict[str, Callable[[], Judge]] = {
    "classifier/demur-v1": Classifier,
    "classifier/demur-v2": classifier.second,
}
"""Judges that read files: made when asked for."""


def available() -> list[str]:
    """Ids of the judges that ship with demur and need neither a model nor a file, sorted."""
    return sorted([*_READY, *_LOADED])


def asking() -> list[str]:
    """Ids of the judges that ask a model, sorted: `get` needs a runtime for them."""
    return sorted([*rubric.ids(), *template.ids()])


def asks(id: str) -> bool:
    """Whether the judge with this id asks a model, so that `get` needs a runtime.

    Raises:
        InputError: unknown id; the message lists the known ones.
    """
    if id in asking():
        return True
    if id in available() or id.startswith(human.PREFIX):
        return False
    raise InputError(
        f"judge {id!r} is not known; use one of {', '.join(available())}, human:FILE, or with a model to ask "
        f"{', '.join(asking())}"
    )


def get(id: str, *, runtime: Asked | None = None, orders: int = 1) -> Judge:
    """The judge with this id.

    Args:
        id: of `available()` or `asking()`, or `human:FILE`.
        runtime: the model that a judge of `asking()` asks; others leave it alone.
        orders: 2 lets a rubric show its choices in both orders (`rubric.Rubric`).

    Raises:
        InputError: unknown id (the message lists the known ones), or no runtime for a judge that needs one.

    >>> get("rules/xstest-v1").id
    'rules/xstest-v1'
    """
    if id.startswith(human.PREFIX):
        return human.Human(id.removeprefix(human.PREFIX))
    if not asks(id):
        return _READY[id] if id in _READY else _made(id)
    if runtime is None:
        raise InputError(
            f"judge {id!r} asks a model and none was given; name one (--judge-model MODEL, or runtime=...), or use "
            f"one of {', '.join(available())}"
        )
    return template.Guard(id, runtime) if id in template.ids() else rubric.Rubric(id, runtime, orders=orders)


@cache
def _made(id: str) -> Judge:
    return _LOADED[id]()
