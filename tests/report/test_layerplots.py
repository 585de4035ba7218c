import re

import pytest

from demur.report.layerplots import layer_lines, layer_map
from tests.report.test_html import XSS, Page


def cells(svg: str) -> list[tuple[float, float, str, float]]:
    found = re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)".*?fill="var\(--(\w+)\)" fill-opacity="([\d.]+)"', svg
    )
    return [(float(x), float(y), c, float(o)) for x, y, c, o in found]


def test_cells_are_coloured_away_from_the_middle() -> None:
    drawn = cells(layer_map(["a", "b"], [[0.5, 1.0, 0.25], [float("nan"), 0.5, 9.0]], middle=0.5, limit=0.5))
    assert [(c, o) for _, _, c, o in drawn] == [("refuse", 1.0), ("over", 0.5), ("refuse", 1.0)]
    (first, second, third) = drawn
    assert first[0] < second[0] == third[0] and first[1] == 0 < third[1]  # columns are layers, rows go down


def test_a_control_stands_beside_and_missing_ones_are_dashes() -> None:
    svg = layer_map(["a", "b"], [[1.0], [1.0]], limit=1, beside=("words", [0.25, None]))
    assert ">0.25<" in svg and ">–<" in svg and ">words<" in svg


def test_a_frame_marks_the_window_and_labels_the_rows_in_ink() -> None:
    svg = layer_map(["a", "b"], [[1.0] * 5] * 2, limit=1, window=(1, 2), marked=[1])
    (frame,) = re.findall(r'<path d="M([\d.]+) 1H([\d.]+)V', svg)
    drawn = [x for x, *_ in cells(svg)][:5]
    assert tuple(map(float, frame)) == (drawn[1], drawn[3])  # around columns 1 and 2
    assert 'fill="var(--muted)" xml:space="preserve">a<' in svg
    assert 'fill="var(--ink)" xml:space="preserve">b<' in svg


@pytest.mark.parametrize("label", [XSS, "\ud83d", "a" * 300, "\n", ""])
def test_labels_stay_text(label: str) -> None:
    svg = layer_map([label, label], [[1.0], [0.0]], limit=1)
    assert not {t for t, _ in Page(svg).tags} - {"svg", "text", "rect", "path"}
    svg.encode()


def test_lines_leave_undefined_values_out_and_name_the_series() -> None:
    svg = layer_lines(
        {"one": [0.1, float("nan"), 0.3], "two": [0.5, 0.5, 0.5]},
        name="x",
        title="cosine",
        domain=(-1, 1),
        rule=("words", 0.2),
    )
    assert ">one<" in svg and ">two<" in svg and ">words<" in svg and "NaN" not in svg
    assert (
        "var(--refuse)" in svg and "var(--over)" in svg and "http" not in svg.replace("http://www.w3.org", "")
    )
