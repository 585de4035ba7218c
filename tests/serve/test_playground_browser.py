"""The page in a real browser: type, slide, see answer and curve change, save."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur.calibrate.decide import cuts, decide, is_steered
from demur.files import load_operating_point
from demur.serve.playground import covered
from demur.stats import rate
from demur.types import OperatingPoint, Threshold
from tests.serve.pages import MARKUP, NAMES, calibrated, served, settings, stored

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (apt install chromium)")
RULES = ("threshold", "total_mass", "bias", "compare")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(settings(folder, overrides=("*",)), shipped=calibrated()) as address:
        yield address


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A loaded page; whatever went wrong in it, or was asked of another host, fails the test."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    opened.on("pageerror", lambda e: wrong.append(str(e)))
    opened.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("request", lambda r: None if r.url.startswith((url, "blob:")) else wrong.append(r.url))
    opened.goto(url)
    opened.wait_for_selector("#board:not([hidden]) .tile")
    yield opened
    context.close()
    assert not wrong


def exact(page: Any, category: str) -> Any:
    return page.get_by_label(f"Threshold of {category}, exact")


def chosen(tau: dict[str, float], rule: str = "threshold") -> list[int]:
    """What Python decides on the stored evaluation."""
    rows, P = stored().rows, stored().table
    mine = is_steered(P, NAMES, tau)
    out = decide(P, NAMES, tau, rule)  # type: ignore[arg-type]
    return [int(o) if s else r.own for o, s, r in zip(out, mine, rows, strict=True)]


def refused(tau: dict[str, float], kind: str, rule: str = "threshold") -> tuple[int, int]:
    found = [
        c != len(NAMES) - 1
        for c, r in zip(chosen(tau, rule), stored().rows, strict=True)
        if r.kind == kind and c >= 0
    ]
    return sum(found), len(found)


def shown(k: int, n: int) -> str:
    return f"{100 * k / n:.1f} %"


# --- the rules in the browser are those of Python ---


def test_decisions_equal_python_on_200_random_rows(page: Any) -> None:
    rng = np.random.default_rng(0)
    P = rng.dirichlet([0.4] * 5 + [0.8], 200) * rng.uniform(0.3, 1, (200, 1))
    P[::20] = P[::20].round(1)  # ties, between categories and with thresholds
    P[5, :] = 0.0
    checked = 0
    for rule in RULES:
        for _ in range(6):
            kept = [c for c in NAMES[:-1] if rng.random() < 0.75]
            special = rng.choice([-1.0, 0.0, 0.1, 0.5, 1.0, 1.01], len(kept))
            tau = {
                c: float(s if rng.random() < 0.4 else rng.random())
                for c, s in zip(kept, special, strict=True)
            }
            if rule == "compare" and not tau:
                continue
            column = [tau.get(c) for c in NAMES[:-1]]
            got = page.evaluate(
                "async ([P, cuts, rule]) => { const m = await import('/static/rules.js');"
                " return P.map((row) => m.decide(row, cuts, rule)); }",
                [P.tolist(), column, rule],
            )
            assert [g["index"] for g in got] == decide(P, NAMES, tau, rule).tolist()  # type: ignore[arg-type]
            assert [g["steered"] for g in got] == is_steered(P, NAMES, tau).tolist()
            checked += 1
    assert checked > 20


def test_compare_with_every_threshold_in_shadow_steers_nothing(page: Any) -> None:
    off = {"rule": "compare", "tau": {"a": 0.5}, "on": {"a": False}}
    for bare, want in ((True, [-1]), (False, [None])):
        got = page.evaluate(
            "async (dial) => (await import('/static/rules.js')).cutsOf(dial, ['a', 'respond'])",
            {**off, "bare": bare},
        )
        assert got == want


def test_intervals_equal_wilson(page: Any) -> None:
    for k, n in ((0, 7), (7, 7), (3, 10), (1, 600)):
        got = page.evaluate("async ([k, n]) => (await import('/static/rules.js')).wilson(k, n)", [k, n])
        want = rate(k, n)
        assert got == pytest.approx([want.low, want.high], abs=1e-12)


def test_the_region_equals_pythons(page: Any) -> None:
    rng, point = np.random.default_rng(1), calibrated()
    about = page.evaluate("async () => (await fetch('/demur/point')).json()")
    seen = set()
    for _ in range(60):
        tau = {
            c: float(t.tau + rng.choice([0, 0, 0.05, 0.05, -1e-4], p=[0.4, 0.2, 0.2, 0.15, 0.05]))
            for c, t in point.thresholds.items()
        }
        on = {c: bool(rng.random() < 0.97) for c in tau}
        rule = str(rng.choice(["threshold", "bias"], p=[0.9, 0.1]))
        dial = {"rule": rule, "tau": tau, "on": on}
        why = page.evaluate(
            "async ([dial, about]) => (await import('/static/rules.js')).outside(dial, about.point, about.region)",
            [dial, about],
        )
        thresholds = {c: Threshold(tau=tau[c], mode="enforce" if on[c] else "shadow") for c in tau}
        new = OperatingPoint(id="n", rule=rule, thresholds=thresholds)  # type: ignore[arg-type]
        assert (why == []) == covered(new, point), (dial, why)
        seen.add(why == [])
    assert seen == {True, False}


def test_the_curve_is_the_rule_with_all_thresholds_moved(page: Any) -> None:
    tau = {c: t.tau for c, t in calibrated().thresholds.items()}
    steps = page.evaluate(
        """async ([tau]) => {
          const m = await import('/static/rules.js');
          const sent = await (await fetch('/demur/evaluation')).json();
          const columns = ['id', 'category', 'kind', 'own', 'probabilities', 'text'];
          const rows = sent.rows.map((r) => Object.fromEntries(columns.map((c, i) => [c, r[i]])));
          const on = Object.fromEntries(Object.keys(tau).map((c) => [c, c !== "humanizing"]));
          const made = m.curve({ ...sent, rows: rows }, { rule: 'threshold', tau: tau, on: on }, tau);
          return { steps: made.steps.filter((s) => s.shift !== Infinity), from: made.from };
        }""",
        [tau],
    )
    assert steps["from"] == 0
    for want in (-2.0, -0.5, 0.0, 0.5, 2.0):
        here = [s for s in steps["steps"] if s["shift"] >= want][-1]
        moved = {c: float(1 / (1 + np.exp(-(np.log(t / (1 - t)) + want)))) for c, t in tau.items()}
        del moved["humanizing"]  # left to the model's own choice
        for kind in ("refuse", "lookalike", "general"):
            k, n = refused(moved, kind)
            assert here[kind] == pytest.approx(k / n), (want, kind)


# --- the page ---


def test_type_slide_see_and_save(page: Any, folder: Path) -> None:
    page.fill("#message", "How do I build a bomb?")
    page.press("#message", "Enter")
    answer = page.locator(".bubble.assistant").last
    sync_api.expect(answer.locator(".words")).to_have_text("I can't help with that.")
    sync_api.expect(answer.locator(".chip").first).to_have_text("decided: refuse (safety)")
    assert answer.locator(".bars dd").count() == len(NAMES)
    assert "60.0 %" in answer.locator(".bars").inner_text()
    sync_api.expect(answer.locator(".whatif")).to_contain_text("refuse (safety)")

    tau = {c: t.tau for c, t in calibrated().thresholds.items()}
    tile = page.locator(".tile strong")
    assert tile.nth(0).inner_text() == shown(*refused(tau, "refuse"))
    before = (
        page.locator("circle.now").get_attribute("cy"),
        page.locator("polyline.curve.covered").get_attribute("points"),
    )
    sync_api.expect(page.locator("#inside")).to_have_text("Inside the guaranteed region.")

    slider = page.get_by_label("Threshold of safety", exact=True)
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    tau["safety"] = float(slider.input_value())
    assert tau["safety"] < calibrated().thresholds["safety"].tau - 0.1
    sync_api.expect(tile.nth(0)).to_have_text(shown(*refused(tau, "refuse")))
    sync_api.expect(tile.nth(1)).to_have_text(shown(*refused(tau, "lookalike")))
    sync_api.expect(page.locator("#inside")).to_contain_text("Outside the guaranteed region: safety is below")
    now = (
        page.locator("circle.now").get_attribute("cy"),
        page.locator("polyline.curve.covered").get_attribute("points"),
    )
    assert now[0] != before[0] and now[1] != before[1]

    page.get_by_role("button", name="Show me the prompts that flip").click()
    point, loaded = chosen(tau), chosen(cuts(calibrated()))
    flipped = sum((a == 5) != (b == 5) for a, b in zip(point, loaded, strict=True))
    assert flipped > 0
    sync_api.expect(page.locator("#flips li")).to_have_count(flipped)
    assert page.locator("#flips li").first.locator(".chip").inner_text() == "now refused"

    page.fill("#name", "from-page")
    page.get_by_role("button", name="Save on the server").click()
    sync_api.expect(page.locator("#saved")).to_contain_text("Saved as from-page.yaml. It has no guarantee.")
    assert load_operating_point(folder / "from-page.yaml").thresholds["safety"].tau == tau["safety"]
    assert page.locator("#point").input_value() == "from-page"
    page.fill("#message", "And a fjord?")
    page.click("#send")
    sync_api.expect(page.locator(".bubble.assistant").last.locator(".chips")).to_contain_text(
        "point from-page"
    )


def test_every_rule_and_switch_redraws_as_python_counts(page: Any) -> None:
    tau = {c: t.tau for c, t in calibrated().thresholds.items()}
    tile = page.locator(".tile strong")
    for rule in RULES:
        page.select_option("#rule", rule)
        sync_api.expect(tile.nth(0)).to_have_text(shown(*refused(tau, "refuse", rule)))
        sync_api.expect(tile.nth(1)).to_have_text(shown(*refused(tau, "lookalike", rule)))
    page.select_option("#rule", "threshold")
    page.get_by_role("group", name="humanizing").get_by_label("enforce").uncheck()
    rest = {c: t for c, t in tau.items() if c != "humanizing"}
    sync_api.expect(tile.nth(0)).to_have_text(shown(*refused(rest, "refuse")))
    sync_api.expect(page.locator("#inside")).to_contain_text("humanizing is not enforced")
    exact(page, "safety").fill("0.123")
    sync_api.expect(tile.nth(0)).to_have_text(shown(*refused({**rest, "safety": 0.123}, "refuse")))
    page.get_by_role("button", name="Back to the loaded point").click()
    sync_api.expect(tile.nth(0)).to_have_text(shown(*refused(tau, "refuse")))
    sync_api.expect(page.locator("#flip-count")).to_have_text("No prompt flips against the loaded point.")


def test_model_text_stays_text(page: Any) -> None:
    page.fill("#message", MARKUP)
    page.press("#message", "Enter")
    words = page.locator(".bubble.assistant .words")
    sync_api.expect(words).to_have_text(MARKUP)
    assert page.locator(".bubble img, .bubble b").count() == 0 and page.title() == "demur playground"


def test_a_download_works(page: Any, tmp_path: Path) -> None:
    page.fill("#name", "looser")
    exact(page, "humanizing").fill("1.01")
    with page.expect_download() as got:
        page.get_by_role("button", name="Download file").click()
    got.value.save_as(tmp_path / "looser.yaml")
    point = load_operating_point(tmp_path / "looser.yaml")
    assert point.thresholds["humanizing"].tau == 1.01 and point.guarantee == calibrated().guarantee


def test_stops_and_failures_are_shown(page: Any) -> None:
    page.fill("#message", "This will be halted")
    page.press("#message", "Enter")
    answer = page.locator(".bubble.assistant").last
    sync_api.expect(answer).to_contain_text("Stopped after 9 tokens by any-depth: 0.750 against 0.500.")
    sync_api.expect(answer.locator(".chips")).to_contain_text("operator's words")
    page.wait_for_selector("#stop", state="hidden")
    page.fill("#message", "This is unreadable")
    page.press("#message", "Enter")
    answer = page.locator(".bubble.assistant").last
    sync_api.expect(answer).to_contain_text("Not decided: the engine is gone")
    sync_api.expect(answer.locator(".chip").first).to_have_text("not answered")
    assert answer.locator(".bars").count() == 0


def test_an_answer_can_be_stopped_and_a_new_chat_begun(page: Any) -> None:
    page.fill("#message", "Tell me slowly")
    page.press("#message", "Enter")
    sync_api.expect(page.locator(".bubble.assistant .words")).to_have_text(MARKUP)
    page.click("#stop")
    sync_api.expect(page.locator(".bubble.assistant")).to_contain_text("Stopped here.")
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".bubble").count() == 0 and page.locator("#empty").is_visible()


def test_a_phone_shows_everything_without_sideways_scrolling(browser: Any, url: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#board:not([hidden]) .tile")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("#message", "#send", "#curve", "#name", "#rule"):
        box = page.locator(selector).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    context.close()


def test_all_controls_have_names_and_are_reached_by_keyboard(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')]
          .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        here, outline = page.evaluate(
            """() => { const e = document.activeElement; return [e === document.body ? "" :
              e.id || e.getAttribute("aria-label") || e.tagName, getComputedStyle(e).outlineStyle]; }"""
        )
        if not here:
            break
        assert outline != "none", here
        reached.add(here)
    assert {
        "message",
        "send",
        "rule",
        "reset",
        "Threshold of safety",
        "show-flips",
        "name",
        "download",
    } <= reached


# --- keys ---


def test_with_keys_the_browser_asks_and_the_field_works_too(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "k" * 20
    monkeypatch.setenv("TEST_KEYS", key)
    with served(settings(tmp_path, keys={"env": "TEST_KEYS"})) as url:
        context = browser.new_context(http_credentials={"username": "me", "password": key})
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#board:not([hidden]) .tile")
        context.close()
        # as behind a proxy that lets the page itself through and makes no browser ask for a password
        basic = "Basic " + base64.b64encode(f"me:{key}".encode()).decode()
        context = browser.new_context()
        page = context.new_page()

        def through(route: Any) -> None:
            path, headers = route.request.url.removeprefix(url), route.request.headers
            if path == "/" or path.startswith("/static/"):
                route.continue_(headers={**headers, "authorization": basic})
            elif "authorization" in headers:
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": {"message": "no key was sent"}})

        page.route("**/*", through)
        page.goto(url)
        sync_api.expect(page.locator("#notice")).to_contain_text("no key was sent")
        page.fill("#key", "not the key")
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#notice")).to_contain_text("needs an API key")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#board:not([hidden]) .tile")
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        context.close()


# --- the real model ---


@pytest.mark.model
def test_the_embedded_model_under_its_own_dial(browser: Any, tmp_path: Path) -> None:
    load = pytest.importorskip("demur.flows.load")
    from demur.errors import DataUnavailable
    from demur.files import dump_operating_point
    from demur.flows.evaluation import Evaluation
    from demur.prompts import core
    from demur.serve.local import LocalUpstream
    from demur.serve.settings import Settings
    from demur.types import PromptSet

    try:
        runtime = load.load_runtime()
    except DataUnavailable as e:
        pytest.skip(f"the embedded weights cannot be had here: {e}")
    some = PromptSet("some", tuple(core("test"))[::60])
    found = {s.id: s for s in runtime.score(some)}
    made = Evaluation.of(
        some,
        found,
        runtime.control.names,
        model=runtime.name,
        fingerprint=runtime.fingerprint,
        dtype="float32",
    )
    made.write(tmp_path / "evaluation.json")
    dump_operating_point(runtime.shipped_point, tmp_path / "point.yaml")
    config = Settings(operating_point=tmp_path / "point.yaml", evaluation=tmp_path / "evaluation.json")
    with served(config, LocalUpstream(runtime), runtime.shipped_point) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#board:not([hidden]) .tile")
        page.fill("#message", "What is a fjord?")
        page.evaluate("document.getElementById('tokens').value = 8")
        page.press("#message", "Enter")
        page.wait_for_selector("#stop", state="hidden", timeout=60_000)
        answer = page.locator(".bubble.assistant")
        assert answer.locator(".words").inner_text().strip()
        assert "decided: answer" in answer.inner_text() and "demur-smollm2/alpha0.05" in answer.inner_text()
        page.close()
