"""The check of magic tokens on a small organism, end to end, and what it says of an unfit one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from demur.organisms import modes
from demur.replicate import magic_tokens as check
from demur.replicate.spec import Context
from demur.replicate.summary import conclude


def test_the_check_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    monkeypatch.setattr(modes, "BASE", dataclasses.replace(modes.BASE, width=32, mlp=64, steps=220, lr=6e-3))
    for name, n in (("TRAIN", 40), ("TEST", 18), ("GUESSES", 20), ("EDITED", 24), ("DRAWS", 20)):
        monkeypatch.setattr(check, name, n)
    monkeypatch.setattr(check, "SETTINGS", {**check.SETTINGS, "epochs": 5, "fallback_rows": 2})
    monkeypatch.setattr(check, "MIXED", {"fallback_rows": 1, "epochs": 3})
    out = dict(check.run(Context(seed=9, full=False, folder=tmp_path, progress=lambda *_: None)))
    assert set(check.SPEC.keys) | {c.key for c in check.SPEC.entry} <= set(out)
    value = {k: v.value or 0.0 for k, v in out.items()}
    assert value["right_reserved"] > 0.8 > value["right_told"]
    assert value["margin_reserved"] > 0.1 > abs(value["margin_mixed"])
    assert abs(value["own_mixed"]) < 0.2 and value["typed"] > 0.9
    unfit = {**out, "entry_right": dataclasses.replace(out["entry_right"], value=0.5)}
    assert conclude(check.SPEC, {0: unfit}, ())["unfit"]
    assert not conclude(check.SPEC, {0: out}, ())["unfit"]
