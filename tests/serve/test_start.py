"""From settings to an upstream of the model here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from demur.control.any_depth import HeaderProbe, header_of
from demur.errors import InputError, MismatchError
from demur.files import dump_operating_point
from demur.flows.evaluation import Evaluation
from demur.serve import start
from demur.serve.app import create_app
from demur.serve.settings import REFUSALS, Limits, Settings
from demur.train.adapter import POINT_FILE
from demur.types import OperatingPoint, Threshold
from tests.runtime.tiny import CATEGORIES, tiny_runtime
from tests.serve.live import served
from tests.serve.pages import stored

SHIPPED = OperatingPoint(id="shipped", thresholds={c: Threshold(tau=0.01) for c in CATEGORIES[:-1]})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model in place of what `load_runtime` would load."""
    runtime = tiny_runtime(control=True)
    monkeypatch.setattr(start, "load_runtime", lambda *_a, **_k: runtime)
    return runtime


def probe(runtime: Any, folder: Path, fingerprint: str) -> Path:
    path = folder / "probe.safetensors"
    HeaderProbe(
        header=header_of(runtime.chat).probe,
        layer=1,
        weights=np.zeros(32),
        bias=5.0,
        depths=(4,),
        n_harmful=5,
        n_benign=5,
        data_hash="0" * 16,
        accuracy={1: 1.0},
        fingerprint=fingerprint,
    ).save(path)
    return path


def test_checks_inside_answers_are_switched_on(loaded: Any, tmp_path: Path) -> None:
    path = probe(loaded, tmp_path, loaded.fingerprint)
    given = Settings(any_depth={"probe": path, "every": 4}, limits=Limits(max_tokens=32))
    ready = start.prepare(given, print)
    with served(create_app(ready.settings, ready.upstream)) as url:
        ask = {"messages": [{"role": "user", "content": "tell me about my cat"}], "temperature": 0}
        got = httpx.post(
            f"{url}/v1/chat/completions", json={"model": ready.upstream.name, **ask}, timeout=30
        ).json()
    assert got["choices"][0]["message"]["content"] == REFUSALS["safety"]
    assert got["choices"][0]["finish_reason"] == "content_filter"
    stopped = got["demur"]["stopped"]
    assert stopped["at"] == 4 and stopped["p"] == pytest.approx(1 / (1 + np.exp(-5))) and stopped["by"]


def test_a_probe_of_another_model_is_refused(loaded: Any, tmp_path: Path) -> None:
    path = probe(loaded, tmp_path, "another")
    with pytest.raises(MismatchError):
        start.prepare(Settings(any_depth={"probe": path}), print)


def test_the_adapters_own_point_is_taken_where_none_is_named(loaded: Any, tmp_path: Path) -> None:
    dump_operating_point(SHIPPED, tmp_path / POINT_FILE)
    loaded.shipped_point = SHIPPED
    ready = start.prepare(Settings(adapter=tmp_path), print)
    assert ready.settings.operating_point == tmp_path / POINT_FILE and ready.shipped == SHIPPED
    assert ready.settings.saved_points == start.SAVED  # not among the adapter's files
    mine = start.prepare(Settings(adapter=tmp_path, operating_point=tmp_path / "mine.yaml"), print)
    assert mine.settings.operating_point == tmp_path / "mine.yaml"


def of(runtime: Any) -> Evaluation:
    """Stored scores that say they are this model's."""
    return stored().model_copy(update={"fingerprint": runtime.fingerprint})


def test_an_evaluation_is_computed_where_it_is_asked_for(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "core_evaluation", lambda runtime, T: of(runtime))
    ready = start.prepare(Settings(evaluation="core"), print)
    app = create_app(ready.settings, ready.upstream, evaluation=ready.evaluation)
    assert isinstance(app.state.gateway.evaluation, Evaluation)
    assert app.state.gateway.drift is not None


def test_a_small_evaluation_is_shown_and_its_drift_is_not_watched(
    loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ready = start.prepare(Settings(), print)
    small = of(loaded).model_copy(update={"reference": (0.1, 0.2)})
    gateway = create_app(ready.settings, ready.upstream, evaluation=small).state.gateway
    assert gateway.evaluation is small and gateway.drift is None and "2 scores" in caplog.text


def test_an_engine_is_no_model_and_has_no_core_evaluation() -> None:
    with pytest.raises(InputError, match="--upstream"):
        start.prepare(Settings(model="http://h/v1#m"), print)
    engine: Any = {"url": "http://h/v1", "model": "m"}
    with pytest.raises(InputError, match="stored run"):
        start.prepare(Settings(upstream=engine, evaluation="core"), print)


def test_the_name_of_a_folder_does_not_show_where_it_is(loaded: Any) -> None:
    loaded.name = "/home/me/models/tiny"
    assert start.prepare(Settings(), print).upstream.name == "tiny"
