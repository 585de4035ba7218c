import json
import threading
from pathlib import Path

import pytest

from demur.errors import InputError
from demur.files import to_row
from demur.flows.runs import RunFolder, differing, stored_row
from demur.types import Label, Prompt, PromptSet, Reply, Score, Verdict

PROMPTS = [Prompt.of(f"q{i}", id=f"p{i}") for i in range(7)]
REFUSE, COMPLY = frozenset({Label.FULL_REFUSAL}), frozenset({Label.COMPLIANCE})


def rows(prompts: list[Prompt]) -> list[dict[str, object]]:
    return [to_row(Score(id=p.id, p_refuse=0.25)) for p in prompts]


def reply_rows(prompts: list[Prompt], samples: int = 2) -> list[dict[str, object]]:
    return [
        to_row(Reply(prompt_id=p.id, content="t\u2028x", sample=s)) for p in prompts for s in range(samples)
    ]


def collect(run: RunFolder, windows: list[list[Prompt]] | None = None) -> None:
    for window in run.open_windows(["scores"], PROMPTS, window=3) if windows is None else windows:
        run.commit({"scores": rows(list(window))})


def test_whatever_is_cut_off_is_collected_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    collect(run)
    whole = run.file("scores").read_bytes()
    for size in range(len(whole) + 1):
        run.file("scores").write_bytes(whole[:size])
        collect(run)
        assert run.file("scores").read_bytes() == whole, size


def test_streams_of_one_window_stand_or_fall_together(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.commit({"replies": reply_rows(PROMPTS[:3]), "verdicts": reply_rows(PROMPTS[:3])})
    run.commit({"replies": reply_rows(PROMPTS[3:6])})
    left = run.open_windows(["replies", "verdicts"], PROMPTS, samples=2, window=3)
    assert [p.id for w in left for p in w] == ["p3", "p4", "p5", "p6"]
    assert len(run.rows("replies")) == len(run.rows("verdicts")) == 6


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.commit({"scores": rows(PROMPTS[1:4])})
    with pytest.raises(InputError, match="line 1: holds prompt 'p1' where this run asks 'p0'"):
        run.open_windows(["scores"], PROMPTS, window=3)


def test_remote_rows_resume_by_prompt_and_errors_are_asked_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    good, bad = to_row(Reply(prompt_id="p0", content="x")), to_row(Reply(prompt_id="p2", error="timeout"))
    run.commit({"replies": [good, bad]})
    with run.file("replies").open("ab") as f:
        f.write(b'{"prompt_id": "p3", "conte')
    assert run.open_samples(["replies"], PROMPTS) == [(p, 0) for p in PROMPTS[1:]]
    run.commit({"replies": [to_row(Reply(prompt_id=i, content="late")) for i in ("p2", "p1")]})
    run.settle(["replies"], PROMPTS)
    assert [r["prompt_id"] for r in run.rows("replies")] == ["p0", "p1", "p2"]
    assert run.replies()["p2", 0].reply.content == "late"


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.start({"seed": 0, "model": {"name": "a", "dtype": "float32"}})
        run.start({"seed": 0, "model": {"name": "a", "dtype": "float32"}})
        run.commit({"scores": rows(PROMPTS)})
        with pytest.raises(InputError, match=r'model.dtype: "float32" there, "bfloat16" now') as caught:
            run.start({"seed": 0, "model": {"name": "a", "dtype": "bfloat16"}})
        assert "seed" not in str(caught.value)
        run.start({"seed": 1}, fresh=True)
        assert run.config == {"seed": 1}
        assert run.rows("scores") == []


def test_a_run_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("mine\n")
    with RunFolder(tmp_path) as run:
        run.start({"seed": 0})
        run.commit({"replies-some condition": [], "scores-tense": []})
        (tmp_path / "operating_point.yaml").write_text("of the run\n")
        run.start({"seed": 1}, fresh=True)
        assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {"answers.jsonl", "run.json"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "prompts.jsonl").write_text("mine\n")
    for fresh in (False, True):
        with (
            RunFolder(other) as run,
            pytest.raises(InputError, match=r"holds prompts\.jsonl but no run\.json"),
        ):
            run.start({"seed": 0}, fresh=fresh)
    assert (other / "prompts.jsonl").read_text() == "mine\n"


def test_only_missing_and_failed_samples_are_open(tmp_path: Path) -> None:
    run, (p, q), failed = RunFolder(tmp_path), PROMPTS[:2], {"error": "timeout"}
    run.commit({"replies": [{"prompt_id": "p0", "sample": s, **(failed if s else {})} for s in range(3)]})
    assert run.open_samples(["replies"], [p, q], samples=3) == [(p, 1), (p, 2), (q, 0), (q, 1), (q, 2)]
    run.commit({"replies": [{"prompt_id": "p0", "sample": 2}]})
    assert run.open_samples(["replies"], [p], samples=3) == [(p, 1)]  # the last row of a sample counts
    run.commit({"replies": [{"prompt_id": "p0", "sample": 1, "finish_reason": "error"}]})
    assert run.open_samples(["replies"], [p], samples=3) == [(p, 1)]


def test_a_failed_judge_alone_is_open_where_the_text_was_kept(tmp_path: Path) -> None:
    run, streams = RunFolder(tmp_path), ["replies", "verdicts"]
    held = {"withheld": {"sha256": "x", "characters": 1}}
    replies = [{"prompt_id": p.id, **(held if p.id in ("p1", "p3") else {})} for p in PROMPTS[:4]]
    verdicts = [{"prompt_id": "p0", "label": "error"}, {"prompt_id": "p1", "label": "error"}]
    run.commit({"replies": replies, "verdicts": verdicts})  # killed before the verdicts of p2 and p3
    assert run.unjudged(streams) == {("p0", 0): True, ("p1", 0): False, ("p2", 0): True, ("p3", 0): False}
    assert run.open_samples(streams, PROMPTS[:4]) == [(PROMPTS[1], 0), (PROMPTS[3], 0)]
    assert [r.prompt_id for r in run.texts("replies", run.unjudged(streams))] == ["p0", "p2"]
    run.commit({"verdicts": [{"prompt_id": p.id, "label": "compliance"} for p in PROMPTS[:4]]})
    assert run.unjudged(streams) == {}
    assert run.open_samples(streams, PROMPTS[:4]) == []


def test_differing_reports_missing_keys() -> None:
    assert list(differing({"a": 1}, {"b": 2})) == ["a: 1 there, null now", "b: null there, 2 now"]
    (long,) = differing({"a": "x" * 5000}, {})
    assert len(long) < 400
    assert long.endswith("... (5,002 characters) there, null now")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    caught: list[Exception] = []

    def second() -> None:
        try:
            RunFolder(tmp_path).__enter__()
        except InputError as e:
            caught.append(e)

    with RunFolder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another run is writing here" in str(caught[0])


@pytest.mark.parametrize(
    ("expected", "label", "kept"),
    [
        (REFUSE, Label.COMPLIANCE, False),
        (REFUSE, Label.PARTIAL_REFUSAL, False),
        (REFUSE, Label.UNPARSED, False),
        (REFUSE, Label.OFF_TOPIC, False),
        (REFUSE, Label.FULL_REFUSAL, True),
        (COMPLY, Label.COMPLIANCE, True),
        (frozenset(), Label.COMPLIANCE, True),
    ],
)
def test_text_that_may_answer_what_should_be_refused_is_not_kept(
    expected: frozenset[Label], label: Label, kept: bool
) -> None:
    prompt = Prompt.of("x", id="a", expected=expected)
    reply = Reply(
        prompt_id="a", content="secret steps", reasoning="secret plan", tool_calls=({"name": "secret"},)
    )
    verdict = Verdict(prompt_id="a", label=label, judge="j")
    row = stored_row(prompt, reply, verdict)
    assert ("secret" in json.dumps(row)) is kept
    assert "secret" in json.dumps(stored_row(prompt, reply, verdict, keep_unsafe_text=True))


def test_a_judge_that_failed_and_an_answer_that_broke_off_keep_no_text() -> None:
    prompt = Prompt.of("x", id="a", expected=REFUSE)
    failed = Verdict(prompt_id="a", label=Label.ERROR, judge="rubric/x@m", read="error")
    assert "secret" not in json.dumps(stored_row(prompt, Reply(prompt_id="a", content="secret"), failed))
    broken = Verdict(prompt_id="a", label=Label.ERROR, judge="provider/field", read="error")
    reply = Reply(prompt_id="a", content="secret", error="connection lost")
    row = stored_row(prompt, reply, broken)
    assert "secret" not in json.dumps(row) and row["error"] == "connection lost"
    thought = stored_row(
        prompt, Reply(prompt_id="a", reasoning="secret"), Verdict(prompt_id="a", label=Label.EMPTY, judge="j")
    )
    assert "secret" not in json.dumps(thought)
    assert "withheld" not in stored_row(prompt, Reply(prompt_id="a", error="timeout"), broken)


def test_the_hash_of_a_plain_reply_is_that_of_its_text() -> None:
    prompt, verdict = (
        Prompt.of("x", id="a", expected=REFUSE),
        Verdict(prompt_id="a", label="compliance", judge="j"),
    )
    held = stored_row(prompt, Reply(prompt_id="a", content="abc"), verdict)["withheld"]
    assert held["characters"] == 3
    assert held["sha256"].startswith("ba7816bf8f01cfea")


def test_prompts_come_back_as_they_went(tmp_path: Path) -> None:
    odd = (
        Prompt.of("a\u2028b\x00", id="1", system="s", category="c", expected=REFUSE, meta={"k": [1, "x"]}),
        Prompt.of("   ", id="2"),
        Prompt.of("lone \ud800", id="3", group="g", language="de"),
    )
    run = RunFolder(tmp_path)
    run.save_prompts(PromptSet("s", odd))
    found = run.prompts()
    assert found is not None
    assert found.prompts == odd
