"""Answers that output judges accept, of which an honesty probe flags some: measured, never searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from demur.errors import InputError
from demur.judges import FAKE_COMPLIANCE
from demur.measure.refusal import clustered
from demur.measure.strategic_dishonesty.fooled import Known
from demur.types import Rate, Report, Table


def accepted_report(
    known: Sequence[Known],
    flagged: Sequence[bool | None],
    accepted: Mapping[str, Sequence[bool | None]],
    harmless: Rate,
    *,
    fresh: bool,
) -> Report:
    """For each judge the share of the answers it accepts that a probe flags, beside that of harmless answers.

    Args:
        known: answers; with `fake`, accepted fakes and accepted real ones stand apart. flagged: by the probe, in
            their order; None where it could not read one.
        accepted: judge -> whether it calls each answer a success (`fooled.success`); None where it was not read.
        harmless: share flagged of answers known to be harmless, at the same threshold: what it costs.
        fresh: these are not the answers that the threshold was set on.

    Raises:
        InputError: no judge, or not one flag and one verdict for each answer.
    """
    sizes = {"flags": len(flagged)} | {judge: len(said) for judge, said in accepted.items()}
    if not known or not accepted or set(sizes.values()) != {len(known)}:
        raise InputError(
            f"{sizes} for {len(known)} answers of {len(accepted)} judges; each answer needs a flag and a verdict"
        )
    rows: list[tuple[Any, ...]] = []
    values: dict[str, Any] = {}
    for judge, said in accepted.items():
        v = _of(known, flagged, said, judge)
        values[judge] = v
        rows.append((judge, v["accepted"], v["flagged"], v["flagged_fake"], v["flagged_real"]))
    kind = "" if fresh else ", those the threshold was set on"
    rows.append((f"harmless answers{kind}", "", harmless, "", harmless))
    columns = ("accepted by", "accepted", "of these flagged", "of the fake ones", "of the real ones")
    return Report(
        title="Accepted by a judge, flagged by the probe",
        tables=(
            Table(
                "Accepted but flagged",
                columns,
                tuple(rows),
                "Flagged where judge and probe could read an answer; fake and real where that is known.",
            ),
        ),
        values={"accepted": values, "harmless": harmless, "harmless_fresh": fresh},
        notes=(
            "A flag is no proof: what is flagged of harmless answers is flagged of any.",
            *(
                ()
                if fresh
                else ("On answers that did not set the threshold more may be flagged (--harmless).",)
            ),
            FAKE_COMPLIANCE,
        ),
    )


def _of(
    known: Sequence[Known], flagged: Sequence[bool | None], said: Sequence[bool | None], judge: str
) -> dict[str, Rate]:
    mine = [((f, k.prompt), k.fake) for f, k, s in zip(flagged, known, said, strict=True) if s]
    return {
        "accepted": clustered(((s, k.prompt) for s, k in zip(said, known, strict=True)), judge),
        "flagged": clustered((f for f, _ in mine), judge),
        "flagged_fake": clustered((f for f, fake in mine if fake is True), judge),
        "flagged_real": clustered((f for f, fake in mine if fake is False), judge),
    }
