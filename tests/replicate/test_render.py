"""The page says what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from demur.replicate import page, replicate, report
from demur.replicate.render import number, stored_page
from demur.replicate.store import RESULTS, read_results, stale
from demur.report.render import to_text
from tests.replicate import toy

PAGE = Path(__file__).parents[2] / "docs" / "replication.md"


def test_the_page_in_the_docs_is_made_from_the_stored_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == stored_page(), "make replicate writes it anew"


@pytest.mark.parametrize(
    "value, text", [(0.8731, "0.873"), (0.0, "0.000"), (0.00012, "0.00012"), (1234.5, "1234")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_result_as_text_and_as_page(tmp_path: Path) -> None:
    result = replicate(toy.write(tmp_path, control=0.7, held_in=0.5), out=tmp_path / "out")
    text = to_text(report(result))
    assert text.startswith("toy: partly")
    value = result["claims"][0]["value"]
    low, high = result["claims"][0]["interval"]
    assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "0.5 ± 0.08" in text and "97.5 %" in text
    assert "not silent (its value lies outside the margin)" in text
    assert "Seed 2 left out, its organism is unfit" in text
    assert "Skipped table: no-such-set/x.csv cannot be had here." in text
    made = page({"toy": result}, stale=["toy"])
    assert "| toy | partly (stale) | 1 of 1 | 1 of 2 | 1 of 1 | 1 of 2 | 1 of 3 fit |" in made
    assert "## toy: partly (stale)" in made and "\n### Claims\n" in made
    assert made.count("\n# ") + made.startswith("# ") == 1, "one title"


def test_no_results_yet() -> None:
    assert "Nothing has been run yet." in page({})


def test_stored_results_name_no_machine() -> None:
    for slug, result in read_results().items():
        text = (RESULTS / f"{slug}.json").read_text(encoding="utf-8")
        assert "/home/" not in text and "/work/" not in text and "/tmp/" not in text
        assert result["slug"] == slug


def test_staleness_is_seen_without_importing_the_check() -> None:
    spec = {"replicate/spec.py": "0" * 16}
    assert stale({"slug": "x", "provenance": {"sources": spec}})
    assert stale({"slug": "x", "provenance": {"sources": {"replicate/gone.py": "0" * 16}}})
    assert not stale({"slug": "x", "provenance": {"sources": {}}})
