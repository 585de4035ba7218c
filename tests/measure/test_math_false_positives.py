"""Scaling, correction and detection: hand calculations, brute force, and a world whose truth is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demur.errors import InputError
from demur.measure.math_false_positives import MathFalsePositives, check, check_prompts, with_verdicts
from demur.measure.math_false_positives.detectors import (
    cross_fitted,
    detection,
    detector_report,
    f1_of,
    folds_by_problem,
    longer_than,
    trivial,
)
from demur.measure.math_false_positives.scaling import (
    best_of_n,
    fp_correct,
    pass_at_n,
    sample_counts,
    scaling_report,
    share,
    weighted_vote,
)
from demur.measure.math_false_positives.solutions import (
    Solution,
    audit_sample,
    graded,
    load_solutions,
    solutions_from,
    with_labels,
)
from demur.measure.math_false_positives.verdicts import check_text, parse_verdict
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Reply

# --- estimators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_estimators_are_the_mean_over_all_draws(n: int) -> None:
    rewards = [0.3, 0.9, 0.9, 0.1, 0.5, 0.2]
    good = [True, False, True, False, False, True]
    draws = list(itertools.combinations(range(6), n))
    passed = np.mean([any(good[i] for i in d) for d in draws])
    assert pass_at_n(6, 3, n) == pytest.approx(passed)
    picks = [max(d, key=lambda i: (rewards[i], -i)) for d in draws]  # on a tie the first sample wins
    expected = np.bincount(picks, minlength=6) / len(draws)
    assert best_of_n(rewards, n) == pytest.approx(expected)


def test_estimators_refuse_impossible_numbers() -> None:
    for total, good, n in [(3, 4, 1), (3, 1, 0), (3, 1, 4)]:
        with pytest.raises(InputError):
            pass_at_n(total, good, n)
    with pytest.raises(InputError):
        best_of_n([1.0], 2)


def test_weighted_vote_by_hand() -> None:
    # scaled rewards 1, 0.5, 0.75, 0: "a" sums to 1.0, "b" to 1.25, so b wins and its best sample is number 2
    assert weighted_vote([10, 5, 7.5, 0], ["a", "b", "b", "c"], 4).tolist() == [0, 0, 1, 0]
    # all rewards equal, also negative ones: a plain majority
    assert weighted_vote([-1, -1, -1], ["a", "b", "b"], 3).tolist() == [0, 1, 0]
    assert weighted_vote(None, ["a", None, None], 3).tolist() == [1, 0, 0]
    assert weighted_vote(None, [None, None], 2).tolist() == [1, 0]


def test_weighted_vote_over_fewer_samples_is_a_repeatable_mean() -> None:
    weights = weighted_vote([3, 2, 1], ["a", "b", "c"], 2, draws=300, seed=1)
    assert weights.sum() == pytest.approx(1)
    assert weights[2] == 0 and weights[0] == pytest.approx(2 / 3, abs=0.1)  # the better one of each pair wins
    assert weights.tolist() == weighted_vote([3, 2, 1], ["a", "b", "c"], 2, draws=300, seed=1).tolist()


def test_fp_correct_by_hand_and_at_the_ends() -> None:
    found = fp_correct(60, 100, 30, 6)  # 0.6 * 0.8
    assert found.value == pytest.approx(0.48)
    assert found.low is not None and found.high is not None and found.low < 0.48 < found.high
    assert fp_correct(60, 100, 0, 0).value is None
    none_right = fp_correct(0, 50, 0, 0)
    assert none_right.value == 0 and none_right.low == 0 and (none_right.high or 0) > 0
    assert fp_correct(50, 50, 50, 0).value == 1 and (fp_correct(50, 50, 50, 0).low or 1) < 1
    for bad in [(60, 50, 10, 1), (10, 50, 20, 1), (10, 50, 5, 6), (10, 50, 5, -1)]:
        with pytest.raises(InputError, match="audited"):
            fp_correct(*bad)


def test_a_larger_audit_narrows_the_interval() -> None:
    few, many = fp_correct(800, 1000, 20, 4), fp_correct(800, 1000, 400, 80)
    assert few.value == many.value
    assert (few.high or 0) - (few.low or 0) > 2 * ((many.high or 0) - (many.low or 0))


def test_the_corrected_interval_covers_and_the_uncorrected_does_not() -> None:
    rng = np.random.default_rng(0)
    ours = naive = 0
    for i in range(400):
        right = int(rng.binomial(200, 0.7))
        audited = right // 3
        flawed = int(rng.binomial(audited, 0.25))
        found, plain = fp_correct(right, 200, audited, flawed, draws=2000, seed=i), share(right, 200)
        ours += (found.low or 0) <= 0.7 * 0.75 <= (found.high or 0)
        naive += (plain.low or 0) <= 0.7 * 0.75 <= (plain.high or 0)
    assert 0.92 <= ours / 400 <= 0.98
    assert naive / 400 < 0.05


# --- scaling report ---------------------------------------------------------------------------------------------


def made(problem: str, rewards: Sequence[float], flags: str, source: str = "m") -> list[Solution]:
    """Samples from a word: v valid, f false positive, u right without a label, w wrong."""
    return [
        Solution(
            problem=problem,
            source=source,
            sample=i,
            answer="7" if c != "w" else f"w{i}",
            correct=c != "w",
            reward=r,
            false_positive={"v": False, "f": True}.get(c),
        )
        for i, (r, c) in enumerate(zip(rewards, flags, strict=True))
    ]


def test_scaling_report_by_hand() -> None:
    rows = [
        *made("a", [4, 3, 2, 1], "fvww"),
        *made("b", [1, 2, 3, 4], "wwff"),
        *made("c", [1, 2, 3, 4], "vwww"),
    ]
    report = scaling_report(rows)
    assert sample_counts(rows) == (1, 4)
    best = next(r for r in report.values["selection"] if (r["selection"], r["N"]) == ("best-of-N", 4))
    assert best["automatic"]["value"] == pytest.approx(2 / 3)  # a and b
    assert best["false_positive_rate"]["value"] == 1 and best["manual"]["value"] == 0
    one = next(r for r in report.values["selection"] if r["N"] == 1)
    assert one["automatic"]["value"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert one["false_positive_rate"]["value"] == pytest.approx((0.25 + 0.5) / 1.25)
    assert one["manual"]["value"] == pytest.approx((0.25 + 0 + 0.25) / 3)
    four = next(r for r in report.values["pass_at_n"] if r["N"] == 4)
    assert four["automatic"]["value"] == 1 and four["manual"]["value"] == pytest.approx(2 / 3)
    assert four["gap"]["value"] == pytest.approx(1 / 3)
    vote = next(r for r in report.values["selection"] if r["selection"] == "weighted vote")
    assert vote["automatic"]["value"] == pytest.approx(2 / 3)  # a and b; in c the highest reward is wrong


def test_labels_on_a_part_stand_for_the_rest_of_their_problem() -> None:
    rows = [*made("a", [1, 1], "uf"), *made("b", [1, 1], "vu"), *made("c", [1, 1], "uu")]
    report = scaling_report(rows, [1])
    one = report.values["selection"][0]
    assert one["automatic"]["value"] == 1 and one["labels"] == 2
    assert one["false_positive_rate"]["value"] == 0.5  # a: 1 of 1 label, b: 0 of 1, c says nothing
    assert one["manual"]["value"] == 0.5
    passed = report.values["pass_at_n"][0]
    assert passed["manual"] is None and passed["gap"] is None
    low, high = passed["manual_between"]
    assert low == pytest.approx((0 + 0.5 + 0) / 3) and high == pytest.approx((0.5 + 1 + 1) / 3)


def test_limit_cases_are_said() -> None:
    all_right = scaling_report(made("a", [1, 2], "vv"))
    assert any("Every answer here is right" in n for n in all_right.notes)
    assert any("one problem only" in n for n in all_right.notes)
    none_right = scaling_report([*made("a", [1], "w"), *made("b", [1], "w")])
    assert none_right.values["selection"][0]["false_positive_rate"]["value"] is None
    assert any("no false-positive rate" in n for n in none_right.notes)
    unlabelled = scaling_report([*made("a", [1], "u"), *made("b", [1], "w")])
    assert unlabelled.values["selection"][0]["manual"]["value"] is None
    assert any("no right answer has a human label" in n.lower() for n in unlabelled.notes)
    stray = [replace(made("a", [1], "w")[0], false_positive=True), *made("b", [1], "v")]
    assert any("1 human labels are on solutions" in n for n in scaling_report(stray).notes)


def test_what_scaling_cannot_report_is_an_error() -> None:
    with pytest.raises(InputError, match="no solutions"):
        scaling_report([])
    with pytest.raises(InputError, match="graded"):
        scaling_report([Solution(problem="a")])
    with pytest.raises(InputError, match="fewest samples has 2"):
        scaling_report([*made("a", [1, 2], "vv"), *made("b", [1, 2, 3], "vvv")], [3])


def test_without_rewards_the_vote_is_a_majority_and_best_of_n_is_left_out() -> None:
    rows = [replace(s, reward=None) for s in made("a", [1, 1, 1, 1], "vvww")]
    names = {r["selection"] for r in scaling_report(rows).values["selection"]}
    assert names == {"one sample", "majority vote"}


# --- detectors --------------------------------------------------------------------------------------------------


def test_counts_of_the_positive_class() -> None:
    found = detection("d", [1, 1, 0, 0, 1], [1, 0, 1, 0, 1], list("abcde"))
    assert (found.tp, found.fp, found.fn, found.tn) == (2, 1, 1, 1)
    assert found.precision.value == found.recall.value == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert f1_of(0, 0, 0) is None


def test_problems_and_not_rows_are_resampled() -> None:
    flags = np.tile([1, 0, 1, 0, 1, 1], 30).astype(bool)
    human = np.tile([1, 1, 0, 0, 1, 0], 30).astype(bool)
    alone = detection("d", flags, human, [str(i) for i in range(180)])
    copied = detection("d", flags, human, [str(i % 6) for i in range(180)])
    assert alone.f1 == copied.f1 and alone.f1_interval and copied.f1_interval
    width = [b - a for a, b in (alone.f1_interval, copied.f1_interval)]
    assert width[1] > 3 * width[0]


def test_folds_keep_a_problem_together_and_choose_elsewhere() -> None:
    problems = [str(i // 3) for i in range(60)]
    fold = folds_by_problem(problems)
    assert all(len(set(fold[3 * i : 3 * i + 3].tolist())) == 1 for i in range(20)) and len(set(fold)) == 5
    used: list[set[str]] = []

    def fit(rows: np.ndarray) -> object:
        seen = {problems[i] for i in rows}

        def flag(rows: np.ndarray) -> np.ndarray:
            used.append(seen & {problems[i] for i in rows})
            return np.ones(len(rows), bool)

        return flag

    assert cross_fitted(fit, problems).all()  # type: ignore[arg-type]
    assert used and not any(used)


def test_the_length_cut_is_the_best_one() -> None:
    lengths, human = np.array([10, 20, 30, 40, 50]), np.array([0, 0, 1, 0, 1], bool)
    assert longer_than(lengths, human, np.arange(5)) == 25  # 2 found, 1 false alarm: F1 0.8
    assert longer_than(lengths, np.zeros(5, bool), np.arange(5)) == float("inf")


def labelled(n: int = 200, seed: int = 0) -> list[Solution]:
    """Right answers; flawed ones are longer, and most of them from one source."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        bad = rng.random() < (0.5 if i % 2 else 0.05)
        size = int(rng.normal(900 if bad else 300, 50))
        out.append(
            Solution(
                problem=str(i // 2),
                sample=0,
                source="weak" if i % 2 else "strong",
                correct=True,
                false_positive=bool(bad),
                text="x" * size,
                statement=f"problem {i // 2}",
                verdicts={"perfect": not bad, "blind": bool(rng.random() < 0.5), "mute": None},
            )
        )
    return out


def test_trivial_rules_find_what_gives_them_away() -> None:
    rows = labelled()
    human = np.array([s.false_positive for s in rows], bool)
    rules = trivial(rows, human)
    f1 = {k: detection(k, v, human, [s.problem for s in rows]).f1 or 0 for k, v in rules.items()}
    assert f1["longer than a threshold"] > 0.95
    assert f1["always False"] < f1["written by certain sources"] < f1["longer than a threshold"]
    shuffled = np.random.default_rng(0).permutation(human)
    chance = trivial([replace(s, source="one") for s in rows], shuffled)["longer than a threshold"]
    assert (detection("c", chance, shuffled, [s.problem for s in rows]).f1 or 0) < 0.5


def test_detector_report_says_who_does_not_beat_a_rule() -> None:
    report = detector_report(labelled())
    found = report.values["checkers"]
    assert found["perfect"]["f1"] == 1 and found["mute"]["tp"] == 0 and found["mute"]["unread"] == 200
    assert found["blind"]["minus_best_rule"][2] < 0 < found["perfect"]["f1"]
    notes = "\n".join(report.notes)
    assert "blind is below the rule" in notes and "200 of mute's verdicts" in notes
    table = report.tables[1]
    assert [r[0] for r in table.rows] == ["strong", "weak"] and "perfect" in table.columns
    random = next(r for r in report.tables[0].rows if r[0].startswith("random"))
    assert random[-2] == f"{report.values['random_f1']:.3f}"


def test_a_checker_is_scored_on_the_rows_it_has_seen() -> None:
    rows = [replace(s, verdicts={"some": False} if i < 50 else {}) for i, s in enumerate(labelled())]
    found = detector_report(rows).values["checkers"]["some"]
    assert found["tp"] + found["fp"] == 50 and found["fn"] + found["tn"] == 0


def test_detectors_need_labels_of_both_kinds() -> None:
    rows = labelled()
    with pytest.raises(InputError, match="human label"):
        detector_report([replace(s, false_positive=None) for s in rows])
    with pytest.raises(InputError, match="all 200 labels say sound"):
        detector_report([replace(s, false_positive=False) for s in rows])


# --- verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("True", True),
        ("**False**", False),
        ("Step 1 is False. Step 2 is True. Step 3 is False. Overall: True", True),
        ("FALSE", False),
        ("false.", False),
        ("It is true that x is real, but the rest is guessed.", None),
        ("The solution provided is incorrect.", False),
        ("The solution is not correct", False),
        ("The solution is not entirely correct, so it fails.", False),
        ("I find the solution to be correct.", True),
        ("Is the solution correct? I cannot say.", None),
        ("", None),
    ],
)
def test_verdicts_are_read_by_the_stated_rule(reply: str, verdict: bool | None) -> None:
    assert parse_verdict(reply) is verdict


def test_the_question_survives_braces() -> None:
    text = check_text("Find {solution}.", r"\frac{1}{2} {problem}")
    assert text.count("Find {solution}.") == 1 and text.count(r"\frac{1}{2} {problem}") == 1


def asked(n: int = 4) -> list[Solution]:
    return [
        Solution(
            problem=f"p{i}",
            statement=f"What is {i} + 0?",
            text=f"<think>hm</think>It is {i}.",
            answer=str(i),
            gold=str(i),
            false_positive=i % 2 == 0,
        )
        for i in range(n)
    ]


def test_right_answers_are_checked_once_each_and_without_their_thinking() -> None:
    rows = graded([*asked(), replace(asked()[0], sample=1), replace(asked()[1], sample=1, answer="9")])
    prompts = check_prompts(rows)
    assert len(prompts) == 4 and {p.group for p in prompts} == {"p0", "p1", "p2", "p3"}
    assert all("hm" not in p.text for p in prompts)
    with pytest.raises(InputError, match="nothing to check"):
        check_prompts([replace(s, correct=False) for s in rows])
    with pytest.raises(InputError, match="`problem` and `solution`"):
        check_prompts([replace(rows[0], text="")])


def test_a_model_checks_and_is_scored() -> None:
    def script(prompt: object, condition: object, sample: int) -> str | Exception:
        text = prompt.text  # type: ignore[attr-defined]
        if "What is 3" in text:
            return RuntimeError("server down")
        return "False" if "What is 0" in text else "True" if "What is 1" in text else "Hm."

    runtime = ScriptedRuntime(script, name="checker")
    rows = graded(asked())
    pairs = list(check(runtime, check_prompts(rows)))
    assert [v.label for v, _ in pairs] == ["flawed", "sound", "unparsed", "error"]
    assert pairs[-1][1].calls == 4 and {v.scale for v, _ in pairs} == {"validity"}
    done = with_verdicts(rows, {v.prompt_id: v.label for v, _ in pairs}, "checker")
    assert [s.verdicts for s in done] == [{"checker": False}, {"checker": True}, {"checker": None}, {}]
    written: list[str] = []
    report = MathFalsePositives().run(runtime, asked(), on_verdict=lambda v: written.append(v.label))
    assert len(written) == 4
    found = report.values["detectors"]["checkers"]["checker"]
    assert (found["tp"], found["fp"], found["fn"], found["unread"]) == (1, 0, 1, 1)


def test_the_last_word_of_a_check_that_was_cut_off_is_no_verdict() -> None:
    cut = Reply(prompt_id="x", content="Step 1 is True. Step 2", finish_reason="length")
    word = Reply(prompt_id="x", content="False", finish_reason="length")
    runtime = ScriptedRuntime(lambda p, *_: cut if "What is 0" in p.text else word)
    labels = [v.label for v, _ in check(runtime, check_prompts(graded(asked(2))))]
    assert labels == ["unparsed", "flawed"]


# --- files ------------------------------------------------------------------------------------------------------


def test_rows_become_solutions() -> None:
    row = {
        "problem": "1 + 1?",
        "solution": r"So \boxed{2}.",
        "ground_truth": 2,
        "reward": [0.2, 0.8, 0.5],
        "false_positive": "True",
        "verdict_a": "I say False",
        "verdicts": {"b": True},
    }
    one, two = solutions_from([(1, row), (2, row)], "f", aggregate="min")
    assert (one.answer, one.gold, one.reward, one.false_positive) == ("2", "2", 0.2, True)
    assert dict(one.verdicts) == {"a": False, "b": True}
    assert (one.sample, two.sample) == (0, 1) and one.problem == two.problem
    mean = solutions_from([(1, row)], "f", aggregate="mean")[0]
    assert mean.reward == pytest.approx(0.5) and solutions_from([(1, row)], "f")[0].reward == 0.5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"solution": "2", "gold": "2"}, "problem_id"),
        ({"problem": "x", "solution": "2"}, "needs `gold`"),
        ({"problem": "x", "gold": "2"}, "needs `solution`"),
        ({"problem": "x", "correct": "maybe"}, "correct is 'maybe'"),
        ({"problem": "x", "correct": True, "reward": "high"}, "reward is 'high'"),
        ({"problem": "x", "correct": True, "reward": []}, "reward is"),
        ({"problem": "x", "correct": True, "sample": "first"}, "sample is 'first'"),
        ({"problem": "x", "correct": True, "verdict_a": 3}, "verdict_a is 3"),
        ({"problem": "x", "correct": True, "verdicts": [True]}, "verdicts is a list"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match="f, line 3") as e:
        solutions_from([(3, row)], "f")
    assert words in str(e.value)


def test_a_sample_stands_once() -> None:
    row = {"problem_id": 1, "correct": True, "sample": 0}
    with pytest.raises(InputError, match="stands on line 1 too"):
        solutions_from([(1, row), (2, row)], "f")


def test_an_audit_is_drawn_filled_in_and_read_back(tmp_path: Path) -> None:
    rows = [Solution(problem=str(i % 8), sample=i // 8, correct=i % 5 != 0) for i in range(40)]
    drawn = audit_sample(rows, 5, seed=3)
    assert len(drawn) == 5 == len({s.problem for s in drawn}) and all(s.correct for s in drawn)
    assert drawn == audit_sample(rows, 5, seed=3) != audit_sample(rows, 5, seed=4)
    file = tmp_path / "labels.jsonl"
    lines = [
        {"problem_id": s.problem, "sample": s.sample, "false_positive": i == 0} for i, s in enumerate(drawn)
    ]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = with_labels(rows, file)
    assert sum(s.false_positive is True for s in found) == 1
    assert sum(s.false_positive is False for s in found) == 4
    lines[0]["problem_id"] = "99"
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(InputError, match="'99'"):
        with_labels(rows, file)


def test_a_csv_is_read(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    file.write_text("problem_id,answer,gold,reward,false_positive\na,1,1,0.5,true\na,2,1,0.25,\n")
    rows = graded(load_solutions(file))
    assert [s.correct for s in rows] == [True, False] and [s.reward for s in rows] == [0.5, 0.25]
