"""The logits processor in `vllm serve` decides as the local runtime does, and no client talks it out of that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from demur.files import dump_operating_point, load_operating_point
from demur.serve.vllm_processor import ARGUMENT, SETTINGS_ENV
from demur.types import Threshold
from tests.vllm.engine import Local, messages, serving, together

NEVER = "never"


@pytest.fixture(scope="module")
def engine(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[int, str]]]:
    folder = tmp_path_factory.mktemp("settings")
    shipped = load_operating_point(merged / "operating_point.yaml")
    never = replace(shipped, id=NEVER, thresholds={c: Threshold(tau=1.01) for c in shipped.thresholds})
    dump_operating_point(never, folder / "never.yaml")
    (folder / "vllm.yaml").write_text(
        yaml.safe_dump({"overrides": ["never.yaml"], "allow_refusal_lowering": True})
    )
    tokens = yaml.safe_load((merged / "control_tokens.yaml").read_text())["tokens"]
    with serving(
        merged,
        "--logits-processors",
        "demur.serve.vllm_processor:RefusalTokens",
        env={SETTINGS_ENV: str(folder / "vllm.yaml")},
    ) as url:
        yield url, {spec["id"]: c for c, spec in tokens.items()}


def asked(url: str, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of the answers to chat requests."""

    async def ask(client: httpx.AsyncClient, row: dict[str, Any]) -> list[int]:
        body = {"model": "demur", "temperature": 0, "max_tokens": 3, "return_token_ids": True, **row}
        answer = await client.post(f"{url}/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    return together(rows, ask)


def test_500_decisions_with_16_at_a_time(
    engine: tuple[str, dict[int, str]], local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    url, names = engine
    ids = asked(url, [{"messages": messages(p)} for p in local.prompts])
    got = [names.get(row[0]) for row in ids]
    differ, wrong = local.compare(got)
    with capsys.disabled():
        near = sum(local.near(n) for n in range(len(got)))
        print(
            f"\nprocessor: {len(got)} decisions, {len(differ)} differ, {len(wrong)} without a tie; {near} near ties"
        )
    assert wrong == []
    assert len(set(got)) >= 5  # the comparison is about something
    assert not any(set(row[1:]) & set(names) for row in ids)


def test_sampling_does_not_undo_the_decision(engine: tuple[str, dict[int, str]], local: Local) -> None:
    url, names = engine
    some = [n for n in range(len(local.prompts)) if not local.near(n)][:40]
    hot = {"temperature": 2.0, "top_p": 1.0, "seed": 5, "max_tokens": 12}
    ids = asked(url, [{"messages": messages(local.prompts[n]), **hot} for n in some])
    forced = [k for k, n in enumerate(some) if local.rule(local.prompts[n], local.scores[n]) is not None]
    assert len(forced) > 20
    assert all(names.get(ids[k][0]) == local.decision(some[k]) for k in forced)
    assert not any(set(row[1:]) & set(names) for row in ids)


def test_a_client_cannot_move_it(engine: tuple[str, dict[int, str]], local: Local) -> None:
    url, names = engine
    respond = next(i for i, c in names.items() if c == "respond")
    refused = [n for n in range(len(local.prompts)) if local.decision(n) == "safety" and not local.near(n)][
        :6
    ]
    assert len(refused) == 6
    pushes: list[dict[str, Any]] = [
        {"logit_bias": {str(respond): 100.0}},
        {"logit_bias": {str(i): -100.0 for i, c in names.items() if c != "respond"}},
        {"logit_bias": {"28": 100.0}},
        {"repetition_penalty": 5.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"bad_words": ["I", " can't", "Sorry"]},
        {"min_p": 0.9, "top_k": 1},
    ]
    for push in pushes:
        ids = asked(url, [{"messages": messages(local.prompts[n]), **push} for n in refused])
        assert [names.get(row[0]) for row in ids] == ["safety"] * 6, push


@pytest.mark.parametrize(
    "push",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"allowed_token_ids": [1, 2, 3]},
        {"vllm_xargs": {ARGUMENT: "unknown"}},
    ],
)
def test_what_would_hide_the_first_position_is_an_error(
    engine: tuple[str, dict[int, str]], push: dict[str, Any]
) -> None:
    url, _ = engine
    body = {"model": "demur", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **push}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert "demur" in json.dumps(answer.json()) or "first token" in answer.text


def test_a_request_may_name_a_point_that_the_operator_lists(
    engine: tuple[str, dict[int, str]], local: Local
) -> None:
    url, names = engine
    refused = [n for n in range(len(local.prompts)) if local.decision(n) not in ("respond", None)][:12]
    rows = [{"messages": messages(local.prompts[n])} for n in refused]
    mixed = [row if k % 2 else {**row, "vllm_xargs": {ARGUMENT: NEVER}} for k, row in enumerate(rows)]
    got = [names.get(row[0]) for row in asked(url, mixed)]
    assert got[::2] == ["respond"] * 6
    assert [g for k, g in enumerate(got) if k % 2] == [
        local.decision(n) for k, n in enumerate(refused) if k % 2
    ]
