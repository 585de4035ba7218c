"""Two checkpoints on one page: what `demur.explain.post_training.compare` found, drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demur.explain.post_training.results import Comparison, Confidence, Curve, Knowledge, Refusal, Truth
from demur.files import write_atomic
from demur.flows.explain import places
from demur.flows.settings import public_name
from demur.report.explainpage import PageView, to_html
from demur.report.layerplots import layer_lines, layer_map
from demur.report.render import percent, plain
from demur.report.view import Figure, Section
from demur.types import Table

FOLD = 12
"""Tables of more rows are closed at first."""
COSINES = (-0.2, 1.0)
CEILING = "two halves of one model"


def write(found: Comparison, out: str | Path) -> tuple[Path, Path | None]:
    """Write vs.html and vs.json into a folder, or the page alone into a file .html."""
    html, data = places(Path(out), "vs")
    html.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(html, to_html(view(found)))
    if data is not None:
        document = {**plain(found.to_dict()), "kind": "comparison"}
        write_atomic(data, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return html, data


def view(found: Comparison) -> PageView:
    """The comparison as a page."""
    tables = found.report.tables
    sections = (
        _knowledge(found.knowledge, _of(tables, "Facts")),
        _truth(found.truth, _of(tables, "Truth")),
        _refusal(found.refusal, _of(tables, "Refusal")),
        _confidence(found.confidence, _of(tables, "Confidence")),
    )
    facts = [
        ("base", (found.base_fingerprint or "unknown")[:12]),
        ("tuned", (found.tuned_fingerprint or "unknown").rsplit("+", 1)[-1][:12]),
        ("layers", str(found.layers)),
        ("seed", str(found.seed)),
    ]
    return PageView(
        kicker="What post-training changed inside",
        title=f"{public_name(found.base)} and {public_name(found.tuned)}",
        verdict=verdict(found),
        detail="Both models read the same prompts, so a direction that stayed can have a cosine near 1; two "
        "halves of the prompts in one model show what the choice of prompts alone does.",
        sections=sections,
        warnings=found.notes,
        facts=tuple(facts),
    )


def verdict(found: Comparison) -> str:
    """What was found in one clause: the measured likenesses, in the order facts, truth, refusal."""
    parts = []
    if (k := found.knowledge) is not None and (pearson := k.likeness["tuned"].pearson) is not None:
        parts.append(f"maps of facts correlate at {pearson:.2f}")
    if (t := found.truth) is not None and (cosine := t.cosines[t.layer]) is not None:
        parts.append(f"truth directions have cosine {cosine:.2f}")
    if (r := found.refusal) is not None and (cosine := r.cosines[r.position][r.layer]) is not None:
        parts.append(f"refusal directions {cosine:.2f} at layer {r.layer}")
    text = ", ".join(parts) or "Nothing could be compared"
    return text[0].upper() + text[1:]


def _of(tables: Sequence[Table], prefix: str) -> tuple[Table, ...]:
    return tuple(t for t in tables if t.title.startswith(prefix))


def _section(
    slug: str, title: str, lead: str, tables: Sequence[Table], figures: Sequence[Figure] = ()
) -> Section:
    return Section(
        slug=slug,
        title=title,
        lead=lead,
        figures=tuple(figures),
        tables=tuple(t for t in tables if len(t.rows) <= FOLD),
        folded=tuple(t for t in tables if len(t.rows) > FOLD),
    )


def _missing(slug: str, title: str) -> Section:
    return Section(
        slug=slug, title=title, missing="Not measured; the note above says why, if it was asked for."
    )


def _knowledge(k: Knowledge | None, tables: Sequence[Table]) -> Section:
    if k is None:
        return _missing("facts", "Where facts are kept")
    plain_run = {name: k.margins[name.rsplit(" into ", 1)[-1]][1] for name in k.maps}
    limit = max(1e-9, *(float(np.abs(np.asarray(m) - plain_run[name]).max()) for name, m in k.maps.items()))
    key = [i for i, role in enumerate(k.roles) if role != "other"]
    figures = [
        Figure(
            svg=layer_map(k.columns, np.asarray(m).T, middle=plain_run[name], limit=limit, marked=key),
            alt=f"Patch map of {name}: effect of copying each token's state at each layer.",
            title=name,
            caption=f"Mean over {k.pairs} pairs. No colour: nothing changed against the false statement; full "
            f"colour: {limit:.1f} in logits. Subject and object in dark ink.",
        )
        for name, m in k.maps.items()
    ]
    lead = (
        "The state of a true statement is copied into a false one, one token and layer at a time. Teal: the model "
        "moves to the true answer, orange: further to the false one."
    )
    return _section("facts", "Where facts are kept", lead, tables, figures)


def _truth(t: Truth | None, tables: Sequence[Table]) -> Section:
    if t is None:
        return _missing("truth", "The direction of truth")
    figure = _cosines("truth", {"base and tuned": t.cosines, CEILING: t.ceiling})
    lead = (
        "The direction from false to true statements, fitted on all sets but one and tested on that one, also on "
        "the other model's states."
    )
    return _section("truth", "The direction of truth", lead, tables, [figure])


def _refusal(r: Refusal | None, tables: Sequence[Table]) -> Section:
    if r is None:
        return _missing("refusal", "The direction of refusal")
    figures = [
        _cosines(f"refusal-{i}", {"base and tuned": r.cosines[p], CEILING: r.ceiling[p]}, f"At {p}")
        for i, p in enumerate(r.positions)
    ]
    rows = [(f"{m}, {p}", _numbers(r.auroc[m][p])) for m in r.auroc for p in r.positions]
    figures.append(
        Figure(
            svg=layer_map(
                [name for name, _ in rows],
                [values for _, values in rows],
                middle=0.5,
                limit=0.5,
                beside=("words", [r.bag_of_words] * len(rows)),
            ),
            alt="AUROC on held-out requests by model, position and layer, with a bag of words beside it.",
            title="AUROC on held-out requests",
            caption=f"No colour is 0.5, full colour 1. {r.n_fit} requests fitted on, {r.n_test} tested.",
        )
    )
    lead = "The direction from harmless to harmful requests, at the same position and under one template."
    return _section("refusal", "The direction of refusal", lead, tables, figures)


def _confidence(c: Confidence | None, tables: Sequence[Table]) -> Section:
    if c is None:
        return _missing("confidence", "Confidence")
    lead = (
        f"Neurons of the last layer that write much and prefer no token may set how sure the model sounds. Of "
        f"{c.of}, {len(c.shared)} are candidates in both models: {percent(c.iou)} of all candidates, by chance "
        f"{c.expected:.3f}."
    )
    return _section("confidence", "Confidence", lead, tables)


def _cosines(name: str, lines: dict[str, Curve], title: str = "") -> Figure:
    return Figure(
        svg=layer_lines(
            {label: _numbers(v) for label, v in lines.items()},
            name=f"vs-{name}",
            title="cosine",
            domain=COSINES,
        ),
        alt="Cosine of the two models' directions by layer, beside that of two halves of one model.",
        title=title,
    )


def _numbers(curve: Curve) -> list[float]:
    return [float("nan") if v is None else v for v in curve]
