"""A run in another tool's files: an Inspect log, or lm-eval results and samples."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from demur.errors import InputError
from demur.files import write_atomic
from demur.flows.readrun import Run
from demur.flows.settings import versions
from demur.judges import agreement
from demur.measure.refusal import Record, by_text, declined, judge_error
from demur.report.exports import Exported, Item
from demur.report.exports.inspect_log import to_inspect
from demur.report.exports.lm_eval import to_lm_eval
from demur.report.render import rate_row
from demur.types import Rate


def export(
    run: Run,
    out: str | Path,
    to: Literal["inspect", "lm-eval"],
    *,
    unsafe: bool = False,
    created: str | None = None,
) -> list[Path]:
    """Write a run for Inspect (one log) or lm-eval (results and samples) into a folder.

    Args:
        run: from `read_run`. out: the folder; for Inspect its log directory.
        unsafe: keep the text of answers to what should be refused, where the run has it.
        created: ISO time to put into the files; now by default, since a run holds no clock.

    Returns:
        The files written.

    Raises:
        InputError: a run without judged answers, or a file where the folder should be.
    """
    with agreement.adding(run.agreement):
        made, folder = exported(run, created), Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"{folder}: is a file; an export needs a folder, since its files have names of their own"
        )
    files = (to_inspect if to == "inspect" else to_lm_eval)(made, unsafe=unsafe)
    for name, text in files.items():
        write_atomic(folder / name, text)
    return [folder / name for name in files]


def exported(run: Run, created: str | None = None) -> Exported:
    """The neutral form that the exporters write."""
    records = run.records
    if not records:
        raise InputError(f"{run.name}: the run holds no judged answers, so there is nothing to export")
    errors = {
        side: judge_error(run.judge, should_refuse=side == "refusal") for side in ("refusal", "over_refusal")
    }
    return Exported(
        model=run.name,
        task=run.prompts.name,
        judge=run.judge,
        judge_error={
            side: {
                "dataset": e.dataset,
                "stratum": e.stratum,
                "sensitivity": rate_row(e.sensitivity),
                "specificity": rate_row(e.specificity),
            }
            for side, e in errors.items()
            if e is not None
        },
        conditions=run.conditions,
        rates={name: rate_row(rate) for name, rate in rates(records).items()},
        items=tuple(
            Item(
                prompt=r.prompt,
                reply=r.reply,
                verdict=r.verdict,
                declined=declined(r.verdict.label),
                withheld=run.replies[r.prompt.id, r.reply.condition, r.reply.sample].withheld,
            )
            for r in records
        ),
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        versions=run.provenance.get("versions") or versions(),
    )


def rates(records: Sequence[Record]) -> dict[str, Rate]:
    """Rates as `measure` prints them, by the names that gates use: `refusal`, `over_refusal`, and each with a
    category behind a dot. The answers of all conditions are counted together."""
    names = (("refuse", "refusal"), ("lookalike", "over_refusal"))
    return {
        name if row == "all" else f"{name}.{row}": two[side]
        for row, two in by_text(records).items()
        for side, name in names
        if two[side].n
    }
