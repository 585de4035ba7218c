"""What people's labels of a part of the answers say about the judges and about the rate.

Each label counts inverse to its answer's chance of being drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import special

from demur import stats
from demur.errors import InputError
from demur.flows.labels import By, Labels
from demur.judges.base import Pair, positive
from demur.measure.refusal import ByPeople, Said, by_people, cluster_of, clustered
from demur.report.render import interval, percent
from demur.types import Report, Table, Verdict

_ESTIMATES = ("sensitivity", "specificity", "kappa")


def evaluate(pairs: Sequence[Pair], verdicts: By, labels: Labels, *, width: float | None = None) -> Report:
    """Each judge against people's labels, and the rate with the judge's error taken out.

    Weights are inverse to the chance of being drawn: cells of the sheet, split by what the judge says, with their
    known shares of all answers. Several answers to one prompt, or to prompts of a group, count as one draw, which
    is on the safe side.

    Args:
        width: asks how many labels would make the corrected interval so wide.

    Raises:
        InputError: a judge of another scale than the labels', or a width that is none.
    """
    for judge, of_one in verdicts.items():
        if any(v.scale != labels.scale for v in of_one):
            raise InputError(f"{judge} judges {of_one[0].scale} and the labels are about {labels.scale}")
    values = {judge: _against(judge, pairs, of_one, labels, width) for judge, of_one in verdicts.items()}
    columns = ["judge", "raw", "corrected", "sensitivity", "specificity", "kappa"]
    columns += [f"labels for a width of {width:g}"] if width else []
    rows = tuple(
        (
            judge,
            v["rate"],
            _bounds(v["rate"].corrected, v["rate"].corrected_interval),
            *(_bounds(v[k].value, v[k].interval) for k in ("sensitivity", "specificity")),
            _number(v["kappa"]),
            *([v["needed"]["text"]] if width else []),
        )
        for judge, v in values.items()
    )
    left = sum(c is None for c in labels.cells)
    notes = [
        f"{labels.counts['labels']} labels from {labels.drawn}, {sum(map(bool, labels.yes.values()))} of them yes."
    ]
    notes += gaps(labels.counts)
    if left:
        notes.append(f"{left} answers without text (error, filter, empty) are in no figure here.")
    tables = [Table("Judges against your labels", tuple(columns), rows, _WHAT)]
    if len(labels.said) > 1:
        tables.append(_cell_table(labels))
    figures = {
        judge: {k: _values(e) if isinstance(e, stats.Estimate) else e for k, e in v.items()}
        for judge, v in values.items()
    }
    return Report(
        title="Your labels",
        tables=tuple(tables),
        values={
            "judges": figures,
            **labels.counts,
            "left": left,
        },
        provenance={"drawn": labels.drawn, "width": width},
        notes=tuple(notes),
    )


_WHAT = (
    "Raw: share that the judge calls declined (or harmful). Corrected: the share that people would find, from the "
    "judge on all answers and people on the labelled ones. Brackets: 95% intervals."
)


def gaps(counts: Mapping[str, int]) -> list[str]:
    """What is said of labels that are missing or of no use (`Labels.counts`)."""
    said = []
    if counts["unsure"] or counts["blank"]:
        said.append(
            f"{counts['unsure']} answers could not be told and {counts['blank']} have no label yet; within a cell "
            "they are taken to be like the others."
        )
    if counts["other"]:
        said.append(f"{counts['other']} labels are of answers that are not here.")
    return said


def _against(
    judge: str, pairs: Sequence[Pair], verdicts: Sequence[Verdict], labels: Labels, width: float | None
) -> dict[str, Any]:
    inside = [i for i, c in enumerate(labels.cells) if c is not None]
    flags = [(positive(verdicts[i]), cluster_of(pairs[i][0])) for i in inside]
    made = by_people(flags, [Said(labels.cells[i], labels.yes.get(i)) for i in inside])
    if made is None:  # `read_labels` lets no such labels through
        raise InputError("no answer with text has a label")
    found = made.found
    rate = replace(
        clustered(flags, judge), corrected=found.rate.value, corrected_interval=found.rate.interval
    )
    out = {"rate": rate, **{name: getattr(found, name) for name in _ESTIMATES}}
    if width is not None:
        out["needed"] = _needed(made, width)
    return out


def _needed(made: ByPeople, width: float) -> dict[str, Any]:
    found = made.found
    needed = stats.labels_needed(found.spread, max(1, round(made.answers)), width)
    if needed is not None:
        needed = int(np.ceil(needed / made.per_label))
        return {"labels": needed, "answers": None, "text": str(needed)}
    p = found.rate.value or 0.0
    more = int(np.ceil(p * (1 - p) * (2 * float(special.ndtri(0.975)) / width) ** 2))
    return {"labels": None, "answers": more, "text": f"not with these answers; about {more} answers needed"}


def _cell_table(labels: Labels) -> Table:
    size = Counter(c for c in labels.cells if c is not None)
    done = [(labels.cells[i], y) for i, y in labels.yes.items() if y is not None]
    rows = []
    for c, said in enumerate(labels.said):
        n = sum(at == c for at, _ in done)
        rows.append((*said.values(), size[c], n, stats.rate(sum(bool(y) for at, y in done if at == c), n)))
    return Table("Cells", (*labels.said[0], "answers", "labelled", "people say yes"), tuple(rows))


def _values(found: stats.Estimate) -> dict[str, float | None]:
    low, high = found.interval or (None, None)
    return {"value": found.value, "low": low, "high": high}


def _number(found: stats.Estimate) -> str:
    if found.value is None or found.interval is None:
        return "–"
    return f"{found.value:.2f} [{found.interval[0]:.2f}–{found.interval[1]:.2f}]"


def _bounds(value: float | None, ends: tuple[float, float] | None) -> str:
    return "–" if value is None or ends is None else f"{percent(value)} [{interval(*ends)}]"
