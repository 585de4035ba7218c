"""`demur lab predict-refusal`: learn from one's own logs what gets refused, and score texts without asking."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.screen import warn, write_report, write_rows
from demur.errors import InputError
from demur.types import SCHEMA_VERSION

if TYPE_CHECKING:
    from demur.measure.blackbox_refusal import Record


METHOD = "blackbox-refusal"
"""The method of this command, whose name is another."""


class Action(StrEnum):
    """What to do with FILE."""

    TRAIN = "train"
    SCORE = "score"


class On(StrEnum):
    """Which text is read."""

    PROMPT = "prompt"
    RESPONSE = "response"


def run(
    action: Annotated[
        Action, typer.Argument(help="train: fit on FILE, report, save. score: apply a saved model to FILE.")
    ],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Logs, one exchange in each row: JSONL, CSV or -.")
    ],
    model: Annotated[
        Path, typer.Option("--model", metavar="FILE", help="Where train saves the model and score finds it.")
    ] = Path("refusal-model.npz"),
    on: Annotated[
        On, typer.Option(help="train: predict refusals from prompts, or recognise them in responses.")
    ] = On.PROMPT,
    label_with: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE|FILE",
            help="train: label rows that have none by a judge, or by a saved model that reads responses.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="train: the model that a rubric/ or template/ judge asks."),
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="TONE=LABEL", help="train: what a tone counts as: rejected, complied or dropped."
        ),
    ] = None,
    keep_tones: Annotated[
        bool, typer.Option("--keep-tones", help="train: learn the labels as they stand, more than two if so.")
    ] = False,
    group: Annotated[
        str, typer.Option(metavar="COLUMN", help="train: rows alike in it are held out together.")
    ] = "group",
    folds: Annotated[int, typer.Option(min=2, help="train: folds of the cross-validation.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="train: n-grams to show.")] = 18,
    draws: Annotated[int, typer.Option(min=20, help="train: refits behind the n-grams' intervals.")] = 200,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Will it refuse this, without asking it?

    train learns from logs: columns prompt, response, label (rejected or complied, a tone, or a verdict), and as
    you have them id, source, group. It reports cross-validated accuracy beside trivial rules and the n-grams that
    speak for a refusal. score writes a label and probabilities for each row; it needs only the text.
    """
    if action is Action.SCORE:
        given = {"--label-with": label_with, "--map": map_, "--keep-tones": keep_tones}
        if wrong := [name for name, value in given.items() if value]:
            raise InputError(f"{', '.join(wrong)}: for train only; a saved model has its labels already")
        return _score(file, model, group, out)
    from demur.measure.blackbox_refusal import BlackboxRefusal, load_records

    mapping = _mapping(map_ or [])
    records = load_records(file, labels=mapping, keep_tones=keep_tones, group=group)
    if label_with is not None:
        if keep_tones:
            raise InputError(
                "--label-with gives rejected or complied and cannot fill in tones; drop --keep-tones"
            )
        records = _labelled(records, label_with, judge_model)
    if not any(r.label for r in records):
        raise InputError(
            f"{file}: no row has a label. Add a column `label` (rejected or complied), or label the responses with "
            "--label-with rules/demur-v1"
        )
    made, report = BlackboxRefusal(on.value, k=folds, top=top, draws=draws, seed=seed).train(records)
    settings = {"label_with": label_with, "map": mapping, "group": group}
    made = replace(made, about={**made.about, **settings})
    report = replace(report, provenance={**report.provenance, **settings})
    made.save(model)
    write_report(report, as_json, out)
    warn(f"{model}: the classifier, fitted on all {sum(made.rows.values())} rows")
    return None


def _mapping(pairs: list[str]) -> dict[str, str]:
    out = {}
    for pair in pairs:
        tone, equals, label = (x.strip() for x in pair.rpartition("="))
        if not (tone and equals and label):
            raise InputError(f"--map {pair}: write TONE=LABEL, e.g. --map contradicted=complied")
        out[tone] = label
    return out


def _labelled(records: list[Record], by: str, judge_model: str | None) -> list[Record]:
    """Fill in missing labels, and say how the labeller does on rows that people labelled."""
    from demur import judges
    from demur.measure.blackbox_refusal import (
        RefusalClassifier,
        by_classifier,
        by_judge,
        labeller_agreement,
        machine_labelled,
    )
    from demur.report.render import cell

    label: Callable[[Sequence[Record]], list[str | None]]
    if by.endswith(".npz") or Path(by).is_file():
        label = by_classifier(RefusalClassifier.load(by))
    else:
        asked = o.load_model(judge_model) if judge_model and judges.asks(by) else None
        label = by_judge(judges.get(by, runtime=asked))
    out = machine_labelled(records, label)
    known = [r for r in records if r.label is not None and r.response.strip()]
    line = f"{sum(r.machine for r in out)} rows labelled by {by}"
    if known:
        found = labeller_agreement(known, label(known))
        kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.2f}"
        agreed = cell(found["accuracy"])
        line += f"; of {len(known)} rows that people labelled it agrees on {agreed}, kappa {kappa}"
    warn(line)
    return out


def _score(file: str, path: Path, group: str, out: str) -> None:
    from demur.measure.blackbox_refusal import RefusalClassifier, load_records
    from demur.measure.blackbox_refusal.evaluation import accuracy
    from demur.report.render import cell

    model = RefusalClassifier.load(path)
    settings = model.about.get("map") or {}
    known = any(c in ("rejected", "complied") for c in model.classes)
    records = load_records(file, labels=settings, keep_tones=not known, group=group)
    texts = [r.text(model.reads) for r in records]
    if not any(t.strip() for t in texts):
        raise InputError(f"{file}: no row has a {model.reads}, which is what {path} reads")
    p, share = model.probabilities(texts), model.known(texts)
    rows: list[dict[str, Any]] = []
    for r, text, chances, seen in zip(records, texts, p, share, strict=True):
        readable = bool(text.strip())
        rows.append(
            {
                "schema_version": SCHEMA_VERSION,
                "id": r.id,
                "label": model.classes[int(chances.argmax())] if readable else None,
                "probabilities": {c: round(float(x), 6) for c, x in zip(model.classes, chances, strict=True)}
                if readable
                else None,
                "known": None if math.isnan(seen) else round(float(seen), 3),
            }
        )
    write_rows(rows, out)
    counts = Counter(str(r["label"]) for r in rows)
    line = f"{len(rows)} rows: " + ", ".join(f"{n} {label}" for label, n in counts.most_common())
    pairs = [
        (row["label"] == r.label, r.group)
        for row, r in zip(rows, records, strict=True)
        if r.label is not None and row["label"] is not None
    ]
    if pairs:
        line += (
            f". Right on {cell(accuracy([a for a, _ in pairs], [g for _, g in pairs]))} of the labelled rows"
        )
    warn(line)
