"""The docs show commands, imports and links that exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from demur.cli import app

REPO = Path(__file__).parents[1]
PAGES = sorted(
    p
    for p in [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").rglob("*.md")]
    if p.name != "design.md"
)
COMMAND = re.compile(r"^(?:\$ )?(?:.*\| )?demur (?P<rest>.*?)(?:\s+#.*)?$", re.MULTILINE)


def blocks(page: Path, *kinds: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for kind, body in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if kind in kinds]


def unknown_options(line: str) -> list[str]:
    """Options of a `demur` command line that the command does not have."""
    words = [w for w in shlex.split(line) if w not in ("|", ">")]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        return [words[0]]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    return [w for w in words if re.match(r"--?[a-z]", w) and w not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_commands_exist(page: Path) -> None:
    for body in blocks(page, "sh", "bash", "console"):
        for found in COMMAND.finditer(body.replace("\\\n", " ")):
            assert not unknown_options(found["rest"]), found[0]


def test_the_command_check_sees_wrong_ones() -> None:
    assert unknown_options("card --nope x") == ["--nope"]
    assert unknown_options("crad") == ["crad"]
    assert unknown_options("train refusal-tokens --select a -m b") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_in_examples_work(page: Path) -> None:
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("demur"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"from {node.module} import {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_file_tree_in_the_readme_is_true() -> None:
    tree = (REPO / "README.md").read_text(encoding="utf-8").rsplit("```", 2)[1]
    rooms = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    here = {p.name for p in (REPO / "src" / "demur").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rooms == here
