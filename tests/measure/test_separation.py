"""The margin against scikit-learn, and on tables whose separation is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from demur.errors import CapabilityError, InputError
from demur.measure import separation as sep
from demur.measure.separation import logit_table, separation, silhouettes
from demur.types import Condition, Prompt

NAMES = ("pos", "rej", "house")


def table(n: int = 30, modes: int = 3, width: int = 40, shift: float = 0.0, prompt: float = 1.0) -> Any:
    """Prompts that differ by `prompt`, modes that differ by `shift` along an axis each."""
    rng = np.random.default_rng(4)
    x = prompt * rng.normal(size=(n, 1, width)) + 0.3 * rng.normal(size=(n, modes, width))
    return x + shift * np.eye(modes, width)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("centred", [False, True])
def test_it_is_the_silhouette(metric: Any, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.setattr(sep, "_COLUMNS", 7)  # products in several parts
    x = table(shift=2.0)
    found = separation(x.astype(np.float32), NAMES, metric=metric, centred=centred, draws=5)
    flat = x - x.mean(1, keepdims=True) if centred else x
    points, labels = flat.reshape(90, -1), np.tile(range(3), 30)
    assert found.sam == pytest.approx(metrics.silhouette_score(points, labels, metric=metric), abs=1e-6)
    each = metrics.silhouette_samples(points, labels, metric=metric)
    for k, name in enumerate(NAMES):
        assert found.per_mode[name] == pytest.approx(each[labels == k].mean(), abs=1e-6)
    assert found.per_prompt == pytest.approx(each.reshape(30, 3).mean(1), abs=1e-6)
    pairs = []
    for pair in ((0, 1), (0, 2), (1, 2)):
        keep = np.isin(labels, pair)
        pairs.append(metrics.silhouette_score(points[keep], labels[keep], metric=metric))
    assert found.pairs == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found.low <= found.sam <= found.high


def test_far_apart_is_near_one_and_nothing_is_near_none() -> None:
    far, none = separation(table(shift=60.0), NAMES), separation(table(), NAMES)
    assert far.sam > 0.95 and far.p_value < 0.01 and abs(far.null) < 0.1
    assert abs(none.sam - none.null) < 0.05 and none.null_low <= none.sam <= none.null_high
    assert abs(none.null) < 0.1 and far.rise == far.sam - far.null
    # prompts drown a small shift until their means are taken out
    some = table(shift=2.0, prompt=4.0)
    assert separation(some, NAMES, centred=True).sam > separation(some, NAMES).sam + 0.2


def test_a_mode_that_stands_twice_has_no_margin() -> None:
    x = table(shift=30.0)
    x[:, 1] = x[:, 0]
    found = separation(x, NAMES)
    assert found.per_mode["pos"] <= 0 and found.per_mode["rej"] <= 0 < found.per_mode["house"]
    x[:, 2] = x[:, 0]
    assert separation(x, NAMES, centred=True).sam == 0  # nothing but rounding is left


def test_fewer_modes_raise_the_margin_and_pairs_show_it() -> None:
    x = table(shift=3.0)
    three, two = separation(x, NAMES), separation(x[:, :2], NAMES[:2])
    assert two.sam == two.pairs > three.sam
    assert two.pairs == pytest.approx(three.pairs, abs=0.05)


def test_a_cluster_of_one_counts_zero() -> None:
    D = np.array([[0.0, 1, 4], [1, 0, 4], [4, 4, 0]])
    assert silhouettes(D, [0, 0, 1]).tolist() == [0.75, 0.75, 0.0]


def test_odd_tables_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        separation(table(), NAMES[:2])
    with pytest.raises(InputError, match="finite"):
        separation(np.full((3, 2, 4), np.inf), NAMES[:2])
    with pytest.raises(InputError, match="metric"):
        separation(table(), NAMES, metric="manhattan")  # type: ignore[arg-type]


def test_logits_are_those_of_single_passes_at_any_position(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from demur.runtime.scripted import ScriptedRuntime
    from tests.runtime.tiny import tiny_runtime

    runtime = tiny_runtime()
    prompts = [Prompt.of(t, id=t) for t in ("boil egg", "tell me about norway", "why you")]
    views = {n: (runtime, Condition(system=s)) for n, s in (("pos", "help please"), ("rej", "sorry no"))}
    said = {p.id: [10, 11, 12] for p in prompts}
    for position in (0, 2):
        found = logit_table(views, prompts, position=position, said=said)
        assert found.shape[:2] == (3, 2) and found.dtype == np.float32
        for i, p in enumerate(prompts):
            for m, (_, condition) in enumerate(views.values()):
                ids = runtime.chat.render(p.with_system(condition.system)).ids + said[p.id][:position]
                with torch.inference_mode():
                    alone = runtime.model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
                assert np.abs(found[i, m] - alone).max() < 1e-4
    with pytest.raises(InputError, match="that length"):
        logit_table(views, prompts, position=4, said=said)
    with pytest.raises(InputError, match="at least two"):
        logit_table(dict(list(views.items())[:1]), prompts)
    with pytest.raises(CapabilityError, match="local"):
        logit_table({**views, "far": (ScriptedRuntime({}), Condition())}, prompts)
    monkeypatch.setattr(sep, "MAX_BYTES", 600)
    with pytest.raises(InputError, match="take at most"):
        logit_table(views, prompts)


def test_the_report_names_everything() -> None:
    found = [separation(table(shift=3.0), NAMES, centred=c, draws=20) for c in (False, True)]
    report = sep.report(found, "m", "core/test")
    assert len(report.tables[0].rows) == 2 and report.values["margins"][1]["centred"] is True
    assert {"pos", "rej", "house", "permuted"} <= set(report.tables[0].columns)
