"""What the gateway counts, in Prometheus form. Names and labels are stable and documented in docs/serve.md.

    demur_decisions_total{category, mode, canary}     mode "enforce" (the dial decided) or "own" (the model did)
    demur_shadow_decisions_total{category}            what thresholds in shadow mode would have decided
    demur_undecided_total                             requests whose probabilities could not be had
    demur_guard_stops_total{guard}                    prompts an input guard stopped
    demur_p_refuse                                    histogram of first-position refuse probability
    demur_answer_seconds{finish}                      histogram: request to last piece
    demur_answers_total{finish, opened}               finished answers; opened: control token or "none"
    demur_tokens_total{kind}                          kind "prompt" or "completion"
    demur_stops_total{by}                             answers that a check inside the answer ended
    demur_failures_total{kind}                        failed requests, by kind (see KINDS)
    demur_operating_point_info{role, id, digest}      1 for what is in force; role "main" or "canary"
    demur_operating_point_ok{role}                    0 while the file on disk cannot be used
    demur_operating_point_loads_total{role}, demur_operating_point_failures_total{role}
    demur_drift_evidence, demur_drift_p_value, demur_drift_alarm, demur_drift_distance   see demur.serve.drift

Labels hold names from the operator's files and fixed words only, never text of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from demur.errors import MissingExtra
from demur.serve.base import Decision, Piece
from demur.serve.drift import Drift
from demur.serve.pointfile import PointFile

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from prometheus_client.registry import Collector
except ImportError:
    raise MissingExtra("Serving metrics", "serve") from None

KINDS = ("input", "upstream", "timeout", "cancelled", "rejected", "internal")
"""Why a request failed: its content, the engine, time, the client left, a limit, a bug of ours."""
_P_BUCKETS = (
    0.001,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
    0.999,
    1,
)
_S_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one gateway, in a registry of their own.

    Args:
        names: refuse categories, then "respond". reference: p_refuse of the calibration prompts (n,), for drift.

    `drift` is the test against the reference, None without one.

    >>> metrics = Metrics(("safety", "respond"))
    >>> metrics.failed("upstream")
    >>> b'demur_failures_total{kind="upstream"} 1.0' in metrics.text()
    True
    """

    def __init__(self, names: Sequence[str], reference: npt.NDArray[np.float64] | None = None) -> None:
        self.names = tuple(names)
        self.drift = Drift(reference) if reference is not None else None
        self.registry = r = CollectorRegistry(auto_describe=True)

        def counter(name: str, what: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"demur_{name}", what, labels, registry=r)

        self._decisions = counter(
            "decisions", "Decisions at the first position", ["category", "mode", "canary"]
        )
        self._shadow = counter("shadow_decisions", "What shadow thresholds would decide", ["category"])
        self._undecided = counter("undecided", "Requests whose probabilities could not be had")
        self._guard = counter("guard_stops", "Prompts stopped by an input guard", ["guard"])
        self._answers = counter("answers", "Finished answers", ["finish", "opened"])
        self._tokens = counter("tokens", "Tokens read and written", ["kind"])
        self._stops = counter("stops", "Answers ended by a check inside them", ["by"])
        self._failures = counter("failures", "Failed requests", ["kind"])
        self._p = Histogram(
            "demur_p_refuse", "Refuse probability at the first position", buckets=_P_BUCKETS, registry=r
        )
        self._seconds = Histogram(
            "demur_answer_seconds", "Request to last piece", ["finish"], buckets=_S_BUCKETS, registry=r
        )
        for kind in KINDS:
            self._failures.labels(kind)
        for name in (*self.names, "none"):
            for mode in ("enforce", "own"):
                self._decisions.labels(name, mode, "false")
        self._points = _Points()
        r.register(self._points)
        if self.drift is not None:
            self._watch_drift(self.drift)

    def decided(self, decision: Decision) -> None:
        """Count a decision and take its score into histogram and drift."""
        mode = "enforce" if decision.enforced else "own"
        category = self._known(decision.category)
        self._decisions.labels(category, mode, str(decision.canary).lower()).inc()
        if decision.shadow is not None:
            self._shadow.labels(self._known(decision.shadow)).inc()
        if decision.guard is not None and decision.guard.get("stopped"):
            self._guard.labels(str(decision.guard.get("name", "guard"))).inc()
        if decision.score is None:
            self._undecided.inc()
            return
        self._p.observe(decision.score.p_refuse)
        if self.drift is not None:
            self.drift.add(decision.score.p_refuse)

    def answered(self, seconds: float, piece: Piece) -> None:
        """Count a finished answer by its last piece."""
        finish = piece.finish or "none"
        self._answers.labels(finish, self._known(piece.control_token)).inc()
        self._seconds.labels(finish).observe(seconds)
        self._tokens.labels("prompt").inc(piece.prompt_tokens or 0)
        self._tokens.labels("completion").inc(piece.completion_tokens or 0)
        if piece.stop is not None:
            self._stops.labels(piece.stop.by).inc()

    def failed(self, kind: str) -> None:
        """Count a failed request; a kind that is not one of `KINDS` counts as "internal"."""
        self._failures.labels(kind if kind in KINDS else "internal").inc()

    def watch(self, role: str, file: PointFile) -> None:
        """Report an operating-point file from now on; `role` is "main" or "canary"."""
        self._points.files[role] = file

    def text(self) -> bytes:
        """Everything in Prometheus' text form; its media type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _known(self, category: str | None) -> str:
        if category is None:
            return "none"
        return category if category in self.names else "other"

    def _watch_drift(self, drift: Drift) -> None:
        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"demur_drift_{name}", what, registry=self.registry)

        gauge("evidence", "log10 of the evidence of a shift; alarm at 6").set_function(lambda: drift.value)
        gauge("p_value", "Bound of the chance of as much evidence without a shift").set_function(
            lambda: drift.p_value
        )
        gauge("alarm", "1 once a shift has been found").set_function(lambda: float(drift.alarm))
        gauge("distance", "Kolmogorov-Smirnov distance of recent scores to the reference").set_function(
            lambda: drift.distance or 0.0
        )


class _Points(Collector):
    """What is in force, asked when the metrics are read, so that an old id leaves no series behind."""

    def __init__(self) -> None:
        self.files: dict[str, PointFile] = {}

    def collect(self) -> Iterable[Metric]:
        """Families over all watched files."""
        info = GaugeMetricFamily(
            "demur_operating_point_info", "What is in force", labels=["role", "id", "digest"]
        )
        ok = GaugeMetricFamily("demur_operating_point_ok", "0 while the file cannot be used", labels=["role"])
        loads = CounterMetricFamily("demur_operating_point_loads", "Files taken into force", labels=["role"])
        failures = CounterMetricFamily("demur_operating_point_failures", "Files refused", labels=["role"])
        for role, file in self.files.items():
            info.add_metric([role, file.point.id, file.digest], 1)
            ok.add_metric([role], float(file.problem is None))
            loads.add_metric([role], file.loads)
            failures.add_metric([role], file.failures)
        return info, ok, loads, failures
