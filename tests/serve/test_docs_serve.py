"""What docs/serve.md shows is what happens."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from demur.serve import api
from demur.serve.app import create_app
from demur.serve.base import Decision
from demur.serve.metrics import Metrics
from demur.serve.settings import Limits, Settings
from tests.serve.live import served
from tests.serve.test_app import NAMES, Upstream, settings

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


class Embedded(Upstream):
    name = "demur-smollm2"


def test_settings_are_read_and_show_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    whole, engine = blocks("yaml")
    path.write_text(whole)
    read = Settings.load(path)
    assert read.limits == Limits() and read.batch == Settings().batch and read.port == Settings().port
    assert set(Settings.model_fields) - set(yaml.safe_load(whole)) == {
        "adapter", "control_tokens", "dtype", "no_auth", "upstream",
    }  # fmt: skip
    path.write_text(engine)
    assert Settings.load(path).mode == "gate"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_and_the_official_client(tmp_path: Path) -> None:
    curl = next(b for b in blocks("sh") if b.startswith("curl"))
    [code] = blocks("python")
    with served(create_app(settings(tmp_path), Embedded())) as url:
        done = subprocess.run(
            ["sh", "-c", curl.replace("http://127.0.0.1:8321", url)], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["demur"]["decision"] == "respond"
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code.replace("http://127.0.0.1:8321", url), {})
    assert said.getvalue().count("Gladly: here \u2603.") == 2 and "respond" in said.getvalue()


def test_every_key_of_the_extension_field_is_described() -> None:
    asked = api.asked(
        api.read_request(b'{"model": "m", "messages": [{"role": "user", "content": "a"}]}'), "r", most=1
    )
    nothing = Decision(score=None, category=None, enforced=False, point=None)
    field = api.extension(asked, nothing, api.Written(), "model")
    table = PAGE.split("## The extension field")[1].split("## Requests")[0]
    described = {
        k for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for k in re.findall(r"`(\w+)`", row)
    }
    assert described == set(field)


def test_every_series_exists() -> None:
    lines = [
        x.split("# HELP ")[1].split()[0] for x in Metrics(NAMES).text().decode().splitlines() if "# HELP" in x
    ]
    named = {
        n for n in re.findall(r"demur_[a-z_]+", PAGE) if not n.startswith(("demur_drift", "demur_operating"))
    }
    assert named <= {*lines, *(f"{x}_total" for x in lines)}


def test_every_refused_or_passed_field_is_listed() -> None:
    for name in (*api.PASSABLE, "n", "logprobs", "logit_bias", "functions", "audio"):
        assert f"`{name}`" in PAGE
