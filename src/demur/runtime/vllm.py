"""vLLM's engine in this process, for big offline jobs: cards, measurements and calibration on a GPU node.

    runtime = load_runtime("vllm:out/merged?tensor_parallel_size=2")

In process and not over HTTP, because a job that asks tens of thousands of prompts wants the engine's own batching,
exact probabilities of the control tokens, and no server to look after; over HTTP there is the gateway
(`demur serve --upstream`), and `OpenAIRuntime` for everything else. Prompts go in as token ids, written by the
same code as for the local runtime, so user text cannot become a control token here either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from demur.errors import CapabilityError, DemurError, InputError
from demur.runtime.base import REFUSAL_OPENINGS, ControlTokens, Decide, Progress, Runtime
from demur.runtime.batching import windows
from demur.runtime.chat import ChatFormat, begun_by
from demur.types import RESPOND, Condition, Prompt, Reply, Score

PREFIX = "vllm:"
WINDOW = 512
"""Prompts handed to the engine at once; answers come back, and can be stored, after each window."""
BARRED = -100.0
"""vLLM's lowest bias: a control token behind the first position."""


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: Prompt
    sample: int
    ids: list[int]
    score: Score | None = None
    forced: str | None = None
    error: str | None = None


class VLLMRuntime(Runtime):
    """A checkpoint folder (or cached hub id) in vLLM.

    Args:
        folder: what vLLM loads; its tokenizer is used. name: what to call it.
        fingerprint: of its weights. control: its control tokens, if any.
        template, thinking: as in `LocalRuntime`.
        engine: arguments of `vllm.LLM`, e.g. tensor_parallel_size=4, dtype="bfloat16".

    Hidden states and interventions are not to be had here: fit those with the local runtime. Scores are at T=1.

    >>> runtime = VLLMRuntime("out/merged", dtype="float32")  # doctest: +SKIP
    """

    capabilities = frozenset({"generate", "score", "prefill"})

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        fingerprint: str | None = None,
        control: ControlTokens | None = None,
        template: str | None = None,
        thinking: bool | None = None,
        **engine: Any,
    ) -> None:
        try:
            from vllm import LLM  # type: ignore[import-not-found, unused-ignore]
        except ImportError as e:
            raise CapabilityError(
                "vLLM is not installed in this environment. It pins its own torch and transformers, so give it one "
                "of its own (docs/vllm.md), or serve the model and name its address, URL#model"
            ) from e
        options = {"enable_prefix_caching": True, "max_logprobs": 32, **engine}
        self.llm = LLM(model=str(folder), **options)
        config = self.llm.llm_engine.model_config
        self.name, self.fingerprint, self.control = name or str(folder), fingerprint, control
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.limit = int(config.max_model_len)
        self.tokenizer: Any = self.llm.get_tokenizer()
        ids = control.ids.values() if control else ()
        if bad := [i for i in ids if i >= config.get_vocab_size()]:
            raise InputError(
                f"control token {bad[0]} is outside the vocabulary of {self.name!r}; export it again"
            )
        self.chat = ChatFormat(self.tokenizer, template=template, thinking=thinking, control_ids=ids)

    def __repr__(self) -> str:
        return f"VLLMRuntime({self.name!r})"

    def problem(self, prompt: Prompt, condition: Condition | None = None) -> str | None:
        """Why the prompt cannot be written for this model or does not fit its context, or None."""
        self.chat.require_template()
        try:
            self._render(prompt, condition or Condition(), 1)
        except InputError as e:
            return str(e)
        return None

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """First-position probabilities, exact over the whole vocabulary, one generated token a prompt.

        Raises:
            InputError: a prompt that cannot be written or is too long. CapabilityError: T is not 1, or the
                model thinks before it answers.
        """
        if T != 1.0:
            raise CapabilityError(
                f"T={T}: vLLM gives log-probabilities at T=1 only; score with the local runtime"
            )
        condition = condition or Condition()
        self.chat.require_decision()
        done = 0
        for window in windows(prompts, WINDOW):
            rows = [_Row(p, 0, self._render(p, condition, 1)) for p in window]
            done += len(rows)
            for row, (score, _) in zip(
                rows, self._first(rows, replace(condition, temperature=0.0)), strict=True
            ):
                yield replace(score, id=row.prompt.id, condition=condition.name)
            if progress is not None:
                progress(done, None)

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers. With control tokens, one token is asked first and the rest behind it, on a warm prefix.

        A control token, forced by `decide` or the model's own, opens an answer and stands nowhere else.

        Raises:
            InputError: `decide` without control tokens. CapabilityError: a rule whose `T` is not 1.
        """
        if samples < 1:
            raise InputError(f"samples={samples}: at least one answer per prompt")
        if decide is not None and self.control is None:
            raise InputError(f"{self.name!r} has no control tokens, so a decision rule has nothing to force")
        if decide is not None and float(getattr(decide, "T", 1.0)) != 1.0:
            raise CapabilityError(
                "the decision rule is for another T, and vLLM gives log-probabilities at T=1 only"
            )
        condition = condition or Condition()
        done = 0
        for window in windows(prompts, max(1, WINDOW // samples)):
            yield from self._window(window, condition, samples, decide)
            done += len(window)
            if progress is not None:
                progress(done, None)

    # --- one window -----------------------------------------------------------------------------------------

    def _window(
        self, prompts: Sequence[Prompt], condition: Condition, samples: int, decide: Decide | None
    ) -> Iterator[Reply]:
        rows = [self._row(p, s, condition) for p in prompts for s in range(samples)]
        good = [n for n, row in enumerate(rows) if row.error is None]
        opened: dict[int, list[int]] = {n: [] for n in good}
        if self.control is not None and good and not (self.chat.thinks and decide is None):
            if decide is not None:
                self.chat.require_decision()
            new = [n for n in good if not begun_by(rows[n].prompt)]
            firsts = self._first([rows[n] for n in new], condition)
            for n, (score, own) in zip(new, firsts, strict=True):
                score = replace(score, id=rows[n].prompt.id, condition=condition.name)
                forced = decide(rows[n].prompt, score) if decide is not None else None
                rows[n] = replace(rows[n], score=score, forced=forced)
                opened[n] = [self.control.ids[forced] if forced is not None else own]
        written = self._rest(rows, good, opened, condition)
        for n, row in enumerate(rows):
            yield self._reply(row, condition, *written.get(n, ([], None)))

    def _row(self, prompt: Prompt, sample: int, condition: Condition) -> _Row:
        try:
            return _Row(prompt, sample, self._render(prompt, condition, condition.max_new_tokens))
        except DemurError as e:
            return _Row(prompt, sample, [], error=str(e))

    def _render(self, prompt: Prompt, condition: Condition, more: int) -> list[int]:
        ids = self.chat.render(prompt.with_system(condition.system)).ids
        if len(ids) + more > self.limit:
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens and needs room for {more} more; the context of "
                f"{self.name!r} is {self.limit} tokens. Shorten it, or raise max_model_len"
            )
        return ids

    def _first(self, rows: Sequence[_Row], condition: Condition) -> Iterator[tuple[Score, int]]:
        """Score and the model's own first token of each row; the score's `id` is left to the caller."""
        if self.control is not None:
            asked: Mapping[str, int] = {c: self.control.ids[c] for c in self.control.names}
        else:
            openings = {self.tokenizer.encode(text, add_special_tokens=False)[0] for text in REFUSAL_OPENINGS}
            asked = {str(i): i for i in sorted(openings)}
        params = [self._params(row, condition, 1, logprob_token_ids=list(asked.values())) for row in rows]
        for out in self._run([row.ids for row in rows], params):
            at, own = out.logprobs[0], out.token_ids[0]
            p = {c: math.exp(at[i].logprob) for c, i in asked.items()}
            if self.control is None:
                yield Score(id="", p_refuse=min(1.0, sum(p.values())), kind="first_token"), own
                continue
            top = own if condition.temperature == 0 else None  # what was drawn is not what is likeliest
            yield (
                Score(
                    id="",
                    p_refuse=min(1.0, sum(v for c, v in p.items() if c != RESPOND)),
                    probabilities=p,
                    off_control_mass=max(0.0, 1.0 - sum(p.values())),
                    token=next((c for c, i in asked.items() if i == top), None),
                ),
                own,
            )

    def _rest(
        self, rows: Sequence[_Row], good: Sequence[int], opened: Mapping[int, list[int]], condition: Condition
    ) -> dict[int, tuple[list[int], str | None]]:
        """{row: (new token ids with the opening one, finish reason)}."""
        ends = self._ends()
        out: dict[int, tuple[list[int], str | None]] = {}
        todo, params = [], []
        barred = dict.fromkeys(self.control.ids.values(), BARRED) if self.control else {}
        for n in good:
            own = opened[n] and rows[n].forced is None
            budget = condition.max_new_tokens - bool(own)
            if own and opened[n][0] in ends:
                out[n] = (list(opened[n]), "stop")
            elif budget < 1:
                out[n] = (list(opened[n]), "length")
            else:
                todo.append(n)
                params.append(self._params(rows[n], condition, budget, logit_bias=barred or None))
        answers = self._run([[*rows[n].ids, *opened[n]] for n in todo], params)
        for n, answer in zip(todo, answers, strict=True):
            out[n] = ([*opened[n], *answer.token_ids], answer.finish_reason)
        return out

    def _params(self, row: _Row, condition: Condition, tokens: int, **more: Any) -> Any:
        from vllm import SamplingParams

        text = f"{condition.seed}|{row.prompt.id}|{row.sample}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return SamplingParams(
            temperature=condition.temperature,
            top_p=condition.top_p,
            max_tokens=tokens,
            seed=seed if condition.temperature else None,
            detokenize=False,
            **more,
        )

    def _run(self, rows: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        if not rows:
            return []
        prompts = [{"prompt_token_ids": list(ids)} for ids in rows]
        return [out.outputs[0] for out in self.llm.generate(prompts, list(params), use_tqdm=False)]

    def _ends(self) -> frozenset[int]:
        given = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        many = given if isinstance(given, list) else [given]
        return frozenset(i for i in (*many, self.tokenizer.eos_token_id) if i is not None)

    def _reply(self, row: _Row, condition: Condition, ids: Sequence[int], finish: str | None) -> Reply:
        reply = Reply(prompt_id=row.prompt.id, condition=condition.name, sample=row.sample)
        if row.error is not None:
            return replace(reply, error=row.error, finish_reason="error")
        body = list(ids[:-1]) if ids and ids[-1] in self._ends() else list(ids)
        category = None
        if self.control is not None and body:
            category = next((c for c, i in self.control.ids.items() if i == body[0]), None)
            body = body[1:] if category else body
        content, reasoning = self.chat.split(body, begun_by(row.prompt))
        log = {c: math.log(p) for c, p in row.score.probabilities.items() if p > 0} if row.score else {}
        return replace(
            reply,
            content=content,
            reasoning=reasoning,
            finish_reason="stop" if finish == "stop" else "length",
            finish_reason_raw=finish,
            logprobs=log,
            control_token=category,
            control_forced=row.forced is not None,
            prompt_tokens=len(row.ids),
            completion_tokens=len(ids),
        )


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Folder and engine arguments of `vllm:FOLDER?key=value&...`; numbers and true / false are read as such.

    >>> parse_name("vllm:out/merged?tensor_parallel_size=2&enforce_eager=true")
    ('out/merged', {'tensor_parallel_size': 2, 'enforce_eager': True})
    """
    folder, _, query = name.removeprefix(PREFIX).partition("?")
    if not folder:
        raise InputError(f"{name!r}: name the folder, as in vllm:out/merged")
    return folder, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
