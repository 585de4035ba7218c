"""`judge`: labels for answers by one judge or several, and how far they agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, warn, write_report, write_rows
from demur.errors import InputError
from demur.types import Report, Verdict

if TYPE_CHECKING:
    from demur.judges.base import Judge


def judge(
    ctx: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="Answers: columns prompt and response (JSONL, CSV or -), or a run folder. None to --validate.",
        ),
    ] = None,
    judge_ids: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            "-j",
            metavar="ID",
            help="A judge, rules/demur-v1 unless given; repeat it to compare. A wrong id lists all.",
        ),
    ] = None,
    judge_model: o.JudgeModel = None,
    agreement: o.Agreement = None,
    both_orders: Annotated[
        bool,
        typer.Option(
            "--both-orders", help="Rubrics: ask twice, choices in both orders; disagreement is unparsed."
        ),
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts, when FILE holds only ids and answers (demur generate)."),
    ] = None,
    sample_for_labels: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draw N answers for people to label, more where the judges disagree: CSV, HTML and key in --out.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labels by people: what they say about the judges and the rate."),
    ] = None,
    key: o.LabelKey = None,
    width: Annotated[
        float | None,
        typer.Option(help="With --labels: how many labels make the interval so wide, e.g. 0.05."),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Measure the judges on the public human-labelled sets (demur data)."),
    ] = False,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Label answers on the refusal scale, or for harm; or measure the judges themselves.

    Writes JSONL verdicts, judge after judge. How the judges differ, and how far each agrees with people, is said
    on stderr. --sample-for-labels, --labels and --validate write no verdicts.
    """
    from demur import judges
    from demur.flows.readrun import read_answers

    _check(file, sample_for_labels, labels, key, width, validate, as_json, out, agreement)
    o.add_agreement(ctx, agreement)
    ids = list(dict.fromkeys(judge_ids or (judges.available() if validate else ["rules/demur-v1"])))
    asks = [judges.asks(i) for i in ids]
    if judge_model and not any(asks):
        raise InputError(
            f"--judge-model {judge_model}: none of {', '.join(ids)} asks a model; leave the option out"
        )
    answers = read_answers(file, o.load_prompt_file(prompts) if prompts else None) if file else None
    runtime = o.load_model(judge_model) if judge_model else None
    chosen = [judges.get(i, runtime=runtime, orders=2 if both_orders else 1) for i in ids]
    if answers is None:
        _validate(list(zip(chosen, asks, strict=True)), as_json, out)
        return
    asked, replies = answers
    by_id = {p.id: p for p in asked}
    pairs = [(by_id[r.prompt_id], r) for r in replies]
    verdicts: dict[str, list[Verdict]] = {}
    for one in chosen:
        with progress(one.id, out) as report:
            verdicts[one.id] = judges.judge_all(one, pairs, report)
    if sample_for_labels is not None or labels is not None:
        from demur.flows import labels as by_people
        from demur.flows.label_figures import evaluate

        if labels is None:
            sheet = by_people.draw(pairs, verdicts, sample_for_labels or 0, seed=seed)
            paths = by_people.write_sheet(sheet, pairs, out)
            warn(f"{len(sheet.rows)} of {len(pairs)} answers drawn: label {paths[0]} or {paths[1]},")
            warn(
                f"then run the same command with --labels LABELS --key {paths[2]} in place of --sample-for-labels, "
                "or give both to demur measure or demur card"
            )
        else:
            found = by_people.read_labels(labels, [by_people.Answer.of(r) for r in replies], key)
            write_report(evaluate(pairs, verdicts, found, width=width), as_json, out)
        return
    write_rows((v for of_one in verdicts.values() for v in of_one), out)
    summarise(verdicts)
    for judge_id in verdicts:
        if judges.measured_error(judge_id) and (other := judges.material_warning(judge_id, asked)):
            warn(other)


def _check(
    file: str | None,
    sample: int | None,
    labels: Path | None,
    key: Path | None,
    width: float | None,
    validate: bool,
    as_json: bool,
    out: str,
    agreement: list[Path] | None,
) -> None:
    """Options that belong together."""
    modes = {
        "--sample-for-labels": sample is not None,
        "--labels": labels is not None,
        "--validate": validate,
    }
    asked = [name for name, on in modes.items() if on]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are different jobs; run one after the other")
    if bool(file) == validate:
        raise InputError(
            f"--validate measures judges on public sets and takes no file, got {file}"
            if validate
            else "needs a FILE of answers to judge (or --validate, to measure judges on public sets)"
        )
    if labels is None and (key or width is not None):
        raise InputError("--key and --width belong to --labels FILE")
    if agreement and asked:
        raise InputError(f"--agreement stands beside verdicts, and {asked[0]} writes none; leave it out")
    if as_json and asked in ([], ["--sample-for-labels"]):
        raise InputError("--json belongs to --labels or --validate; verdicts are JSONL anyway")
    if sample is not None and out == "-":
        raise InputError("--sample-for-labels writes three files; name a folder for them with --out")


def _validate(chosen: list[tuple[Judge, bool]], as_json: bool, out: str) -> None:
    import time

    from demur.judges import agreement

    rows = []
    for one, asks in chosen:
        clock = time.perf_counter if asks else time.process_time
        with progress(one.id, "") as report:
            rows += agreement.validate([one], missing=warn, clock=clock, progress=report)
    report_of = Report(
        title="Judges against people",
        tables=agreement.tables(rows),
        values={"rows": [asdict(r) for r in rows]},
    )
    if out != "-":
        agreement.write(rows, out)
    write_report(report_of, as_json, "-")


def summarise(verdicts: dict[str, list[Verdict]]) -> None:
    """What the judges said, how they differ, and how far each agrees with people, on stderr."""
    if len(verdicts) > 1:
        from demur import judges
        from demur.report.render import to_text

        warn(to_text(Report(title="Judges compared", tables=judges.compare(verdicts))).rstrip())
    else:
        for of_one in verdicts.values():
            counts = Counter(str(v.label) for v in of_one)
            warn(f"{len(of_one)} answers: " + ", ".join(f"{n} {label}" for label, n in counts.most_common()))
    for judge_id in verdicts:
        warn(judge_error(judge_id))


def judge_error(judge_id: str) -> str:
    """One sentence on how far a judge agreed with people, and on what."""
    from demur import judges
    from demur.judges import agreement
    from demur.report.render import percent

    found = judges.measured_error(judge_id)
    if not found:
        return f"{judge_id} has not been measured against people{agreement.others_added(judge_id)}."
    lines = []
    for a in (a for a in found if a.stratum == "all"):
        said, what = [], "refusals" if a.scale == "refusal" else "harmful"
        if a.sensitivity is not None:
            said.append(f"{percent(a.sensitivity)} of {a.n_pos} {what} found")
        if a.specificity is not None:
            said.append(f"{percent(1 - a.specificity)} of {a.n_neg} other answers called {what}")
        lines.append(f"  {a.dataset}: {', '.join(said)}")
    return "\n".join([f"{judge_id} against people:", *lines])
