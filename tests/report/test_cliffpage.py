import dataclasses
import re

import pytest

from demur.report.cliffpage import HEIGHT, LONGEST, TOP, Traced, pick, to_html
from demur.types import Report, Table
from tests.report.test_html import XSS, Page


def traced(drop: float, name: str = "", words: int = 4, text: str = "word ") -> Traced:
    return Traced(
        id=name or f"drop {drop}",
        prompt=text,
        thinking=text * words,
        tokens=("hidden header",) + (text,) * words + ("</think>", "\n\n"),
        spans=("template",) + ("thinking",) * words + ("close",) * 2,
        scores=(0.5,) + (0.9,) * words + (0.9, 0.9 - drop),
        plateau=0.9,
        final=0.9 - drop,
    )


def point(span: str, place: int, median: float) -> dict[str, object]:
    return {"span": span, "place": place, "median": median, "low": median - 0.1, "high": median, "n": 7}


def report(text: str = "plain", words: float = 0.6, chance: tuple[float, float] = (-0.1, 0.1)) -> Report:
    cliff = Table(
        "cliff",
        ("what", "median", "low", "high", "n"),
        (
            ("plateau", 0.9, 0.8, 0.95, 7),
            ("final", 0.2, 0.1, 0.3, 7),
            ("drop", 0.7, 0.5, 0.8, 7),
            ("drop of probes on shuffled labels", 0.0, *chance, 7),
        ),
    )
    fitted = Table("probes on 8 thoughts kept back", ("reader", "AUROC"), (("final", 0.95), (text, words)))
    heads = Table("heads, 2 of 4", ("layer", "head"), ((3, 1), (0, 2)), note="below 0: against refusal")
    curve = [point("thinking", k, 0.9) for k in range(10)]
    curve += [point("close", -2, 0.75), point("close", -1, 0.25)]
    return Report(
        title=text,
        tables=(cliff, fitted, heads),
        values={
            "layer": 5,
            "curve": curve,
            "shuffled_curve": [{**p, "median": 0.5} for p in curve],
            "held_out": {"final": 0.95, "bag_of_words": words},
        },
        provenance={"model": text, "by": "groups", "n_fit": 32},
        notes=(text,),
    )


def test_everything_foreign_comes_out_as_text_and_nothing_is_loaded() -> None:
    page = Page(to_html(report(XSS), [traced(0.5, XSS, text=XSS)]))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "form"}
    assert not [a for _, a in page.tags if any(k.startswith("on") or k == "src" for k in a)]
    policy = next(a for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    assert page.words.count("<script>alert(1)</script>") >= 8 and "\x1b" not in page.words


def lines(page: str) -> list[list[tuple[float, float]]]:
    """The points of each line drawn, heights as scores."""
    found = re.findall(r'<path d="M([^"HZ]+)" fill="none" stroke="var\(--(?:refuse|over)\)"', page)
    pairs = [[tuple(map(float, p.split())) for p in one.split("L")] for one in found]
    return [[(x, 1 - (y - TOP) / HEIGHT) for x, y in one] for one in pairs]


def test_the_curve_and_its_chance_are_drawn_where_they_are() -> None:
    page = to_html(report(), [traced(0.5)])
    chance, curve, single = lines(page)
    assert [y for _, y in curve] == pytest.approx([0.9] * 10 + [0.75, 0.25], abs=0.001)
    assert [y for _, y in chance] == pytest.approx([0.5] * 12, abs=0.001)
    assert [y for _, y in single] == pytest.approx([0.9] * 5 + [0.4], abs=0.001)
    assert [x for x, _ in curve] == sorted({x for x, _ in curve}) == [x for x, _ in chance]
    assert "Dashed: readers fitted on shuffled labels" in page and "closing, 2 tokens" in page
    full = report()
    bare = {k: v for k, v in full.values.items() if k != "shuffled_curve"}
    without = to_html(dataclasses.replace(full, values=bare), [traced(0.5)])
    assert len(lines(without)) == 2 and "Dashed" not in without


@pytest.mark.parametrize(
    ("chance", "said"),
    [((-0.1, 0.1), ": more than the -0.10 to 0.10"), ((-0.1, 0.6), "not clearly"), ((0.9, 1.0), "less than")],
)
def test_the_first_sentence_holds_the_drop_against_chance(chance: tuple[float, float], said: str) -> None:
    page = to_html(report(chance=chance), [traced(0.5)])
    assert "drop of 0.70 [0.50, 0.80], with the score at 0.90" in page and said in page


def test_a_bag_of_words_that_does_as_well_is_said() -> None:
    assert "may follow the wording" in to_html(report(words=0.95), [traced(0.5)])
    assert "may follow the wording" not in to_html(report(words=0.94), [traced(0.5)])


def test_traces_are_spread_over_the_drops_and_not_chosen() -> None:
    many = [traced(k / 100) for k in range(51)]
    assert [round(t.drop, 2) for t in pick(many)] == [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert [round(t.drop, 2) for t in pick(many[:2])] == [0.01, 0.0]


def test_tokens_take_the_colour_of_their_score_and_long_thinking_is_cut() -> None:
    page = to_html(report(), [traced(0.8, words=LONGEST + 30)])
    marks = re.findall(r"var\((--\w+)\) (\d+)%, transparent\)\" title=\"(\w+), ([\d.]+)\"", page)
    assert len(marks) == LONGEST + 2 and "[30 tokens before]" in page and "hidden header" not in page
    assert marks[0] == ("--refuse", "40", "thinking", "0.90")
    assert marks[-1] == ("--over", "40", "close", "0.10")


def test_spaces_that_single_tokens_lack_come_from_the_thinking() -> None:
    bare = dataclasses.replace(traced(0.5), tokens=("", "one", "two", "3", "4", "</think>", ""))
    read = "one two\n\n34</think>"
    assert read in Page(to_html(report(), [dataclasses.replace(bare, thinking="one two\n\n34")])).words
    whole = dataclasses.replace(bare, tokens=("", "one", " two", "\n\n", "34", "</think>", ""))
    assert read in Page(to_html(report(), [dataclasses.replace(whole, thinking="one two\n\n34")])).words
    odd = dataclasses.replace(whole, tokens=("", "one", " \ufffd", "\ufffd", " 34", "</think>", ""))
    shown = Page(to_html(report(), [dataclasses.replace(odd, thinking="one \u00e9 34")])).words
    assert "one \ufffd\ufffd 34</think>" in shown


def test_the_tables_are_there_and_heads_only_when_asked_for() -> None:
    full = report()
    page = to_html(full, [traced(0.5)])
    assert "heads, 2 of 4" in page and "probes on 8 thoughts kept back" in page and "against refusal" in page
    assert 'id="heads"' not in to_html(dataclasses.replace(full, tables=full.tables[:2]), [traced(0.5)])
