"""Which operating point a request falls under, and what it decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demur.errors import InputError
from demur.files import dump_operating_point
from demur.serve.base import Ask
from demur.serve.dial import Dial, Forbidden, share_of
from demur.serve.pointfile import PointFile
from demur.serve.settings import Canary, Settings
from demur.types import Condition, OperatingPoint, Prompt, Score, Threshold

NAMES = ("safety", "humanizing", "respond")
MAIN = OperatingPoint(id="main", thresholds={"safety": Threshold(tau=0.5), "humanizing": Threshold(tau=0.5)})
TRIAL = replace(MAIN, id="trial", thresholds={"safety": Threshold(tau=0.2)})


def ask(id: str = "r") -> Ask:
    return Ask(prompt=Prompt.of("x", id=id), condition=Condition())


def score(safety: float, humanizing: float, respond: float, T: float = 1.0) -> Score:
    p = dict(zip(NAMES, (safety, humanizing, respond), strict=True))
    return Score(id="r", p_refuse=safety + humanizing, probabilities=p, T=T)


def file(folder: Path, point: OperatingPoint) -> PointFile:
    path = folder / f"{point.id}.yaml"
    dump_operating_point(point, path)
    return PointFile(path, NAMES)


def dial(folder: Path, point: OperatingPoint = MAIN, **settings: object) -> Dial:
    settings = {"operating_point": folder / f"{point.id}.yaml", **settings}
    return Dial(Settings(**settings), file(folder, point), opened=lambda p: PointFile(p, NAMES))  # type: ignore[arg-type]


def test_thresholds_decide(tmp_path: Path) -> None:
    d = dial(tmp_path)
    for p, category in (
        ((0.6, 0.1, 0.3), "safety"),
        ((0.1, 0.5, 0.4), "humanizing"),
        ((0.4, 0.3, 0.2), "respond"),
    ):
        found = d.decide(ask(), score(*p))
        assert (found.category, found.enforced, found.point, found.canary) == (category, True, "main", False)
        assert found.shadow is None and found.problem is None


def test_shadow_thresholds_are_told_and_not_enforced(tmp_path: Path) -> None:
    thresholds = {"safety": Threshold(tau=0.5, mode="shadow"), "humanizing": Threshold(tau=0.5)}
    d = dial(tmp_path, replace(MAIN, thresholds=thresholds))
    found = d.decide(ask(), score(0.9, 0.0, 0.1))
    assert (found.category, found.enforced, found.shadow) == (None, False, "safety")
    found = d.decide(ask(), score(0.0, 0.9, 0.1))
    assert (found.category, found.enforced, found.shadow) == ("humanizing", True, "humanizing")
    # a reload replaces the shadow rule, too
    d.main.save(
        replace(d.main.point, thresholds={**thresholds, "safety": Threshold(tau=0.95, mode="shadow")})
    )  # type: ignore[union-attr]
    assert d.decide(ask(), score(0.9, 0.0, 0.1)).shadow == "respond"


def test_a_category_without_a_threshold_is_left_to_the_model(tmp_path: Path) -> None:
    found = dial(tmp_path, TRIAL).decide(ask(), score(0.1, 0.8, 0.1))
    assert (found.category, found.enforced) == (None, False)


def test_the_canary_takes_its_share_and_keeps_its_requests(tmp_path: Path) -> None:
    settings = Settings(
        operating_point=tmp_path / "main.yaml",
        canary=Canary(operating_point=tmp_path / "trial.yaml", share=0.2),
    )
    d = Dial(settings, file(tmp_path, MAIN), file(tmp_path, TRIAL))
    picks = [d.pick(f"request-{i}").canary for i in range(2000)]
    assert 0.17 < np.mean(picks) < 0.23  # 3 standard errors are 0.027
    assert picks == [d.pick(f"request-{i}").canary for i in range(2000)]
    on_trial = f"request-{picks.index(True)}"
    found = d.decide(ask(on_trial), score(0.3, 0.0, 0.7))
    assert (found.category, found.point, found.canary) == ("safety", "trial", True)
    assert d.decide(ask(f"request-{picks.index(False)}"), score(0.3, 0.0, 0.7)).category == "respond"


def test_shares_are_spread_evenly() -> None:
    found = np.sort([share_of(str(i)) for i in range(5000)])
    assert np.abs(found - np.arange(5000) / 5000).max() < 0.03  # Kolmogorov: 1.95 / sqrt(5000) at 0.1 %


def test_overrides_only_where_the_operator_says_so(tmp_path: Path) -> None:
    dump_operating_point(TRIAL, tmp_path / "trial.yaml")
    with pytest.raises(Forbidden, match="overrides"):
        dial(tmp_path).pick("r", "trial")
    d = dial(tmp_path, overrides=("trial", "away"))
    assert d.decide(ask(), score(0.3, 0.0, 0.7), "trial").category == "safety"
    assert d.decide(ask(), score(0.3, 0.0, 0.7)).category == "respond"
    with pytest.raises(InputError, match="no operating point 'away'"):
        d.pick("r", "away")
    with pytest.raises(Forbidden):
        d.pick("r", "main")


@pytest.mark.parametrize("id", ["../trial", "/etc/passwd", "a/b", ".hidden", "a\x00b", "", "trial.yaml/.."])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, id: str) -> None:
    (tmp_path / "inner").mkdir()
    dump_operating_point(TRIAL, tmp_path / "trial.yaml")
    d = dial(tmp_path / "inner", overrides=("*",))
    with pytest.raises(InputError):
        d.pick("r", id)


def test_a_named_point_is_read_again_when_it_changes(tmp_path: Path) -> None:
    dump_operating_point(TRIAL, tmp_path / "trial.yaml")
    d = dial(tmp_path, overrides=("*",))
    assert d.decide(ask(), score(0.3, 0.0, 0.7), "trial").category == "safety"
    dump_operating_point(replace(TRIAL, thresholds={"safety": Threshold(tau=0.9)}), tmp_path / "trial.yaml")
    assert d.refresh()
    assert d.decide(ask(), score(0.3, 0.0, 0.7), "trial").category == "respond"


def test_what_was_picked_decides_even_if_the_file_changes_meanwhile(tmp_path: Path) -> None:
    d = dial(tmp_path)
    pick = d.pick("r")
    assert d.main is not None
    d.main.save(replace(MAIN, T=2.0, id="warmer"))
    assert pick.T == 1.0 and d.pick("r").T == 2.0
    found = d.decide(ask(), score(0.6, 0.1, 0.3), pick=pick)
    assert (found.category, found.point) == ("safety", "main")


def test_scores_that_cannot_be_decided_are_a_problem(tmp_path: Path) -> None:
    d = dial(tmp_path)
    for bad in (score(0.6, 0.1, 0.3, T=2.0), Score(id="r", p_refuse=0.3, kind="first_token")):
        found = d.decide(ask(), bad)
        assert found.problem and found.score is None and not found.enforced


def test_without_an_operating_point_the_model_decides() -> None:
    found = Dial(Settings(), None).decide(ask(), score(0.9, 0.0, 0.1))
    assert (found.category, found.enforced, found.point) == (None, False, None)
    assert found.score is not None and found.problem is None
