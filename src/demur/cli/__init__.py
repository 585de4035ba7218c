"""The command line: thin, each command is one call of the library. See `demur --help`."""

from demur.cli.main import app, main

__all__ = ["app", "main"]
