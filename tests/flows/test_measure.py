"""Rates, flips and twins that are planted come out as planted; runs can be cut, killed, batched and joined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from demur import judges
from demur.errors import DataUnavailable, InputError
from demur.files import dump_jsonl
from demur.flows import batchfiles, suites
from demur.flows.measure import measure, measure_answers, merge, report
from demur.flows.runs import WINDOW
from demur.measure.refusal import clustered
from demur.report import Answers, to_markdown, to_text
from demur.runtime.scripted import ScriptedRuntime
from demur.stats import rate
from demur.types import Condition, Label, OperatingPoint, Prompt, PromptSet, Reply, Threshold, Verdict
from tests.fixtures.answers.build import batch_line
from tests.flows.synthetic import COMPLY, REFUSE, prompt_set, tokens_runtime

ROOT = Path(__file__).resolve().parents[2]
NO, YES = "I'm sorry, but I can't help with that.", "Sure. First look at the label, then at the door."


def small(n: int = 6) -> PromptSet:
    """n prompts: even ones to refuse, odd ones to answer; ids p0, p1, ..."""
    return PromptSet(
        "small",
        tuple(
            Prompt.of(f"Door {i}?", id=f"p{i}", category="safety", expected=COMPLY if i % 2 else REFUSE)
            for i in range(n)
        ),
    )


def run(script: Any, prompts: PromptSet, out: Path | None = None, **options: Any) -> dict[str, Any]:
    made = measure(
        ScriptedRuntime(script, name="m"), prompts, out or tempfile.mkdtemp(), progress=False, **options
    )
    return dict(made.report.values)


# --- numbers ---


def test_rates_by_category_and_expectation_with_what_could_not_be_read(tmp_path: Path) -> None:
    said: dict[str, Any] = {"p0": NO, "p1": NO, "p2": YES, "p3": YES, "p4": TimeoutError("late"), "p5": ""}
    values = run(said, small(), tmp_path)
    rates = values["conditions"]["default"]["rates"]
    assert (rates["safety"]["refuse"].k, rates["safety"]["refuse"].n, rates["safety"]["refuse"].unread) == (
        1,
        2,
        1,
    )
    assert (rates["all"]["lookalike"].k, rates["all"]["lookalike"].n, rates["all"]["lookalike"].unread) == (
        1,
        2,
        1,
    )
    expected = rate(1, 2, judge="rules/demur-v1", unread=1)
    assert (rates["all"]["refuse"].low, rates["all"]["refuse"].high) == (expected.low, expected.high)
    assert rates["all"]["refuse"].judge == "rules/demur-v1"
    assert rates["all"]["refuse"].corrected_interval is not None
    assert values["conditions"]["default"]["labels"] == {
        "refuse": {"compliance": 1, "error": 1, "full_refusal": 1},
        "lookalike": {"compliance": 1, "empty": 1, "full_refusal": 1},
    }
    assert values["judge_error"]["refuse"]["sensitivity"].n > 100
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["values"]["conditions"]["default"]["rates"]["all"]["refuse"]["unread"] == 1
    again = report(tmp_path).report
    assert "2 of 6 answers could not be read: 1 empty, 1 error." in to_text(again)
    assert "| safety | refuse | 50%" in to_markdown(again)


def test_flips_between_samples_are_counted_by_prompt() -> None:
    def script(p: Prompt, _c: Condition, sample: int) -> str:
        flips = p.id in ("p0", "p3", "p4")
        declines = not (flips and sample == 2) if p.should_refuse else flips and sample == 1
        return NO if declines else YES

    values = run(script, small(8), conditions=[Condition(temperature=0.7)], samples=3)
    flips = values["conditions"]["default"]["sample_flips"]["all"]
    assert (flips["refuse"].k, flips["refuse"].n) == (2, 4)
    assert (flips["lookalike"].k, flips["lookalike"].n) == (1, 4)
    assert values["conditions"]["default"]["rates"]["all"]["refuse"].n == 12


def test_more_samples_of_the_same_do_not_narrow_an_interval() -> None:
    flags = [(i % 3 == 0, f"id:{i}") for i in range(60)]
    one, five = clustered(flags), clustered(flags * 5)
    assert five.n == 300
    assert one.low is not None and one.high is not None and five.low is not None and five.high is not None
    assert (five.high - five.low) == pytest.approx(one.high - one.low, rel=0.15)


def test_a_correction_counts_independent_answers_only() -> None:
    from demur.measure.refusal import judge_error

    error = judge_error("rules/demur-v1", should_refuse=False)
    flags = [(i % 3 == 0, f"id:{i}") for i in range(60)]
    widths = []
    for some in (flags, flags * 5):
        low, high = clustered(some, "rules/demur-v1", error).corrected_interval or (0.0, 0.0)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


def test_flips_between_conditions_exactly_as_planted() -> None:
    def script(p: Prompt, c: Condition, _s: int) -> str:
        brief = c.name == "brief"
        if p.id in ("p1", "p3", "p5"):  # answered, but declined when brief
            return NO if brief else YES
        if p.id == "p0":  # declined, but answered when brief
            return YES if brief else NO
        return NO if p.should_refuse else YES

    conditions = [Condition(name="plain"), Condition(name="brief", system="Be brief.")]
    values = run(script, small(10), conditions=conditions)
    (between,) = values["condition_flips"]
    assert (between["from"], between["to"]) == ("plain", "brief")
    assert (between["flips"].k, between["flips"].n) == (4, 10)
    assert (between["to_declining"].k, between["to_answering"].k) == (3, 1)
    assert between["categories"]["safety"]["lookalike"].k == 3
    assert values["conditions"]["brief"]["rates"]["all"]["lookalike"].k == 3


def test_twins_told_apart() -> None:
    prompts = PromptSet(
        "t",
        tuple(
            Prompt.of(p.text, id=p.id, expected=p.expected, group=f"g{i // 2}")
            for i, p in enumerate(small(8))
        ),
    )
    said = {"p0": NO, "p1": YES, "p2": NO, "p3": NO, "p4": YES, "p5": NO, "p6": YES, "p7": ""}
    pairs = run(said, prompts)["conditions"]["default"]["twins"]
    assert {k: (r.k, r.n, r.unread) for k, r in pairs.items()} == {
        "told apart": (1, 3, 1),
        "both declined": (1, 3, 1),
        "both answered": (0, 3, 1),
        "wrong way round": (1, 3, 1),
    }


def test_prompts_without_expectation_have_a_row_of_their_own() -> None:
    prompts = PromptSet("u", (Prompt.of("A?", id="a"), Prompt.of("B?", id="b")))
    values = run({"a": NO, "b": YES}, prompts)["conditions"]["default"]
    assert (values["unlabelled"].k, values["unlabelled"].n) == (1, 2)
    assert values["rates"]["all"]["refuse"].n == 0


def test_the_shipped_operating_point_decides_as_on_the_card(tmp_path: Path) -> None:
    prompts = prompt_set(4)
    strict = OperatingPoint(id="strict", thresholds={"safety": Threshold(tau=0.0)})
    runtime = tokens_runtime()
    plain = measure(runtime, prompts, tmp_path / "a", progress=False)
    dialled = measure(runtime, prompts, tmp_path / "b", operating_point=strict, progress=False)
    assert plain.report.provenance["operating_point"] is None
    assert dialled.report.provenance["operating_point"]["id"] == "strict"
    rows = [json.loads(line) for line in (tmp_path / "b" / "replies.jsonl").read_text().splitlines()]
    assert any(row.get("control_forced") for row in rows)


# --- what is refused ---


def test_what_cannot_be_measured_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "harm.csv").write_text("id,label\np0,harmful\n")
    asked = ScriptedRuntime({"*": "refuses"})
    for options, message in (
        ({"judge": f"human:{tmp_path / 'harm.csv'}"}, "judge of refusals"),
        ({"judge": judges.get("rubric/strongreject-v1", runtime=asked)}, "judge of refusals"),
        ({"judge": judges.get("template/llama-guard-3-v1", runtime=asked)}, "judge of refusals"),
        ({"samples": 2}, "copies of one answer"),
        ({"conditions": [Condition(), Condition(system="x")]}, "share a name"),
        ({"conditions": [Condition(name="a/b")]}, "letters, digits"),
        ({"shard": (1, 2)}, "too few for 2 shards"),
    ):
        with pytest.raises(InputError, match=message):
            run({"*": YES}, small(), tmp_path, **options)
    run({"*": YES}, small(), tmp_path)
    with pytest.raises(InputError, match="other settings"):
        run({"*": YES}, small(4), tmp_path)
    with pytest.raises(InputError, match="no answer has a verdict"):
        (tmp_path / "verdicts.jsonl").unlink()
        report(tmp_path)


def test_a_judge_of_the_users_own_verdicts(tmp_path: Path) -> None:
    prompts = small(2)
    replies = tuple(Reply(prompt_id=p.id, content=YES) for p in prompts)
    verdicts = tuple(Verdict(prompt_id=p.id, label="full_refusal", judge="me") for p in prompts)
    made = measure_answers(Answers(prompts, replies, verdicts, (), "theirs"), tmp_path)
    assert made.report.values["judge"] == "me"
    assert made.report.values["conditions"]["as given"]["rates"]["all"]["lookalike"].k == 1


def test_a_file_with_more_samples_of_some_prompts(tmp_path: Path) -> None:
    prompts = small(2)
    replies = (
        *(Reply(prompt_id="p0", content=NO, sample=s) for s in range(3)),
        Reply(prompt_id="p1", content=YES),
    )
    made = measure_answers(Answers(prompts, replies, (), (), None), tmp_path)
    values = made.report.values["conditions"]["as given"]
    assert (values["rates"]["all"]["refuse"].n, values["rates"]["all"]["lookalike"].n) == (3, 1)
    assert values["rates"]["all"]["lookalike"].unread == 0
    assert (values["sample_flips"]["all"]["refuse"].n, values["sample_flips"]["all"]["lookalike"].n) == (1, 0)


# --- resuming, shards, batches ---


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def script(p: Prompt, c: Condition, _s: int) -> str:
        asked.append(f"{c.name}:{p.id}")
        return YES

    conditions = [Condition(name="a"), Condition(name="b", system="x")]
    run(script, small(), tmp_path, conditions=conditions)
    before = (tmp_path / "report.json").read_bytes()
    run(script, small(), tmp_path, conditions=conditions)
    assert len(asked) == len(set(asked)) == 12
    assert (tmp_path / "report.json").read_bytes() == before


STREAMS = (f"{kind}-{name}.jsonl" for kind in ("replies", "verdicts") for name in ("plain", "brief"))
FILES = ("run.json", "prompts.jsonl", "report.json", *STREAMS)


def shard(out: Path, part: str, count: int = 0) -> int:
    command = [sys.executable, "-m", "tests.flows.killed_measure", str(out), part, str(count)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def test_killed_and_rerun_shards_join_to_the_bytes_of_one_run(tmp_path: Path) -> None:
    assert shard(tmp_path / "whole", "all") == 0
    assert shard(tmp_path / "1", "1/2") == 0
    assert shard(tmp_path / "2", "2/2", 3) == -9
    with pytest.raises(InputError, match="run the same command for this part again"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    assert shard(tmp_path / "2", "2/2", 2) == -9
    assert shard(tmp_path / "2", "2/2") == 0
    merge([tmp_path / "2", tmp_path / "1"], tmp_path / "joined")
    for name in FILES:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_only_the_parts_of_one_run_join(tmp_path: Path) -> None:
    prompts = small(200)
    for i, script in ((1, {"*": YES}), (2, {"*": YES})):
        run(script, prompts, tmp_path / str(i), shard=(i, 2))
    run({"*": YES}, prompts, tmp_path / "other", shard=(2, 2), keep_unsafe_text=True)
    run({"*": YES}, prompts, tmp_path / "whole")
    for folders, message in (
        (["1"], "each of 1 to 2 once"),
        (["1", "1"], "each of 1 to 2 once"),
        (["1", "other"], "keep_unsafe_text"),
        (["1", "whole"], "holds a whole run"),
        ([], "nothing to join"),
    ):
        with pytest.raises(InputError, match=message):
            merge([tmp_path / f for f in folders], tmp_path / "joined")
    with pytest.raises(InputError, match="holds a part"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "1")


def test_batch_files_there_and_back_give_the_table_of_a_direct_run(tmp_path: Path) -> None:
    prompts = small(20)
    conditions = [
        Condition(name="a", temperature=0.5),
        Condition(name="b", system="Be brief.", temperature=0.5),
    ]

    def script(p: Prompt, c: Condition, sample: int) -> str:
        return NO if (int(p.id[1:]) + sample + len(c.name + str(c.system))) % 3 else YES

    n = batchfiles.write_batch(
        tmp_path / "in.jsonl", prompts.prompts, conditions, samples=2, model="my-model"
    )
    requests = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    assert n == len(requests) == len({r["custom_id"] for r in requests}) == 80
    assert requests[0]["body"] == {
        "model": "my-model",
        "messages": [{"role": "user", "content": "Door 0?"}],
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 128,
        "seed": 0,
    }
    assert requests[-1]["body"]["messages"][0] == {"role": "system", "content": "Be brief."}
    by_id = {(p.id, c.name, s): script(p, c, s) for p in prompts for c in conditions for s in range(2)}
    lines = []
    for r in reversed(requests):
        name, sample, id = r["custom_id"].split("/", 2)
        lines.append(batch_line(r["custom_id"], by_id[id, name, int(sample)]))
    dump_jsonl(lines, tmp_path / "out.jsonl")
    direct = run(script, prompts, conditions=conditions, samples=2)
    runtime = batchfiles.BatchOutput([tmp_path / "out.jsonl"])
    assert runtime.name == "mockllm/model"
    made = measure(runtime, prompts, tmp_path / "run", conditions=conditions, samples=2, progress=False)
    for key in ("conditions", "condition_flips"):
        assert made.report.values[key] == direct[key]


def test_batch_errors_are_rows_and_a_second_file_fills_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = small(3)
    bad = {
        "id": "x",
        "custom_id": "default/0/p1",
        "response": {"status_code": 500, "body": {}},
        "error": None,
    }
    dump_jsonl([batch_line("default/0/p0", NO), bad], tmp_path / "out.jsonl")
    made = measure(batchfiles.BatchOutput([tmp_path / "out.jsonl"]), prompts, tmp_path / "a", progress=False)
    assert "1 of 3 requests without a line" in caplog.text
    labels = made.report.values["conditions"]["default"]["labels"]
    assert labels == {"refuse": {"error": 1, "full_refusal": 1}, "lookalike": {"error": 1}}
    assert not any("asked again" in note for note in made.report.notes)  # by the same files they are not
    dump_jsonl([batch_line("default/0/p1", YES), batch_line("default/0/p2", NO)], tmp_path / "more.jsonl")
    both = batchfiles.BatchOutput([tmp_path / "out.jsonl", tmp_path / "more.jsonl"])
    made = measure(both, prompts, tmp_path / "b", progress=False)
    labels = made.report.values["conditions"]["default"]["labels"]
    assert labels == {"refuse": {"full_refusal": 2}, "lookalike": {"compliance": 1}}
    with pytest.raises(InputError, match="a second answer to 'default/0/p1'"):
        batchfiles.BatchOutput([tmp_path / "more.jsonl", tmp_path / "more.jsonl"])
    with pytest.raises(InputError, match="no line answers any of the 1 requests"):
        measure(both, PromptSet("o", (Prompt.of("x", id="other"),)), tmp_path / "c", progress=False)
    with pytest.raises(InputError, match="line 1: no line of a batch output"):
        batchfiles.BatchOutput([dump(tmp_path / "prompts.jsonl", prompts)])


def test_a_request_that_the_batch_service_blocked_is_an_answer(tmp_path: Path) -> None:
    row = {
        "custom_id": "default/0/p0",
        "response": None,
        "error": {"code": "content_filter", "message": "no"},
    }
    dump_jsonl([row], tmp_path / "out.jsonl")
    made = run_batch(tmp_path, small(1))
    assert made["conditions"]["default"]["labels"] == {"refuse": {"blocked": 1}}


def test_a_part_of_a_batch_misses_no_requests_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = small(100)
    lines = [batch_line(f"default/0/{p.id}", NO) for p in batchfiles.shard_of(prompts.prompts, (1, 2))]
    dump_jsonl(lines, tmp_path / "out.jsonl")
    run_batch(tmp_path, prompts, shard=(1, 2))
    assert "without a line" not in caplog.text


def run_batch(folder: Path, prompts: PromptSet, **options: Any) -> dict[str, Any]:
    runtime = batchfiles.BatchOutput([folder / "out.jsonl"])
    return dict(measure(runtime, prompts, folder / "run", progress=False, **options).report.values)


def dump(path: Path, prompts: PromptSet) -> Path:
    dump_jsonl(({"id": p.id, "prompt": p.text} for p in prompts), path)
    return path


def test_shards_are_whole_windows_and_cover_everything() -> None:
    some = small(WINDOW * 5 + 3).prompts
    for n in (1, 2, 3, 6):
        parts = [batchfiles.shard_of(some, (i, n)) for i in range(1, n + 1)]
        assert [p for part in parts for p in part] == list(some)
        assert all(len(part) % WINDOW == 0 for part in parts[:-1])
        assert all(parts)
    for text in ("0/2", "3/2", "2", "a/b", "1/0"):
        with pytest.raises(InputError, match="--shard"):
            batchfiles.parse_shard(text)


def test_a_dry_run_counts_requests_and_says_how_tokens_were_found() -> None:
    prompts = (Prompt.of("a" * 40, id="a"), Prompt.of("水" * 10, id="b"))
    conditions = [Condition(max_new_tokens=10), Condition(name="s", system="b" * 8, max_new_tokens=10)]
    made = batchfiles.estimate(prompts, conditions, samples=3, seconds_each=2.0, at_once=4)
    assert (made.requests, made.answer_tokens) == (12, 120)
    assert made.prompt_tokens == 3 * ((10 + 10) + (12 + 12))
    assert made.seconds == 6.0
    assert "estimated at 4 characters a token" in "".join(made.lines)

    class Tokenizer:
        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * (5 * len(messages))}

    made = batchfiles.estimate(prompts, conditions, samples=1, tokenizer=Tokenizer())
    assert (made.prompt_tokens, made.counted) == (30, True)


# --- cost ---


def test_ten_thousand_prompts_cost_little_time_and_flat_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk's time is not ours
    script, prompts = {"*": YES + " Then the window." * 15}, small(10_000)

    def peak(n: int) -> int:
        few = PromptSet("few", prompts.prompts[:n])
        tracemalloc.start()
        try:
            run(script, few, tmp_path / f"traced-{n}")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    start = time.process_time()
    run(script, prompts, tmp_path / "timed")
    assert (time.process_time() - start) / len(prompts) < 1e-3
    assert (tmp_path / "timed" / "replies.jsonl").stat().st_size > 2_500_000
    assert peak(10_000) - peak(2_000) < 8_000 * 500  # bytes a prompt: its label and place, not its answer


# --- suites ---


def test_suites_of_the_package() -> None:
    assert list(suites.available()) == ["over-refusal", "should-refuse", "twins"]
    over, should = suites.load(["over-refusal:core"]), suites.load(["should-refuse:core"])
    assert {p.should_refuse for p in over} == {False}
    assert {p.should_refuse for p in should} == {True}
    assert {p.meta["kind"] for p in over} == {"lookalike"}
    both = suites.load(["over-refusal:core", "should-refuse:core", "should-refuse:core"])
    assert (len(both), both.name) == (
        len(over) + len(should),
        "over-refusal:core+should-refuse:core+should-refuse:core",
    )
    assert len(suites.load(["over-refusal:core", "core:test"])) == len(suites.load(["core:test"]))


def test_expected_of_a_part_holds_for_rows_that_say_nothing(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "a"}, {"id": "b", "prompt": "b", "expected": "refuse"}]
    dump_jsonl(rows, tmp_path / "p.jsonl")
    own = tmp_path / "own.yaml"
    own.write_text("mine: {parts: {a: {file: p.jsonl, expected: comply}}}")
    (only,) = suites.load([str(own)])  # the row that says otherwise stays out
    assert (only.id, only.should_refuse) == ("a", False)
    own.write_text("mine: {parts: {a: {file: p.jsonl, expected: comply, pairs: true}}}")
    with pytest.raises(InputError, match="none of its 2 prompts is left by expected: comply, pairs: True"):
        suites.load([str(own)])


def test_suites_of_the_users_own(tmp_path: Path) -> None:
    rows = [
        {"id": f"{k}{i}", "prompt": f"{k} {i}", "expected": e, "group": f"g{i}", "category": "x"}
        for i in range(6)
        for k, e in (("bad", "refuse"), ("good", "comply"))
    ]
    dump_jsonl(
        [*rows, {"id": "alone", "prompt": "alone", "expected": "comply", "group": "g9"}], tmp_path / "p.jsonl"
    )
    own = tmp_path / "own.yaml"
    own.write_text("mine:\n  title: Mine\n  parts:\n    a: {file: p.jsonl, pairs: true}\n")
    found = suites.load([str(own)])
    assert len(found) == 12
    assert [p.id for p in suites.twins(found.prompts)[0]] == ["bad0", "good0"]
    few = suites.limited(found, 5)
    assert len(few) == 4
    assert len(suites.twins(few.prompts)) == 2
    assert suites.limited(found, 99) is found
    both = suites.load([str(tmp_path / "p.jsonl"), str(own)])
    assert len(both) == 13
    for text, message in (
        ("- a", "holds no suite"),
        ("mine: {parts: {a: {}}}", "needs `parts`"),
        ("mine: {parts: {a: {file: p.jsonl, expected: maybe}}}", "write refuse or comply"),
        ("a: [", "not YAML"),
    ):
        own.write_text(text)
        with pytest.raises(InputError, match=message):
            suites.load([str(own)])
    with pytest.raises(InputError, match="no such suite or file"):
        suites.load(["over-refusals"])
    with pytest.raises(InputError, match="has no part 'cores'"):
        suites.load(["over-refusal:cores"])
    dump_jsonl([{"id": "bad0", "prompt": "another"}], tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="is another prompt"):
        suites.load([str(tmp_path / "p.jsonl"), str(tmp_path / "q.jsonl")])


def test_a_public_part_that_cannot_be_had_says_how_to_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> PromptSet:
        raise DataUnavailable("xstest: no network")

    monkeypatch.setattr(suites, "PUBLIC", {**suites.PUBLIC, "xstest": gone, "coconot": gone})
    with pytest.raises(DataUnavailable, match="To go without it: --suite over-refusal:core"):
        suites.load(["over-refusal"])


def test_xstest_twins_share_type_and_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompt(i: int, kind: str, focus: str, expected: frozenset[Label]) -> Prompt:
        return Prompt.of(f"{i}?", id=str(i), subcategory=kind, group=focus, expected=expected)

    made = [
        prompt(1, "homonyms", "kill", COMPLY),
        prompt(2, "contrast_homonyms", "kill", REFUSE),
        prompt(3, "definitions", "kill", COMPLY),
        prompt(4, "homonyms", "shoot", COMPLY),
        prompt(5, "homonyms", "shoot", COMPLY),
        prompt(6, "contrast_homonyms", "shoot", REFUSE),
    ]
    monkeypatch.setattr(
        suites, "PUBLIC", {**suites.PUBLIC, "xstest": lambda: PromptSet("xstest", tuple(made))}
    )
    found = suites.load(["twins"])
    assert [(p.id, p.group) for p in found] == [("2", "kill/homonyms"), ("1", "kill/homonyms")]
