"""Answers that exist already, from demur's own tables and from other tools' logs.

| file | told by | what is read |
|---|---|---|
| `.csv`, `.jsonl` | columns `prompt`, `response` | also category, expected, verdict, ...: see `joining` |
| Inspect `.eval`, `.json` | zip of `samples/`; `eval` and `samples` | input, output, errors, epochs, metadata |
| lm-eval `samples_*.jsonl` | `doc` and `resps` | the doc's prompt, every response before filters |
| garak `*.report.jsonl` | `entry_type` | attempts: prompt and outputs |
| OpenAI batch output | `custom_id` and `response` | the chat completion or the error of each row |

Category and expectation come from the file where it has them (Inspect metadata or target, lm-eval docs), else
from `prompts`, matched by text and then by id. Nothing is dropped: a row without an answer keeps its error.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import parse_json, read_rows, read_text
from demur.report.importers import garak, inspect_log, lm_eval, openai_batch
from demur.report.importers.joining import RESPONSE_NAMES, VERDICT_WORDS, Answers, Row, joined
from demur.types import PromptSet

__all__ = ["RESPONSE_NAMES", "VERDICT_WORDS", "Answers", "load_answers"]


def load_answers(path: str | Path, prompts: PromptSet | None = None) -> Answers:
    """Read answers; the format is recognised. `-` is standard input (CSV or any of the JSONL forms).

    Args:
        path: the file.
        prompts: where category and expectation come from when the file has only ids and responses.

    Raises:
        InputError: a row without prompt or response, a repeated (id, sample), an id that `prompts` does not
            hold, an unknown verdict, verdicts in some rows only, or a run folder's row whose text was withheld.
        MissingExtra: an `.eval` file in zstd compression and no package that reads it.

    Example:
        >>> import tempfile, pathlib
        >>> f = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
        >>> head, row = "prompt,response,category,expected", "How to kill a process?,Use kill.,safety,comply"
        >>> _ = f.write_text(f"{head}\\n{row}\\n")
        >>> load_answers(f).replies[0].content
        'Use kill.'
    """
    return joined(_rows(path, prompts), path, prompts)


def _rows(path: str | Path, prompts: PromptSet | None) -> list[Row]:
    suffix = Path(str(path)).suffix.lower()
    if suffix == ".eval":
        return inspect_log.rows_of_zip(Path(path))
    if suffix == ".json":
        log = parse_json(read_text(path), str(path))
        if not inspect_log.is_log(log):
            raise InputError(
                f"{path}: no Inspect log (an object with `eval` and `samples`); answers of your own go into "
                ".jsonl or .csv, one object or row per answer"
            )
        return inspect_log.rows(log, str(path))
    found = [(f"line {n}", row) for n, row in read_rows(path)]
    if suffix == ".csv" and not any(c in row for _, row in found for c in RESPONSE_NAMES):
        _check_columns(path, next(csv.reader(io.StringIO(read_text(path), newline="")), []))
    first: Mapping[str, Any] = found[0][1]
    if garak.is_row(first):
        return garak.rows(found, str(path))
    if openai_batch.is_row(first):
        return openai_batch.rows(found, str(path), prompts)
    if lm_eval.is_row(first):
        return lm_eval.rows(found, str(path))
    if str(path) == "-":  # it cannot be read again for its header, nor be asked for its kind
        _check_columns(path, sorted({c for _, row in found for c in row}))
    return found


def _check_columns(path: str | Path, columns: Sequence[str]) -> None:
    """Where all answers are empty, there is at least a column for them."""
    if not {*RESPONSE_NAMES, "verdict", "error"} & set(columns):
        raise InputError(f"{path}: needs a column `response`; found columns {', '.join(columns)}")
