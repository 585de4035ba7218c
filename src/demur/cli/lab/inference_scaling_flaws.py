"""`demur lab inference-scaling-flaws`: what resampling with a verifier can reach, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from demur.cli import options as o
from demur.cli.screen import say, warn
from demur.errors import InputError
from demur.files import read_rows, read_text, write_atomic

if TYPE_CHECKING:
    from demur.measure.inference_scaling import InferenceScaling
    from demur.measure.inference_scaling.closed_form import TaskTypes
    from demur.types import Report

_SAMPLE = "sample"
_TYPES = """completeness: 1
soundness: 0.75
types:
  easy: {share: 0.58, correct: 0.87}
  hard: {share: 0.42, correct: 0.13}"""


def run(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="CSV or JSONL, one row for each sampled answer; or YAML with task types; or nothing, with --type.",
        ),
    ] = None,
    task: Annotated[str, typer.Option(metavar="COLUMN", help="Which task the sample belongs to.")] = "task",
    sample: Annotated[
        str,
        typer.Option(metavar="COLUMN", help="Tells samples of a task apart; twice the same is an error."),
    ] = _SAMPLE,
    base: Annotated[str, typer.Option(metavar="COLUMN", help="Did the verifier accept it?")] = "accepted",
    plus: Annotated[str, typer.Option(metavar="COLUMN", help="Was it truly correct?")] = "correct",
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Compare several models, named in this column.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--type", metavar="SHARE:CORRECT", help="A task type, e.g. 0.58:0.87; once for each type."
        ),
    ] = None,
    soundness: Annotated[
        float | None, typer.Option(help="With --type: share of wrong answers that the verifier rejects.")
    ] = None,
    completeness: Annotated[
        float, typer.Option(help="With --type: share of correct answers that it accepts.")
    ] = 1.0,
    value: Annotated[float, typer.Option(help="What a right answer is worth.")] = 1.0,
    cost_false: Annotated[float, typer.Option(help="What an accepted wrong answer costs.")] = 0.0,
    cost_sample: Annotated[float, typer.Option(help="What one attempt costs.")] = 0.0,
    target: Annotated[
        float | None,
        typer.Option(help="Accuracy to reach, e.g. what a stronger model has with one sample."),
    ] = None,
    min_samples: Annotated[int, typer.Option(min=1, help="Leave out tasks with fewer samples.")] = 1,
    drop_false_negatives: Annotated[
        bool,
        typer.Option(
            "--drop-false-negatives",
            help="Leave out tasks with more correct than accepted samples, as the paper does.",
        ),
    ] = False,
    boot: Annotated[int, typer.Option(min=100, help="Bootstrap resamples of the tasks.")] = 1000,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Also write report.json, report.md, curve.csv and curve.svg."
        ),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Sample until a verifier accepts: the ceiling, the best number of attempts, and the curve between.

    No answer is worth 0. With a table all numbers have intervals over tasks; with task types they are exact.
    """
    from demur.measure.inference_scaling import Costs, InferenceScaling
    from demur.report.render import to_json, to_text

    costs = Costs(value=value, false=cost_false, sample=cost_sample)
    how = InferenceScaling(costs=costs, target=target, n_boot=boot, seed=seed)
    if file is None or file.endswith((".yaml", ".yml")):
        report = how.expect(_types(file, kind, soundness, completeness))
    elif kind or soundness is not None:
        raise InputError(
            f"{file} holds verdicts, and --type and --soundness describe task types; give one of them"
        )
    else:
        columns = {"task": task, "sample": sample, "base": base, "plus": plus}
        report = _table(how, file, columns, by, min_samples, drop_false_negatives)
    say(to_json(report).rstrip("\n") if as_json else to_text(report))
    if out is not None:
        _write(report, out)


def _types(
    file: str | None, kind: list[str] | None, soundness: float | None, completeness: float
) -> TaskTypes:
    from demur.measure.inference_scaling import TaskTypes

    if file is not None:
        if kind or soundness is not None:
            raise InputError(f"{file} holds the task types; leave --type and --soundness out")
        return _types_file(file)
    if not kind or soundness is None:
        raise InputError(
            "give a table of verdicts (FILE), a YAML file of task types, or --type and --soundness, e.g. "
            "--type 0.58:0.87 --type 0.42:0.13 --soundness 0.75"
        )
    pairs = []
    for text in kind:
        try:
            share, correct = map(float, text.split(":"))
        except ValueError:
            raise InputError(f"--type {text}: write SHARE:CORRECT, e.g. 0.58:0.87") from None
        pairs.append((share, correct))
    return TaskTypes(*zip(*pairs, strict=True), soundness=soundness, completeness=completeness)


def _types_file(file: str) -> TaskTypes:
    from demur.measure.inference_scaling import TaskTypes

    try:
        raw = yaml.safe_load(read_text(file))
    except yaml.YAMLError as e:
        raise InputError(f"{file}: not YAML ({e})") from None
    types = raw.get("types") if isinstance(raw, Mapping) else None
    if not isinstance(types, Mapping) or not types or not all(isinstance(t, Mapping) for t in types.values()):
        raise InputError(f"{file}: holds no `types`. It should look like this:\n{_TYPES}")

    def numbers(key: str, default: float | None = None) -> list[float]:
        found = [t.get(key, raw.get(key, default)) for t in types.values()]
        for name, x in zip(types, found, strict=True):
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                raise InputError(
                    f"{file}: type {name!r} has {key}: {x!r}; it must be a number between 0 and 1"
                )
        return found

    known = {"share", "correct", "soundness", "completeness"}
    extra = (set(raw) - {"types", "soundness", "completeness"}) | {
        k for t in types.values() for k in t if k not in known
    }
    if extra:
        raise InputError(
            f"{file}: unknown field {', '.join(sorted(map(str, extra)))}. It should look like this:\n{_TYPES}"
        )
    return TaskTypes(
        numbers("share"),
        numbers("correct"),
        soundness=numbers("soundness"),
        completeness=numbers("completeness", 1.0),
        names=tuple(map(str, types)),
    )


def _table(
    how: InferenceScaling, file: str, columns: dict[str, Any], by: str | None, min_samples: int, drop: bool
) -> Report:
    from demur.measure.inference_scaling import read_verdicts

    rows = read_rows(file)
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line, row in rows:
        if by is not None and row.get(by) in (None, ""):
            raise InputError(
                f"{file}, line {line}: nothing in column {by!r} (--by); the row has {', '.join(row)}"
            )
        groups.setdefault("" if by is None else str(row[by]), []).append((line, row))
    if columns["sample"] == _SAMPLE and not any(_SAMPLE in row for _, row in rows):
        columns["sample"] = None
    models = {}
    for name, part in groups.items():
        verdicts = read_verdicts(part, **columns)
        keep = verdicts.n >= min_samples
        if drop:
            keep &= verdicts.correct <= verdicts.accepted
        if not keep.any():
            raise InputError(
                f"{file}: none of {len(verdicts)} tasks{f' of {name}' if name else ''} is left after --min-samples "
                f"{min_samples}{' and --drop-false-negatives' if drop else ''}"
            )
        if not keep.all():
            warn(
                f"{name + ': ' if name else ''}left out {int((~keep).sum())} of {len(verdicts)} tasks, as asked"
            )
        models[name] = verdicts.take(keep)
    return how.score(models[""]) if by is None else how.compare(models)


def _write(report: Report, out: Path) -> None:
    from demur.measure.inference_scaling.plot import drawing
    from demur.report.render import to_csv, to_json, to_markdown

    files = {"report.json": to_json(report), "report.md": to_markdown(report)}
    if "curve" in report.values:
        from demur.types import Table

        curve = report.values["curve"]
        rows = tuple(tuple(None if x != x else x for x in row) for row in zip(*curve.values(), strict=True))
        files["curve.csv"] = to_csv(Table("curve", tuple(curve), rows))
        try:
            files["curve.svg"] = drawing(report)
        except InputError as e:
            warn(f"no curve.svg: {e}")
    for name, text in files.items():
        write_atomic(out / name, text)
    warn(f"wrote {', '.join(files)} to {out}")
