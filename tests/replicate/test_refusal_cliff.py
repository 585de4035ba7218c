"""The cliff check on a small organism, end to end, and what it concludes when there is no cliff."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from demur.organisms import cliff
from demur.replicate import refusal_cliff as check
from demur.replicate.spec import Context
from demur.replicate.summary import conclude

SMALL = dataclasses.replace(cliff.PLAIN, layers=2, width=32, heads=4, mlp=64, steps=250, lr=5e-3)


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    monkeypatch.setenv("DEMUR_CACHE", str(folder))
    monkeypatch.setattr(cliff, "PLAIN", SMALL)
    for name, n in (("FIT", 100), ("TEST", 40), ("POOL", 100), ("DRAWS", 2), ("SHUFFLES", 30), ("PICKS", 1)):
        monkeypatch.setattr(check, name, n)
    return dict(check.run(Context(seed=9, full=False, folder=folder, progress=lambda *_: None)))


def test_the_check_finds_the_cliff_and_its_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = measured(monkeypatch, tmp_path)
    assert set(check.SPEC.keys) | {c.key for c in check.SPEC.entry} == set(out)
    value = {k: v.value for k, v in out.items()}
    assert value["drop_marked"] > 0.3 > abs(value["drop_no_marker"])
    assert value["planted_first"] == value["planted_causal"] == 1
    assert value["restored"] > 0.5 and value["benign_up"] <= 0.05
    assert value["restored_kept"] > 0.5 and -0.1 < value["cut_harmful"] < 1
    assert abs(value["random_heads"]) < 0.2 and abs(value["drop_shuffled"]) < 0.2
    document = conclude(check.SPEC, {0: out}, ())
    assert not document["unfit"]
    # an organism without the planted head is no organism of this check
    monkeypatch.setattr(cliff, "grow_marked", lambda recipe, **_: cliff.grow_plain(recipe))
    monkeypatch.setattr(check, "_heads", lambda *_: {})
    monkeypatch.setattr(check, "_mend", lambda *_: {})
    plain = check.run(Context(seed=9, full=False, folder=tmp_path, progress=lambda *_: None))
    assert conclude(check.SPEC, {0: plain}, ())["unfit"]
