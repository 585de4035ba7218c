"""The playground's routes: the page, its data, and operating points that are saved from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from demur.calibrate.decide import cuts, decide
from demur.errors import InputError
from demur.files import load_operating_point
from demur.serve.app import create_app
from demur.serve.playground import NewPoint, covered, evaluation_problem, new_point, region
from demur.types import OperatingPoint, Threshold
from tests.serve.pages import NAMES, Scripted, calibrated, dial, served, settings, stored

STATIC = Path(__file__).parents[2] / "src" / "demur" / "serve" / "static"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    config = settings(folder, overrides=("*",))
    with served(config, shipped=calibrated()) as url, httpx.Client(base_url=url) as c:
        yield c


def save(client: httpx.Client, name: str, *, keep: bool = True, rule: str = "threshold", **tau: float) -> Any:
    point = client.get("/demur/point").json()["point"]
    body = {"name": name, "rule": rule, "thresholds": dial(point, **tau), "save": keep}
    return client.post("/demur/operating-points", json=body)


# --- the page ---


def test_the_page_is_local_and_strict(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        assert client.get(f"/{name}").status_code == 200, name
    again = client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda p: p.name)
def test_no_remote_sources_and_no_markup_from_text(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text and "https:" not in text and "//cdn" not in text
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
        assert danger not in text
    assert not re.search(r"\son\w+=|style=|<script>", text)


@pytest.mark.parametrize(
    "path", ["/static/nope.js", "/static/..%2fplayground.py", "/static/%2e%2e/app.py", "/static/__init__.py"]
)
def test_nothing_else_is_a_static_file(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and "import" not in answer.text


# --- its data ---


def test_the_evaluation_is_what_was_stored_without_the_reference(client: httpx.Client) -> None:
    sent = client.get("/demur/evaluation").json()
    assert "reference" not in sent and sent["names"] == list(NAMES)
    assert [tuple(r[4]) for r in sent["rows"]] == [r.probabilities for r in stored().rows]


def test_the_page_learns_the_point_and_the_region(client: httpx.Client) -> None:
    about = client.get("/demur/point").json()
    point = calibrated()
    assert about["point"]["id"] == "calibrated" and about["point"]["guarantee"] == point.guarantee
    assert about["region"] == {c: t.tau for c, t in point.thresholds.items()}
    assert about["any_override"] and about["overrides"] == [] and not about["consent"]


def test_scores_of_another_model_are_neither_shown_nor_watched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, upstream = settings(tmp_path), Scripted()
    gateway = create_app(config, upstream).state.gateway
    dial = gateway.dial
    assert gateway.drift is not None
    assert evaluation_problem(stored(), upstream, dial) is None
    other = create_app(config, upstream, evaluation=stored().model_copy(update={"T": 2.0})).state.gateway
    assert other.drift is None
    assert "drift is not watched" in caplog.text
    upstream.fingerprint = "e" * 16
    assert "not the model served here" in str(evaluation_problem(stored(), upstream, dial))
    upstream.names = ("harm", "respond")
    assert "categories" in str(evaluation_problem(stored(), upstream, dial))
    assert "no stored evaluation" in str(evaluation_problem(None, upstream, dial))


# --- the region ---


def test_every_point_of_the_region_keeps_the_certified_errors_down() -> None:
    """What the region rests on: false refusals of each category fall as thresholds of the point rise."""
    point, rows = calibrated(), stored(120).rows
    P = np.array([r.probabilities for r in rows])
    rng = np.random.default_rng(0)

    def wrong(p: OperatingPoint) -> dict[str, int]:
        out = decide(P, NAMES, cuts(p), p.rule)
        pairs = [(NAMES[i], r) for i, r in zip(out, rows, strict=True)]
        return {c: sum(i == c == r.category and r.kind == "lookalike" for i, r in pairs) for c in NAMES[:-1]}

    before = wrong(point)
    assert sum(before.values()) > 0
    for _ in range(30):
        lifted = {
            c: replace(t, tau=t.tau + (1.01 - t.tau) * rng.choice([0.0, rng.random()]))
            for c, t in point.thresholds.items()
        }
        higher = replace(point, thresholds=lifted)
        assert covered(higher, point)
        assert all(n <= before[c] for c, n in wrong(higher).items())


def test_what_lies_outside_the_region() -> None:
    point = calibrated()

    def moved(category: str, **changes: Any) -> OperatingPoint:
        return replace(
            point, thresholds={**point.thresholds, category: replace(point.thresholds[category], **changes)}
        )

    assert covered(point, point)
    assert covered(moved("safety", tau=1.0), point)
    assert not covered(moved("safety", tau=point.thresholds["safety"].tau - 1e-6), point)
    assert not covered(moved("safety", tau=-1.0), point)
    assert not covered(moved("safety", mode="shadow"), point)
    assert not covered(replace(point, rule="bias"), point)
    assert not covered(replace(point, T=2.0), point)
    assert not covered(point, None)
    less = {c: t for c, t in point.thresholds.items() if c != "safety"}
    assert not covered(replace(point, thresholds=less), point)
    assert not covered(point, replace(point, thresholds=less))  # safety was never calibrated
    assert region(replace(point, guarantee=None)) is None
    assert region(replace(point, rule="compare")) is None


def test_a_bias_point_inherits_its_own_thresholds() -> None:
    point = OperatingPoint(
        id="b",
        rule="bias",
        thresholds={"safety": Threshold(tau=0.5, bias=0.0, bound=0.04, n_benign=90)},
        guarantee="g",
    )
    same = new_point(
        NewPoint(name="n", rule="bias", thresholds={"safety": {"tau": 0.5}}), point, Scripted(), 1.0
    )  # type: ignore[dict-item]
    assert same.guarantee == "g" and same.thresholds["safety"] == point.thresholds["safety"]
    up = new_point(
        NewPoint(name="n", rule="bias", thresholds={"safety": {"tau": 0.6}}), point, Scripted(), 1.0
    )  # type: ignore[dict-item]
    assert up.guarantee == "g" and up.thresholds["safety"] == Threshold(tau=0.6, bound=0.04)
    assert cuts(up) == {"safety": 0.6}


# --- saving ---


def test_a_point_inside_the_region_keeps_the_guarantee(client: httpx.Client, folder: Path) -> None:
    loaded = calibrated()
    tau = loaded.thresholds["humanizing"].tau + 0.01
    told = save(client, "careful", humanizing=tau)
    assert told.status_code == 201 and told.json()["usable"] and told.json()["guarantee"] == loaded.guarantee
    point = load_operating_point(folder / "careful.yaml")
    assert (point.id, point.goal, point.alpha) == ("careful", "manual", loaded.alpha)
    assert point.thresholds["humanizing"] == Threshold(tau=tau, bound=loaded.thresholds["humanizing"].bound)
    assert point.thresholds["safety"] == loaded.thresholds["safety"]
    assert (point.model_fingerprint, point.calibrated_on) == (loaded.model_fingerprint, "calib")


def test_a_point_outside_the_region_promises_nothing(client: httpx.Client, folder: Path) -> None:
    told = save(client, "eager", safety=0.2)
    assert told.status_code == 201 and told.json()["guarantee"] is None
    point = load_operating_point(folder / "eager.yaml")
    assert point.guarantee is None and point.alpha is None and point.calibrated_on is None
    assert point.thresholds["safety"] == Threshold(tau=0.2)
    asked = {"model": "scripted", "messages": [{"role": "user", "content": "a bomb"}]}
    served_now = client.post("/v1/chat/completions", json={**asked, "demur": {"operating_point": "eager"}})
    assert served_now.json()["demur"]["operating_point"] == "eager"


def test_loosened_safety_needs_the_operators_consent(
    client: httpx.Client, folder: Path, tmp_path: Path
) -> None:
    told = save(client, "loose", safety=0.999)
    assert told.status_code == 403 and "refuse less" in told.json()["error"]["message"]
    assert not (folder / "loose.yaml").exists()
    point = client.get("/demur/point").json()["point"]
    off = {**dial(point), "safety": {"tau": 0.0, "mode": "shadow"}}
    body = {"name": "off", "thresholds": off}
    assert client.post("/demur/operating-points", json=body).status_code == 403
    config = settings(tmp_path, allow_refusal_lowering=True)
    with served(config, shipped=calibrated()) as url, httpx.Client(base_url=url) as other:
        allowed = save(other, "loose", safety=0.999)
    assert allowed.status_code == 201 and "refuse less" in allowed.json()["lowers"]
    assert not allowed.json()["usable"]


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "a/b",
        "a\\b",
        ".hidden",
        "",
        "x" * 65,
        "..",
        "a\n",
        "a b",
        "C:x",
        "\u0430",
        "%2e%2e",
        "a\x00b",
    ],
)
def test_a_name_cannot_lead_elsewhere(client: httpx.Client, folder: Path, name: str) -> None:
    before = sorted(p.name for p in folder.parent.rglob("*"))
    assert save(client, name).status_code in (400, 422)
    assert sorted(p.name for p in folder.parent.rglob("*")) == before


def test_nothing_is_overwritten(client: httpx.Client, folder: Path) -> None:
    loaded = (folder / "calibrated.yaml").read_bytes()
    for name in ("calibrated", "CALIBRATED"):
        assert save(client, name, safety=0.1).status_code == 409
    assert (folder / "calibrated.yaml").read_bytes() == loaded


def test_a_download_writes_no_file(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    told = save(client, "mine", keep=False, safety=0.2)
    assert told.status_code == 200 and not (folder / "mine.yaml").exists()
    (tmp_path / told.json()["file"]).write_text(told.json()["yaml"], encoding="utf-8")
    assert load_operating_point(tmp_path / "mine.yaml").thresholds["safety"].tau == 0.2


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "thresholds": {"nonsense": {"tau": 0.5}}},
        {"name": "x", "thresholds": {"safety": {"tau": "NaN"}}},
        {"name": "x", "thresholds": {"safety": {"tau": 5}}},
        {"name": "x", "thresholds": {}, "rule": "whatever"},
        {"name": "x", "thresholds": {}, "more": 1},
        {"thresholds": {}},
        [],
    ],
)
def test_what_is_no_dial_is_refused(client: httpx.Client, folder: Path, body: Any) -> None:
    told = client.post("/demur/operating-points", json=body)
    assert told.status_code in (400, 422) and told.json()["error"]["message"]
    assert not (folder / "x.yaml").exists()


def test_saving_and_data_need_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEYS", "k" * 20)
    with served(settings(tmp_path, keys={"env": "TEST_KEYS"})) as url, httpx.Client(base_url=url) as c:
        for path in ("/", "/demur/point", "/demur/evaluation", "/static/playground.js"):
            assert c.get(path).status_code == 401, path
        body = {"name": "x", "thresholds": {"safety": {"tau": 0.1}}}
        assert c.post("/demur/operating-points", json=body).status_code == 401
        assert not (tmp_path / "x.yaml").exists()
        known = {"Authorization": f"Bearer {'k' * 20}"}
        assert c.post("/demur/operating-points", json=body, headers=known).status_code == 201


def test_without_a_loaded_point_the_dial_starts_from_the_model(tmp_path: Path) -> None:
    stored().write(tmp_path / "evaluation.json")
    from demur.serve.settings import Settings

    config = Settings(evaluation=tmp_path / "evaluation.json", points_folder=tmp_path / "points")
    with served(config) as url, httpx.Client(base_url=url) as c:
        about = c.get("/demur/point").json()
        assert about["point"] is None and about["region"] is None
        body = {"name": "first", "thresholds": {"safety": {"tau": 0.4}}}
        assert c.post("/demur/operating-points", json=body).status_code == 201
    point = load_operating_point(tmp_path / "points" / "first.yaml")
    assert point.model_fingerprint == Scripted.fingerprint and point.thresholds["safety"].tau == 0.4


def test_a_point_for_other_categories_cannot_be_made() -> None:
    new = NewPoint(name="n", thresholds={"harm": {"tau": 0.5}})  # type: ignore[dict-item]
    with pytest.raises(InputError):
        decide([[0.5, 0.5]], ("safety", "respond"), cuts(new_point(new, None, Scripted(), 1.0)))
