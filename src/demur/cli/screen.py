"""What people see: messages on stderr, results on stdout, and nothing a model wrote unfiltered."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demur.files import dumps_row, write_atomic
from demur.report.render import clean, plain, to_json, to_text
from demur.runtime.base import Progress
from demur.types import Report


def warn(message: str) -> None:
    """A line on stderr, cleaned: messages quote ids, prompts and what servers said."""
    print(clean(message), file=sys.stderr)  # noqa: T201


def say(text: str) -> None:
    """Model or user text on stdout: cleaned when a terminal reads it, untouched in a pipe."""
    shown = clean(text) if sys.stdout.isatty() else text.encode("utf-8", "replace").decode()
    sys.stdout.write(shown + "\n")


def say_json(value: Any) -> None:
    """A JSON document on stdout."""
    say(json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False, default=str))


def write_rows(rows: Iterable[Any], out: str) -> None:
    """Write nouns as JSONL: streamed to stdout for `-`, else to a file that appears when it is whole."""
    if out == "-":
        for row in rows:
            say(dumps_row(row))
    else:
        write_atomic(Path(out), "".join(dumps_row(row) + "\n" for row in rows))


def write_report(report: Report, as_json: bool, out: str) -> None:
    """A report as text or JSON, on stdout for `-`, else to a file that appears when it is whole."""
    text = (to_json(report) if as_json else to_text(report)).rstrip("\n")
    if out == "-":
        say(text)
    else:
        write_atomic(Path(out), text + "\n")


def bar(*, disable: bool = False) -> Any:
    """A rich progress display on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # By default rich would send what is printed on stdout, the results, to its own stream.
    console = Console(stderr=True)
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=disable or not console.is_terminal,
        redirect_stdout=False,
    )


@contextmanager
def progress(what: str, out: str) -> Iterator[Progress]:
    """One bar with the time left, as the callback of runtimes; none where rows fill the same screen."""
    with bar(disable=out == "-" and sys.stdout.isatty()) as b:
        task = b.add_task(what, total=None)

        def report(done: int, total: int | None) -> None:
            b.update(task, completed=done, total=total)

        yield report
