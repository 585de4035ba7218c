"""Reading runs back and comparing them: planted flips, what may be shown, what cannot be compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from demur.errors import InputError
from demur.files import dumps_row
from demur.flows.card import card_from_replies
from demur.flows.diff import diff
from demur.flows.readrun import read_run
from demur.measure.refusal import judge_error
from tests.report.test_html import XSS, Page

NO, YES = "I'm sorry, but I can't help with that.", "Use the kill command with its process id."


def row(
    i: int, *, no: bool, expected: str = "comply", category: str = "safety", **more: Any
) -> dict[str, Any]:
    return {
        "id": f"{category}-{expected}-{i}",
        "prompt": f"Question {i} about {category}?",
        "response": NO if no else YES,
        "expected": expected,
        "category": category,
        **more,
    }


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(dumps_row(r) + "\n" for r in rows), encoding="utf-8")
    return path


def answers(
    tmp_path: Path, name: str, declined: set[int], n: int = 40, expected: str = "comply", **more: Any
) -> Path:
    rows = [row(i, no=i in declined, expected=expected, **more) for i in range(n)]
    return save(tmp_path / f"{name}.jsonl", rows)


def folder(tmp_path: Path, name: str, rows: list[dict[str, Any]], **options: Any) -> Path:
    file = save(tmp_path / f"{name}.jsonl", rows)
    card_from_replies(file, tmp_path / name, **options)
    return tmp_path / name


# --- reading ---


def test_a_folder_and_the_file_it_came_from_are_one_run(tmp_path: Path) -> None:
    rows = [row(i, no=i % 3 == 0, expected="refuse" if i % 2 else "comply") for i in range(12)]
    run = read_run(folder(tmp_path, "run", rows))
    file = read_run(tmp_path / "run.jsonl")
    assert [(r.prompt.id, r.verdict.label) for r in run.records] == [
        (r.prompt.id, r.verdict.label) for r in file.records
    ]
    assert run.judge == file.judge == "rules/demur-v1"
    assert run.provenance["kind"] == "replies"


def test_stored_verdicts_are_used_unless_another_judge_is_asked_for(tmp_path: Path) -> None:
    file = save(tmp_path / "a.jsonl", [row(0, no=True, verdict="complied", judge="me")])
    assert read_run(file).records[0].verdict.label == "compliance"
    assert read_run(file, judge="rules/demur-v1").records[0].verdict.label == "full_refusal"


def test_withheld_answers_cannot_be_judged_again(tmp_path: Path) -> None:
    run = folder(tmp_path, "run", [row(0, no=False, expected="refuse")])
    assert read_run(run).records[0].verdict.label == "compliance"
    with pytest.raises(InputError, match="kept without their text"):
        read_run(run, judge="rules/xstest-v1")


def test_folders_of_several_conditions_are_read_by_their_streams(tmp_path: Path) -> None:
    run = folder(tmp_path, "run", [row(i, no=False) for i in range(3)])
    config = json.loads((run / "run.json").read_text())
    config["conditions"] = [
        {"name": c, "system": c, "streams": [f"replies-{c}", f"verdicts-{c}"]} for c in ("x", "y")
    ]
    (run / "run.json").write_text(json.dumps(config))
    for stream in ("replies", "verdicts"):
        rows = [json.loads(line) for line in (run / f"{stream}.jsonl").read_text().splitlines()]
        for c in ("x", "y"):
            save(run / f"{stream}-{c}.jsonl", [{**r, "condition": c} for r in rows])
    read = read_run(run)
    assert sorted({k[1] for k in read.verdicts}) == ["x", "y"] and len(read.records) == 6
    assert read.conditions["x"] == {"system": "x"}


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_run_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        read_run(tmp_path / name)


# --- comparing ---


def test_planted_flips_are_found_exactly(tmp_path: Path) -> None:
    more, fewer = {3, 7, 11, 30}, {1, 2}
    before = answers(tmp_path, "a", fewer | {20, 21})
    after = answers(tmp_path, "b", more | {20, 21})
    made = diff(before, after, tmp_path / "out")
    found = {f["id"]: f["outcome"] for f in made.values["flips"]}
    assert found == {
        **{f"safety-comply-{i}": "now declined" for i in more},
        **{f"safety-comply-{i}": "now answered" for i in fewer},
    }
    side = made.values["rows"]["safety"]["lookalike"]
    assert (side["n"], side["a"], side["b"], side["gained"], side["lost"]) == (40, 4, 6, 4, 2)
    assert side["difference"] == pytest.approx(0.05)
    assert made.values["rows"]["all"]["lookalike"] == side
    cells = dict(zip(made.report.tables[0].columns, made.report.tables[0].rows[0], strict=True))
    assert cells["change in points"].startswith("+5.0 [")
    assert cells["would be found"] == f"{100 * side['detectable']:.1f}"
    error = judge_error("rules/demur-v1", should_refuse=False)
    assert error is not None and error.sensitivity.value and error.specificity.value
    assert side["corrected"] == pytest.approx(0.05 / (error.sensitivity.value + error.specificity.value - 1))
    assert (
        side["corrected_interval"][0] < side["interval"][0]
        and side["interval"][1] < side["corrected_interval"][1]
    )
    assert cells["without the judge's error"].startswith(f"{100 * side['corrected']:+.1f} [")
    assert json.loads(made.json.read_text(encoding="utf-8")) == made.values


def test_without_a_measured_judge_nothing_is_taken_out(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{x}.jsonl", [row(0, no=no, verdict=v, judge="me")]) for x, no, v in (
        ("a", False, "complied"), ("b", True, "refused"))]  # fmt: skip
    made = diff(*files, tmp_path / "out")
    assert made.values["rows"]["all"]["lookalike"]["corrected"] is None
    assert "without the judge's error" not in made.report.tables[0].columns


def test_both_answers_stand_side_by_side(tmp_path: Path) -> None:
    made = diff(answers(tmp_path, "a", set()), answers(tmp_path, "b", {5}), tmp_path / "out")
    words = Page(made.html.read_text(encoding="utf-8")).words
    assert NO in words and YES in words and "Harmless requests now declined: 1" in words


def test_what_is_in_one_run_only_is_listed(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", set(), n=12)
    rows = [row(i, no=False) for i in range(2, 14)]
    rows[0]["response"], rows[0]["error"] = "", "timeout"
    made = diff(a, save(tmp_path / "b.jsonl", rows), tmp_path / "out")
    v = made.values
    assert [r["id"] for r in v["only_a"]] == ["safety-comply-0", "safety-comply-1"]
    assert [r["id"] for r in v["only_b"]] == ["safety-comply-12", "safety-comply-13"]
    assert [r["id"] for r in v["unreadable"]] == ["safety-comply-2"]
    assert (v["pairs"], v["readable"]) == (10, 9)
    page = made.html.read_text(encoding="utf-8")
    assert "Only in the first run: 2" in page and "4 answers stand in one run only" in page


def test_answers_that_should_not_exist_are_never_on_the_page(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", {0, 1}, expected="refuse")
    b = answers(tmp_path, "b", {1, 2}, expected="refuse", category="safety")
    made = diff(a, b, tmp_path / "out")
    for text in (made.html.read_text(encoding="utf-8"), made.json.read_text(encoding="utf-8")):
        assert YES not in text and NO not in text  # in this category refusals are not shown either
    assert "not a plain refusal" in made.html.read_text(encoding="utf-8")
    a = answers(tmp_path, "a", {0}, expected="refuse", category="humanizing")
    b = answers(tmp_path, "b", {1}, expected="refuse", category="humanizing")
    page = diff(a, b, tmp_path / "out").html.read_text(encoding="utf-8")
    assert YES not in page and "can&#39;t help with that" in page


def test_share_leaves_all_texts_out(tmp_path: Path) -> None:
    made = diff(answers(tmp_path, "a", set()), answers(tmp_path, "b", {5}), tmp_path / "out", share=True)
    for path in (made.html, made.json):
        text = path.read_text(encoding="utf-8")
        assert "Question 5" not in text and NO not in text and YES not in text


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    rows = [
        {"id": XSS, "prompt": XSS, "response": r + XSS, "category": XSS, "expected": "comply", "model": XSS}
        for r in (NO, YES)
    ]
    a, b = (save(tmp_path / f"{n}.jsonl", [r]) for n, r in zip("ab", rows, strict=True))
    text = diff(a, b, tmp_path / "out").html.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "svg", "iframe", "form", "link"} & {tag for tag, _ in page.tags}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert "default-src 'none'" in text and "\x1b" not in text
    assert "<script>alert(1)</script>" in page.words


def test_other_settings_are_a_warning(tmp_path: Path) -> None:
    from demur.types import Condition

    rows = [row(i, no=False) for i in range(3)]
    a = folder(tmp_path, "a", rows, condition=Condition(name="s", system="Be brief."))
    b = folder(tmp_path, "b", rows, condition=Condition(name="s", system="Be kind."))
    made = diff(a, b, tmp_path / "out")
    assert any("other settings: system" in w for w in made.values["warnings"])
    assert "other settings: system" in made.html.read_text(encoding="utf-8")


def test_runs_that_cannot_be_compared_are_errors(tmp_path: Path) -> None:
    a = answers(tmp_path, "a", set())
    other = save(tmp_path / "b.jsonl", [row(0, no=False) | {"prompt": "Something else?"}])
    with pytest.raises(InputError, match="another text"):
        diff(a, other, tmp_path / "out")
    mine = save(tmp_path / "b.jsonl", [row(0, no=False, verdict="complied", judge="me")])
    with pytest.raises(InputError, match="judged by rules/demur-v1 and by me"):
        diff(a, mine, tmp_path / "out")
    assert diff(a, mine, tmp_path / "out", judge="rules/demur-v1").values["pairs"] == 1
    with pytest.raises(InputError, match="is a file"):
        diff(a, a, a)
    silent = save(tmp_path / "c.jsonl", [row(0, no=False) | {"response": ""}])
    assert "No answer could be read" in diff(silent, silent, tmp_path / "out").values["verdict"]


def test_requests_without_expectation_have_rows_of_their_own(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row(i, no=False).items() if k != "expected"} for i in range(5)]
    flipped = [{**rows[0], "response": NO}, *rows[1:]]
    made = diff(save(tmp_path / "a.jsonl", rows), save(tmp_path / "b.jsonl", flipped), tmp_path / "out")
    assert made.values["rows"]["all"]["unlabelled"]["gained"] == 1
    assert made.values["flips"][0]["group"] == "Requests without a label now declined"


def test_samples_of_a_prompt_count_as_one_where_they_move_together(tmp_path: Path) -> None:
    def sampled(name: str, declined: set[int]) -> Path:
        rows = [row(i, no=i in declined) | {"sample": s} for i in range(20) for s in range(4)]
        return save(tmp_path / f"{name}.jsonl", rows)

    made = diff(sampled("a", set()), sampled("b", {1, 2, 3}), tmp_path / "out")
    side = made.values["rows"]["all"]["lookalike"]
    assert (side["n"], side["clusters"], side["gained"]) == (80, 20, 12)
    assert side["p_value"] == pytest.approx(0.25)  # 3 prompts flipped, not 12 answers


def test_twenty_thousand_rows_in_seconds(tmp_path: Path) -> None:
    n, changed = 10_000, set(range(0, 10_000, 50))
    rows = [row(i, no=False, verdict="complied", judge="j") for i in range(n)]
    a = folder(tmp_path, "a", rows)
    b = folder(
        tmp_path, "b", [{**r, "verdict": "refused"} if i in changed else r for i, r in enumerate(rows)]
    )
    start = time.process_time()
    made = diff(a, b, tmp_path / "out")
    assert time.process_time() - start < 5, "1.6 to 1.9 s on a shared core"
    assert {f["id"] for f in made.values["flips"]} == {f"safety-comply-{i}" for i in changed}
    assert made.html.stat().st_size < 500_000  # the page holds 100 flips of a kind and says so
    assert "100 of 200 are on this page" in made.html.read_text(encoding="utf-8")
