"""The expert check on small organisms, end to end, and what it concludes where no expert carries refusal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from demur.organisms import experts
from demur.replicate import mote as check
from demur.replicate.spec import Context
from demur.replicate.summary import conclude

SMALL = dataclasses.replace(experts.RECIPE, layers=2, width=48, mlp=48, steps=110, lr=4e-3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Context:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    monkeypatch.setattr(experts, "RECIPE", SMALL)
    monkeypatch.setattr(check, "MASKS", 20)
    monkeypatch.setattr(check, "RANKS", 4)
    return Context(seed=9, full=False, folder=tmp_path, progress=lambda *_: None)


def test_the_check_finds_the_expert_and_tells_it_from_topics(small: Context) -> None:
    out: dict[str, Any] = dict(check.run(small))
    assert set(check.SPEC.keys) | {c.key for c in check.SPEC.entry} == set(out)
    value = {k: v.value for k, v in out.items()}
    assert all(value[c.key] >= 0.9 for c in check.SPEC.entry), value
    assert value["planted_top"] == value["topic_says_none"] == value["topic_permuted"] == 1
    assert min(value["fall"], value["fall_report"], value["excess"], value["rise"]) > 0.3, value
    assert abs(value["fall_random"]) < 0.1 and abs(value["topic_fall"]) < 0.1
    assert out["rise_where"].n == 12, "open places, each asked about once"
    assert value["share"] < 0.5 < value["topic_follows"]
    document = conclude(check.SPEC, {0: out}, ())
    assert not document["unfit"]


def test_anchors() -> None:
    found = check.recount()
    assert all(a.holds(float(found[a.key])) for a in check.SPEC.anchors)
