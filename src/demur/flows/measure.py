"""`measure`: ask prompt sets under one or several conditions, judge, and report with intervals.

    from demur.flows.measure import measure
    from demur.flows.suites import load
    made = measure(runtime, load(["over-refusal:core"]), out="run")

Collecting is the card's (`flows.collect`) and so is the run folder (`flows.runs`): killed at any moment, the same
call goes on. Each condition has its own pair of streams; shards of a run are joined by `merge`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur import judges
from demur.control.refusal_tokens import RefusalTokens, check_point
from demur.errors import InputError
from demur.files import dumps_row, to_row, write_atomic
from demur.flows import people
from demur.flows.asking import askable
from demur.flows.batchfiles import BatchOutput, shard_of
from demur.flows.collect import Given, Stage, collect, judged, sources
from demur.flows.measure_tables import Tally, report_of
from demur.flows.runs import WINDOW, RunFolder, differing
from demur.flows.settings import base_config, model_config, public_name
from demur.judges import Judge, agreement, judge_all
from demur.measure.refusal import Said
from demur.report.importers import Answers
from demur.report.render import to_json
from demur.runtime.base import Runtime
from demur.types import Condition, OperatingPoint, Prompt, PromptSet, Report

DEFAULT_JUDGE = "rules/demur-v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Where the run is, and what it says."""

    json: Path
    report: Report


def measure(
    runtime: Runtime,
    prompts: PromptSet,
    out: str | Path = "out",
    *,
    conditions: Sequence[Condition] | None = None,
    judge: str | Judge = DEFAULT_JUDGE,
    samples: int = 1,
    shard: tuple[int, int] | None = None,
    operating_point: OperatingPoint | None = None,
    allow_refusal_lowering: bool = False,
    keep_unsafe_text: bool = False,
    fresh: bool = False,
    labels: str | Path | None = None,
    key: str | Path | None = None,
    progress: bool = True,
) -> Measured:
    """Ask, judge and report.

    Args:
        runtime: the model. prompts: what to ask (`flows.suites.load`).
        out: run folder; gets report.json and everything collected. The same call goes on in it.
        conditions: what may change beside the prompt; names are unique, of letters, digits, - and _.
        judge: id of a judge of refusals, or a judge. samples: answers per prompt; more than 1 need a temperature.
        shard: (i, n) asks only part i of n; `merge` joins the folders.
        operating_point: thresholds to answer under; by default those that came with the model.
        keep_unsafe_text: keep the text of answers that comply with what should be refused.
        fresh: throw away an earlier run in `out`.
        labels, key: people's labels of answers that `out` holds (`flows.labels.read_labels`), to correct the rates;
            nothing is asked then.

    Raises:
        InputError: nothing to ask, a folder of another run, a judge of harm, condition names that clash, labels of
            other answers.

    Example:
        >>> import tempfile
        >>> from demur.runtime.scripted import ScriptedRuntime
        >>> p = Prompt.of("How do I kill a process?", id="a", category="safety", expected=["compliance"])
        >>> made = measure(ScriptedRuntime({"a": "Use kill."}), PromptSet("s", (p,)), tempfile.mkdtemp())
        >>> made.report.values["conditions"]["default"]["rates"]["safety"]["lookalike"].k
        0
    """
    reader = judge_of_refusals(judge)
    point = operating_point or runtime.shipped_point
    rule = None
    if point is not None:
        check_point(point, runtime)
        rule = RefusalTokens(
            point, shipped=runtime.shipped_point, allow_refusal_lowering=allow_refusal_lowering
        )
    where = checked_conditions(conditions or (Condition(),), samples)
    asked = prompts
    skipped: dict[str, str] = {}
    for condition in where:  # a longer system message leaves less room for the prompt
        asked, more = askable(runtime, asked, condition)
        skipped |= more
    streams = _streams(where)
    stages = [
        Stage(
            name=f"texts-{c.name}",
            title=f"answering ({c.name})" if len(where) > 1 else "answering",
            kind="texts",
            runtime=runtime,
            prompts=asked.prompts,
            condition=c,
            streams=two,
            samples=samples,
            decide=rule,
        )
        for c, two in zip(where, streams, strict=True)
    ]
    config = {
        **base_config("measure", prompts, reader.id, where[0].seed, runtime),
        "model": model_config(runtime),
        "conditions": [
            {**to_row(c), "name": c.name, "streams": list(two)} for c, two in zip(where, streams, strict=True)
        ],
        "operating_point": to_row(point) if point else None,
        "refusal_lowering": rule is not None and rule.lowers is not None,
        "skipped": {"prompts": skipped},
        "samples": samples,
        "keep_unsafe_text": keep_unsafe_text,
        "window": WINDOW,
        "stages": dict(sources(stages)),
    }
    if shard is not None:
        window = WINDOW if runtime.deterministic else 1
        stages = [replace(s, prompts=tuple(shard_of(s.prompts, shard, window))) for s in stages]
        config["shard"] = {"i": shard[0], "n": shard[1], "window": window}
    if isinstance(runtime, BatchOutput):
        runtime.check(stages[0].prompts, where, samples)
    with RunFolder(out) as run:
        said = people.of_run(run, labels, key, fresh=fresh) if labels is not None else None
        run.start(config, fresh=fresh)
        run.save_prompts(prompts)
        people.keep(run, said)
        if said is None:
            collect(run, stages, reader, keep_unsafe_text=keep_unsafe_text, progress=progress)
        return _write_report(run, stages[0].prompts)


def measure_answers(
    answers: Answers,
    out: str | Path = "out",
    *,
    judge: str | Judge = DEFAULT_JUDGE,
    name: str | None = None,
    keep_unsafe_text: bool = False,
    fresh: bool = False,
    labels: str | Path | None = None,
    key: str | Path | None = None,
) -> Measured:
    """Report on answers that exist already (`demur.report.load_answers`). Needs neither torch nor a model.

    Args:
        answers: with their own verdicts, these count and `judge` is left alone.
        name: what to call the model; by default what the file says, else the prompt set's name.
        labels, key: people's labels of some of the answers (`flows.labels.read_labels`), to correct the rates.

    Raises:
        InputError: verdicts of several judges, a judge of harm, labels of other answers, or a folder that holds the
            run of a model.

    >>> import tempfile
    >>> p = Prompt.of("How do I kill a process?", id="a", expected=["compliance"])
    >>> given = Answers(PromptSet("s", (p,)), (Reply(prompt_id="a", content="Use kill."),), (), (), None)
    >>> rates = measure_answers(given, tempfile.mkdtemp()).report.values["conditions"]["as given"]["rates"]
    >>> rates["all"]["lookalike"].n
    1
    """
    given, answers = answers, answers.under_one_condition()
    said = people.of_answers(given, labels, key) if labels is not None else None
    own = sorted({v.judge for v in answers.verdicts})
    if len(own) > 1:
        raise InputError(f"verdicts of several judges ({', '.join(own)}); a report needs one")
    reader = judge_of_refusals(judge)
    config = {
        **base_config("replies", answers.prompts, own[0] if own else reader.id, 0),
        "model": {"name": public_name(name or answers.model or answers.prompts.name), "fingerprint": None},
        "conditions": [{"name": "as given", "streams": ["replies", "verdicts"]}],
        "samples": 1 + max(r.sample for r in answers.replies),
        "keep_unsafe_text": keep_unsafe_text,
    }
    by_id = {p.id: p for p in answers.prompts}
    verdicts = answers.verdicts or judge_all(reader, [(by_id[r.prompt_id], r) for r in answers.replies])
    with RunFolder(out) as run:
        # nothing was paid for in an earlier report on a file, so it may go; a model's run may not
        again = (run.path / "run.json").exists() and run.config.get("kind") == "replies"
        run.start(config, fresh=fresh or again)
        run.save_prompts(answers.prompts)
        rows = judged(
            ("replies", "verdicts"),
            by_id,
            answers.replies,
            Given(verdicts),
            keep_unsafe_text=keep_unsafe_text,
        )
        for stream, some in rows.items():
            write_atomic(run.file(stream), "".join(dumps_row(r) + "\n" for r in some))
        people.keep(run, said)
        return _write_report(run)


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    fresh: bool = False,
    labels: str | Path | None = None,
    key: str | Path | None = None,
) -> Measured:
    """Join the shards of a run. Of deterministic runtimes the result has the bytes of a run without shards.

    Raises:
        InputError: a folder that is no shard, shards of different runs, one missing or twice, or one that was
            stopped before its end.
    """
    shards = sorted(((_shard(path), path) for path in folders), key=lambda s: s[0].config["shard"]["i"])
    if not shards:
        raise InputError("nothing to join: name the folders of the shards")
    base, n = shards[0][0].config, shards[0][0].config["shard"]["n"]
    have = [run.config["shard"]["i"] for run, _ in shards]
    if have != list(range(1, n + 1)):
        raise InputError(
            f"the folders hold the parts {', '.join(map(str, have))}; needed is each of 1 to {n} once"
        )
    base.pop("shard")
    for run, path in shards:
        config = run.config
        part = config.pop("shard")
        if (part["n"], differences := list(differing(base, config))) != (n, []):
            shown = "".join(f"\n  {line}" for line in differences[:12]) or f" {part['n']} parts against {n}"
            raise InputError(f"{path}: is a part of another run:{shown}")
    prompts = _asked(shards[0][0])
    streams = [name for c in base["conditions"] for name in c["streams"]]
    for run, _ in shards:
        shard = run.config["shard"]
        part = shard_of(prompts, (shard["i"], n), shard["window"])
        keys = [(p.id, s) for p in part for s in range(base["samples"])]
        for name in streams:
            _check_complete(run, name, keys)
    with agreement.adding(r for part, _ in shards for r in part.agreement), RunFolder(out) as run:
        if (run.path / "run.json").exists() and "shard" in run.config:
            raise InputError(f"{run.path}: holds a part of a run; pass another folder to join the parts in")
        run.start(base, fresh=fresh)
        shutil.copyfile(shards[0][0].file("prompts"), run.file("prompts"))
        for name in streams:
            with run.file(name).open("wb") as whole:
                for part_run, _ in shards:
                    with part_run.file(name).open("rb") as f:
                        shutil.copyfileobj(f, whole)
        people.keep(run, people.of_run(run, labels, key) if labels is not None else None)
        return _write_report(run)


def report(out: str | Path) -> Measured:
    """Write report.json of a run folder again, without asking the model.

    Raises:
        InputError: no run of `measure` there.
    """
    with RunFolder(out) as run:
        return _write_report(run)


# --- checks ---


def judge_of_refusals(judge: str | Judge) -> Judge:
    """The judge, or the one with this id, if its verdicts are refusals.

    Raises:
        InputError: an unknown id, or a judge of harm.
    """
    reader = judges.get(judge) if isinstance(judge, str) else judge
    scale = getattr(reader, "scale", "refusal")
    if scale != "refusal":
        raise InputError(
            f"judge {reader.id!r} gives verdicts on the scale {scale!r}; rates of refusal need a judge of "
            "refusals. demur judge writes its verdicts"
        )
    return reader


def checked_conditions(conditions: Sequence[Condition], samples: int) -> tuple[Condition, ...]:
    """Conditions whose names can be file names, with samples that can differ.

    Raises:
        InputError: a name twice or with other characters, or several samples at temperature 0.
    """
    names = [c.name for c in conditions]
    for c in conditions:
        if not re.fullmatch(r"[\w.+-]+", c.name):
            raise InputError(f"condition name {c.name!r}: use letters, digits, - . + and _ only")
        if samples > 1 and not c.temperature:
            raise InputError(
                f"samples={samples} at temperature 0 would be copies of one answer; set a temperature, e.g. 0.7"
            )
    if len(set(names)) < len(names):
        raise InputError(f"conditions share a name ({', '.join(names)}); results are joined by it")
    return tuple(conditions)


# --- the folder ---


def _streams(conditions: Sequence[Condition]) -> list[tuple[str, str]]:
    """Names of the reply and verdict streams: plain for one condition, else with the condition's name."""
    if len(conditions) == 1:
        return [("replies", "verdicts")]
    return [(f"replies-{c.name}", f"verdicts-{c.name}") for c in conditions]


def _rows(run: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a stream one by one; a torn last line ends it."""
    path = run.file(name)
    if not path.exists():
        return
    with path.open("rb") as f:
        for raw in f:
            if raw.endswith(b"\n"):
                yield json.loads(raw)


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return str(row["prompt_id"]), int(row.get("sample", 0))


def _asked(run: RunFolder) -> tuple[Prompt, ...]:
    skipped = run.config.get("skipped", {}).get("prompts", {})
    return tuple(p for p in run.prompts() or () if p.id not in skipped)


def _write_report(run: RunFolder, prompts: Sequence[Prompt] | None = None) -> Measured:
    config = run.config
    if "conditions" not in config:
        raise InputError(f"{run.path}: holds no run of demur measure; a card is reported by demur card")
    if prompts is None:
        prompts, shard = _asked(run), config.get("shard")
        if shard is not None:
            prompts = shard_of(prompts, (shard["i"], shard["n"]), shard["window"])
    said = people.kept(run)
    tallies = [_tally(run, c, prompts, config["samples"], said) for c in config["conditions"]]
    with agreement.adding(run.agreement):
        result = report_of(tallies, config, said)
    path = run.path / "report.json"
    write_atomic(path, to_json(result))
    return Measured(json=path, report=result)


def _tally(
    run: RunFolder,
    condition: Mapping[str, Any],
    prompts: Sequence[Prompt],
    samples: int,
    by_people: people.People | None,
) -> Tally:
    at = {p.id: i for i, p in enumerate(prompts)}
    labels: list[list[str | None]] = [[None] * samples for _ in prompts]
    said = [[Said(None)] * samples for _ in prompts] if by_people else None
    for row in _rows(run, condition["streams"][1]):
        id, sample = _key(row)
        labels[at[id]][sample] = sys.intern(str(row["label"]))
        if said is not None and by_people is not None:
            said[at[id]][sample] = by_people.said[id, str(row.get("condition", "default")), sample]
    if run.config["kind"] == "replies":  # a file may hold more answers to some prompts than to others
        there = [[s for s, label in enumerate(some) if label is not None] for some in labels]
        labels = [[row[s] for s in some] for row, some in zip(labels, there, strict=True)]
        said = [[row[s] for s in some] for row, some in zip(said, there, strict=True)] if said else None
    return Tally(condition["name"], prompts, labels, said)


# --- shards ---


def _shard(path: str | Path) -> RunFolder:
    run = RunFolder(path)
    if "shard" not in run.config:
        raise InputError(f"{path}: holds a whole run and no part of one (demur measure --shard i/n)")
    return run


def _check_complete(run: RunFolder, name: str, keys: Sequence[tuple[str, int]]) -> None:
    found = [_key(row) for row in _rows(run, name)]
    if found != keys:
        lost = len(set(keys) - set(found))
        what = f"{lost} of {len(keys)} rows are missing" if lost else "the rows are not in order"
        raise InputError(f"{run.file(name)}: {what}; run the same command for this part again, then join")
