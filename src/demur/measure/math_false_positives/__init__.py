"""Right answers from wrong reasoning: how many there are, what that does to accuracy, and who finds them.

A false positive is a solution whose final answer is right and whose reasoning is invalid. Score your own
solutions (`.score`), or let a model check them first (`.run`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from demur.errors import InputError
from demur.measure.math_false_positives.detectors import detector_report
from demur.measure.math_false_positives.grading import Grader, answer_part
from demur.measure.math_false_positives.scaling import fp_correct, scaling_report, share
from demur.measure.math_false_positives.solutions import Solution, graded
from demur.measure.math_false_positives.verdicts import check_text, parse_verdict
from demur.runtime.base import Progress, Runtime
from demur.types import Card, Condition, Prompt, PromptSet, Report, Table, Verdict

CARD = Card(
    slug="math-false-positives",
    title="Right answers from wrong reasoning",
    room="measure",
    tier="lab",
    paper="Examining False Positives under Inference Scaling for Mathematical Reasoning",
    url="https://arxiv.org/abs/2502.06217",
    files=(
        "measure/math_false_positives/__init__.py",
        "measure/math_false_positives/detectors.py",
        "measure/math_false_positives/grading.py",
        "measure/math_false_positives/scaling.py",
        "measure/math_false_positives/solutions.py",
        "measure/math_false_positives/verdicts.py",
        "measure/math_false_positives/worker.py",
    ),
    needs=(),
    summary="Answer accuracy beside reasoning-valid accuracy, pass@N, and checkers against trivial rules.",
    replicate="math-false-positives",
)

CHECKING = Condition(name="check", temperature=0.0, max_new_tokens=4096)
"""How checkers are asked: greedy, with room to think."""

SOUND, FLAWED, UNPARSED, ERROR = "sound", "flawed", "unparsed", "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What checking took. Token counts are sums over the replies that say them; `known` is how many do."""

    calls: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def check_id(solution: Solution) -> str:
    """Id of the question about one solution: the same problem and text give the same id."""
    text = f"{solution.statement}\0{answer_part(solution.text)}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_prompts(solutions: Sequence[Solution]) -> PromptSet:
    """One question for each different answer-correct solution, grouped by problem.

    Thinking before the last `</think>` is left out: only the answer part of a solution is checked.

    Raises:
        InputError: nothing to check, or a solution without its problem's or its own text.
    """
    prompts: dict[str, Prompt] = {}
    for s in solutions:
        if not s.correct:
            continue
        if not s.statement.strip() or not s.text.strip():
            raise InputError(
                f"problem {s.problem!r}, sample {s.sample}: a checker reads the problem and the solution; give the "
                "columns `problem` and `solution`"
            )
        key = check_id(s)
        text = check_text(s.statement, answer_part(s.text))
        prompts.setdefault(key, Prompt.of(text, id=key, group=s.problem))
    if not prompts:
        raise InputError("no solution has a right answer, so there is nothing to check for false positives")
    return PromptSet("checks", tuple(prompts.values()))


def check(
    runtime: Runtime,
    prompts: PromptSet,
    condition: Condition = CHECKING,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[Verdict, Cost]]:
    """Ask a model about solutions, one verdict at a time, with the cost so far.

    Verdict labels are sound, flawed, unparsed and error, on the scale "validity"; `reason` holds the reply.
    """
    started = time.monotonic()
    cost = Cost()
    for reply in runtime.generate(prompts, condition, progress=progress):
        told = reply.prompt_tokens is not None and reply.completion_tokens is not None
        cost = Cost(
            calls=cost.calls + 1,
            known=cost.known + told,
            prompt_tokens=cost.prompt_tokens + (reply.prompt_tokens or 0),
            completion_tokens=cost.completion_tokens + (reply.completion_tokens or 0),
            seconds=time.monotonic() - started,
        )
        # the last "True" of a text that was cut off may speak of a step
        cut = reply.finish_reason == "length" and len(reply.content.split()) > 1
        said = None if reply.error is not None or cut else parse_verdict(reply.content)
        label = ERROR if reply.error is not None else {True: SOUND, False: FLAWED, None: UNPARSED}[said]
        verdict = Verdict(
            prompt_id=reply.prompt_id,
            label=label,
            judge=runtime.name,
            condition=condition.name,
            scale="validity",
            reason=reply.error if reply.error is not None else reply.content,
            read="error" if reply.error is not None else "content",
        )
        yield verdict, cost


def with_verdicts(solutions: Sequence[Solution], labels: Mapping[str, str], checker: str) -> list[Solution]:
    """Solutions with a checker's verdicts on them.

    Args:
        labels: {`check_id`: label} as `check` yields them. Solutions without one, and errors, get none.
    """
    meaning = {SOUND: True, FLAWED: False, UNPARSED: None}
    out = []
    for s in solutions:
        label = labels.get(check_id(s)) if s.correct else None
        known = label in meaning
        out.append(replace(s, verdicts={**s.verdicts, checker: meaning[str(label)]}) if known else s)
    return out


class MathFalsePositives:
    """Accuracy by answer and by reasoning on sampled solutions.

    Args:
        ns: numbers of samples to report on; default the powers of four.
        draws: random draws for votes over fewer samples than there are. seed: of everything random.

    Example:
        >>> rows = [Solution(problem=str(i), correct=i < 6, false_positive=i == 0 if i < 6 else None)
        ...         for i in range(10)]
        >>> report = MathFalsePositives().score(rows)
        >>> round(report.values["selection"][0]["manual"]["value"], 3)
        0.5
    """

    def __init__(self, ns: Sequence[int] | None = None, *, draws: int = 100, seed: int = 0) -> None:
        self.ns = ns
        self.draws = draws
        self.seed = seed

    def run(
        self,
        runtime: Runtime,
        solutions: Sequence[Solution],
        condition: Condition = CHECKING,
        *,
        on_verdict: Callable[[Verdict], None] | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Grade the answers, have the model check the right ones, and report.

        Args:
            on_verdict: receives every verdict as it comes, to be written down.
        """
        rows = graded(solutions)
        labels: dict[str, str] = {}
        for verdict, _ in check(runtime, check_prompts(rows), condition, progress=progress):
            labels[verdict.prompt_id] = verdict.label
            if on_verdict is not None:
                on_verdict(verdict)
        return self.score(with_verdicts(rows, labels, runtime.name))

    def score(self, solutions: Sequence[Solution], *, grader: Grader | None = None) -> Report:
        """Report on solutions, grading those whose `correct` is open.

        Raises:
            InputError: no solutions, or an N beyond the samples of some problem.
            MissingExtra: an answer needs math-verify (extra `math`).
        """
        rows = graded(solutions, grader)
        scaling = scaling_report(rows, self.ns, draws=self.draws, seed=self.seed)
        tables, values, notes = list(scaling.tables), dict(scaling.values), list(scaling.notes)
        labels = {s.false_positive for s in rows if s.correct and s.false_positive is not None}
        checkers = list(dict.fromkeys(name for s in rows if s.correct for name in s.verdicts))
        if len(labels) == 2:
            found = detector_report(rows, seed=self.seed)
            tables += found.tables
            values["detectors"] = dict(found.values)
            notes += found.notes
        elif checkers:
            notes.append(
                "Checkers cannot be scored: that needs human labels on right answers, of both kinds."
            )
        if checkers:
            tables.append(_flag_table(rows, checkers))
            notes.append(
                "A checker's flags are not the false-positive rate: it misses some and raises false alarms. Have a "
                "random part of the right answers read by people."
            )
        return Report(
            title="Right answers from wrong reasoning",
            tables=tuple(tables),
            values=values,
            notes=tuple(notes),
            provenance={
                "solutions": len(rows),
                "problems": len({s.problem for s in rows}),
                "sources": list(dict.fromkeys(s.source for s in rows)),
                "labelled": sum(s.correct is True and s.false_positive is not None for s in rows),
                "draws": self.draws,
                "seed": self.seed,
            },
        )


def _flag_table(rows: Sequence[Solution], checkers: Sequence[str]) -> Table:
    """How many right answers each checker flags, by source."""
    lines = []
    for source in dict.fromkeys(s.source for s in rows):
        for name in checkers:
            said = [s.verdicts[name] for s in rows if s.source == source and s.correct and name in s.verdicts]
            read = [v for v in said if v is not None]
            flagged = share(sum(v is False for v in read), len(read))
            lines.append((source, name, len(said), len(said) - len(read), str(flagged)))
    return Table(
        "What checkers flag",
        ("source", "checker", "right answers", "unread", "flagged"),
        tuple(lines),
    )


__all__ = [
    "CARD",
    "CHECKING",
    "Cost",
    "MathFalsePositives",
    "Solution",
    "check",
    "check_id",
    "check_prompts",
    "detector_report",
    "fp_correct",
    "scaling_report",
    "with_verdicts",
]
