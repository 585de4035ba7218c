"""The `demur` command: its commands, and how every one of them ends.

Exit codes: 0 done, 1 a gate or a verification failed, 2 an error, 130 stopped with Ctrl-C. Errors that demur
raises on purpose are printed as one message; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import demur
from demur.cli import (
    answers,
    calibrate,
    card,
    diff,
    explain,
    export,
    gate,
    judge,
    lab,
    measure,
    replicate,
    resources,
    serve,
    train,
)
from demur.cli.screen import warn
from demur.errors import DemurError

FAILED, STOPPED = 2, 130


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(self.format(record))


@contextmanager
def heard() -> Iterator[None]:
    """What the library logs or warns about becomes a line on stderr."""
    handler = _Lines(logging.WARNING)
    logging.getLogger("demur").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: warn(f"warning: {message}")
            yield
    finally:
        logging.getLogger("demur").removeHandler(handler)


class Front(TyperGroup):
    """The command group, with the one place where exceptions become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with heard():
                result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            warn(
                "Stopped. The same command goes on: a card resumes where it was, a replication after its last "
                "finished seed, other commands start over."
            )
            raise typer.Exit(STOPPED) from None
        except BrokenPipeError:
            # The reader (`head`, say) has seen enough. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (DemurError, OSError) as e:
            warn(f"error: {e}")
            raise typer.Exit(FAILED) from None
        except Exception as e:
            if type(e).__module__.startswith(
                ("typer", "click")
            ):  # Exit, Abort and usage errors have their own ways
                raise
            logging.getLogger("demur").exception(
                "error: a bug in demur, not in your input; please report these lines"
            )
            raise typer.Exit(FAILED) from None


app = typer.Typer(
    name="demur",
    cls=Front,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Measure, calibrate and steer refusal in language models.",
    epilog="MODEL is a built-in name (`demur models`), a folder, a hub id, or an endpoint URL#model. FILE is "
    "JSONL or CSV, or - for standard input. Exit codes: 0 done, 1 a gate or verification failed, 2 error.",
)
app.command("card")(card.card)
app.command("measure")(measure.measure)
app.command("diff")(diff.diff)
app.command("gate")(gate.gate)
app.command("export")(export.export)
app.command("explain")(explain.explain)
app.command("score")(answers.score)
app.command("generate")(answers.generate)
app.command("judge")(judge.judge)
app.command("calibrate")(calibrate.calibrate)
app.command("serve")(serve.serve)
app.add_typer(train.app, name="train")
app.add_typer(resources.models_app, name="models")
app.add_typer(resources.data_app, name="data")
app.command("methods")(resources.methods)
app.command("replicate")(replicate.replicate)
app.add_typer(lab.app, name="lab")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"demur {demur.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with its code."""
    app()
