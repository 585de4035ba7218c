"""Answers made by other tools: the same table whatever file they come in, and nothing lost on the way."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from demur.errors import InputError, MissingExtra
from demur.files import load_prompts
from demur.report import load_answers
from demur.report.importers import openai_batch
from demur.types import Label, Prompt, PromptSet
from tests.fixtures.answers import build

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import json, sys
from pathlib import Path
for name in ("torch", "transformers", "sklearn", "pandas", "zstandard"):
    sys.modules[name] = None
from demur.files import load_prompts
from demur.flows.measure import measure_answers
from demur.report import load_answers
from demur.report.render import plain
prompts = load_prompts(sys.argv[1])
for n, file in enumerate(sys.argv[2:]):
    needs = file.endswith(("report.jsonl", "output.jsonl"))
    answers = load_answers(file, prompts if needs else None)
    made = measure_answers(answers, Path(file).parent / f"out{n}")
    print(json.dumps([plain(made.report.values["conditions"]), plain(made.report.tables), len(answers.replies)]))
"""


def test_the_same_500_answers_give_the_same_tables_through_every_importer(tmp_path: Path) -> None:
    some = build.answers(500)
    files = [str(make(tmp_path, some)) for make in build.BUILDERS.values()]
    asked = str(build.as_jsonl(tmp_path, some))
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, asked, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 20  # seconds of processor time
    tables = dict(zip(build.BUILDERS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert tables["jsonl"][2] == 500
    rates = tables["jsonl"][0]["as given"]["rates"]
    assert rates["all"]["refuse"]["n"] + rates["all"]["refuse"]["unread"] == 250
    assert 0 < rates["safety"]["lookalike"]["k"] < rates["safety"]["lookalike"]["n"]
    for name, found in tables.items():
        assert found == tables["jsonl"], name


def test_inspect_in_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    some = build.answers(8)
    found = load_answers(build.as_inspect_zstd(tmp_path, some))
    assert [r.content for r in found.replies] == [a.text for a in some]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"zstd.*--to json.*demur\[inspect\]"):
        load_answers(tmp_path / "log.zstd.eval")


def test_inspect_epochs_errors_reasoning_and_targets(tmp_path: Path) -> None:
    one, two = build.answers(2)
    failed: dict[str, Any] = build.inspect_sample(two)
    failed |= {"error": {"message": "rate limit", "traceback": "..."}, "output": {"choices": []}}
    thinking = build.inspect_sample(one, epoch=2)
    thinking["output"]["choices"] = [
        {
            "message": {
                "role": "assistant",
                "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Yes."}],
            },
            "stop_reason": "max_tokens",
        }
    ]
    thinking["target"] = ["42", "43"]
    samples = [build.inspect_sample(one), failed, thinking]
    (tmp_path / "log.json").write_text(json.dumps({**build.HEADER, "samples": samples}))
    found = load_answers(tmp_path / "log.json")
    assert [(r.prompt_id, r.sample) for r in found.replies] == [("q0", 0), ("q1", 0), ("q0", 1)]
    assert found.replies[1].error == "rate limit"
    last = found.replies[2]
    assert (last.content, last.reasoning, last.finish_reason) == ("Yes.", "hm", "length")
    assert found.model == "mockllm/model"
    assert (found.prompts[0].text, found.prompts[0].category) == (one.prompt, "safety")
    assert found.prompts[1].should_refuse is True
    assert len(found.prompts[0].messages) == 1  # the solver's system message is no part of the prompt


def test_epochs_of_a_stopped_inspect_log_count_from_0(tmp_path: Path) -> None:
    one, two = build.answers(2)
    samples = [build.inspect_sample(a, epoch=e) for a, e in ((one, 3), (two, 1), (one, 2))]
    (tmp_path / "log.json").write_text(json.dumps({**build.HEADER, "samples": samples}))
    found = load_answers(tmp_path / "log.json").replies
    assert [(r.prompt_id, r.sample) for r in found] == [("q0", 1), ("q1", 0), ("q0", 0)]


def test_an_answer_as_target_is_no_expectation(tmp_path: Path) -> None:
    sample = {**build.inspect_sample(build.answers(1)[0]), "target": "Paris", "metadata": {"expected": 7}}
    (tmp_path / "log.json").write_text(json.dumps({**build.HEADER, "samples": [sample]}))
    prompt = load_answers(tmp_path / "log.json").prompts[0]
    assert (prompt.should_refuse, prompt.meta) == (None, {"expected": 7})


def test_lm_eval_samples_filters_and_chat_histories(tmp_path: Path) -> None:
    row: dict[str, Any] = {"doc_id": 4, "doc": {"label": 1}, "target": "x", "resps": [["one", "two"]]}
    history = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}])
    row |= {"arguments": {"gen_args_0": {"arg_0": history, "arg_1": {}}}, "filter": "none"}
    path = build._lines(tmp_path / "samples_a.jsonl", [row, {**row, "filter": "strip"}])
    found = load_answers(path)
    assert [(r.prompt_id, r.sample, r.content) for r in found.replies] == [("4", 0, "one"), ("4", 1, "two")]
    assert [m.role for m in found.prompts[0].messages] == ["system", "user"]
    asked = PromptSet("s", (Prompt.of("Hi?", id="mine", category="safety"),))
    assert load_answers(path, asked).replies[0].prompt_id == "mine"  # found by its text


def test_lm_eval_without_generated_text(tmp_path: Path) -> None:
    row = {"doc_id": 0, "doc": {"question": "?"}, "resps": [[["-1.2", "False"]], [["-2.0", "True"]]]}
    with pytest.raises(InputError, match="line 1: `resps` holds 2 scored continuations"):
        load_answers(build._lines(tmp_path / "samples_a.jsonl", [row]))


def test_garak_counts_an_attempt_once_and_an_output_that_never_came(tmp_path: Path) -> None:
    path = build.as_garak(tmp_path, build.answers(3))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row.get("uuid") == "uuid-q1":
            row["outputs"] = [{"text": "a"}, None]
        if row.get("uuid") == "uuid-q2":
            row.update(prompt="plain text of old reports", outputs=["b"])
    found = load_answers(build._lines(path, rows))
    assert [r.content for r in found.replies] == [build.TEXTS[0], "a", "", "b"]
    assert [r.error is None for r in found.replies] == [True, True, False, True]
    assert found.model == "mockllm/model"
    assert found.prompts[2].text == "plain text of old reports"
    with pytest.raises(InputError, match="no attempt that was sent"):
        load_answers(build._lines(path, rows[:2]))


def test_batch_output_errors_filters_and_prompts(tmp_path: Path) -> None:
    some = build.answers(6)
    lines: list[dict[str, Any]] = [build.batch_line(a.id, a.text or "x") for a in some]
    lines[1]["response"] = {"status_code": 500, "body": {"error": {"message": "overloaded"}}}
    lines[2] |= {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    lines[3]["response"] = {
        "status_code": 400,
        "body": {"error": {"code": "content_filter", "message": "no"}},
    }
    lines[4]["response"]["body"] = {"object": "response", "output": []}
    lines[5]["response"] = {"status_code": "odd", "body": {}}
    path = build._lines(tmp_path / "out.jsonl", lines)
    with pytest.raises(InputError, match="pass --prompts"):
        load_answers(path)
    found = load_answers(path, load_prompts(build.as_jsonl(tmp_path, some)))
    errors = [r.error for r in found.replies]
    assert errors[0] is None
    assert "overloaded" in str(errors[1])
    assert "too late" in str(errors[2])
    assert (found.replies[3].finish_reason, errors[3]) == ("content_filter", None)
    assert "no chat completion" in str(errors[4])
    assert "unreadable answer" in str(errors[5])


def test_batch_input_gives_the_prompts(tmp_path: Path) -> None:
    some = build.answers(3)
    requests = [
        {
            "custom_id": f"default/0/{a.id}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": a.prompt}]},
        }
        for a in some
    ]
    asked = openai_batch.load_requests(build._lines(tmp_path / "in.jsonl", requests))
    assert [(p.id, p.text) for p in asked] == [(a.id, a.prompt) for a in some]
    out = build._lines(tmp_path / "out.jsonl", [build.batch_line(f"default/0/{a.id}", a.text) for a in some])
    assert [r.prompt_id for r in load_answers(out, asked).replies] == [a.id for a in some]
    requests[1]["custom_id"] = requests[0]["custom_id"]
    with pytest.raises(InputError, match="line 2: id 'q0' has another prompt"):
        openai_batch.load_requests(build._lines(tmp_path / "in.jsonl", requests))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": 1}', "no Inspect log"),
        ("a.json", json.dumps(build.HEADER), "only its header"),
        ("a.json", json.dumps({**build.HEADER, "samples": [{"id": 1}]}), "without `input`"),
        ("a.json", json.dumps({**build.HEADER, "samples": [{"id": 1, "input": ["q"]}]}), "neither text"),
        ("a.eval", "no zip", "no readable .eval"),
        (
            "a.report.jsonl",
            '{"entry_type": "attempt", "status": 2, "prompt": {"turns": ["q"]}, "outputs": ["x"]}',
            "without text",
        ),
        (
            "samples_a.jsonl",
            '{"doc_id": 0, "doc": {"text": "q"}, "resps": [["x"]]}\n{"doc_id": 1, "doc": {"text": "r"}}',
            "line 2: `resps`",
        ),
        ("a.jsonl", '{"custom_id": 1, "response": null}', "pass --prompts"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_answers(tmp_path / name)


def test_an_eval_file_cut_short(tmp_path: Path) -> None:
    path = build.as_inspect_eval(tmp_path, build.answers(4))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"no readable \.eval"):
        load_answers(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("header.json", json.dumps(build.HEADER))
    with pytest.raises(InputError, match="no samples"):
        load_answers(path)


REAL = """
import sys
import inspect_ai.model._model as M
M.count_text_tokens = lambda text: 5  # its own tokenizer is downloaded
async def count(self, *a, **k): return 5
M.ModelAPI.count_text_tokens = count
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput, get_model
from inspect_ai.solver import generate, system_message
data = [Sample(id="a", input="Who are you?", target="refuse", metadata={"category": "humanizing"}),
        Sample(id=2, input="Name a river. " * 20, target="comply")]
for form in ("eval", "json"):
    said = [ModelOutput.from_content("mockllm/model", "The answer is long. " * 20)] * 4
    eval(Task(dataset=MemoryDataset(data), solver=[system_message("Be brief."), generate()]), display="none",
         model=get_model("mockllm/model", custom_outputs=said, memoize=False), epochs=2, log_format=form,
         log_dir=sys.argv[1])
"""


def test_logs_that_inspect_itself_wrote(tmp_path: Path) -> None:
    python = os.environ.get("DEMUR_INSPECT_PYTHON")
    if not python:
        pytest.skip("set DEMUR_INSPECT_PYTHON to a python that has inspect_ai")
    pytest.importorskip("zstandard")
    subprocess.run([python, "-c", REAL, str(tmp_path)], check=True, capture_output=True, cwd=tmp_path)
    logs = [load_answers(next(tmp_path.glob(f"*.{form}"))) for form in ("eval", "json")]
    for found in logs:
        assert {(r.prompt_id, r.sample) for r in found.replies} == {
            (i, s) for i in ("a", "2") for s in (0, 1)
        }
        assert {r.content for r in found.replies} == {"The answer is long. " * 20}
        by_id = {p.id: p for p in found.prompts}
        assert by_id["a"].category == "humanizing"
        assert Label.COMPLIANCE in by_id["2"].expected
        assert by_id["2"].text == "Name a river. " * 20
