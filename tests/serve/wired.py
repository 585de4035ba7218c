"""The whole gateway over a tiny model, and a client's view of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demur.files import dump_operating_point
from demur.serve.app import create_app
from demur.serve.local import LocalUpstream
from demur.serve.settings import Limits, Settings
from demur.types import OperatingPoint, Threshold
from tests.runtime.tiny import tiny_runtime
from tests.serve.live import served

KEY = "a-key-of-more-than-sixteen-characters"
AUTH = {"Authorization": f"Bearer {KEY}"}


def write_point(path: Path, id: str = "tiny", **taus: float) -> Path:
    """An operating-point file; without thresholds given, safety is refused from 0.2 on."""
    thresholds = {c: Threshold(tau=t) for c, t in (taus or {"safety": 0.2}).items()}
    dump_operating_point(OperatingPoint(id=id, thresholds=thresholds), path)
    return path


def chat(text: str, *, n: int = 12, **fields: Any) -> dict[str, Any]:
    """A greedy request."""
    return {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": n,
        "temperature": 0,
        **fields,
    }


@contextmanager
def gateway(folder: Path, *, upstream: Any = None, **given: Any) -> Iterator[tuple[str, Any]]:
    """(address, application) of a gateway with an API key, over a tiny local model unless `upstream` is given."""
    limits = {"max_tokens": 200, **given.pop("limits", {})}
    keys = folder / "keys"
    keys.write_text(KEY)
    settings = Settings(
        keys={"file": keys},
        operating_point=given.pop("operating_point", None) or write_point(folder / "point.yaml"),
        limits=Limits(**limits),
        **given,
    )
    upstream = upstream or LocalUpstream(tiny_runtime(control=True))
    app = create_app(settings, upstream)
    with served(app, head_s=settings.limits.header_s) as address:
        yield address, app


def failures(app: Any) -> dict[str, float]:
    """Failed requests by kind."""
    text = app.state.gateway.metrics.text().decode()
    rows = [line for line in text.splitlines() if line.startswith("demur_failures_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in rows}
