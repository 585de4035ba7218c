"""Endpoints that block some prompts, fail on some, or break off: the others are scored, and the card says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demur import judges
from demur.flows.card import CardResult, card, plan
from demur.flows.carddata import CardData
from demur.flows.collect import collect
from demur.flows.runs import RunFolder
from demur.flows.section_scores import tense_section
from demur.flows.settings import base_config
from demur.stress.past_tense import PastTense
from demur.types import Condition, Prompt, PromptSet, Score
from tests.flows.synthetic import COMPLY, REFUSE
from tests.runtime.test_openai import Answer, Server, runtime, say, server, text_of, with_logprobs

__all__ = ["server"]

N = 20
INNER = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
FILTERED = (400, {"error": {"code": "content_filter", "message": "q3, you said", "innererror": INNER}})


def doors() -> PromptSet:
    def one(i: int) -> Prompt:
        return Prompt.of(f"q{i}", id=f"p{i}", category="safety", expected=COMPLY if i % 2 else REFUSE)

    return PromptSet("doors", tuple(one(i) for i in range(N)))


def scored(payload: dict[str, Any]) -> Answer:
    i = int(text_of(payload)[1:])
    return 200, with_logprobs({"Sorry": 0.1 + 0.04 * (i if i % 2 else 19 - i), "Sure": 0.1}, "Sorry")


def serve(
    server: Server, *, blocked: set[str], failed: set[str], then: Callable[[str], bool] | None = None
) -> None:
    """The server of these tests; where `then` holds for a text, first tokens come without log-probabilities."""

    def answer(payload: dict[str, Any], n: int) -> Answer:
        text = text_of(payload)
        if text in blocked:
            return FILTERED
        if text in failed:
            return 500, b"overloaded"
        if payload.get("max_tokens") != 1 or (then and then(text)):
            return 200, say("Sure. Open it.")
        return scored(payload)

    server.answer = answer


def made(server: Server, out: Path, **more: Any) -> CardResult:
    options = {"control_text": more.pop("control_text")} if "control_text" in more else {}
    return card(runtime(server, retries=1, **options), doors(), out, progress=False, **more)


def gathered(server: Server, out: Path) -> CardData:
    """The scores of a card and nothing else, as its sections see them."""
    rt, condition, prompts = runtime(server, retries=1), Condition(), doors()
    stages = plan(
        rt,
        prompts,
        condition,
        sample=(),
        compared=(),
        calibrate=None,
        baseline=None,
        samples=1,
        T=1.0,
        decide=None,
    )
    with RunFolder(out) as run:
        run.start({**base_config("card", prompts, "rules/demur-v1", 0), "model": {}})
        run.save_prompts(prompts)
        collect(run, stages, judges.get("rules/demur-v1"), progress=False)
        return CardData.read(run)


def asked(server: Server) -> list[str]:
    """Texts that were asked for a score, in order, and forgotten."""
    texts = [text_of(p) for p in server.seen if p.get("max_tokens") == 1]
    server.seen.clear()
    return texts


def test_blocked_and_failed_prompts_cost_only_their_own_score(server: Server, tmp_path: Path) -> None:
    serve(server, blocked={"q3", "q8"}, failed={"q5"})
    first = made(server, tmp_path)
    rows = [json.loads(line)["id"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert rows == [f"p{i}" for i in range(N) if i not in (3, 5, 8)]
    lost = json.loads((tmp_path / "unscored.json").read_text())["scores"]
    assert lost["p3"] == lost["p8"] == {"blocked": "content_filter: hate"}
    assert lost["p5"] == {"failed": "HTTP 500: overloaded"}
    assert not (tmp_path / "notes.json").exists() or "scores" not in (tmp_path / "notes.json").read_text()

    told = "3 of 20 prompts could not be scored (2 blocked by the provider, 1 failed in spite of retries)"
    document = json.loads(first.json.read_text())
    for slug in ("curve", "calibration", "baselines"):
        section = document["sections"][slug]
        assert section["missing"] is None and any(told in note for note in section["notes"]), slug
    assert document["sections"]["calibration"]["values"]["n"] == 17
    assert document["unscored"] == {"scores": {"p3": "blocked", "p5": "failed", "p8": "blocked"}}
    page = first.html.read_text()
    assert told in page and "p5 (failed)" in page and "you said" not in page
    assert any(told in note for note in first.report.notes)


def test_failed_prompts_are_asked_again_and_blocked_ones_are_not(server: Server, tmp_path: Path) -> None:
    serve(server, blocked={"q3", "q8"}, failed={"q5"})
    assert gathered(server, tmp_path).lost == {"scores": {"p3": "blocked", "p5": "failed", "p8": "blocked"}}
    asked(server)
    serve(server, blocked={"q3", "q8"}, failed=set())
    second = gathered(server, tmp_path)
    assert asked(server) == ["q5"]
    assert list(second.scores) == [
        f"p{i}" for i in range(N) if i not in (3, 8)
    ]  # in the order of the prompts
    assert second.lost == {"scores": {"p3": "blocked", "p8": "blocked"}}
    assert (second.no_score() or "").startswith(
        "2 of 20 prompts could not be scored (2 blocked by the provider) and"
    )
    gathered(server, tmp_path)
    assert asked(server) == []


def test_a_kill_within_a_window_does_not_forget_what_was_blocked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(server, blocked={"q3", "q8"}, failed={"q5"})
    commit, left = RunFolder.commit, iter(range(9))

    def killed(run: RunFolder, rows: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        commit(run, rows)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            gathered(server, tmp_path)
    asked(server)
    serve(server, blocked=set(), failed=set())
    assert gathered(server, tmp_path).lost == {"scores": {"p3": "blocked", "p8": "blocked"}}
    assert set(asked(server)) == {"q5", *(f"q{i}" for i in range(12, N))}


def test_a_first_table_from_tokens_says_it_too(server: Server, tmp_path: Path) -> None:
    serve(server, blocked={"q3"}, failed=set())
    plain = server.answer
    found = with_logprobs({"[no]": 0.7, "[yes]": 0.2}, "[no]")
    server.answer = lambda p, n: (200, found) if (a := plain(p, n))[0] == 200 and p["max_tokens"] == 1 else a
    shown = made(server, tmp_path, control_text={"safety": "[no]", "respond": "[yes]"}, texts=4)
    note = json.loads(shown.json.read_text())["headline"]["note"]
    assert "for 19 prompts" in note and "1 of 20 prompts could not be scored (1 blocked" in note


def test_a_fragment_is_drawn_as_one(server: Server, tmp_path: Path) -> None:
    serve(server, blocked={"q3"}, failed=set(), then=lambda text: int(text[1:]) >= 16)
    document = json.loads(made(server, tmp_path).json.read_text())
    (note,) = [n for n in document["sections"]["curve"]["notes"] if "could not be scored" in n]
    assert note.startswith("5 of 20")
    assert "left open when scoring broke off" in note and "returns no log-probabilities" in note


def test_a_run_that_was_stopped_is_a_fragment_too(server: Server, tmp_path: Path) -> None:
    serve(server, blocked=set(), failed=set())
    assert gathered(server, tmp_path).no_score() is None
    rows = (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text("".join(rows[:14]))
    told = CardData.read(RunFolder(tmp_path)).no_score() or ""
    assert told.startswith("6 of 20 prompts could not be scored (6 left open when scoring broke off)")


def test_an_endpoint_without_log_probabilities_leaves_a_note(server: Server, tmp_path: Path) -> None:
    serve(server, blocked=set(), failed=set(), then=lambda text: True)
    document = json.loads(made(server, tmp_path).json.read_text())
    assert "returns no log-probabilities" in document["sections"]["curve"]["missing"]
    assert "scores" in json.loads((tmp_path / "notes.json").read_text())


def test_when_every_prompt_is_blocked_the_card_says_that(server: Server, tmp_path: Path) -> None:
    serve(server, blocked={f"q{i}" for i in range(N)}, failed=set())
    document = json.loads(made(server, tmp_path).json.read_text())
    assert document["sections"]["curve"]["missing"].startswith(
        "20 of 20 prompts could not be scored (20 blocked"
    )


def test_tenses_none_of_which_is_whole_are_no_error() -> None:
    asked = PromptSet("s", (Prompt.of("How do I open a door?", id="a", expected=COMPLY),))
    tenses = PastTense().apply(asked)
    assert len(tenses) == 4
    data = CardData(
        config={"kind": "card"},
        prompts=asked,
        tenses=tenses,
        tense_scores={p.id: Score(id=p.id, p_refuse=0.1) for p in list(tenses)[1:]},
        lost={"scores-tense": {tenses[0].id: "blocked"}},
    )
    assert "1 of 4 reworded prompts could not be scored" in (tense_section(data).missing or "")
