"""People's labels of a part of a run's answers, kept in its folder, for the rates of its report.

`of_run` and `of_answers` join a file of labels with the answers of a run, `keep` writes what they say into the run
folder (or takes away what an earlier report was corrected by), and `kept` is what the report is made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demur.errors import InputError
from demur.files import write_atomic
from demur.flows.label_figures import gaps
from demur.flows.labels import Answer, read_labels
from demur.flows.runs import PEOPLE, RunFolder
from demur.measure.paired import Key
from demur.measure.refusal import LEAST, Said
from demur.report.importers import Answers
from demur.types import SCHEMA_VERSION, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """What labels say of every answer of a run, by key.

    Attributes:
        counts: as in `Labels.counts`.
        drawn: how the labelled answers were chosen.
    """

    said: Mapping[Key, Said]
    counts: Mapping[str, int]
    drawn: str

    def of(self, replies: Iterable[Reply]) -> list[Said]:
        """What they say of these answers, in order."""
        return [self.said[r.prompt_id, r.condition, r.sample] for r in replies]

    @property
    def how(self) -> str:
        """Where the corrected rates of a report come from."""
        return (
            f"by your labels of {self.counts['labels']} answers (prediction-powered; behind each how many fell "
            f"into its row), left out where they are worth fewer than {LEAST}"
        )

    @property
    def notes(self) -> list[str]:
        """What the report says of the labels."""
        return [
            f"{self.counts['labels']} labels by people correct these rates, from {self.drawn}.",
            *gaps(self.counts),
        ]

    @property
    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return {"by": "labels", "method": "prediction-powered", **self.counts, "drawn": self.drawn}


def joined(
    path: str | Path,
    key: str | Path | None,
    answers: Sequence[Answer],
    replies: Sequence[Reply] | None = None,
) -> People:
    """Read labels of a run's answers.

    Args:
        path, key: as in `read_labels`. answers: every answer, as the sheet was drawn from.
        replies: the same in order, as the report names them; by default those of the answers.

    Raises:
        InputError: as `read_labels`, or labels of harm.
    """
    found = read_labels(path, answers, key)
    if found.scale != "refusal":
        raise InputError(
            f"{path}: the labels are about {found.scale}; rates of refusal need labels of refusals "
            "(demur judge --labels reads others)"
        )
    keys = [(r.prompt_id, r.condition, r.sample) for r in replies or [a.reply for a in answers]]
    said = {k: Said(c, found.yes.get(i)) for i, (k, c) in enumerate(zip(keys, found.cells, strict=True))}
    return People(said=said, counts=found.counts, drawn=found.drawn)


def of_answers(answers: Answers, path: str | Path, key: str | Path | None) -> People:
    """Labels of the answers of a file, for the report that knows them under one condition.

    Raises:
        InputError: as `joined`.
    """
    return joined(path, key, [Answer.of(r) for r in answers.replies], answers.under_one_condition().replies)


def of_run(run: RunFolder, path: str | Path, key: str | Path | None, *, fresh: bool = False) -> People:
    """Labels of the answers that a run folder holds.

    Raises:
        InputError: as `joined`, a folder without answers, or one whose answers are to be thrown away.
    """
    if fresh:
        raise InputError(
            f"{path}: --fresh throws away the answers that these labels belong to; leave one of the two out"
        )
    answers = []
    for replies, verdicts in run.text_streams if (run.path / "run.json").exists() else ():
        judged = run.verdicts(verdicts)
        answers += [Answer.stored(r, judged.get(k)) for k, r in run.replies(replies).items()]
    if not answers:
        raise InputError(
            f"{path}: labels belong to answers that are there, and {run.path} holds none; run the same command "
            "without labels first, and draw the sheet from its folder (demur judge RUN --sample-for-labels 150)"
        )
    return joined(path, key, answers)


def keep(run: RunFolder, people: People | None) -> None:
    """Write what the next report of a folder is corrected by; None takes away what an earlier one was."""
    path = run.path / PEOPLE
    if people is None:
        path.unlink(missing_ok=True)
        return
    rows = (json.dumps([*k, s.cell, s.yes]) for k, s in people.said.items())
    head = {"schema_version": SCHEMA_VERSION, "drawn": people.drawn, "counts": dict(people.counts)}
    body = ",\n".join(rows)
    write_atomic(path, f'{json.dumps(head)[:-1]}, "answers": [\n{body}\n]}}\n')


def kept(run: RunFolder) -> People | None:
    """What `keep` wrote, or None."""
    path = run.path / PEOPLE
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    said = {
        (id, condition, sample): Said(cell, yes) for id, condition, sample, cell, yes in stored["answers"]
    }
    return People(said=said, counts=stored["counts"], drawn=stored["drawn"])
