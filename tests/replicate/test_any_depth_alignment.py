"""The any-depth check end to end on one organism, and what it concludes when refusal is not there to bring back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from demur import data
from demur.errors import DataUnavailable, InputError
from demur.organisms import depth
from demur.replicate import any_depth_alignment as check
from demur.replicate.harness import check_anchors
from demur.replicate.spec import Context
from demur.replicate.summary import conclude

SIZES = {
    "FIT": 80,
    "SELECT": 40,
    "TEST": 40,
    "CALIBRATE": 120,
    "SERVED": 40,
    "SHUFFLES": 4,
    "READ": (8, 48, 64),
}


@pytest.mark.slow
def test_the_check_finds_what_the_organism_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    for name, n in SIZES.items():
        if name != "READ":
            monkeypatch.setattr(check, name, n)
    monkeypatch.setattr(depth, "UNTAUGHT", dataclasses.replace(depth.UNTAUGHT, steps=60))
    context = Context(seed=9, full=False, folder=tmp_path, progress=lambda *_: None)
    out = dict(check.run(context))
    assert set(check.SPEC.keys) | {c.key for c in check.SPEC.entry} == set(out)
    value = {k: v.value or 0.0 for k, v in out.items()}
    assert value["refuse_0"] > 0.9 and value["refuse_8"] < 0.1
    assert min(value["lp_8"], value["lp_64"]) > 0.9 > value["token_auroc"]
    assert value["rk_64"] > 0.7 and value["rk_benign"] < 0.1 and value["rk_user"] == value["rk_untaught"] == 0
    assert value["same"] == 1 and value["fork"] < 1e-5
    assert value["stopped"] > 0.8 and value["false_stops"] < 0.2
    assert not conclude(check.SPEC, {0: out}, ())["unfit"]
    # an organism that was never taught to refuse is no organism of this check
    monkeypatch.setattr(depth, "TAUGHT", depth.UNTAUGHT)
    for part in ("_starts", "_probes", "_rethink", "_served"):
        monkeypatch.setattr(check, part, lambda *_: {})
    bare = check.run(context)
    assert conclude(check.SPEC, {0: bare}, ())["unfit"]


def test_the_published_means_are_counted_again() -> None:
    try:
        data.get(*check.FILE.split("/"))
    except (DataUnavailable, InputError) as e:
        pytest.skip(f"the published rates are not here: {e}")
    rows = check_anchors(check.SPEC)
    assert len(rows) == 7 and {r["status"] for r in rows} == {"exact"}, rows
