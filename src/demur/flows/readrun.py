"""Read a run back: the folder that `measure` or `card` wrote, or any file of answers.

Where verdicts are stored they are used; a file without them is judged as it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur import judges
from demur.errors import InputError
from demur.files import from_row
from demur.flows.measure import DEFAULT_JUDGE, judge_of_refusals
from demur.flows.people import People, kept
from demur.flows.runs import RunFolder, StoredReply
from demur.judges import Agreement, Judge, human
from demur.judges.base import PREREAD, judge_all
from demur.measure.paired import Key, judge_of
from demur.measure.refusal import Record
from demur.report.importers import Answers, load_answers
from demur.types import Prompt, PromptSet, Reply, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Prompts, answers and verdicts, joined by (prompt id, condition, sample).

    A run that was stopped holds prompts without answers; `records` are what was answered and judged. `agreement` is
    the judge's measured error as the folder holds it, and `people` the labels that its report was corrected by.
    """

    name: str
    prompts: PromptSet
    replies: Mapping[Key, StoredReply]
    verdicts: Mapping[Key, Verdict]
    provenance: Mapping[str, Any]
    agreement: Sequence[Agreement] = ()
    people: People | None = None

    @property
    def records(self) -> list[Record]:
        """Judged answers in the order of the run."""
        by_id = {p.id: p for p in self.prompts}
        return [
            Record(by_id[key[0]], stored.reply, self.verdicts[key])
            for key, stored in self.replies.items()
            if key in self.verdicts
        ]

    @property
    def conditions(self) -> dict[str, Mapping[str, Any]]:
        """Settings by condition, as far as the run knows them (a file of answers knows none)."""
        names = dict.fromkeys(key[1] for key in self.replies)
        own = self.provenance.get("condition")
        stored = self.provenance.get("conditions") or ([own] if own else [])
        known = {c.get("name", "default"): c for c in stored}
        if len(names) == len(stored) == 1:  # answers from a file keep the name that the file gave them
            known = dict.fromkeys(names, stored[0])
        return {
            name: {
                k: v for k, v in known.get(name, {}).items() if k not in ("name", "streams", "schema_version")
            }
            for name in names
        }

    @property
    def judge(self) -> str:
        """The one judge behind the verdicts."""
        return judge_of(self.records)


def read_run(path: str | Path, *, judge: str | Judge | None = None, prompts: PromptSet | None = None) -> Run:
    """A run folder, or a file of answers in any form that `load_answers` reads.

    Args:
        path: folder with run.json, or a file (`-` is standard input).
        judge: the judge wanted, or its id. By default stored verdicts are used, and files without any are read by
            `rules/demur-v1`; verdicts of another judge than the one asked for are made anew.
        prompts: where category and expectation come from, for files that have only ids and answers.

    Raises:
        InputError: no run there, answers to judge anew whose text was withheld, or verdicts of harm.

    Example:
        >>> import tempfile, pathlib
        >>> f = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = f.write_text("prompt,response,expected\\nHow to kill a process?,Use kill.,comply\\n")
        >>> read_run(f).records[0].verdict.label
        <Label.COMPLIANCE: 'compliance'>
    """
    reader = None if judge is None else judge_of_refusals(judge)
    if Path(path).is_dir():
        if prompts is not None:
            raise InputError(f"{path}: a run folder brings its own prompts; leave the prompt file out")
        run = _folder(RunFolder(path), reader)
    else:
        run = _answers(load_answers(path, prompts), reader)
    other = {v.scale for v in run.verdicts.values()} - {"refusal"}
    if other:
        raise InputError(
            f"{path}: the verdicts are on the scale {', '.join(sorted(other))}; rates of refusal need a judge "
            "of refusals"
        )
    return run


def read_answers(path: str | Path, prompts: PromptSet | None = None) -> tuple[PromptSet, tuple[Reply, ...]]:
    """Prompts and answers of a run folder or a file, to be judged anew.

    Raises:
        InputError: as `read_run` and `load_answers`, or a folder that kept some answers without their text.
    """
    if not Path(path).is_dir():
        answers = load_answers(path, prompts)
        return answers.prompts, answers.replies
    run = read_run(path, prompts=prompts)
    if gone := sum(r.withheld is not None for r in run.replies.values()):
        raise InputError(
            f"{path}: {gone} answers were kept without their text, so nobody can read them. Judge the file that "
            "the answers came from, or collect again with --keep-unsafe-text"
        )
    return run.prompts, tuple(r.reply for r in run.replies.values())


def _folder(run: RunFolder, judge: Judge | None) -> Run:
    config = run.config
    prompts = run.prompts()
    if prompts is None:
        raise InputError(f"{run.path}: holds no prompts.jsonl, so it is no finished run; run it again")
    replies, verdicts = {}, {}
    for streams in run.text_streams:
        files = [str(run.file(name)) for name in streams]
        for n, row in enumerate(run.rows(streams[0]), 1):
            withheld = row.pop("withheld", None)
            reply = from_row(Reply, row, f"{files[0]}, line {n}")
            replies[_key(reply)] = StoredReply(reply, withheld)
        for n, row in enumerate(run.rows(streams[1]), 1):
            verdict = from_row(Verdict, row, f"{files[1]}, line {n}")
            verdicts[_key(verdict)] = verdict
    if not verdicts:
        raise InputError(f"{run.path}: holds no judged answers; a run of scores alone cannot be compared")
    known = {p.id for p in prompts}
    if lost := [key[0] for key in replies if key[0] not in known]:
        raise InputError(
            f"{run.path}: holds an answer to the prompt {lost[0]!r}, which prompts.jsonl does not hold"
        )
    if judge is not None and not _made_by(judge, verdicts.values()):
        verdicts = _judged_again(run.path, judge, prompts, replies)
    return Run(
        name=str(config["model"]["name"]),
        prompts=PromptSet(str(config["prompts"]["name"]), prompts.prompts),
        replies=replies,
        verdicts=verdicts,
        provenance=config,
        agreement=run.agreement,
        people=kept(run),
    )


def _made_by(judge: Judge, verdicts: Iterable[Verdict]) -> bool:
    """Whether stored verdicts are this judge's; people's labels are read again, their file may have grown."""
    own = {v.judge for v in verdicts} <= {PREREAD, judge.id}
    return own and not judge.id.startswith(human.PREFIX)


def _judged_again(
    path: Path, judge: Judge, prompts: PromptSet, replies: Mapping[Key, StoredReply]
) -> dict[Key, Verdict]:
    gone = sum(r.withheld is not None for r in replies.values())
    if gone:
        raise InputError(
            f"{path}: {gone} answers were kept without their text, so {judge.id} cannot read them. Use the stored "
            "verdicts (leave --judge out), or collect again with --keep-unsafe-text"
        )
    return _judge(judge, prompts, [r.reply for r in replies.values()])


def _judge(judge: Judge, prompts: PromptSet, replies: Sequence[Reply]) -> dict[Key, Verdict]:
    by_id = {p.id: p for p in prompts}
    pairs: list[tuple[Prompt, Reply]] = [(by_id[r.prompt_id], r) for r in replies]
    return {_key(v): v for v in judge_all(judge, pairs)}


def _answers(answers: Answers, judge: Judge | None) -> Run:
    if answers.verdicts and (judge is None or _made_by(judge, answers.verdicts)):
        verdicts = {_key(v): v for v in answers.verdicts}
    else:
        verdicts = _judge(judge or judges.get(DEFAULT_JUDGE), answers.prompts, answers.replies)
    return Run(
        name=answers.model or answers.prompts.name,
        prompts=answers.prompts,
        replies={_key(r): StoredReply(r) for r in answers.replies},
        verdicts=verdicts,
        provenance={
            "kind": "answers",
            "prompts": {"name": answers.prompts.name, "hash": answers.prompts.hash},
        },
    )


def _key(row: Reply | Verdict) -> Key:
    return (row.prompt_id, row.condition, row.sample)
