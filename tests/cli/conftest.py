"""Run the command line in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from demur.cli import main

Cli = Callable[..., SimpleNamespace]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `demur ...` in this process; gives code, out and err."""

    def run(*args: str | Path, stdin: str | bytes = b"") -> SimpleNamespace:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        monkeypatch.setattr(sys, "argv", ["demur", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        seen = capsys.readouterr()
        return SimpleNamespace(code=exited.value.code or 0, out=seen.out, err=seen.err)

    return run
