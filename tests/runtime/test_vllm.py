"""The vLLM runtime's name and its rows, on an engine that stands in for vLLM's (the real one: tests/vllm)."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from demur.errors import CapabilityError, InputError
from demur.flows.load import load_runtime
from demur.runtime import forward
from demur.runtime.vllm import VLLMRuntime, parse_name
from demur.types import Condition, Message, Prompt, Score
from tests.runtime.tiny import tiny_runtime

PROMPTS = [Prompt.of(text, id=text) for text in ("how do i boil a egg ?", "write a story please", "hi")]


class Engine:
    """vLLM's offline engine over the tiny random model: greedy, one row at a time."""

    def __init__(self, **options: Any) -> None:
        self.local, self.asked = tiny_runtime(control=True), []  # type: ignore[var-annotated]
        config = SimpleNamespace(
            dtype="torch.float32",
            max_model_len=64,
            get_vocab_size=lambda: 92,
            try_get_generation_config=lambda: {"eos_token_id": 7},
        )
        self.llm_engine = SimpleNamespace(model_config=config)

    def get_tokenizer(self) -> Any:
        return self.local.tokenizer

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        out = []
        for prompt, p in zip(prompts, params, strict=True):
            ids, new, logprobs, finish = list(prompt["prompt_token_ids"]), [], [], "length"
            self.asked.append((ids[:], p))
            for _ in range(p.max_tokens):
                with self.local.edited():
                    row = forward.run(self.local.model, [ids])[0].tolist()  # type: ignore[index]
                z = torch.tensor(row)
                logp = z.log_softmax(-1)
                logprobs.append(
                    {i: SimpleNamespace(logprob=float(logp[i])) for i in p.logprob_token_ids or ()}
                )
                for i, bias in (p.logit_bias or {}).items():
                    z[i] += bias
                new.append(int(z.argmax()))
                ids.append(new[-1])
                if new[-1] == 7:
                    finish = "stop"
                    break
            out.append(
                SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=new, logprobs=logprobs, finish_reason=finish)]
                )
            )
        return out


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> VLLMRuntime:
    stand_in = ModuleType("vllm")
    stand_in.LLM = Engine  # type: ignore[attr-defined]

    def params(**given: Any) -> Any:
        return SimpleNamespace(**{"logit_bias": None, "logprob_token_ids": None, **given})

    stand_in.SamplingParams = params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return VLLMRuntime("tiny", control=tiny_runtime(control=True).control)


def test_scores_are_the_local_ones(runtime: VLLMRuntime) -> None:
    for mine, theirs in zip(runtime.score(PROMPTS), tiny_runtime(control=True).score(PROMPTS), strict=True):
        assert mine.id == theirs.id and mine.token == theirs.token
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)
        assert mine.p_refuse == pytest.approx(theirs.p_refuse, abs=1e-6)
        assert mine.off_control_mass == pytest.approx(theirs.off_control_mass, abs=1e-5)


@pytest.mark.parametrize("forced", [None, "safety", "respond"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_answers_are_the_local_ones(runtime: VLLMRuntime, forced: str | None, tokens: int) -> None:
    local, ask = tiny_runtime(control=True), Condition(max_new_tokens=tokens)

    def rule(_prompt: Prompt, _score: Score) -> str | None:
        return forced

    mine = list(runtime.generate(PROMPTS, ask, decide=rule, samples=2))
    theirs = list(local.generate(PROMPTS, ask, decide=rule, samples=2))
    for a, b in zip(mine, theirs, strict=True):
        assert (a.prompt_id, a.sample, a.content, a.finish_reason) == (
            b.prompt_id,
            b.sample,
            b.content,
            b.finish_reason,
        )
        assert (a.control_token, a.control_forced) == (b.control_token, b.control_forced)
        assert (a.prompt_tokens, a.completion_tokens) == (b.prompt_tokens, b.completion_tokens)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_control_tokens_are_forbidden_behind_the_first_position(runtime: VLLMRuntime) -> None:
    list(runtime.generate(PROMPTS, Condition(max_new_tokens=4), decide=lambda _p, _s: "safety"))
    assert runtime.control is not None
    written = runtime.llm.asked[len(PROMPTS) :]
    assert len(written) == len(PROMPTS)
    for ids, params in written:
        assert ids[-1] == runtime.control.ids["safety"]
        assert params.logit_bias == dict.fromkeys(runtime.control.ids.values(), -100.0)


def test_answers_that_were_begun_are_the_local_ones(runtime: VLLMRuntime) -> None:
    said = (Message(role="user", content="write a story"), Message(role="assistant", content="one two"))
    rows, ask = [Prompt(id="begun", messages=said), PROMPTS[0]], Condition(max_new_tokens=4)
    for rule in (None, lambda _p, _s: "safety"):
        mine = list(runtime.generate(rows, ask, decide=rule))
        theirs = list(tiny_runtime(control=True).generate(rows, ask, decide=rule))
        assert [(r.content, r.control_token) for r in mine] == [(r.content, r.control_token) for r in theirs]
        assert mine[0].control_token is None and mine[0].logprobs == {}


def test_a_prompt_that_cannot_be_asked_is_a_row(runtime: VLLMRuntime) -> None:
    long = Prompt.of("egg " * 80, id="long")
    first, second = runtime.generate([long, PROMPTS[0]], Condition(max_new_tokens=2))
    assert first.finish_reason == "error" and "max_model_len" in str(first.error) and second.error is None
    assert "max_model_len" in str(runtime.problem(long)) and runtime.problem(PROMPTS[0]) is None
    with pytest.raises(InputError):
        list(runtime.score([long]))


def test_another_temperature_of_the_softmax_is_refused(runtime: VLLMRuntime) -> None:
    with pytest.raises(CapabilityError, match="T=1 only"):
        list(runtime.score(PROMPTS, T=2.0))

    class Rule:
        T = 2.0

        def __call__(self, _prompt: Prompt, _score: Score) -> str | None:
            return None

    with pytest.raises(CapabilityError, match="another T"):
        list(runtime.generate(PROMPTS, decide=Rule()))
    with pytest.raises(CapabilityError, match="cannot states"):
        runtime.require("states")


def test_names() -> None:
    assert parse_name("vllm:a/b") == ("a/b", {})
    assert parse_name("vllm:a?x=1&y=0.5&z=true&w=auto") == ("a", {"x": 1, "y": 0.5, "z": True, "w": "auto"})
    with pytest.raises(InputError, match="name the folder"):
        parse_name("vllm:")
    with pytest.raises(InputError, match="merge the adapter"):
        load_runtime("vllm:a", adapter="b")


def test_without_vllm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(CapabilityError, match="environment"):
        VLLMRuntime("tiny")
