import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.report import clean, to_csv, to_json, to_markdown, to_text
from demur.report.render import cell, interval, percent, plain
from demur.types import Rate, Report, Table

RATE = Rate(k=9, n=10, low=0.6, high=0.98, judge="j", unread=2, corrected=0.95, corrected_interval=(0.7, 1.0))
EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\u202eevil\x00|<b>`x`"


def report(first: object = "safety") -> Report:
    table = Table("Refusals", ("category", "rate"), ((first, RATE), ("other", None)), "a note")
    return Report(title="Card", tables=(table,), values={"r": RATE, "nan": float("nan")}, notes=("n1",))


def test_text_aligns_columns_and_cleans() -> None:
    lines = to_text(report()).splitlines()
    assert lines[0] == "Card"
    assert "  safety    90% [60–98] 9/10" in lines
    assert "  other     –" in lines


@pytest.mark.parametrize(
    "payload", [EVIL, "\x1b[2J\x1b[H", "\x9b31mx", "a\rb", "\x1b]8;;http://x\x1b\\t\x1b]8;;\x1b\\"]
)
def test_terminal_text_has_no_control_characters(payload: str) -> None:
    shown = to_text(report(payload))
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) <= 0x9F or c in "\u202e\u2066" for c in shown)


@given(st.text())
def test_clean_is_idempotent_and_leaves_nothing_that_steers(text: str) -> None:
    out = clean(text)
    assert clean(out) == out
    assert "\x1b" not in out
    out.encode("utf-8")


def test_markdown_escapes_pipes_and_html() -> None:
    row = next(line for line in to_markdown(report(EVIL)).splitlines() if "evil" in line)
    assert row.count("|") - row.count("\\|") == 3
    assert "<b>" not in row.replace("\\<", "")


def test_json_spells_rates_out_and_holds_no_nan() -> None:
    data = json.loads(to_json(report()))
    assert data["values"]["nan"] is None
    want = {"k": 9, "n": 10, "value": 0.9, "low": 0.6, "high": 0.98, "judge": "j", "unread": 2}
    assert {k: data["values"]["r"][k] for k in want} == want
    assert data["values"]["r"]["corrected_low"] == 0.7


@pytest.mark.parametrize(
    "payload", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\x1b[31m=1"]
)
def test_csv_neutralises_formulas(payload: str) -> None:
    row = to_csv(report(payload).tables[0]).splitlines()[1]
    assert row.lstrip('"')[0] not in "=+-@\t\r"


def test_csv_spreads_rates_over_columns() -> None:
    head, first, second = to_csv(report().tables[0]).splitlines()
    assert head == "category,rate share,rate low,rate high,rate n"
    assert first == "safety,0.9,0.6,0.98,10"
    assert second == "other,,,,"


def test_numbers() -> None:
    assert percent(0.0) == "0%"
    assert percent(1.0) == "100%"
    assert percent(0.0004) == "<1%"
    assert percent(0.045, 1) == "4.5%"
    assert interval(None, 0.5) == ""
    assert cell(Rate(k=0, n=0, low=None, high=None)) == "–"
    assert plain({1: frozenset({"b", "a"})}) == {"1": ["a", "b"]}
