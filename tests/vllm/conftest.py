"""Tests against a real vLLM engine, in an environment of their own: `make test-vllm`. Elsewhere not collected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm.engine import Local

collect_ignore_glob = [] if os.environ.get("DEMUR_VLLM_TESTS") else ["test_*.py"]


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model as one checkpoint, as `demur models export --to merged` writes it."""
    from demur import models
    from demur.flows import weights
    from demur.flows.load import load_runtime

    out = tmp_path_factory.mktemp("export") / "merged"
    weights.merged(load_runtime("demur-smollm2"), out, source=models.resolve("demur-smollm2").path)  # type: ignore[arg-type]
    yield out


@pytest.fixture(scope="session")
def local() -> Local:
    """What the local runtime says of the 500 prompts."""
    from tests.vllm.engine import Local

    return Local.of(500)
