import itertools
import re
from html.parser import HTMLParser

import pytest

from demur.report import plots
from demur.report.html import to_html
from demur.report.view import CardView, Example, Figure, Headline, Section
from demur.types import Rate, Table

XSS = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=x>&amp;\x1b[31m\x00"
RATE = Rate(k=9, n=10, low=0.6, high=0.98, unread=3)
EMPTY = Rate(k=0, n=0, low=None, high=None)


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def card(text: str = "plain") -> CardView:
    svg = plots.heat_map([text, "b"], ["c", text + "2"], [[0.9, 0.1], [0.2, 0.8]], name="heat")
    example = Example(
        id=text,
        outcome="refused a harmless request",
        right=False,
        category=text,
        should_refuse=False,
        prompt=text,
        reply=text,
        withheld=None,
        label="full refusal",
        p_refuse=0.7,
        probabilities={text: 0.7},
    )
    section = Section(
        slug="text",
        title=text,
        lead=text,
        tables=(Table(text, (text, "r"), ((text, RATE), ("x", EMPTY)), text),),
        figures=(Figure(svg=svg, alt=text, caption=text),),
        notes=(text,),
        examples=(example,),
    )
    gone = Section(slug="flips", title=text, missing=text)
    last = Section(slug="provenance", title="Provenance", values={"settings": {text: text}})
    return CardView(
        model=text,
        verdict=text,
        detail=text,
        facts=((text, text),),
        headline=Headline(rows=(("all", RATE, EMPTY), (text, RATE, RATE)), source="token", note=text),
        curve=None,
        sections=(section, gone, last),
    )


def test_foreign_text_stays_text() -> None:
    page = Page(to_html(card(XSS)))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form", "base", "link"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert "<script>alert(1)</script>" in page.words
    assert "\x1b" not in to_html(card(XSS))
    assert "\x00" not in to_html(card(XSS))


def test_the_page_loads_nothing() -> None:
    html = to_html(card())
    policy = next(
        a["content"] for t, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    outside = html.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    assert not re.search(r"https?://|@import|url\((?!#)", outside)


def test_structure_is_accessible() -> None:
    page = Page(to_html(card()))
    tags = [t for t, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table")
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    assert all(a.get("aria-label") for t, a in page.tags if a.get("role") in ("img", "region"))
    assert all(a.get("aria-hidden") == "true" for t, a in page.tags if t == "svg")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    html_tag = next(a for t, a in page.tags if t == "html")
    assert html_tag["lang"] == "en"


def test_rates_are_shown_with_interval_count_and_unread() -> None:
    words = re.sub(r"\s+", " ", Page(to_html(card())).words)
    assert "90% 60–98 9 of 10" in words
    assert "3 unread" in words
    assert "not asked" in words


@pytest.mark.parametrize("scheme", ["prefers-color-scheme: dark", "@media print", "max-width: 620px"])
def test_the_page_is_made_for(scheme: str) -> None:
    assert scheme in to_html(card())


def test_drawings_follow_the_page_and_share_no_ids() -> None:
    band = [(0.0, 0.1, 0.3), (1.0, 0.9, 1.0)]
    points = [{"x": 0.1, "y": 0.8, "label": XSS, "kind": "current"}]
    one = plots.trade_off([(0, 0), (1, 1)], band, points, name="one")
    two = plots.dial([0, 0.5, 1], [1, 0.8, 0], [1, 0.2, 0], name="two")
    three = plots.reliability([(0.1, 0.2, 5), (0.9, 0.8, 9)], name="three")
    for svg in (one, two, three):
        assert "var(--" in svg
        assert not re.search(r'"#01020\d"', svg)
        assert not re.search(r"<svg[^>]* width=", svg)
        assert "<script" not in svg
        assert "<a" not in svg
    ids = [i for svg in (one, two, three) for i in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    assert all(f"#{i}" for i in ids)


@pytest.mark.parametrize(
    "word",
    ["a\x00b", "\x1b[31m", "\ud9aa", "👩‍👩‍👧‍👦" * 20, "日本語" * 30, "", " ", "x" * 4000, "\u2028", "\uffff"],
)
def test_no_label_breaks_a_drawing(word: str) -> None:
    svg = plots.heat_map([word, "b", word + "!"], ["c", word], [[1.0, 0.0]] * 3, name="h")
    assert svg.count("<svg") == 1
    assert len(re.findall(r"<text", svg)) >= 5


def test_names_of_points_stay_apart_and_below_a_rising_curve() -> None:
    at = lambda y: {"x": 0.1, "y": y, "label": "p", "kind": "own"}  # noqa: E731
    ys = (0.5, 0.9, 0.88, 0.51)
    below = plots.drops([at(y) for y in ys], 300)
    assert min(below) >= 12
    lines = sorted((1 - y) * 300 + d for y, d in zip(ys, below, strict=True))
    assert all(b - a >= 17.9 for a, b in itertools.pairwise(lines))
    assert below[1] == 12 and below[0] > 12  # the highest is not moved, the lower of a close pair is
