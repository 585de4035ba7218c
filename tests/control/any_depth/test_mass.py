"""The refuse mass behind the header is that of one full pass, under way and on finished answers alike."""

from __future__ import annotations

import numpy as np
import pytest

from demur.control.any_depth import Answer, AnyDepth, RefuseMass, header_of
from demur.control.any_depth.answers import encoded
from demur.errors import InputError
from demur.runtime import forward
from demur.runtime.lanes import Lanes
from demur.types import Condition, Prompt
from tests.runtime.tiny import tiny_runtime

ANSWERS = [Answer(prompt=Prompt.of(f"tell me about {x}"), text="red cat sum two boil", harmful=h) for x, h in
           (("egg", False), ("bomb bomb", True))]  # fmt: skip


def by_hand(depth: int) -> list[float]:
    runtime, out = tiny_runtime(control=True), []
    assert runtime.control is not None
    for answer in ANSWERS:
        head, said = encoded(runtime, answer)
        with runtime.edited():
            logits = forward.run(runtime.model, [[*head, *said[:depth], *header_of(runtime.chat).ids]])
        assert logits is not None
        p = logits.float().softmax(-1)[0]
        out.append(float(sum(p[runtime.control.ids[c]] for c in runtime.control.refuse)))
    return out


def test_finished_answers_and_rows_under_way_read_the_same() -> None:
    runtime = tiny_runtime(control=True)
    scores = RefuseMass().scores(runtime, ANSWERS, (0, 2, 9))
    assert scores[:, 0] == pytest.approx(by_hand(0), abs=1e-6)
    assert scores[:, 1] == pytest.approx(by_hand(2), abs=1e-6) and np.isnan(scores[:, 2]).all()
    lanes = Lanes(runtime)
    texts = [encoded(runtime, a) for a in ANSWERS]
    keys = lanes.join_all([([*head, *said[:2]], Condition(), True) for head, said in texts])
    assert RefuseMass().read(lanes, keys[::-1]) == pytest.approx(by_hand(2)[::-1], abs=1e-6)
    assert lanes.masses([], [3], [4]).shape == (0, 1)
    with pytest.raises(InputError, match="give both"):
        lanes.masses(keys, [], [4])


def test_the_threshold_decides_and_a_check_that_never_stops_changes_nothing() -> None:
    runtime, prompts = tiny_runtime(control=True), [a.prompt for a in ANSWERS]
    condition = Condition(max_new_tokens=6)
    with AnyDepth(RefuseMass(threshold=1.1), every=2).on(runtime) as free:
        assert list(free.generate(prompts, condition)) == list(runtime.generate(prompts, condition))
    with AnyDepth(RefuseMass(threshold=0.0), every=2).on(runtime) as never:
        stopped = list(never.generate(prompts, condition))
    assert all(
        r.finish_reason == "content_filter" and "any-depth-mass" in str(r.finish_reason_raw) for r in stopped
    )


def test_calibrated_for_whole_answers() -> None:
    rng = np.random.default_rng(0)
    benign, harmful = rng.uniform(0, 0.4, (100, 3)), rng.uniform(0.3, 1, (50, 3))
    check = RefuseMass().calibrated(np.vstack([benign, harmful]), [False] * 100 + [True] * 50, on="mine")
    assert check.cut is not None and 0.3 < check.threshold < 0.7 and "mine" in str(check.guarantee)
    assert (benign.max(1) >= check.threshold).mean() <= 0.05


def test_a_model_without_control_tokens_is_told() -> None:
    with pytest.raises(InputError, match="no control tokens"):
        RefuseMass().fits(tiny_runtime())
