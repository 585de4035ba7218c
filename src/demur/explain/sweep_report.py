"""A sweep's result as a table in which the controls cannot be left out, from memory or from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demur.errors import InputError
from demur.types import Report, Table

ALWAYS = ("random_labels", "shuffled", "random_direction", "bag_of_words", "length", "topic_only")
"""Controls that stand beside every result, if only to say that they were not run."""
COLUMNS = ("on the test rows", "AUROC", "95 %", "gain of the probe", "95 % of the gain", "remark")


def sweep_report(saved: Mapping[str, Any], title: str = "Probe") -> Report:
    """A result in the form of `Sweep.to_dict`, also one read back from JSON, as a table beside its controls.

    Raises:
        InputError: a result without one of the controls.

    >>> from demur.report import to_text  # doctest: +SKIP
    >>> print(to_text(sweep_report(json.loads(text))))  # doctest: +SKIP
    """
    beside = saved.get("controls") or {}
    if lost := [name for name in ALWAYS if name not in beside]:
        raise InputError(
            f"this result of a sweep lacks the controls {', '.join(lost)}, and without them its AUROC says "
            "nothing. Save what `Sweep.to_dict` gives, or run the sweep again"
        )
    layer, position = saved["site"]
    chosen = f"probe: layer {layer}, {position}, {saved['kind']}"
    own = _three(saved["auroc"]), _range(saved["low"], saved["high"])
    rows: list[tuple[Any, ...]] = [(chosen, *own, None, None, "")]
    rows += [(name.replace("_", " "), *_control(found)) for name, found in beside.items()]
    note = (
        f"{saved['n_positive']} positive and {saved['n_negative']} negative test rows. The site was chosen at "
        f"AUROC {_three(saved['select_auroc'])} on the select rows, which is optimistic."
    )
    return Report(
        title=title, tables=(Table(title, COLUMNS, tuple(rows), note),), notes=tuple(saved["notes"])
    )


def _control(found: Mapping[str, Any] | None) -> tuple[str | None, str | None, str | None, str | None, str]:
    if found is None:
        return None, None, None, None, "not run: no texts or topics were given"
    if "draws" in found:
        remark = f"mean of {found['draws']} draws and their middle 95 %, p = {found['p_value']:.3g}"
        return _three(found["mean"]), _range(found["low"], found["high"]), None, None, remark
    return (
        _three(found["auroc"]),
        _range(found["low"], found["high"]),
        _three(found["gain"]),
        _range(found["gain_low"], found["gain_high"]),
        _remark(found["gain_low"]),
    )


def _remark(gain_low: float | None) -> str:
    if gain_low is None:
        return "too few rows for an interval of the gain"
    return "" if gain_low > 0 else "not beaten"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _range(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.3f} to {high:.3f}"
