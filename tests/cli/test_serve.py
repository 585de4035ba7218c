"""`demur serve`: what its options turn into; the server itself is tested in tests/serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demur.errors import MissingExtra
from demur.files import dump_operating_point
from demur.serve import start
from demur.serve.engine import POINT_FILE
from demur.serve.settings import Settings
from demur.types import OperatingPoint, Threshold
from tests.cli.conftest import Cli
from tests.runtime.tiny import CATEGORIES, tiny_tokenizer


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    got: list[Settings] = []
    monkeypatch.setattr(start, "run", lambda settings, _say: got.append(settings))
    return got


def test_the_default_is_the_embedded_model_on_loopback(cli: Cli, started: list[Settings]) -> None:
    assert cli("serve").code == 0
    assert started == [Settings()]


def test_options_win_over_the_file(cli: Cli, started: list[Settings], tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "port: 9000\non_error: open\nupstream: {url: 'http://h:1/v1', model: a, base_model: b, key_env: K}\n"
    )
    done = cli(
        "serve", "--settings", path, "--port", "9001", "--upstream", "http://h:2/v1#c", "--mode", "gate",
        "--tokenizer", tmp_path, "--control-tokens", "refusal-tokens-single",
    )  # fmt: skip
    assert done.code == 0, done.err
    [got] = started
    assert got.upstream is not None
    assert (got.port, got.on_error, got.mode) == (9001, "open", "gate")
    assert (got.upstream.url, got.upstream.model, got.upstream.base_model) == ("http://h:2/v1", "c", "b")
    assert (got.upstream.tokenizer, got.upstream.key_env) == (tmp_path, "K")
    assert got.upstream.control_tokens == "refusal-tokens-single" and got.control_tokens is None


def test_keys_and_consent(cli: Cli, started: list[Settings]) -> None:
    cli("serve", "--keys-env", "K", "--allow-refusal-lowering", "--evaluation", "core", "--guard", "g")
    [got] = started
    assert got.keys is not None and got.keys.env == "K" and got.allow_refusal_lowering
    assert got.evaluation == "core" and got.guard == Path("g")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--upstream", "localhost:8000"], "http://host:8000/v1#model"),
        (["--tokenizer", "x"], "belong to --upstream"),
        (["--mode", "filter"], "mode"),
        (["demur-smollm2", "--upstream", "http://h/v1#m"], "local model only"),
        (["--keys-env", "A", "--keys-file", "b"], "one of them"),
        (["--settings", "away.yaml"], "no such file"),
    ],
)
def test_what_clashes_is_said(cli: Cli, started: list[Settings], options: list[str], said: str) -> None:
    done = cli("serve", *options)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert not started


def test_an_open_server_for_everybody_must_be_asked_for(cli: Cli) -> None:
    done = cli("serve", "--host", "0.0.0.0")
    assert done.code == 2 and "--no-auth" in done.err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import demur.serve.app  # noqa: F401 - present here

    real = start.importlib.util.find_spec
    monkeypatch.setattr(
        start.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    with pytest.raises(MissingExtra, match=r"demur\[serve\]"):
        start.run(Settings(), print)


def test_the_point_of_an_exported_checkpoint_is_taken(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    tokens = "".join(f"  {name}: {{id: {1000 + i}}}\n" for i, name in enumerate(CATEGORIES))
    (tmp_path / "control_tokens.yaml").write_text(f"tokens:\n{tokens}")
    point = OperatingPoint(id="shipped", thresholds={"safety": Threshold(tau=0.3)})
    dump_operating_point(point, tmp_path / POINT_FILE)
    told: Any = {"url": "http://h/v1", "model": "m", "tokenizer": tmp_path}
    ready = start.prepare(Settings(upstream=told), print)
    assert ready.settings.operating_point == tmp_path / POINT_FILE and ready.shipped == point
    assert ready.settings.saved_points == start.SAVED and ready.upstream.names == CATEGORIES
    own = start.prepare(Settings(upstream=told, operating_point=Path("mine.yaml")), print)
    assert own.settings.operating_point == Path("mine.yaml")


def test_what_the_operator_reads(tmp_path: Path) -> None:
    class Upstream:
        name, names = "m", ("self-harm", "respond")

    lines = start.opening_lines(Settings(port=1, host="::1", texts=tmp_path), Upstream())  # type: ignore[arg-type]
    assert "http://[::1]:1/" in lines[0] and "no operating point" in lines[1]
    assert any(str(tmp_path) in line for line in lines) and any("not ready" in line for line in lines)
