"""Shared by all tests: the slow tier is opt-in, and nothing reaches the user's own settings."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in each run; a search for new ones is `pytest --hypothesis-profile default`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tier too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEMUR_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
