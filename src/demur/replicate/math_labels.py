"""The released human labels of false positives in mathematics, counted again: anchors of `math-false-positives`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from demur import data
from demur.replicate.spec import Anchor

if TYPE_CHECKING:
    from demur.types import Report

SLUG = "math-false-positives"
SUMMARY, BENCHMARK, VERDICTS, TYPES, PASS4, PASS16, MATH100 = (
    f"{SLUG}/{name}"
    for name in (
        "condition_summary.csv",
        "false_positive_detection_benchmark.jsonl",
        "detector_verdicts.csv",
        "false_positive_types.jsonl",
        "pass_at_4_qwen72b_aime.jsonl",
        "pass_at_16_qwen72b_aime.jsonl",
        "MATH100.jsonl",
    )
)


@cache
def rows(name: str) -> tuple[dict[str, Any], ...]:
    """Rows of one of the set's files."""
    text = data.get(*name.split("/")).read_text(encoding="utf-8")
    if name.endswith(".csv"):
        return tuple(csv.DictReader(text.splitlines()))
    return tuple(json.loads(line) for line in text.split("\n") if line.strip())


def condition(name: str) -> tuple[int, int, int]:
    """Problems, right answers and false positives of a condition."""
    row = next(r for r in rows(SUMMARY) if r["condition"] == name)
    return int(row["n_problems"]), int(row["n_answer_correct"]), int(row["n_false_positive"])


def _rates(name: str) -> dict[str, float]:
    from demur.measure.math_false_positives.scaling import fp_correct, share

    problems, correct, flawed = condition(name)
    values = {
        "auto": share(correct, problems).value,
        "fp": share(flawed, correct).value,
        "manual": fp_correct(correct, problems, correct, flawed).value,
    }
    return {k: round(v, 3) if k == "fp" else round(100 * v, 1) for k, v in values.items() if v is not None}


def _rate(name: str, part: str) -> Callable[[], float]:
    return lambda: _rates(name)[part]


def consistent_rows() -> int:
    """Rows of the summary whose three rates follow from their counts, to four digits."""
    good = 0
    for r in rows(SUMMARY):
        n, k, bad = (int(r[c]) for c in ("n_problems", "n_answer_correct", "n_false_positive"))
        printed = [float(r[c]) for c in ("auto_accuracy", "manual_accuracy", "false_positive_rate")]
        good += [round(k / n, 4), round((k - bad) / n, 4), round(bad / k, 4)] == printed
    return good


def matching_sources() -> int:
    """Sources of the benchmark whose rows give the summary's counts."""
    counts: dict[str, list[int]] = {}
    for r in rows(BENCHMARK):
        one = counts.setdefault(r["source"], [0, 0])
        one[0] += 1
        one[1] += bool(r["false_positive"])
    return sum(list(condition(name)[1:]) == found for name, found in counts.items())


def _passed(name: str) -> tuple[float, float]:
    """Percent of the 90 AIME problems passed by answer, and by reasoning, from the rows."""
    found = rows(name)
    flawed = sum(bool(r["false_positive"]) for r in found)
    return round(100 * len(found) / 90, 1), round(100 * (len(found) - flawed) / 90, 1)


@cache
def solutions() -> tuple[Any, ...]:
    """The benchmark with the verdicts of the three checkers, through the reader that users have."""
    from demur.measure.math_false_positives.solutions import solutions_from

    said = {"True": True, "False": False, "": None}
    verdicts = rows(VERDICTS)
    read = solutions_from(enumerate(rows(BENCHMARK), 1), BENCHMARK)
    return tuple(
        replace(
            s,
            correct=True,
            dataset=v["dataset"],
            verdicts={c: said[v[f"{c}_says_correct"]] for c in ("gpt4o", "llama", "qwen")},
        )
        for s, v in zip(read, verdicts, strict=True)
    )


@cache
def detectors() -> Report:
    """The report on the three checkers and the trivial rules."""
    from demur.measure.math_false_positives.detectors import detector_report

    return detector_report(solutions())


def _checker(name: str, part: str) -> Callable[[], float]:
    def value() -> float:
        found = detectors().values["checkers"][name]
        x = found[part]
        return round(float(x.value if part in ("precision", "recall") else x), 3)

    return value


def rule_f1(flags: Callable[[Any], bool]) -> float:
    """F1 of a fixed rule on all labelled rows."""
    from demur.measure.math_false_positives.detectors import detection

    some = solutions()
    found = detection(
        "rule", [flags(s) for s in some], [s.false_positive for s in some], [s.problem for s in some]
    )
    return round(found.f1 or 0.0, 3)


def accepted() -> int:
    """Solutions of the benchmark, all right by upstream's grader, whose answer ours accepts."""
    from demur.measure.math_false_positives.solutions import graded

    return sum(s.correct is True for s in graded([replace(s, correct=None) for s in solutions()]))


def _mean_length(flawed: bool) -> float:
    some = [len(s.text) for s in solutions() if s.false_positive is flawed]
    return float(round(sum(some) / len(some)))


CONDITIONS = {
    "qwen72b_math100": ("Qwen72B-BoN_256samples-QwenRM-MATH100", 90.0, 0.044, 86.0),
    "qwen72b_aime": ("Qwen72B-BoN_256samples-QwenRM-AIME", 35.6, 0.188, 28.9),
    "qwen72b_omnimath100": ("Qwen72B-BoN_256samples-QwenRM-OmniMATH100", 51.0, 0.294, 36.0),
    "llama3b_aime": ("LLaMA3B-BoN_256samples-QwenRM", 24.4, 0.500, 12.2),
    "llama70b_aime": ("LLaMA70B-BoN_256samples-QwenRM", 31.1, 0.464, 16.7),
    "qwen1_5b_aime": ("Qwen1.5B-BoN_256samples-QwenRM", 27.8, 0.160, 23.3),
    "oat_zero_aime": ("Oat1.5B-BoN_256samples-QwenRM", 30.0, 0.259, 22.2),
    "pass_at_4": ("Qwen72B-Pass_at_N_4samples", 23.3, None, 21.1),
    "pass_at_16": ("Qwen72B-Pass_at_N_16samples", 41.1, None, 32.2),
    "pass_at_64": ("Qwen72B-Pass_at_N_64samples", 53.3, None, 34.4),
    "best_of_4": ("Qwen72B-BoN_4samples-QwenRM", 23.3, None, 20.0),
    "best_of_16": ("Qwen72B-BoN_16samples-QwenRM", 31.1, None, 28.9),
    "best_of_64": ("Qwen72B-BoN_64samples-QwenRM", 32.2, None, 27.8),
}
"""Condition, percent right by answer, false-positive rate, percent valid, as published."""

CHECKERS = {
    "gpt4o": (45, 59, 18, 0.433, 0.714, 0.539),
    "qwen": (17, 4, 46, 0.810, 0.270, 0.405),
    "llama": (11, 6, 52, 0.647, 0.175, 0.275),
}
PARTS = ("tp", "fp", "fn", "precision", "recall", "f1")

Line = tuple[Anchor, Callable[[], float]]
"""An anchor and the function that counts it."""


def _anchor(key: str, text: str, expected: float, value: Callable[[], float], *needs: str) -> Line:
    return Anchor(key=key, text=text, expected=expected, needs=needs), value


def _lines() -> list[Line]:
    out: list[Line] = []
    words = {"auto": "% right by answer", "fp": "false-positive rate", "manual": "% valid"}
    for key, (name, *values) in CONDITIONS.items():
        for part, expected in zip(("auto", "fp", "manual"), values, strict=True):
            if expected is not None:
                out.append(
                    _anchor(f"{part}_{key}", f"{name}: {words[part]}", expected, _rate(name, part), SUMMARY)
                )
    for checker, numbers in CHECKERS.items():
        for part, number in zip(PARTS, numbers, strict=True):
            text = f"checker {checker}: {part}"
            out.append(
                _anchor(f"{checker}_{part}", text, number, _checker(checker, part), BENCHMARK, VERDICTS)
            )
    kinds = {0: ("jump", 9), 1: ("logical", 42), 2: ("calculation", 18), 3: ("conceptual", 14)}
    out += [
        _anchor(f"type_{name}", f"false positives of type {name} of 83", n, _type_count(t), TYPES)
        for t, (name, n) in kinds.items()
    ]
    out += [_anchor(key, text, expected, value, *needs) for key, text, expected, value, needs in _counts()]
    return out


def _type_count(kind: int) -> Callable[[], float]:
    return lambda: sum(r["false_positive_type"] == kind for r in rows(TYPES))


def _counts() -> list[tuple[str, str, float, Callable[[], float], tuple[str, ...]]]:
    both = (BENCHMARK, VERDICTS)
    some = solutions
    return [
        (
            "summary_rows",
            "rows of the summary whose rates follow from their counts, of 47",
            47,
            consistent_rows,
            (SUMMARY,),
        ),
        (
            "benchmark_sources",
            "sources of the benchmark that match the summary, of 8",
            8,
            matching_sources,
            (BENCHMARK, SUMMARY),
        ),
        ("rows_pass_4", "pass@4 by answer, % of 90, from rows", 23.3, lambda: _passed(PASS4)[0], (PASS4,)),
        ("rows_pass_4_manual", "pass@4 valid, % of 90, from rows", 21.1, lambda: _passed(PASS4)[1], (PASS4,)),
        (
            "rows_pass_16",
            "pass@16 by answer, % of 90, from rows",
            41.1,
            lambda: _passed(PASS16)[0],
            (PASS16,),
        ),
        (
            "rows_pass_16_manual",
            "pass@16 valid, % of 90, from rows",
            32.2,
            lambda: _passed(PASS16)[1],
            (PASS16,),
        ),
        ("rows", "rows of the detection benchmark", 453, lambda: len(some()), both),
        (
            "rows_flawed",
            "false positives in it",
            63,
            lambda: sum(s.false_positive is True for s in some()),
            both,
        ),
        ("unique_solutions", "different solutions in it", 406, lambda: len({s.text for s in some()}), both),
        ("problems", "problems in it", 132, lambda: len({s.problem for s in some()}), both),
        ("llama_unread", "unreadable verdicts of checker llama", 1, _checker("llama", "unread"), both),
        ("always_false", "F1 of flagging everything", 0.244, lambda: rule_f1(lambda _: True), both),
        (
            "random_flags",
            "expected F1 of random flags at prevalence",
            0.139,
            lambda: round(float(detectors().values["random_f1"]), 3),
            both,
        ),
        (
            "long_solutions",
            "F1 of 'longer than 1,900 characters', chosen on these rows",
            0.380,
            lambda: rule_f1(lambda s: len(s.text) > 1900),
            both,
        ),
        (
            "llama70b_on_aime",
            "F1 of 'written by Llama-70B on AIME'",
            0.441,
            lambda: rule_f1(lambda s: s.source.startswith("LLaMA70B")),
            both,
        ),
        ("length_flawed", "mean characters of false positives", 2141, lambda: _mean_length(True), both),
        ("length_sound", "mean characters of sound solutions", 1400, lambda: _mean_length(False), both),
        ("graded_right", "answers that our grader accepts, of 453 right ones", 453, accepted, both),
    ]


LINES = _lines()


def recount() -> dict[str, float | Callable[[], float]]:
    """The anchors' values, each counted when it is asked for."""
    return {anchor.key: value for anchor, value in LINES}
