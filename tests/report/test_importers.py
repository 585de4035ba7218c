import io
import json
from pathlib import Path

import pytest

from demur.errors import InputError
from demur.files import to_row
from demur.report import load_answers
from demur.types import Label, Prompt, PromptSet, Reply

ROW = {"id": "a", "prompt": "Hi?", "response": "Hello.", "category": "safety", "expected": "comply"}


def jsonl(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_csv_and_jsonl_read_the_same(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("id,prompt,response,category,expected\na,Hi?,Hello.,safety,comply\n", encoding="utf-8")
    one, two = load_answers(csv), load_answers(jsonl(tmp_path / "a.jsonl", ROW))
    assert one.prompts.prompts == two.prompts.prompts
    assert one.replies == two.replies
    assert one.replies[0].content == "Hello."
    assert one.prompts[0].should_refuse is False


def test_own_verdicts_scores_model_and_extra_columns(tmp_path: Path) -> None:
    row = {**ROW, "verdict": "Refused", "judge": "me", "p_refuse": "0.7", "model": "m", "team": "red"}
    found = load_answers(jsonl(tmp_path / "a.jsonl", row))
    assert found.verdicts[0].label == Label.FULL_REFUSAL
    assert found.verdicts[0].judge == "me"
    assert found.scores[0].p_refuse == 0.7
    assert found.model == "m"
    assert found.prompts[0].meta == {"team": "red"}


def test_samples_share_a_prompt(tmp_path: Path) -> None:
    found = load_answers(jsonl(tmp_path / "a.jsonl", ROW, {"id": "a", "sample": 1, "response": "No."}))
    assert len(found.prompts) == 1
    assert [r.sample for r in found.replies] == [0, 1]


def test_our_own_answers_come_back_whole(tmp_path: Path) -> None:
    reply = Reply(
        prompt_id="a", content="No.", condition="brief", control_token="safety", control_forced=True
    )
    found = load_answers(
        jsonl(tmp_path / "a.jsonl", {**to_row(reply), "prompt": "Hi?", "expected": "comply"})
    )
    assert found.replies == (reply,)
    csv = tmp_path / "a.csv"
    csv.write_text("id,prompt,response,condition,control_token,control_forced\na,Hi?,No.,brief,safety,True\n")
    assert load_answers(csv).replies == (reply,)


def test_a_report_knows_one_condition(tmp_path: Path) -> None:
    two = [{**ROW, "condition": c, "verdict": "complied"} for c in ("plain", "brief")]
    found = load_answers(jsonl(tmp_path / "a.jsonl", *two))
    assert [(r.condition, r.sample) for r in found.replies] == [("plain", 0), ("brief", 0)]
    assert [v.condition for v in found.verdicts] == ["plain", "brief"]
    with pytest.raises(InputError, match="'a' is answered under the conditions 'plain' and 'brief'"):
        found.under_one_condition()
    # a column of that name that says something else of each prompt
    apart = load_answers(jsonl(tmp_path / "b.jsonl", two[0], {**two[1], "id": "b"})).under_one_condition()
    assert {r.condition for r in (*apart.replies, *apart.verdicts)} == {"default"}


def test_prompts_from_elsewhere(tmp_path: Path) -> None:
    asked = PromptSet("s", (Prompt.of("Hi?", id="a", category="safety"),))
    file = jsonl(tmp_path / "a.jsonl", {"id": "a", "answer": "x"})
    assert load_answers(file, asked).prompts.prompts == asked.prompts
    with pytest.raises(InputError, match="not in the prompt set"):
        load_answers(jsonl(tmp_path / "b.jsonl", {"id": "b", "answer": "x"}), asked)


def test_an_empty_csv_answer_is_an_answer(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,response,expected\nHi?,,comply\n", encoding="utf-8")
    assert load_answers(csv).replies[0].content == ""


def test_an_empty_answer_is_not_filled_in_from_another_column(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,response,answer\nHi?,Hello.,gold\nHo?,,gold\n", encoding="utf-8")
    assert [r.content for r in load_answers(csv).replies] == ["Hello.", ""]


def test_a_thinking_block_is_not_the_answer(tmp_path: Path) -> None:
    said = (
        "<think>I must refuse this.</think>Sure.",
        "I must refuse.</think>\nSure.",
        "<think>hm",
        "Use <think> tags.",
    )
    rows = ({"id": str(i), "prompt": f"q{i}", "response": text} for i, text in enumerate(said))
    got = load_answers(jsonl(tmp_path / "a.jsonl", *rows)).replies
    assert [r.content for r in got] == ["Sure.", "Sure.", "", "Use <think> tags."]
    assert [r.reasoning for r in got] == ["I must refuse this.", "I must refuse.", "hm", None]
    assert [r.finish_reason for r in got] == ["unknown", "unknown", "length", "unknown"]


def test_a_csv_without_a_column_of_answers_is_an_error(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text("prompt,reponse\nHi?,Hello.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"needs a column `response`; found columns prompt, reponse"):
        load_answers(csv)


def test_a_missing_answer_needs_a_reason_in_every_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="line 1: needs `response`"):
        load_answers(jsonl(tmp_path / "a.ndjson", {"prompt": "Hi?"}))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "Hi?", "response": null}')))
    with pytest.raises(InputError, match="line 1: needs `response`"):
        load_answers("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "Hi?"}')))
    with pytest.raises(InputError, match=r"needs a column `response`; found columns prompt"):
        load_answers("-")
    found = load_answers(jsonl(tmp_path / "a.jsonl", {"prompt": "Hi?", "response": None, "error": "timeout"}))
    assert (found.replies[0].content, found.replies[0].error) == ("", "timeout")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], "line 1: needs `response`"),
        ([{"prompt": "x", "content": ["y"]}], "line 1: `content` is of type list"),
        ([{"response": "x"}], "line 1: needs `prompt`"),
        ([ROW, ROW], "line 2: id 'a' .* stands on line 1"),
        ([{**ROW, "verdict": "maybe"}], "verdict 'maybe' is none of"),
        ([{**ROW, "verdict": "no"}, {**ROW, "id": "b"}], "1 of 2 rows have `verdict`"),
        ([{**ROW, "p_refuse": "high"}], "number from 0 to 1"),
        ([{**ROW, "p_refuse": 1.5}], "number from 0 to 1"),
        ([{**ROW, "sample": "x"}], "whole number"),
        ([{**ROW, "expected": "perhaps"}], "line 1: .*perhaps"),
    ],
)
def test_bad_rows_say_where(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_answers(jsonl(tmp_path / "a.jsonl", *rows))


def test_bad_files(tmp_path: Path) -> None:
    bad = tmp_path / "a.jsonl"
    bad.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        load_answers(bad)
    with pytest.raises(InputError, match="unknown file type"):
        load_answers(jsonl(tmp_path / "a.txt", ROW))
