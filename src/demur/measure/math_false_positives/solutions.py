"""Solutions to mathematical problems as records: read from a file, graded, and drawn for an audit by people.

One row is one sampled solution. The columns are those of the table in docs/math-false-positives.md; files of
the published benchmark are read as they are.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from demur.errors import InputError
from demur.files import read_rows
from demur.measure.math_false_positives.grading import Grader, extract_answer
from demur.measure.math_false_positives.verdicts import parse_verdict

Aggregate = Literal["last", "min", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One sampled solution to one problem.

    Attributes:
        problem: id of the problem, the unit of all intervals. statement, text: problem and solution as written.
        sample: number of the sample within (source, problem).
        answer: final answer, None when the solution has none. gold: the reference answer.
        correct: whether the answer equals gold; None until graded.
        source: which model and method wrote it; reports keep sources apart.
        dataset: a name with "aime" in it makes answers integers.
        reward: a verifier's score, higher is better. false_positive: a person's label of an answer-correct
            solution: True when its reasoning is invalid. verdicts: {checker: True sound, False flawed, None
            unreadable}.
    """

    problem: str
    sample: int = 0
    answer: str | None = None
    gold: str | None = None
    correct: bool | None = None
    source: str = "all"
    dataset: str | None = None
    reward: float | None = None
    false_positive: bool | None = None
    verdicts: Mapping[str, bool | None] = field(default_factory=dict)
    statement: str = ""
    text: str = ""


def load_solutions(
    path: str | Path, *, aggregate: Aggregate = "last", dataset: str | None = None
) -> list[Solution]:
    """Solutions of a JSONL or CSV file (`-` is standard input).

    Args:
        aggregate: how a list of step rewards becomes one number: its last, smallest or mean value.
        dataset: name for rows that have none of their own.

    Raises:
        InputError: a row without problem, or without both `gold` and `correct`; a value of the wrong kind; the
            same (source, problem, sample) twice.
    """
    return solutions_from(read_rows(path), str(path), aggregate=aggregate, dataset=dataset)


def solutions_from(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    name: str,
    *,
    aggregate: Aggregate = "last",
    dataset: str | None = None,
) -> list[Solution]:
    """The same from numbered rows; `name` opens every error."""
    out: list[Solution] = []
    lines: dict[tuple[str, str, int], int] = {}
    counted: dict[tuple[str, str], int] = {}
    for n, row in rows:
        one = _solution(row, f"{name}, line {n}", aggregate, dataset)
        group = (one.source, one.problem)
        if row.get("sample") is None:
            one = replace(one, sample=counted.get(group, 0))
        counted[group] = counted.get(group, 0) + 1
        if (*group, one.sample) in lines:
            raise InputError(
                f"{name}, line {n}: sample {one.sample} of problem {one.problem!r} ({one.source}) stands on line "
                f"{lines[(*group, one.sample)]} too; number the samples of a problem 0, 1, ..."
            )
        lines[(*group, one.sample)] = n
        out.append(one)
    if not out:
        raise InputError(f"{name}: holds no solutions")
    return out


def _solution(row: Mapping[str, Any], where: str, aggregate: Aggregate, dataset: str | None) -> Solution:
    statement = str(row.get("problem") or "")
    text = str(_first(row, "solution", "text", "response") or "")
    gold = _first(row, "gold", "ground_truth", "reference")
    correct = _flag(row, "correct", where)
    answer = row.get("answer")
    if row.get("problem_id") is None and not statement.strip():
        raise InputError(f"{where}: needs `problem_id`, or `problem` (the text of the problem)")
    if gold is None and correct is None:
        raise InputError(
            f"{where}: needs `gold` (the reference answer), or `correct` (true or false) if you graded already"
        )
    if answer is None and correct is None and not text.strip():
        raise InputError(f"{where}: needs `solution` (text), or `answer`, or `correct`")
    verdicts = {
        k.removeprefix("verdict_"): _verdict(v, f"{where}: {k}")
        for k, v in row.items()
        if k.startswith("verdict_")
    }
    nested = row.get("verdicts") or {}
    if not isinstance(nested, Mapping):
        raise InputError(
            f"{where}: verdicts is a {type(nested).__name__}; it maps a checker to true or false"
        )
    verdicts |= {str(k): _verdict(v, f"{where}: verdicts: {k}") for k, v in nested.items()}
    name = row.get("dataset") or dataset
    return Solution(
        problem=str(row["problem_id"]) if row.get("problem_id") is not None else _digest(statement),
        sample=_whole(row.get("sample"), where),
        answer=str(answer) if answer is not None else (extract_answer(text) if text else None),
        gold=None if gold is None else str(gold),
        correct=correct,
        source=str(row.get("source") or "all"),
        dataset=None if name is None else str(name),
        reward=_reward(row.get("reward"), where, aggregate),
        false_positive=_flag(row, "false_positive", where),
        verdicts=verdicts,
        statement=statement,
        text=text,
    )


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[n] for n in names if row.get(n) is not None), None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def _flag(row: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = row.get(name)
    if value is None or isinstance(value, bool):
        return value
    found = _WORDS.get(str(value).strip().lower())
    if found is None:
        raise InputError(f"{where}: {name} is {value!r}; write true or false, or leave it empty")
    return found


def _verdict(value: Any, where: str) -> bool | None:
    """A checker's verdict: a flag, or its whole reply."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise InputError(
            f"{where} is {value!r}; write true (sound), false (flawed), null, or the reply itself"
        )
    return parse_verdict(value)


def _whole(value: Any, where: str) -> int:
    try:
        if value is None or isinstance(value, bool):
            return 0
        return int(str(value))
    except ValueError:
        raise InputError(f"{where}: sample is {value!r}; it is a whole number: 0, 1, ...") from None


def _reward(value: Any, where: str, aggregate: Aggregate) -> float | None:
    if value is None:
        return None
    steps = value if isinstance(value, list) else [value]
    try:
        numbers = [float(x) for x in steps]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: reward is {value!r}; a finite number, or a list of one for each step")
    if aggregate == "mean":
        return math.fsum(numbers) / len(numbers)
    return min(numbers) if aggregate == "min" else numbers[-1]


def graded(solutions: Sequence[Solution], grader: Grader | None = None) -> list[Solution]:
    """The same solutions with `correct` filled in where it was open. An undecided comparison stays None.

    Raises:
        MissingExtra: an answer needs math-verify and it is not installed.
    """
    if all(s.correct is not None for s in solutions):
        return list(solutions)
    if grader is None:
        with Grader() as own:
            return graded(solutions, own)
    return [
        s
        if s.correct is not None or s.gold is None
        else replace(s, correct=grader.grade(s.answer, s.gold, s.dataset))
        for s in solutions
    ]


def with_labels(solutions: Sequence[Solution], labels: str | Path) -> list[Solution]:
    """Solutions with the human labels of a filled-in audit file (columns problem_id, sample, false_positive).

    Raises:
        InputError: a row that fits no solution, or no label in the file at all.
    """
    found: dict[tuple[str, str, int], bool] = {}
    known = {(s.source, s.problem, s.sample) for s in solutions}
    for n, row in read_rows(labels):
        where = f"{labels}, line {n}"
        key = (str(row.get("source") or "all"), str(row.get("problem_id")), _whole(row.get("sample"), where))
        if key not in known:
            raise InputError(
                f"{where}: source {key[0]!r}, problem_id {key[1]!r}, sample {key[2]} is in no row of the solutions"
            )
        if (flag := _flag(row, "false_positive", where)) is not None:
            found[key] = flag
    if not found:
        raise InputError(f"{labels}: no row has false_positive filled in (true or false)")
    return [
        replace(s, false_positive=found.get((s.source, s.problem, s.sample), s.false_positive))
        for s in solutions
    ]


def audit_sample(solutions: Sequence[Solution], size: int, seed: int = 0) -> list[Solution]:
    """A random part of the answer-correct solutions without a human label, at most one for each problem and
    source, in file order: what a person should read next so that `fp_correct` holds.

    >>> some = [Solution(problem=str(i % 3), sample=i, correct=True) for i in range(9)]
    >>> len(audit_sample(some, 2)), len({s.problem for s in audit_sample(some, 9)})
    (2, 3)
    """
    if size < 1:
        raise InputError(f"audit size {size}: ask for at least one solution")
    rng = random.Random(seed)
    open_ones: dict[tuple[str, str], list[int]] = {}
    for i, s in enumerate(solutions):
        if s.correct:
            open_ones.setdefault((s.source, s.problem), []).append(i)
    chosen = [rng.choice(group) for group in open_ones.values()]
    chosen = [i for i in chosen if solutions[i].false_positive is None]
    return [solutions[i] for i in sorted(rng.sample(chosen, min(size, len(chosen))))]
