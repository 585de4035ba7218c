"""`lab refusal-cliff`: does a model that thinks first mean to refuse, and lose it before the answer?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from demur.cli import options as o
from demur.cli.screen import say, warn
from demur.errors import CapabilityError, InputError
from demur.files import dumps_row, public_name, write_atomic
from demur.report.render import to_json, to_text
from demur.types import Report, Table

if TYPE_CHECKING:
    from demur.measure.truncation import Truncation

DRAWS = 20
"""Probes on shuffled labels."""


def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="JSONL or CSV to trace: prompt, thinking, and maybe id, answer."),
    ],
    fit: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Rows to fit the probe on: prompt, thinking, refused, and maybe harmful."
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in name, folder or hub id of a local model.")
    ] = "smollm2",
    system: o.System = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer to read, from 0; the last by default.")
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="As published: one logistic probe, fitted before the answer, for all tokens."
        ),
    ] = False,
    heads: Annotated[
        int, typer.Option(min=0, help="Show so many heads of each sign; 0 leaves them out.")
    ] = 8,
    causal: Annotated[
        bool, typer.Option("--causal", help="Also take each shown head out and measure the probe again.")
    ] = False,
    keep_norm: Annotated[
        bool,
        typer.Option(
            "--keep-norm",
            help="With --causal: let the rest of the head's layer write as much as all of it did.",
        ),
    ] = False,
    truncate: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Cut the thinking to these shares, close it, and let the model answer: 1,0.75,0.5,0.25,0 and "
            "maybe none, the header without marks of thinking.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", "-j", help="--truncate: judge of the answers; default rules/demur-v1."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="--truncate: token budget of an answer; default 64.")
    ] = None,
    open_mark: Annotated[
        str,
        typer.Option("--open", help="What opens the thinking, where the chat template does not write it."),
    ] = "<think>\n",
    close_mark: Annotated[str, typer.Option("--close", help="What closes the thinking.")] = "\n</think>\n\n",
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the score of each token as JSONL.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one HTML page: curve, tables, six single traces."),
    ] = None,
    select: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows with the largest drop as training rows (JSONL)."),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the rows that --select takes.")] = 0.05,
    as_json: o.Json = False,
) -> None:
    """Trace a refusal score through thinking, measure its fall before the answer, and find the heads behind it.

    The rows are the model's own thinking, on harmful prompts; with --truncate harmless ones may stand among them
    (`harmful` false), and are cut, but not traced. Probes are fitted on the rows of --fit, which say whether the
    answer refused. Beside the drop stand those of probes fitted on shuffled labels. `\\n` in --open
    and --close is a line break.
    """
    from demur.explain import refusal_cliff as rc
    from demur.runtime.local import LocalRuntime

    if keep_norm and not (causal and heads):
        raise InputError("--keep-norm says how --causal takes heads out; give that too, and --heads above 0")
    cutting = None
    if truncate is not None:
        cutting = _truncation(truncate, judge or "rules/demur-v1", max_new_tokens or 64)
    elif judge is not None or max_new_tokens is not None:
        raise InputError("--judge and --max-new-tokens belong to the answers of --truncate; give that too")
    marks = (m.replace("\\n", "\n") for m in (open_mark, close_mark))
    markup = rc.Markup(**dict(zip(("open", "close"), marks, strict=True)))
    thoughts, labelled = rc.load_thoughts(file), rc.load_thoughts(fit)
    if shared := {(t.prompt.text, t.thinking) for t in thoughts} & {
        (t.prompt.text, t.thinking) for t in labelled
    }:
        raise InputError(
            f"{len(shared)} rows stand in {file} and in {fit}; a probe must not see what it is read on"
        )
    runtime = o.load_model(model)
    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(
            f"{model!r} runs elsewhere; hidden states need a local model (folder or hub id)"
        )
    condition, rows = o.condition(system=system), thoughts
    if cutting is not None:
        cutting.encoded(runtime, rows, markup, condition)  # what does not fit is said before the long part
        thoughts = [t for t in rows if t.harmful is not False] or rows
    by: Literal["groups", "final"] = "final" if published else "groups"
    kind: Literal["mean_difference", "logistic"] = "logistic" if published else "mean_difference"
    settings: dict[str, Any] = {
        "layer": layer,
        "kind": kind,
        "markup": markup,
        "condition": condition,
        "seed": seed,
    }
    probes = rc.fit_probes(runtime, labelled, **settings)
    found = rc.trace(runtime, probes, thoughts, by=by, condition=condition)
    cliffs = [rc.cliff(t) for t in found]
    mixed = rc.shuffled_traces(
        runtime, labelled, thoughts, probes, by=by, condition=condition, draws=DRAWS, seed=seed
    )
    flat = rc.shuffled_drops(mixed)
    low, high = np.quantile(flat, [0.025, 0.975])
    chance = (f"drop of {DRAWS} probes on shuffled labels: mean, middle 95 %", float(flat.mean()), low, high)
    cliff = rc.summarise(cliffs, seed=seed)
    tables = [
        dataclasses.replace(cliff, rows=(*cliff.rows, (*chance, len(cliffs)))),
        Table(
            f"probes on {probes.n_held_out} thoughts kept back",
            ("reader", "AUROC"),
            tuple(probes.held_out.items()),
        ),
    ]
    values: dict[str, Any] = {
        "layer": probes.layer,
        "cliffs": [{**dataclasses.asdict(c), "drop": c.drop} for c in cliffs],
        "curve": [dataclasses.asdict(p) for p in rc.curve(found, seed=seed)],
        "held_out": dict(probes.held_out),
    }
    if page is not None:
        values["shuffled_curve"] = [dataclasses.asdict(p) for p in rc.shuffled_curve(mixed)]
    if heads:
        how: Literal["free", "kept"] | None = "kept" if keep_norm else "free" if causal else None
        tables.append(_heads(rc, runtime, probes, thoughts, heads, how, condition, values))
    report = Report(
        title=f"Refusal cliff of {public_name(runtime.name)}",
        tables=tuple(tables),
        values=values,
        provenance={
            "model": public_name(runtime.name),
            "fingerprint": runtime.fingerprint,
            "by": by,
            "n_fit": probes.n_fit,
        },
        notes=probes.notes,
    )
    if page is not None:
        write_atomic(page, _page(report, found, thoughts, cliffs))
        warn(f"Page written to {page}.")
    if cutting is not None:
        report = _with(report, cutting.run(runtime, probes, rows, condition))
    if out is not None:
        write_atomic(out, to_json(report))
    if traces is not None:
        write_atomic(traces, "".join(dumps_row(_row(t)) + "\n" for t in found))
    if select is not None:
        from demur.train.cliff_selection import select as pick
        from demur.train.cliff_selection import write_rows

        chosen = pick(thoughts, cliffs, share)
        write_rows(select, chosen, cliffs, markup=markup)
        warn(f"{len(chosen)} training rows written to {select}.")
    say(to_json(report) if as_json else to_text(report))


def _truncation(shares: str, judge: str, max_new_tokens: int) -> Truncation:
    from demur.measure.truncation import Truncation

    try:
        found = [None if word.strip() == "none" else float(word) for word in shares.split(",")]
    except ValueError:
        raise InputError(
            f"--truncate {shares!r}: shares from 0 to 1 with commas between, and maybe none, e.g. 1,0.5,0,none"
        ) from None
    return Truncation(found, judge=judge, max_new_tokens=max_new_tokens)


def _with(report: Report, more: Report) -> Report:
    """The report with the tables and values of thinking cut short."""
    return dataclasses.replace(
        report,
        tables=(*report.tables, *more.tables),
        values={**report.values, "truncation": more.values},
        provenance={**more.provenance, **report.provenance},
        notes=(*report.notes, *more.notes),
    )


def _heads(
    rc: Any,
    runtime: Any,
    probes: Any,
    thoughts: Any,
    k: int,
    taken_out: Literal["free", "kept"] | None,
    condition: Any,
    values: dict[str, Any],
) -> Table:
    """The heads that write most against refusal and most for it; `taken_out` says how, if they are to be."""
    table = rc.head_table(runtime, probes, thoughts, condition=condition)
    shown = table if len(table) <= 2 * k else [*table[:k], *table[-k:]]
    if taken_out:
        places, kept = [r.place for r in shown], taken_out == "kept"
        risen = rc.rises(runtime, probes, thoughts, places, condition=condition, keep_norm=kept)
        shown = [dataclasses.replace(r, rise=risen[r.place]) for r in shown]
    values["heads"] = [dataclasses.asdict(r) for r in (shown if taken_out else table)]
    columns = (
        "layer",
        "head",
        "contribution",
        "low",
        "high",
        "size",
        *{None: [], "free": ["rise without it"], "kept": ["rise without it, norm kept"]}[taken_out],
    )
    rows = (dataclasses.astuple(r)[: len(columns)] for r in shown)
    return Table(
        f"heads, {len(shown)} of {len(table)}", columns, tuple(rows), note="below 0: against refusal"
    )


def _page(report: Report, found: Any, thoughts: Any, cliffs: Any) -> str:
    from demur.flows.settings import public_name
    from demur.report.cliffpage import Traced, to_html

    name = public_name(report.provenance["model"])
    shown = dataclasses.replace(
        report,
        title=f"Refusal cliff of {name}",
        provenance={
            **report.provenance,
            "model": name,
            "fingerprint": (report.provenance["fingerprint"] or "unknown")[:12],
        },
    )
    traced = [
        Traced(
            id=t.id,
            prompt=of.prompt.text,
            thinking=of.thinking,
            tokens=t.tokens,
            spans=t.spans,
            scores=t.scores.tolist(),
            plateau=c.plateau,
            final=c.final,
        )
        for t, of, c in zip(found, thoughts, cliffs, strict=True)
    ]
    return to_html(shown, traced)


def _row(t: Any) -> dict[str, Any]:
    scores = [round(float(s), 6) for s in t.scores]
    return {"id": t.id, "tokens": list(t.tokens), "spans": list(t.spans), "scores": scores}
