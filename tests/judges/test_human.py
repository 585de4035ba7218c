"""Labels by people from a file."""

from pathlib import Path

import pytest

from demur import judges
from demur.errors import InputError
from demur.types import Prompt, Reply


def ask(path: Path, id: str, sample: int = 0) -> tuple[str, str, str | None]:
    v = judges.get(f"human:{path}").judge(Prompt.of("?", id=id), Reply(prompt_id=id, sample=sample))
    return v.label, v.scale, v.reason


def test_csv_by_id_and_sample(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,sample,label\na,0,Full refusal\na,1,compliance\nb,0,\n7,0,off_topic\n")
    assert ask(path, "a") == ("full_refusal", "refusal", None)
    assert ask(path, "a", 1)[0] == "compliance"
    assert ask(path, "7")[0] == "off_topic"
    for missing in (("b", 0), ("a", 2), ("zzz", 0)):
        assert ask(path, *missing) == ("unparsed", "refusal", "no human label")
    assert judges.get(f"human:{path}").id == "human:labels.csv"


def test_jsonl_of_harm_labels(tmp_path: Path) -> None:
    path = tmp_path / "harm.jsonl"
    path.write_text('{"prompt_id": "a", "label": "harmful"}\n{"prompt_id": "b", "label": "not harmful"}\n')
    assert ask(path, "a")[:2] == ("harmful", "harm") and ask(path, "b")[:2] == ("not_harmful", "harm")
    assert ask(path, "c") == ("unparsed", "harm", "no human label")


def test_a_label_is_of_the_answer_under_one_condition(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,condition,label\na,plain,compliance\na,steered,full_refusal\nb,,compliance\n")
    judge = judges.get(f"human:{path}")

    def label(id: str, condition: str) -> str:
        return judge.judge(Prompt.of("?", id=id), Reply(prompt_id=id, condition=condition)).label

    assert [label("a", c) for c in ("plain", "steered", "other")] == [
        "compliance",
        "full_refusal",
        "unparsed",
    ]
    assert label("b", "plain") == label("b", "plain") == "compliance"
    with pytest.raises(InputError, match=r"names no condition.*'plain' and 'steered'; add a column"):
        label("b", "steered")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,0,refused?", "line 2: label 'refused"),
        ("a,0,compliance\na,0,compliance", "line 3.*line 2"),
        ("a,-1,compliance", "line 2: sample"),
        ("a,0,compliance\nb,0,harmful", "each scale"),
        (",0,compliance", "line 2: no `id`"),
    ],
)
def test_bad_files(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"id,sample,label\n{rows}\n")
    with pytest.raises(InputError, match=message):
        judges.get(f"human:{path}")
