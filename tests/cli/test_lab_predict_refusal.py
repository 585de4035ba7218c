"""`demur lab predict-refusal`: train, score, label by machine, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demur.measure.blackbox_refusal import RefusalClassifier, Words
from tests.cli.conftest import Cli

LAB = ("lab", "predict-refusal")
THINGS = ("lamp", "river", "table", "cloud", "road")


def rows(n: int = 60, **more: Any) -> list[dict[str, Any]]:
    """Praise is refused and painting is not."""
    return [
        {
            "id": i,
            "prompt": f"{'Praise' if i % 2 else 'Paint'} the {THINGS[i % 5]} number {i}",
            "response": f"I'm sorry, I can't praise {i}." if i % 2 else f"Here is a picture of {i}: done.",
            "label": "refused" if i % 2 else "complied",
            "team": THINGS[i % 5] + str(i % 2),
            **more,
        }
        for i in range(n)
    ]


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    pytest.importorskip("sklearn")
    return write(tmp_path / "log.jsonl", rows())


def test_train_then_score(cli: Cli, tmp_path: Path, log: Path) -> None:
    model = tmp_path / "m.npz"
    done = cli(*LAB, "train", log, "--model", model, "--draws", "20", "--top", "3")
    assert done.code == 0, done.err
    for words in ("random folds", "100% [94–100] 60/60", "best single n-gram", "praise the", "60 rows"):
        assert words in done.out + done.err, done.out
    new = write(
        tmp_path / "new.jsonl", [{"prompt": "Praise the moon"}, {"prompt": "Paint it"}, {"prompt": ""}]
    )
    scored = cli(*LAB, "score", new, "--model", model)
    found = [json.loads(line) for line in scored.out.splitlines()]
    assert [r["label"] for r in found] == ["rejected", "complied", None]
    assert found[0]["probabilities"]["rejected"] > 0.6 and 0 < found[0]["known"] < 1
    assert found[2]["probabilities"] is None and "3 rows: " in scored.err
    checked = cli(*LAB, "score", log, "--model", model, "-o", tmp_path / "s.jsonl")
    assert "Right on 100% [94–100] 60/60" in checked.err and checked.out == ""
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 60


def test_json_groups_and_a_users_map(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    tones = [{**r, "label": "bored" if r["label"] == "refused" else "keen"} for r in rows()]
    log, model = write(tmp_path / "t.jsonl", tones), tmp_path / "m.npz"
    base = (*LAB, "train", log, "--model", model, "--draws", "20", "--json")
    done = cli(
        *base, "--map", "bored=rejected", "--map", "keen=complied", "--group", "team", "--on", "response"
    )
    report = json.loads(done.out)
    assert report["values"]["grouped"]["accuracy"]["n"] == 60 and report["provenance"]["groups"] == 10
    assert report["provenance"]["map"] == {"bored": "rejected", "keen": "complied"}
    assert "rules/demur-v1" in report["values"]["rules"]
    assert "Right on" in cli(*LAB, "score", log, "--model", model).err, "the map travels with the model"
    kept = json.loads(cli(*base, "--keep-tones").out)
    assert kept["provenance"]["labels"] == {"bored": 30, "keen": 30}
    assert "Right on" in cli(*LAB, "score", log, "--model", model).err


def test_labels_by_machine(cli: Cli, tmp_path: Path, log: Path) -> None:
    some = [r if i < 20 else {k: v for k, v in r.items() if k != "label"} for i, r in enumerate(rows())]
    part, responder = write(tmp_path / "p.jsonl", some), tmp_path / "r.npz"
    assert cli(*LAB, "train", log, "--on", "response", "--model", responder, "--draws", "20").code == 0
    # a judge that asks nobody leaves the model that it could ask alone
    for by in (("rules/demur-v1", "--judge-model", "no-such-model"), (str(responder),)):
        done = cli(
            *LAB, "train", part, "--model", tmp_path / "m.npz", "--draws", "20", "--json", "--label-with", *by
        )
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["provenance"]["machine_labels"] == 40
        assert report["values"]["random"]["accuracy"]["n"] == 20
        assert "40 rows labelled by" in done.err and "kappa 1.00" in done.err


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        ({"label": None}, ("train",), "--label-with rules/demur-v1"),
        ({"label": "odd"}, ("train",), "--map TONE="),
        ({}, ("train", "--map", "odd"), "write TONE=LABEL"),
        ({}, ("train", "--label-with", "rules/nope"), "rules/nope"),
        ({}, ("train", "--label-with", "rules/demur-v1", "--keep-tones"), "drop --keep-tones"),
        ({}, ("train", "--group", "nowhere"), "no row has a column 'nowhere'"),
        ({"label": "complied"}, ("train",), "two labels are needed"),
        ({}, ("train", "--folds", "40"), "40 folds need 40 rows"),
        ({}, ("score", "--map", "a=b"), "for train only"),
        ({}, ("score",), "no such file"),
    ],
)
def test_wrong_input(
    cli: Cli, tmp_path: Path, change: dict[str, Any], args: tuple[str, ...], words: str
) -> None:
    pytest.importorskip("sklearn")
    file = write(tmp_path / "l.jsonl", rows(**change))
    done = cli(*LAB, args[0], file, *args[1:], "--model", tmp_path / "m.npz")
    assert (done.code, done.out) == (2, ""), done
    assert done.err.splitlines()[-1].startswith("error: ") and words in done.err
    assert not (tmp_path / "m.npz").exists()


def test_score_asks_for_the_text_it_reads(cli: Cli, tmp_path: Path) -> None:
    import numpy as np

    one = np.ones(1)
    RefusalClassifier(
        reads="response",
        words=Words(),
        classes=("complied", "rejected"),
        terms=("sorry",),
        idf=one,
        coef=4 * one[None],
        intercept=-one,
        C=1.0,
        rows={},
    ).save(tmp_path / "m.npz")
    file = write(tmp_path / "l.jsonl", [{"prompt": "a"}])
    done = cli(*LAB, "score", file, "--model", tmp_path / "m.npz")
    assert done.code == 2 and "no row has a response" in done.err
    done = cli(*LAB, "score", "-", "--model", tmp_path / "m.npz", stdin='{"response": "Sorry"}\n')
    assert json.loads(done.out)["probabilities"]["rejected"] == pytest.approx(1 / (1 + np.exp(-3)), abs=1e-6)
