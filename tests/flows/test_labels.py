"""Drawing a blind sheet, the page for it, and reading labels back."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from demur.errors import InputError
from demur.files import read_rows
from demur.flows import labels
from demur.flows.label_figures import evaluate
from demur.judges.base import Pair
from demur.types import Prompt, Reply, Verdict


def read_labels(path: Path, pairs: Sequence[Pair], key: Path | None = None) -> labels.Labels:
    return labels.read_labels(path, [labels.Answer.of(r) for _, r in pairs], key)


LABEL = {True: "full_refusal", False: "compliance"}


def said(judge: str, flags: Sequence[bool], scale: str = "refusal") -> list[Verdict]:
    return [
        Verdict(prompt_id=f"p{i}", label=LABEL[bool(f)], judge=judge, scale=scale)
        for i, f in enumerate(flags)
    ]


def world(n: int = 2000, seed: int = 0) -> tuple[list[Pair], dict[str, list[Verdict]], np.ndarray]:
    """Answers whose truth is known, and two judges of different error."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    a = np.where(truth, rng.random(n) < 0.85, rng.random(n) < 0.1)
    b = np.where(truth, rng.random(n) < 0.7, rng.random(n) < 0.03)
    pairs = [
        (Prompt.of(f"Request {i}", id=f"p{i}"), Reply(prompt_id=f"p{i}", content=f"Answer number {i}"))
        for i in range(n)
    ]
    return pairs, {"judge/a": said("judge/a", a), "judge/b": said("judge/b", b)}, truth


def filled(sheet: labels.Sheet, truth: np.ndarray, path: Path, keep: int | None = None) -> Path:
    lines = [f"{row},{LABEL[bool(truth[at])]}" for row, at in sheet.rows][:keep]
    path.write_text("\n".join(["row,label", *lines]) + "\n")
    return path


def test_draws_more_where_judges_disagree_and_knows_the_chances(tmp_path: Path) -> None:
    pairs, verdicts, _ = world()
    sheet = labels.draw(pairs, verdicts, 150)
    size, taken = Counter(sheet.cells), Counter(sheet.cells[at] for _, at in sheet.rows)
    rate = {tuple(said.values()): taken[c] / size[c] for c, said in enumerate(sheet.said)}
    assert len(sheet.rows) == 150 == len({at for _, at in sheet.rows}) and len(rate) == 4
    agreeing = rate["no", "no"], rate["yes", "yes"]
    assert min(rate["no", "yes"], rate["yes", "no"]) > 2 * max(agreeing)
    assert min(taken.values()) >= labels.AT_LEAST
    labels.write_sheet(sheet, pairs, tmp_path)
    key = json.loads((tmp_path / "key.json").read_text())
    assert sum(c["answers"] for c in key["cells"]) == 2000
    cell_of = {tuple(answer): c for *answer, _, c in key["drawn_from"]}
    for row in key["rows"].values():
        cell = key["cells"][cell_of[row["id"], row["condition"], row["sample"]]]
        assert row["probability"] == cell["drawn"] / cell["answers"]
    assert labels.draw(pairs, verdicts, 150) == sheet != labels.draw(pairs, verdicts, 150, seed=1)


def test_small_cells_are_taken_whole_and_answers_without_text_left_out() -> None:
    pairs, verdicts, _ = world(60)
    pairs[0] = (pairs[0][0], Reply(prompt_id="p0", error="timeout"))
    sheet = labels.draw(pairs, verdicts, 150)
    assert sorted(at for _, at in sheet.rows) == list(range(1, 60)) and sheet.cells[0] is None


def test_the_sheet_is_blind_and_in_random_order(tmp_path: Path) -> None:
    pairs, verdicts, _ = world()
    sheet = labels.draw(pairs, verdicts, 150)
    paths = labels.write_sheet(sheet, pairs, tmp_path)
    order = [at for _, at in sheet.rows]
    assert order != sorted(order)
    cells = [sheet.cells[at] or 0 for at in order]
    assert cells != sorted(cells) and len(set(cells[:40])) > 2
    page = paths[1].read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert all(set(item) == {"row", "prompt", "answer"} for item in data["items"])
    for text in (page, paths[0].read_text()):
        assert not re.search(r"\bp\d+\b|judge/", text)
    rows = [row for _, row in read_rows(paths[0])]
    assert [r["row"] for r in rows] == [row for row, _ in sheet.rows] == [i["row"] for i in data["items"]]
    assert all(set(r) == {"row", "prompt", "answer"} for r in rows)
    with pytest.raises(InputError, match="belongs to another sheet"):
        labels.write_sheet(sheet, pairs, tmp_path)


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    pairs, verdicts, _ = world(30)
    bad = "</script><script>alert(1)</script><!--\u202e=1+1"
    pairs[:] = [(p, Reply(prompt_id=p.id, content=bad)) for p, _ in pairs]
    sheet, page, _ = labels.write_sheet(labels.draw(pairs, verdicts, 30), pairs, tmp_path)
    assert page.read_text().count("</script>") == 2 and "alert(1)<" not in page.read_text()
    assert "\u202e" not in sheet.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page.read_text())
    assert policy is not None
    allowed = html.unescape(policy[1])
    assert "default-src 'none'" in allowed and "unsafe" not in allowed and "http" not in allowed
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page.read_text(), re.S)[-1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in allowed


def test_reading_back_gives_the_truth(tmp_path: Path) -> None:
    pairs, verdicts, truth = world()
    sheet = labels.draw(pairs, verdicts, 600)
    labels.write_sheet(sheet, pairs, tmp_path)
    found = read_labels(filled(sheet, truth, tmp_path / "l.csv"), pairs)
    report = evaluate(pairs, verdicts, found, width=0.05)
    flags = np.array([v.label == "full_refusal" for v in verdicts["judge/a"]])
    one = report.values["judges"]["judge/a"]
    assert one["rate"].value == flags.mean()
    assert one["rate"].corrected == pytest.approx(truth.mean(), abs=0.02)
    assert one["sensitivity"]["value"] == pytest.approx(flags[truth].mean(), abs=0.05)
    assert one["specificity"]["value"] == pytest.approx((~flags[~truth]).mean(), abs=0.03)
    assert one["sensitivity"]["low"] < flags[truth].mean() < one["sensitivity"]["high"]
    # both judges share the labels and so the rate
    assert report.values["judges"]["judge/b"]["rate"].corrected == pytest.approx(one["rate"].corrected)
    assert one["needed"]["labels"] > 100 and report.tables[0].columns[-1] == "labels for a width of 0.05"
    narrow = evaluate(pairs, verdicts, found, width=0.01).values["judges"]["judge/a"]["needed"]
    assert narrow["labels"] is None and narrow["answers"] == pytest.approx(0.21 * (3.92 / 0.01) ** 2, rel=0.1)


def test_150_labels_of_a_sheet_cover_the_rate(tmp_path: Path) -> None:
    inside = raw = 0
    for i in range(25):
        pairs, verdicts, truth = world(800, seed=i)
        sheet = labels.draw(pairs, verdicts, 150, seed=i)
        yes = {at: bool(truth[at]) for _, at in sheet.rows}
        every = labels.Labels(
            scale="refusal", yes=yes, cells=sheet.cells, said=sheet.said, blank=0, drawn="a sheet"
        )
        rate = evaluate(pairs, {"judge/b": verdicts["judge/b"]}, every).values["judges"]["judge/b"]["rate"]
        inside += rate.corrected_interval[0] <= 0.3 <= rate.corrected_interval[1]
        raw += rate.low <= 0.3 <= rate.high
    assert inside >= 21 and raw <= 5


def test_a_half_done_sheet_and_unsure_rows_are_said(tmp_path: Path) -> None:
    pairs, verdicts, truth = world()
    sheet = labels.draw(pairs, verdicts, 150)
    labels.write_sheet(sheet, pairs, tmp_path / "s")
    path = filled(sheet, truth, tmp_path / "l.csv", keep=100)
    path.write_text(path.read_text().replace(",compliance", ",unparsed", 3))
    found = read_labels(path, pairs, tmp_path / "s" / "key.json")
    report = evaluate(pairs, verdicts, found)
    assert (report.values["labels"], report.values["unsure"], report.values["blank"]) == (97, 3, 50)
    assert "3 answers could not be told and 50 have no label yet" in report.notes[1]


def test_own_labels_are_taken_for_a_random_sample(tmp_path: Path) -> None:
    pairs, verdicts, truth = world()
    path = tmp_path / "mine.csv"
    path.write_text("id,label\n" + "".join(f"p{i},{LABEL[bool(truth[i])]}\n" for i in range(400)))
    report = evaluate(pairs, verdicts, read_labels(path, pairs))
    rate = report.values["judges"]["judge/a"]["rate"]
    assert rate.corrected == pytest.approx(truth.mean(), abs=0.04) and "random sample" in report.notes[0]


def test_samples_of_one_prompt_count_as_one() -> None:
    pairs, verdicts, truth = world(500)
    five = [(p, Reply(prompt_id=p.id, content="x", sample=s)) for p, _ in pairs for s in range(5)]
    again = {j: [v for v in vs for _ in range(5)] for j, vs in verdicts.items()}
    yes = {i: bool(truth[i // 5]) for i in range(500)}  # 100 prompts, all their samples
    once = {i: bool(truth[i]) for i in range(100)}
    kind = {"scale": "refusal", "said": [{}], "blank": 0, "drawn": "x"}
    many = evaluate(five, again, labels.Labels(yes=yes, cells=[0] * 2500, **kind)).values["judges"]["judge/a"]
    few = evaluate(pairs, verdicts, labels.Labels(yes=once, cells=[0] * 500, **kind)).values["judges"][
        "judge/a"
    ]
    assert many["rate"].corrected == pytest.approx(few["rate"].corrected)
    assert many["rate"].corrected_interval == pytest.approx(few["rate"].corrected_interval, abs=0.005)
    assert (many["rate"].low, many["rate"].high) == pytest.approx(
        (few["rate"].low, few["rate"].high), abs=0.01
    )


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    pairs, verdicts, truth = world(200)
    sheet = labels.draw(pairs, verdicts, 50)
    path = filled(sheet, truth, tmp_path / "l.csv")
    with pytest.raises(InputError, match="--key"):
        read_labels(path, pairs)
    labels.write_sheet(sheet, pairs, tmp_path)
    path.write_text("row,label\nsomething-1,compliance\n")
    with pytest.raises(InputError, match="not in the sheet"):
        read_labels(path, pairs)
    path.write_text(f"row,label\n{sheet.rows[0][0]},maybe\n")
    with pytest.raises(InputError, match="none of"):
        read_labels(path, pairs)
    with pytest.raises(InputError, match="no row has a label"):
        read_labels(tmp_path / "sheet.csv", pairs)
    with pytest.raises(InputError, match="at least 20"):
        labels.draw(pairs, verdicts, 5)
    mixed = {"judge/a": verdicts["judge/a"], "h": said("h", truth, scale="harm")}
    with pytest.raises(InputError, match="one scale"):
        labels.draw(pairs, mixed, 50)
    filled(sheet, truth, path)
    with pytest.raises(InputError, match="labels are about refusal"):
        evaluate(pairs, {"h": said("h", truth, scale="harm")}, read_labels(path, pairs))


# --- the page at work ---

DRIVER = """
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key: key, cancelable: true }));
const first = items[0].row;
let blob = null;
URL.createObjectURL = (made) => { blob = made; return "#"; };
for (const key of ["1", "3", "0", "ArrowLeft", "Delete", "ArrowRight", "9", "6"]) { press(key); }
byId("save-csv").click();
const state = { count: byId("count").textContent, prompt: byId("prompt").textContent, bar: byId("progress").value };
labels.clear();
const quoted = first + ',compliance,"two ""lines""\\nof, text"';
const half = ["\\ufeffrow,label,prompt", quoted, "other-1,compliance,x", ""];
read("half.csv", half.join("\\n"));
state.loaded = [labels.get(first), labels.size, byId("count").textContent];
press("ArrowLeft");
state.pressed = [...document.querySelectorAll('[aria-pressed="true"]')].map((b) => b.dataset.value);
blob.text().then((text) => { state.csv = text; document.body.dataset.result = JSON.stringify(state); });
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to open the page with")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    pairs, verdicts, _ = world(30)
    pairs[:] = [(p, Reply(prompt_id=p.id, content="<b>x</b><img src=x onerror=alert(1)>")) for p, _ in pairs]
    sheet = labels.draw(pairs, verdicts, 30)
    page = labels.write_sheet(sheet, pairs, tmp_path)[1]
    digest = base64.b64encode(hashlib.sha256(DRIVER.encode()).digest()).decode()
    text = page.read_text().replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    page.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"))
    command = [
        *(
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=3000",
            "--dump-dom",
        ),
        f"--user-data-dir={tmp_path / 'profile'}",
        page.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    result = re.search(r'data-result="([^"]*)"', dom)
    assert result is not None, dom[-2000:]
    state = json.loads(html.unescape(result[1]))
    rows = [row for row, _ in sheet.rows]
    # 1, 3, 0 label the first three; back to the third, taken back; on to the fourth; 9 is no label; 6 labels it
    assert state["csv"].split() == [
        "row,label",
        f"{rows[0]},full_refusal",
        f"{rows[1]},compliance",
        f"{rows[3]},off_topic",
    ]
    assert state["count"] == "answer 5 of 30, 3 labelled" and state["bar"] == 3
    assert state["prompt"] == pairs[sheet.rows[4][1]][0].text
    assert state["loaded"][:2] == ["compliance", 1] and "1 rows do not belong" in state["loaded"][2]
    assert state["pressed"] == ["compliance"]
    assert "<img src" not in dom.split("<script")[0]
