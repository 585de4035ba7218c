"""`demur lab METHOD ...`: one file of this folder for each method, named like its slug, holding a function `run`.

`run` has typer annotations and a docstring; it becomes the command. A file is imported when its command is asked
for, so that one method's imports cost the others nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperGroup

FOLDER = Path(__file__).parent


@cache
def _command(slug: str) -> Any:
    module = importlib.import_module(f"{__name__}.{slug.replace('-', '_')}")
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    one.command(slug)(module.run)
    return typer.main.get_command(one)


class _Files(Mapping[str, Any]):
    """Commands by slug; those that nobody asks for stay unread."""

    def __getitem__(self, slug: str) -> Any:
        if slug not in list(self):
            raise KeyError(slug)
        return _command(slug)

    def __iter__(self) -> Iterator[str]:
        files = (f.stem for f in FOLDER.glob("*.py") if not f.stem.startswith("_"))
        return iter(sorted(stem.replace("_", "-") for stem in files))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Lab(TyperGroup):
    """The group whose commands are the files of this folder."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast(Any, _Files())


app = typer.Typer(
    cls=Lab,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Methods on your own data, one command each. Tested, but their options may still change.",
)


@app.callback()
def _lab() -> None:
    pass
