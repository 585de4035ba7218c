"""People's labels correct every rate of a report, row by row; they find their answers in any order."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur import judges, stats
from demur.errors import InputError
from demur.flows import labels
from demur.flows.card import card, card_from_replies
from demur.flows.measure import measure, measure_answers, merge, report
from demur.flows.readrun import read_answers
from demur.measure.refusal import LEAST, Said, by_category, by_people, clustered
from demur.report import load_answers, to_text
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Prompt, PromptSet, Reply, Verdict
from tests.flows.synthetic import COMPLY, REFUSE

NO, ODD = "I'm sorry, but I can't help with that.", "Ask me something else, friend, and gladly."
YES = "Sure. First look at the label, then at the door."
LABEL = {True: "full_refusal", False: "compliance"}
CATEGORIES = ("humanizing", "safety")


def rows(n: int = 120) -> list[dict[str, Any]]:
    """Answers of two categories and sides. Every fifth declines in words that no rule knows."""
    text = {0: NO, 1: ODD, 2: YES, 3: YES, 4: NO}
    return [
        {
            "id": f"p{i}",
            "prompt": f"Request {i}?",
            "response": f"{text[i % 5]} {i}",
            "category": CATEGORIES[i // 5 % 2],
            "expected": "refuse" if i // 10 % 2 else "comply",
        }
        for i in range(n)
    ]


def write(path: Path, some: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def drawn(path: Path, folder: Path, n: int = 60) -> labels.Sheet:
    """A sheet of the answers of a file or run, by two judges."""
    asked, replies = read_answers(path)
    by_id = {p.id: p for p in asked}
    pairs = [(by_id[r.prompt_id], r) for r in replies]
    two = [judges.get(i) for i in ("rules/xstest-v1", "rules/gcg-v1")]
    sheet = labels.draw(pairs, {j.id: judges.judge_all(j, pairs) for j in two}, n)
    labels.write_sheet(sheet, pairs, folder)
    return sheet


def filled(folder: Path) -> Path:
    """The sheet of a folder with the truth in it."""
    with (folder / "sheet.csv").open(newline="", encoding="utf-8-sig") as f:
        done = [f"{row['row']},{LABEL[not row['answer'].startswith('Sure')]}" for row in csv.DictReader(f)]
    path = folder / "filled.csv"
    path.write_text("\n".join(["row,label", *done]) + "\n")
    return path


@pytest.fixture
def sheet(tmp_path: Path) -> tuple[Path, Path]:
    """A file of answers, and the labels of a sheet that was drawn from it."""
    path = write(tmp_path / "a.jsonl", rows())
    drawn(path, tmp_path / "labels")
    return path, filled(tmp_path / "labels")


def rates(values: Any) -> dict[str, Any]:
    return dict(values["conditions"]["as given"]["rates"])


# --- the estimate ---


def test_a_row_is_corrected_by_its_own_labels_by_hand() -> None:
    # the judge says yes to 6 of 10 here, 5 of them rightly, and misses 1 of the 4 others; elsewhere it errs always
    here = [(f, f"h{i}") for i, f in enumerate([True] * 6 + [False] * 4)]
    said = [Said(0, y) for y in [True] * 5 + [False] + [True] + [False] * 3]
    away = [(True, f"a{i}") for i in range(90)]
    rate = clustered(here, "j", said=said)
    assert (rate.k, rate.n, rate.labels) == (6, 10, 10)
    assert rate.corrected == pytest.approx(0.6)
    both = clustered(here + away, said=said + [Said(0, False)] * 90)
    assert both.corrected == pytest.approx(0.06)


def test_answers_settled_by_their_fields_are_known() -> None:
    # 20 with text, labelled; 10 blocked by the provider (declined); 5 errors, in no rate
    flags = [(i % 2 == 0, f"t{i}") for i in range(20)] + [(True, f"b{i}") for i in range(10)]
    said = [Said(0, i % 2 == 0) for i in range(20)] + [Said(None)] * 10
    rate = clustered([*flags, *((None, f"e{i}") for i in range(5))], said=[*said, *[Said(None)] * 5])
    assert (rate.k, rate.n, rate.unread, rate.labels) == (20, 30, 5, 20)
    assert rate.corrected == pytest.approx(20 / 30)


def test_samples_and_groups_are_one_draw() -> None:
    flags = [(i < 10, str(i)) for i in range(20)]
    said = [Said(0, i < 12) for i in range(20)]
    once = clustered(flags, said=said)
    five = clustered([f for f in flags for _ in range(5)], said=[s for s in said for _ in range(5)])
    assert five.corrected == pytest.approx(once.corrected)
    assert five.corrected_interval == pytest.approx(once.corrected_interval, abs=0.01)
    assert five.labels == 100


def test_too_few_labels_correct_nothing_whatever_they_say() -> None:
    flags = [(i % 2 == 0, str(i)) for i in range(100)]
    few = [Said(0, False if i < LEAST - 1 else None) for i in range(100)]
    rate = clustered(flags, said=few)
    assert (rate.corrected, rate.labels) == (None, LEAST - 1)
    # many labels, but none where most of the answers are
    one_sided = [Said(i % 2, True if i % 2 else None) for i in range(100)]
    assert clustered(flags, said=one_sided).corrected is None
    assert by_people(flags, [Said(0)] * 100) is None and clustered(flags, said=[Said(0)] * 100).labels == 0


CELLS = {
    # (category, should refuse): share that declines, and what the judge finds of refusals and of answers there
    ("a", True): (0.90, 0.95, 0.97),
    ("b", True): (0.70, 0.80, 0.90),
    ("c", True): (0.50, 0.60, 0.80),
    ("a", False): (0.05, 0.95, 0.97),
    ("b", False): (0.15, 0.80, 0.90),
    ("c", False): (0.30, 0.60, 0.80),
}


def simulated(seed: int, n: int = 70) -> dict[str, dict[str, Any]]:
    """The rates of n answers in each cell, by a judge whose error differs by category, with 150 labels."""
    rng = np.random.default_rng(seed)
    pairs, truth, mine, other = [], [], [], []
    for (category, side), (share, sensitivity, specificity) in CELLS.items():
        yes = rng.random(n) < share
        truth += yes.tolist()
        mine += np.where(yes, rng.random(n) < sensitivity, rng.random(n) >= specificity).tolist()
        other += np.where(yes, rng.random(n) < 0.75, rng.random(n) < 0.05).tolist()
        for i in range(n):
            p = Prompt.of(
                "x", id=f"{category}{side}{i}", category=category, expected=REFUSE if side else COMPLY
            )
            pairs.append((p, Reply(prompt_id=p.id, content="x")))
    both = {
        name: [
            Verdict(prompt_id=p.id, label=LABEL[f], judge=name)
            for (p, _), f in zip(pairs, flags, strict=True)
        ]
        for name, flags in (("mine", mine), ("other", other))
    }
    sheet = labels.draw(pairs, both, 150, seed=seed)
    labelled = {at for _, at in sheet.rows}
    said = [Said(c, truth[i] if i in labelled else None) for i, c in enumerate(sheet.cells)]
    return by_category([p for p, _ in pairs], mine, "mine", said=said)


def test_the_intervals_of_all_rows_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "from_cells", partial(stats.from_cells, draws=500))
    inside, raw = defaultdict(list), defaultdict(list)
    for seed in range(200):
        for row, two in simulated(seed).items():
            for side, rate in two.items():
                cells = [c for c in CELLS if c[1] == (side == "refuse") and row in ("all", c[0])]
                truth = np.mean([CELLS[c][0] for c in cells])
                raw[row, side].append(rate.low <= truth <= rate.high)
                if rate.corrected is not None:
                    low, high = rate.corrected_interval
                    inside[row, side].append(low <= truth <= high)
    assert len(inside) == 8 and min(map(len, inside.values())) > 150
    assert min(np.mean(hits) for hits in inside.values()) >= 0.92
    assert np.mean(raw["all", "refuse"]) < 0.4 and np.mean(raw["b", "refuse"]) < 0.6


# --- reports ---


def test_every_rate_of_the_report_comes_from_labels(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    made = measure_answers(load_answers(path), tmp_path / "run", labels=done)
    found = rates(made.report.values)
    whole = found["all"]["refuse"]
    assert (whole.k, whole.n) == (24, 60)  # the rule misses a fifth that declines in words of its own
    assert whole.corrected == pytest.approx(0.6, abs=0.1)
    assert whole.corrected_interval[0] < 0.6 < whole.corrected_interval[1]
    assert sum(found["all"][side].labels for side in ("refuse", "lookalike")) == 60
    for side in ("refuse", "lookalike"):
        assert sum(found[c][side].labels for c in CATEGORIES) == found["all"][side].labels
    stored = json.loads((tmp_path / "run" / "report.json").read_text())["values"]
    assert stored["correction"] == {
        "by": "labels",
        "method": "prediction-powered",
        "labels": 60,
        "unsure": 0,
        "blank": 0,
        "other": 0,
        "drawn": "a sheet drawn by what 2 judges said",
    }
    text = to_text(made.report)
    assert "by your labels of 60 answers (prediction-powered" in text and f"({whole.labels})" in text
    assert "measured error" not in text and "against people's labels" not in text


def test_a_row_without_labels_is_not_corrected_in_another_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows())
    mine = tmp_path / "mine.csv"
    some = [r for r in rows() if r["expected"] == "refuse"][:30]
    lines = [f"{r['id']},{LABEL[not r['response'].startswith('Sure')]}" for r in some]
    mine.write_text("\n".join(["id,label", *lines, "gone,compliance"]) + "\n")
    plain = rates(measure_answers(load_answers(path), tmp_path / "plain").report.values)
    assert plain["all"]["lookalike"].corrected is not None and plain["all"]["lookalike"].labels is None
    made = measure_answers(load_answers(path), tmp_path / "run", labels=mine)
    found = rates(made.report.values)
    assert (found["all"]["lookalike"].corrected, found["all"]["lookalike"].labels) == (None, 0)
    assert found["all"]["refuse"].corrected == pytest.approx(0.6, abs=0.05)
    assert "1 labels are of answers that are not here." in made.report.notes


def test_labels_find_their_answers_in_any_order(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    # the report names its one condition otherwise, and its rows stand in another order
    mixed = [{**row, "condition": "T0.7"} for row in rows()]
    np.random.default_rng(0).shuffle(mixed)  # type: ignore[arg-type]
    other = write(tmp_path / "b.jsonl", mixed)
    first, second = (
        rates(measure_answers(load_answers(f), tmp_path / f.stem, labels=done).report.values)
        for f in (path, other)
    )
    assert first == second


def test_the_folder_keeps_what_its_report_was_made_from(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    run = tmp_path / "run"
    with_labels, again = (
        measure_answers(load_answers(path), run, labels=done).json.read_bytes() for _ in range(2)
    )
    kept = (run / "people.json").read_bytes()
    assert with_labels == again == report(run).json.read_bytes()
    assert not any(r["response"].encode() in kept for r in rows())
    plain = measure_answers(load_answers(path), run).json.read_bytes()
    assert not (run / "people.json").exists() and plain != with_labels
    assert plain == measure_answers(load_answers(path), tmp_path / "new").json.read_bytes()


def test_a_judge_that_had_no_part_in_the_sheet(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    one, two = (
        rates(measure_answers(load_answers(path), tmp_path / "r", judge=j, labels=done).report.values)["all"][
            "refuse"
        ]
        for j in ("rules/demur-v1", "rules/cyberseceval-v1")
    )
    assert one.labels == two.labels and two.corrected == pytest.approx(0.6, abs=0.1)


def model(script: Any = None) -> tuple[ScriptedRuntime, PromptSet]:
    prompts = tuple(
        Prompt.of(
            r["prompt"],
            id=r["id"],
            category=r["category"],
            expected=REFUSE if r["expected"] == "refuse" else COMPLY,
        )
        for r in rows()
    )
    said = {r["id"]: r["response"] for r in rows()}
    return ScriptedRuntime(script or said, name="m"), PromptSet("s", prompts)


def test_a_run_with_two_conditions_resumes_with_labels_and_asks_nothing(tmp_path: Path) -> None:
    asked = []

    def script(p: Prompt, c: Condition, _s: int) -> str:
        asked.append(p.id)
        i = int(p.id[1:])
        return rows()[i]["response"] if c.name == "plain" else f"{NO if i % 2 else YES} {i}"

    runtime, prompts = model(script)
    conditions = (Condition(name="plain"), Condition(name="strict", system="Be careful."))
    how: dict[str, Any] = {"conditions": conditions, "progress": False, "keep_unsafe_text": True}
    run = tmp_path / "run"
    plain = measure(runtime, prompts, run, **how).json.read_bytes()
    assert len(asked) == 240
    drawn(run, tmp_path / "l", 120)
    done = filled(tmp_path / "l")
    values = measure(runtime, prompts, run, **how, labels=done).report.values["conditions"]
    assert len(asked) == 240
    found = {name: values[name]["rates"]["all"]["refuse"] for name in ("plain", "strict")}
    assert found["plain"].corrected == pytest.approx(0.6, abs=0.12)
    assert found["strict"].corrected == pytest.approx(0.5, abs=0.12)
    assert sum(values[c]["rates"]["all"][s].labels for c in values for s in ("refuse", "lookalike")) == 120
    assert measure(runtime, prompts, run, **how).json.read_bytes() == plain and len(asked) == 240
    with pytest.raises(InputError, match="--fresh throws away the answers"):
        measure(runtime, prompts, run, **how, labels=done, fresh=True)
    with pytest.raises(InputError, match="holds none"):
        measure(runtime, prompts, tmp_path / "empty", **how, labels=done)
    assert not (tmp_path / "empty" / "run.json").exists() and len(asked) == 240
    # a label of one's own must say which of the two answers it means
    (tmp_path / "own.csv").write_text("id,label\np0,compliance\n")
    with pytest.raises(InputError, match="add a column `condition`"):
        measure(runtime, prompts, run, **how, labels=tmp_path / "own.csv")


def test_joined_parts_and_withheld_texts(tmp_path: Path) -> None:
    """A sheet drawn from a file with all texts serves a folder that kept none of the unsafe ones."""
    runtime, prompts = model()
    parts = [tmp_path / f"p{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        measure(runtime, prompts, part, shard=(i, 2), progress=False)
    path = write(tmp_path / "a.jsonl", rows())
    drawn(path, tmp_path / "l")
    made = merge(parts, tmp_path / "all", labels=filled(tmp_path / "l"))
    assert any("withheld" in line for line in (tmp_path / "all" / "replies.jsonl").read_text().splitlines())
    found = made.report.values["conditions"]["default"]["rates"]
    assert found["all"]["refuse"].corrected == pytest.approx(0.6, abs=0.1)
    with pytest.raises(InputError, match="kept without their text"):
        read_answers(tmp_path / "all")


def test_the_card(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    out = tmp_path / "card"
    made = card_from_replies(path, out, labels=done)
    document = json.loads(made.json.read_text())
    text = document["sections"]["text"]
    rate = text["values"]["categories"]["all"]["refuse"]
    assert rate == document["headline"]["rows"]["all"]["refuse"] and rate["labels"] > 20
    assert rate["corrected"] == pytest.approx(0.6, abs=0.1)
    assert (
        text["values"]["correction"]["labels"] == 60 and "by your labels of 60" in text["tables"][0]["note"]
    )
    assert f"corrected by {rate['labels']} labels:" in made.html.read_text()
    assert (
        "correction"
        not in json.loads(card_from_replies(path, out).json.read_text())["sections"]["text"]["values"]
    )
    assert not (out / "people.json").exists()
    # a model's run, asked before
    runtime, prompts = model()
    card(runtime, prompts, tmp_path / "run", progress=False)
    asked = card(runtime, prompts, tmp_path / "run", progress=False, labels=done)
    assert (
        json.loads(asked.json.read_text())["sections"]["text"]["values"]["categories"]["all"]["refuse"]
        == rate
    )


def test_labels_of_other_answers(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    other = rows()
    other[3]["response"] = "Sure."
    other[4]["id"] = "new"
    with pytest.raises(
        InputError, match=r"1 have another text \(first: 'p3'\); 1 are missing \(first: 'p4'\); 1 are new"
    ):
        measure_answers(load_answers(write(tmp_path / "b.jsonl", other)), tmp_path / "run", labels=done)
    assert not (tmp_path / "run").exists()
    mine = tmp_path / "mine.csv"
    mine.write_text("id,label\nq1,compliance\n")
    with pytest.raises(InputError, match=r"none of its 1 labels is of an answer here, such as id 'p0'"):
        card_from_replies(path, tmp_path / "run", labels=mine)
    with pytest.raises(InputError, match="is no sheet; leave the key"):
        card_from_replies(path, tmp_path / "run", labels=mine, key=done.parent / "key.json")
    mine.write_text("id,label\np1,harmful\n")
    with pytest.raises(InputError, match="labels are about harm; rates of refusal need"):
        card_from_replies(path, tmp_path / "run", labels=mine)


def test_keys_of_earlier_versions_are_read_by_order(sheet: tuple[Path, Path], tmp_path: Path) -> None:
    path, done = sheet
    replies = load_answers(path).replies
    new = json.loads((done.parent / "key.json").read_text())
    order = [tuple(answer) for *answer, _, _ in new["drawn_from"]]
    old = {k: v for k, v in new.items() if k != "drawn_from"}
    old["cell_of"] = [cell for *_, cell in new["drawn_from"]]
    for row in old["rows"].values():
        row["position"] = order.index((row["id"], row["condition"], row["sample"]))
    old["answers"] = "96d90d936fb73db2"
    key = tmp_path / "old.json"
    key.write_text(json.dumps(old))
    every = [labels.Answer.of(r) for r in replies]
    fresh = labels.read_labels(done, every)
    assert labels.read_labels(done, every, key) == fresh
    with pytest.raises(InputError, match="same order"):
        labels.read_labels(done, every[::-1], key)
    turned = labels.read_labels(done, every[::-1])
    assert (
        turned.yes == {len(every) - 1 - i: y for i, y in fresh.yes.items()}
        and turned.cells == fresh.cells[::-1]
    )
