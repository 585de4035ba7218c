from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demur.files import dump_operating_point
from demur.serve.base import Decision, Piece, Stop
from demur.serve.metrics import KINDS, Metrics
from demur.serve.pointfile import PointFile
from demur.types import OperatingPoint, Score, Threshold

NAMES = ("safety", "humanizing", "respond")


def value(metrics: Metrics, series: str) -> float:
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith(series + " ")]
    assert len(lines) == 1, f"{series}: {lines}"
    return float(lines[0].split()[-1])


def decision(**fields: object) -> Decision:
    score = Score(id="x", p_refuse=0.7, probabilities={"safety": 0.7, "respond": 0.2})
    return Decision(**{"score": score, "category": "safety", "enforced": True, "point": "p", **fields})  # type: ignore[arg-type]


def test_decisions_by_category_mode_and_canary() -> None:
    m = Metrics(NAMES)
    m.decided(decision())
    m.decided(decision(canary=True, shadow="humanizing"))
    m.decided(decision(category=None, enforced=False))
    m.decided(decision(score=None, category=None, enforced=False, problem="engine down"))
    assert value(m, 'demur_decisions_total{canary="false",category="safety",mode="enforce"}') == 1
    assert value(m, 'demur_decisions_total{canary="true",category="safety",mode="enforce"}') == 1
    assert value(m, 'demur_decisions_total{canary="false",category="none",mode="own"}') == 2
    assert value(m, 'demur_shadow_decisions_total{category="humanizing"}') == 1
    assert value(m, "demur_undecided_total") == 1
    assert value(m, "demur_p_refuse_count") == 3
    assert value(m, 'demur_p_refuse_bucket{le="0.6"}') == 0
    assert value(m, 'demur_p_refuse_bucket{le="0.7"}') == 3


def test_answers_tokens_stops_guards_and_failures() -> None:
    m = Metrics(NAMES)
    stop = Stop(by="header-probe", at=32, p=0.9, threshold=0.5)
    m.answered(
        3.0,
        Piece(
            finish="content_filter", control_token="respond", prompt_tokens=7, completion_tokens=32, stop=stop
        ),
    )
    m.decided(decision(guard={"name": "latent-guard-1", "p": 1.0, "threshold": 0.0, "stopped": True}))
    m.failed("upstream")
    m.failed("something that is not listed")
    assert value(m, 'demur_answers_total{finish="content_filter",opened="respond"}') == 1
    assert value(m, 'demur_tokens_total{kind="prompt"}') == 7
    assert value(m, 'demur_tokens_total{kind="completion"}') == 32
    assert value(m, 'demur_stops_total{by="header-probe"}') == 1
    assert value(m, 'demur_guard_stops_total{guard="latent-guard-1"}') == 1
    assert value(m, 'demur_answer_seconds_bucket{finish="content_filter",le="2.0"}') == 0
    assert value(m, 'demur_answer_seconds_bucket{finish="content_filter",le="4.0"}') == 1
    assert value(m, 'demur_failures_total{kind="upstream"}') == 1
    assert value(m, 'demur_failures_total{kind="internal"}') == 1


def test_labels_stay_few_whatever_comes() -> None:
    m = Metrics(NAMES)
    before = len(m.text().splitlines())
    for n in range(50):
        m.failed(f"kind {n}")
        m.decided(decision(category=f"category {n}"))
        m.answered(1.0, Piece(finish="stop", control_token=f"token {n}"))
    after = m.text().decode()
    assert "category 7" not in after and "token 7" not in after and 'category="other"' in after
    assert len(after.splitlines()) < before + 40
    assert all(f'kind="{k}"' in after for k in KINDS)


def test_drift_is_fed_and_shown() -> None:
    m = Metrics(NAMES, np.linspace(0, 0.5, 200))
    assert m.drift is not None and value(m, "demur_drift_alarm") == 0
    for _ in range(100):
        m.decided(decision())
    assert m.drift.n == 100 and value(m, "demur_drift_alarm") == 1
    assert value(m, "demur_drift_evidence") >= 6 and value(m, "demur_drift_distance") == pytest.approx(1)
    assert b"demur_drift" not in Metrics(NAMES).text()


def test_operating_point_state(tmp_path: Path) -> None:
    files = {}
    m = Metrics(NAMES)
    for role in ("main", "canary"):
        path = tmp_path / f"{role}.yaml"
        dump_operating_point(OperatingPoint(id=f"{role}-1", thresholds={"safety": Threshold(tau=0.2)}), path)
        files[role] = PointFile(path, NAMES)
        m.watch(role, files[role])
    main = files["main"]
    assert value(m, f'demur_operating_point_info{{digest="{main.digest}",id="main-1",role="main"}}') == 1
    main.path.write_text("broken: [")
    main.refresh()
    assert value(m, 'demur_operating_point_ok{role="main"}') == 0
    assert value(m, 'demur_operating_point_ok{role="canary"}') == 1
    assert value(m, 'demur_operating_point_failures_total{role="main"}') == 1
    dump_operating_point(OperatingPoint(id="main-2", thresholds={}), main.path)
    assert main.refresh()
    text = m.text().decode()
    assert "main-2" in text and "main-1" not in text, "an old id leaves no series behind"
    assert value(m, 'demur_operating_point_loads_total{role="main"}') == 2


def test_two_gateways_do_not_share_counters() -> None:
    one, two = Metrics(NAMES), Metrics(NAMES)
    one.failed("input")
    assert value(two, 'demur_failures_total{kind="input"}') == 0
