"""Latent Guard: thresholds with a promise, what is stopped and what passes on, files, the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from demur.control import LatentGuard
from demur.control.inversion import ask as ask_harm
from demur.control.latent_guard_report import _Tested, contrast, examine, fit_beliefs, inversion_table
from demur.errors import InputError, MismatchError, UnsupportedClaim
from demur.explain.harmfulness import Belief, Beliefs
from demur.judges.base import preread
from demur.organisms.beliefs import RECIPE, grow_beliefs
from demur.stats import auroc_interval, upper_bound
from demur.types import Condition, Label, Message, Prompt, PromptSet, expand_expected
from tests.explain.planted import Planted, ask, cells


@pytest.fixture(scope="module")
def guard():
    beliefs = Beliefs.fit(Planted(), cells(20, 0), range(4), select=cells(20, 1000))
    return LatentGuard(beliefs)


def test_the_threshold_keeps_its_promise_and_stops_what_it_can():
    scores = np.r_[np.linspace(0.5, 1.5, 50), np.linspace(-1, 0.99, 200)]
    harmful = np.arange(250) < 50
    guard = LatentGuard(Beliefs.fit(Planted(), cells(20, 0), range(4)))
    fine = guard.calibrated(scores, harmful, fpr=0.05, delta=0.1, on="core/calibrate")
    k = int((scores[~harmful] >= fine.at).sum())
    most = max(j for j in range(200) if upper_bound(j, 200, 0.1) <= 0.05)
    assert fine.cut.k == k <= most and fine.cut.n == 200 and fine.cut.upper <= 0.05
    assert (scores[harmful] >= fine.at).sum() == max(
        (scores[harmful] >= t).sum() for t in scores if (scores[~harmful] >= t).sum() <= most
    )
    assert "drawn like core/calibrate" in fine.guarantee and "at most 0.05" in fine.guarantee
    with pytest.raises(UnsupportedClaim, match="at least 45"):
        guard.calibrated(scores[:80], harmful[:80])
    with pytest.raises(InputError, match="all 50"):
        guard.calibrated(scores[:50], harmful[:50])


def test_flagged_prompts_are_blocked_and_never_asked(guard):
    runtime = Planted()
    rows = [*ask(3, 4000, True, False), *ask(3, 4100, False, True)]
    rows = [rows[i] for i in (0, 3, 1, 4, 2, 5)]
    done = []
    with guard.on(runtime) as guarded:
        said = list(
            guarded.generate(
                rows, Condition(name="c"), samples=2, progress=lambda n, total: done.append((n, total))
            )
        )
    assert [(r.prompt_id, r.sample) for r in said] == [(p.id, i) for p in rows for i in (0, 1)]
    assert runtime.asked == [p.id for p in rows if not p.meta["harm"]]
    for prompt, reply in zip([p for p in rows for _ in (0, 1)], said, strict=True):
        verdict = preread(reply)
        if prompt.meta["harm"]:
            assert (reply.finish_reason, reply.content, reply.condition) == ("content_filter", "", "c")
            assert reply.finish_reason_raw.startswith("latent-guard: harmful ")
            assert verdict is not None and verdict.label == Label.BLOCKED
        else:
            assert "sorry" in reply.content
    assert done == [(i, 6) for i in range(1, 7)]


def test_what_cannot_be_read_is_not_answered_and_what_cannot_be_asked_says_why(guard):
    runtime = Planted()
    tool = replace(ask(1, 4200, False, False)[0], messages=(Message(role="assistant", content="x"),))
    long = replace(ask(1, 4300, False, False)[0], messages=(Message(role="user", content="long"),))
    fine = ask(1, 4400, False, False)[0]
    with guard.on(runtime) as guarded:
        said = {r.prompt_id: r for r in guarded.generate([tool, long, fine])}
    assert said[tool.id].error.startswith("latent guard: ") and said[tool.id].finish_reason == "error"
    assert said[long.id].error == "too long"
    assert said[fine.id].content and tool.id not in runtime.asked


def test_the_guard_reads_harm_and_the_layers_of_its_window_alone(guard):
    assert guard.beliefs.refuse is None and guard.beliefs.layers == guard.beliefs.harmful.window
    assert (
        guard.flags(Planted(), [*ask(5, 4500, True, False), *ask(5, 4600, False, True)]).tolist()
        == [True] * 5 + [False] * 5
    )


def test_saved_guards_come_back_for_their_model_only(guard, tmp_path):
    file = tmp_path / "g.safetensors"
    rng = np.random.default_rng(0)
    fine = guard.calibrated(rng.normal(size=200) + (np.arange(200) < 60), np.arange(200) < 60)
    fine.save(file)
    back = LatentGuard.load(file, fingerprint="planted-1")
    assert (back.at, back.cut, back.guarantee, back.id) == (fine.at, fine.cut, fine.guarantee, fine.id)
    assert back.id != guard.id
    with pytest.raises(MismatchError):
        LatentGuard.load(file, fingerprint="other")
    with pytest.raises(InputError, match="no set of beliefs"):
        Beliefs.load(file, fingerprint="planted-1")
    other = Planted()
    other.fingerprint = "other"
    with pytest.raises(MismatchError), back.on(other):
        pass


# --- the report -------------------------------------------------------------------------------------------------


def labelled(n, start, refuse=None):
    """n harmful and n harmless prompts of category safety, every fifth doing the contrary of its label."""
    rows = []
    for harm in (True, False):
        for p in ask(n, start + n * harm, harm, harm):
            does = harm if refuse is None else refuse
            contrary = int(p.id.split("-")[1]) % 5 == 0
            rows.append(
                replace(
                    p,
                    expected=expand_expected("refuse" if harm else "comply"),
                    meta={"harm": harm, "refuse": does ^ (contrary and refuse is None)},
                )
            )
    return PromptSet(f"set-{start}", tuple(rows))


class Layered(Planted):
    """With a model, so that its layers can be counted."""

    @property
    def model(self):
        from tests.runtime.tiny import tiny_runtime

        return tiny_runtime().model


def test_examine_fits_on_one_set_and_tests_on_another():
    runtime = Layered()
    fit, select, calibrate, test = (labelled(n, s) for n, s in ((60, 0), (30, 500), (100, 1000), (50, 2000)))
    beliefs, notes = fit_beliefs(runtime, fit, select, calibrate, n=60, asked=60)
    assert not notes and beliefs.unclear is None and beliefs.harmful.n == (60, 60)
    assert beliefs.harmful.select_auroc == 1.0 and beliefs.refuse.select_auroc > 0.9  # windows were chosen
    found = examine(runtime, beliefs, calibrate, [test], words=fit)
    row = found.report.tables[0].rows[0]
    name, harmful, benign, area, low, _high, refuse, bag, gain, gain_low, _, length, over_length, *_ = row
    assert (name, harmful, benign, area) == ("set-2000", 50, 50, 1.0) and low > 0.9
    assert 0.6 < refuse < 0.95  # a fifth of the prompts go the other way
    assert (
        abs(bag - 0.5) < 0.2 and gain == pytest.approx(area - bag) and gain_low > 0
    )  # texts are numbers only
    assert over_length == pytest.approx(area - length)
    assert found.report.tables[1].rows[0][1].k == 50 and found.report.tables[1].rows[0][2].k <= 5
    counts = dict(zip(found.report.tables[2].columns[1:], found.report.tables[2].rows[0][1:], strict=True))
    assert counts["believed harmless, will refuse"] == counts["believed harmful, will answer"] == 10
    assert len(found.rows) == 100 and sum(row["stopped"] for row in found.rows) >= 50
    never = replace(
        beliefs, harmful=replace(beliefs.harmful, cut=9.0)
    )  # the cut is not the guard's threshold
    again = examine(runtime, never, calibrate, [test])
    assert again.report.tables[1] == found.report.tables[1]
    assert again.report.tables[2].rows[0][1] == again.report.tables[2].rows[0][2] == 0


def test_prompts_of_one_source_are_drawn_together():
    rows = [replace(p, group=f"g-{i // 5}") for i, p in enumerate(labelled(50, 2000))]
    scores = np.random.default_rng(0).normal(size=20).repeat(5) + (np.arange(100) < 50)
    found = [Belief(id=p.id, harmful=x, refuse=None) for p, x in zip(rows, scores, strict=True)]
    together = _Tested(PromptSet("t", tuple(rows)), contrast(PromptSet("t", tuple(rows))), set())
    single = _Tested(labelled(50, 2000), contrast(labelled(50, 2000)), set())
    groups = [p.group for p in rows]
    wide, narrow = (
        auroc_interval(scores, np.arange(100) < 50, clusters=c, n_boot=1000) for c in (groups, None)
    )
    assert together.ranking(found, None)[4:6] == wide != narrow == single.ranking(found, None)[4:6]


def test_reply_inversion_is_a_change_against_no_push():
    world, organism = grow_beliefs(replace(RECIPE, steps=2, batch=8, context=32), cache=False)
    runtime = organism.runtime()
    sides = {
        name: world.prompts(20, k, part="train", harmful=not k)
        for k, name in enumerate(("harmful", "harmless"))
    }
    beliefs = Beliefs.fit(runtime, sides)
    asked = list(world.prompts(4, 5, part="test", harmful=False))
    table = inversion_table(runtime, beliefs, asked, coefficient=3.0, layers=[1, 2])
    for layer, change, low, high, *refuse in table.rows:
        now = ask_harm(runtime, asked, beliefs.direction("harmful", layer), coefficient=3.0)
        gain = np.mean([a.harmful for a in now]) - np.mean([a.harmful for a in ask_harm(runtime, asked)])
        assert change == pytest.approx(gain) and low <= change <= high and refuse == [None] * 3


def test_a_model_that_never_refuses_leaves_harmfulness_alone():
    runtime = Layered()
    parts = [labelled(n, s, refuse=False) for n, s in ((40, 0), (30, 500), (100, 1000), (30, 2000))]
    beliefs, notes = fit_beliefs(runtime, *parts[:3], n=40, asked=30)
    assert beliefs.refuse is None and "0 were refused" in notes[0]
    found = examine(runtime, beliefs, parts[2], [parts[3]])
    row = found.report.tables[0].rows[0]
    assert row[3] == 1.0 and row[6] is None and row[7] is None
    assert found.report.tables[2].rows[0][-1] == 60  # all not identifiable


def test_sets_that_cannot_be_tested_on():
    runtime = Layered()
    fit, calibrate = labelled(40, 0), labelled(100, 1000)
    beliefs = Beliefs.fit(runtime, contrast(fit))
    with pytest.raises(InputError, match="set the threshold too"):
        examine(runtime, beliefs, calibrate, [calibrate])
    plain = PromptSet("plain", tuple(Prompt.of(f"x {i}", id=f"p-{i}") for i in range(5)))
    with pytest.raises(InputError, match="category and expected"):
        examine(runtime, beliefs, calibrate, [plain])


def test_contrast_takes_safety_prompts_spread_over_the_set():
    other = tuple(replace(p, category="humanizing", expected=frozenset()) for p in labelled(50, 300))
    other += tuple(replace(p, category="humanizing") for p in labelled(5, 600))
    some = contrast(PromptSet("mixed", (*other, *labelled(50, 0))), 10)
    assert {k: len(v) for k, v in some.items()} == {"harmful": 10, "harmless": 10}
    assert [p.id for p in some["harmful"]] == [f"p-{50 + 5 * i}" for i in range(10)]
