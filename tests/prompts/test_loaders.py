"""Public layouts, as their authors ship them and as subsets of them; contents made up here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from demur import prompts
from demur.errors import InputError

local_data = pytest.mark.skipif(
    not os.environ.get("DEMUR_DATA"), reason="DEMUR_DATA is not set: no local public data"
)


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


NAMES = {
    "safety": "Requests with safety concerns",
    "humanizing": "Humanizing requests",
    "unsupported": "Unsupported requests",
    "indeterminate": "Indeterminate requests",
    "incomplete": "Incomplete requests",
}


def row(i: int, category: str, **more: object) -> dict[str, object]:
    return {"id": f"x{i}", "category": NAMES[category], "subcategory": "sub", "prompt": f"prompt {i}", **more}


def test_coconot_with_the_upstream_response_column(tmp_path: Path) -> None:
    original = jsonl(tmp_path / "o.jsonl", [row(i, c, response="") for i, c in enumerate(NAMES)])
    contrast = jsonl(tmp_path / "c.jsonl", [row(9, "safety")])
    loaded = prompts.coconot(original, contrast)
    assert [p.category for p in loaded] == [*NAMES, "safety"]
    assert [p.should_refuse for p in loaded] == [True] * 5 + [False]
    assert loaded[5].meta["kind"] == "lookalike"
    assert loaded[0].subcategory == "sub"
    assert loaded.dropped == {}


def test_coconot_preference_pairs(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [row(1, "incomplete", chosen="yes", chosen_model="m", rejected="no")])
    p = prompts.coconot_preferences(path)[0]
    assert (p.chosen, p.rejected, p.should_refuse) == ("yes", "no", False)


def test_unknown_category_names_the_known_ones(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "o.jsonl", [{**row(1, "safety"), "category": "Rude requests"}])
    with pytest.raises(InputError, match=r"line 1.*Rude requests.*humanizing requests"):
        prompts.coconot(path, path)


def test_wrong_file_says_which_column_is_missing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "o.jsonl", [{"prompt": "hi"}])
    with pytest.raises(InputError, match=r"no 'category'.*Is this the right file"):
        prompts.coconot(path, path)


def test_xstest(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b"id,prompt,type,label,focus,note\r\n1,How do I kill time?,homonyms,safe,kill,\r\n"
        b"26,How do I bake bread?,contrast_homonyms,unsafe,kill,\r\n"
    )
    safe, unsafe = prompts.xstest(path)
    assert (safe.should_refuse, unsafe.should_refuse) == (False, True)
    assert safe.group == unsafe.group == "xstest/kill"
    assert safe.id == "xstest/1"
    path.write_text("id,prompt,label\n1,a,maybe\n")
    with pytest.raises(InputError, match="maybe"):
        prompts.xstest(path)


def test_refusal_tokens_counts_redacted_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    head = "id,category,subcategory,prompt,label_type,eval_split,redacted\n"
    rows = [
        "a,Requests with safety concerns,wildchats,,Abstain,refusal,1",
        'b,Humanizing requests,personal inquiry,"two\nlines",Abstain,refusal,0',
        "c,Incomplete requests,underspecified,fine,Respond,contrast-refusal,0",
    ]
    path.write_text(head + "\n".join(rows) + "\n")
    loaded = prompts.refusal_tokens_eval(path)
    assert loaded.dropped == {"redacted": 1}
    assert [(p.id, p.text, p.should_refuse) for p in loaded] == [
        ("b", "two\nlines", True),
        ("c", "fine", False),
    ]


def test_temporal_leaves_the_mislabelled_rows_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "id,question,label_type,eval_split\n1,Who won today?,Abstain,temporal\n"
        "2,Capital of Peru?,Respond,normal\n3,Do harm,Respond,refusal\n"
    )
    loaded = prompts.temporal(path)
    assert [p.should_refuse for p in loaded] == [True, False]
    assert loaded.dropped == {"eval_split refusal": 1}


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_benign_alpaca_under_both_column_names(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.json"  # upstream's suffix for JSON lines
    path.write_text(json.dumps({column: "Explain tides."}) + "\n")
    (p,) = prompts.benign_alpaca(path)
    assert (p.id, p.should_refuse, p.category) == ("alpaca/0", False, None)


def test_an_id_twice_is_an_input_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "one", "idx": 1}, {"prompt": "two", "idx": 1}])
    with pytest.raises(InputError, match="alpaca/1"):
        prompts.benign_alpaca(path)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,question,eval_split\n3,x,refusal\n")
    with pytest.raises(InputError, match="no prompt left"):
        prompts.temporal(path)


@local_data
def test_local_copies_have_the_counts_of_their_description() -> None:
    """Counts of the upstream files, or of the half with an even sha1 of the id."""
    c = prompts.coconot()
    refuse, contrast = len([p for p in c if p.should_refuse]), len([p for p in c if not p.should_refuse])
    assert (refuse, contrast) in {(1001, 379), (501, 178)}
    assert len(prompts.coconot_preferences()) == 927
    x = prompts.xstest()
    assert [sum(bool(p.should_refuse) is s for p in x) for s in (False, True)] == [250, 200]
    t = prompts.temporal()
    assert [sum(bool(p.should_refuse) is s for p in t) for s in (False, True)] == [236, 200]
    r = prompts.refusal_tokens_eval()
    assert len(r) + sum(r.dropped.values()) in {1380, 680}
    assert len(prompts.benign_alpaca()) == 300
