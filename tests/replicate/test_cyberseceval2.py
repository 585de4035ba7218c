"""The check of cyberseceval2: its world has the effects and the silence it needs, and the files recount."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from demur import data
from demur.errors import DataUnavailable
from demur.measure.cyberseceval2.frr import HEAD, MAY
from demur.replicate import cyberseceval2 as cse
from demur.replicate.spec import Anchor, Context, find


def test_the_spec_is_found_and_complete() -> None:
    found = find("cyberseceval2")
    assert found.spec is cse.SPEC
    assert {"judges/rules.py", "measure/cyberseceval2/frr.py"} <= set(found.sources)
    assert set(cse.recount()) == {a.key for a in cse.SPEC.anchors}


def test_the_world_has_the_benchmark_s_shape() -> None:
    sizes = Counter(p.group for p in cse.prompts())
    assert len(sizes) == 135 and sum(sizes.values()) == 750 and sizes["0"] == 132
    assert len(cse.PREAMBLE) > 220


def test_late_refusals_and_code_are_what_the_matchers_miss() -> None:
    rng = np.random.default_rng(0)
    refused = np.arange(750) % 4 == 0
    plain = cse.measured(rng, refused, lambda text, _: text)
    late = cse.measured(rng, refused, lambda text, _: cse.PREAMBLE + text)
    hidden = cse.measured(rng, refused, lambda text, no: text + cse.CODE if no else text)
    share = float(refused.mean())
    assert cse.frr(plain) == cse.frr(plain, MAY) == pytest.approx(share)
    assert cse.frr(late) == 0 and cse.frr(late, MAY) == pytest.approx(share)
    assert cse.frr(hidden) == 0
    lossy = cse.measured(rng, refused, lambda text, _: text, failed=0.5)
    assert abs(cse.frr(lossy, HEAD) - share) < 0.08
    assert cse.published_frr(lossy) < 0.7 * share


def test_coverage() -> None:
    held = cse.coverage(np.random.default_rng(0), 150)
    assert np.mean(held["alone"]) > 0.9 and np.mean(held["tasks"]) > 0.88
    assert np.mean(held["wilson"]) < 0.6


def test_judges_that_hedge() -> None:
    rng = np.random.default_rng(0)
    yes, grade = cse.hedging(rng, 400), cse.grading(rng, 400)
    assert (yes["substring_yes"].value or 0) > 0.05 > abs(yes["strict_yes"].value or 1)
    assert (grade["unparsed_as_benign"].value or 0) > 0.06 > abs(grade["unparsed_apart"].value or 1)


def test_a_seed_gives_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cse, "coverage", lambda rng: {"alone": [1.0], "tasks": [1.0], "wilson": [0.0]})
    got = cse.run(Context(seed=0, full=False, folder=tmp_path, progress=lambda *_: None))
    assert set(got) >= set(cse.SPEC.keys)
    assert got["echo_leaks"].value == 1 and got["ok_leaks"].value == 0


@pytest.mark.parametrize("line", cse.LINES, ids=lambda x: x[0].key)
def test_the_public_files_give_the_numbers(line: tuple[Anchor, Callable[[], float]]) -> None:
    anchor, value = line
    for need in anchor.needs:
        try:
            data.get(*need.split("/"))
        except DataUnavailable as e:
            pytest.skip(f"{need} is not here: {e}")
    assert value() == pytest.approx(anchor.expected, abs=1e-12)
