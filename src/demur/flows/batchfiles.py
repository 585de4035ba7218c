"""Big jobs that run elsewhere: OpenAI batch files, shards, and what a run would cost.

    write_batch("requests.jsonl", prompts, conditions, samples=1, model="my-model")
    measure(BatchOutput(["out.jsonl"]), prompts, "out", conditions=conditions)

The request file is the one of the OpenAI Batch API, which `vllm run-batch -i requests.jsonl -o out.jsonl` reads
too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur.errors import CapabilityError, InputError
from demur.files import parse_json, write_atomic
from demur.flows.runs import WINDOW
from demur.report.importers.openai_batch import custom_id, is_row, reply_of
from demur.runtime.base import Decide, Progress, Runtime
from demur.types import Condition, Prompt, Reply

BATCH_LIMIT = 50_000
"""Requests that the OpenAI Batch API takes in one file."""


def write_batch(
    path: str | Path, prompts: Sequence[Prompt], conditions: Sequence[Condition], *, samples: int, model: str
) -> int:
    """Write one chat request per (condition, prompt, sample); returns their number.

    `custom_id` is "condition/sample/prompt id", so that answers find their prompt again.

    Raises:
        InputError: a prompt with images, which the file form cannot carry.
    """
    jobs = [(c, p, s) for c in conditions for p in prompts for s in range(samples)]
    lines = [json.dumps(_request(p, c, s, model), ensure_ascii=True) + "\n" for c, p, s in jobs]
    write_atomic(path, "".join(lines))
    if len(jobs) > BATCH_LIMIT:
        logging.getLogger("demur").warning(
            "%s holds %d requests; OpenAI takes %d in one file, so split it (--shard 1/%d ...)",
            path,
            len(jobs),
            BATCH_LIMIT,
            -(-len(jobs) // BATCH_LIMIT),
        )
    return len(jobs)


def _request(prompt: Prompt, condition: Condition, sample: int, model: str) -> dict[str, Any]:
    if prompt.images:
        raise InputError(f"prompt {prompt.id!r} has images, which batch requests of demur do not carry")
    body = {
        "model": model,
        "messages": [_message(m) for m in prompt.with_system(condition.system).messages],
        "temperature": condition.temperature,
        "top_p": condition.top_p,
        "max_tokens": condition.max_new_tokens,
        "seed": condition.seed + sample,
    }
    id = custom_id(prompt.id, condition.name, sample)
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _message(message: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    calls = {"tool_calls": [dict(c) for c in message.tool_calls], "tool_call_id": message.tool_call_id}
    return row | {k: v for k, v in calls.items() if v}


class BatchOutput(Runtime):
    """The answers in batch output files, as a runtime that `measure` can ask.

    A failed line is an error row, and so is a request without a line. Of several lines for one request (an error
    file, a second batch for what failed) the answered one counts.

    Args:
        paths: output and error files. name: of the model; by default the one named in the first answer.

    Raises:
        InputError: no batch output, or two answers to one request.
    """

    capabilities = frozenset({"generate"})
    deterministic = True

    def __init__(self, paths: Sequence[str | Path], *, name: str | None = None) -> None:
        self._paths = [Path(p) for p in paths]
        self._lines: dict[str, tuple[int, int]] = {}
        model, digest = self._index()
        self.name = name or model or "batch"
        self.fingerprint = f"batch:{digest}"

    def _index(self) -> tuple[str | None, str]:
        """Note where each line starts, so that answers need not be held in memory."""
        model, answered, digest = None, set(), hashlib.sha256()
        for n, path in enumerate(self._paths):
            if not path.is_file():
                raise InputError(f"{path}: no such file")
            with path.open("rb") as f:
                offset = 0
                for count, raw in enumerate(f, 1):
                    start, offset = offset, offset + len(raw)
                    digest.update(raw)
                    if not raw.strip():
                        continue
                    row = parse_json(raw.decode("utf-8", "replace"), f"{path}, line {count}")
                    if not isinstance(row, Mapping) or not is_row(row):
                        raise InputError(
                            f"{path}, line {count}: no line of a batch output (`custom_id`, `response`)"
                        )
                    id = str(row["custom_id"])
                    if reply_of(row, "").error is not None:
                        self._lines.setdefault(id, (n, start))
                        continue
                    if id in answered:
                        raise InputError(
                            f"{path}, line {count}: a second answer to {id!r}; ids must be unique"
                        )
                    answered.add(id)
                    self._lines[id] = (n, start)
                    response = row.get("response")
                    body = response.get("body") if isinstance(response, Mapping) else None
                    model = model or (body.get("model") if isinstance(body, Mapping) else None)
        return model, digest.hexdigest()[:16]

    def check(self, prompts: Iterable[Prompt], conditions: Sequence[Condition], samples: int) -> None:
        """Log requests without a line and lines without a request.

        Raises:
            InputError: no line belongs to any request: these are answers to something else.
        """
        asked = {custom_id(p.id, c.name, s) for p in prompts for c in conditions for s in range(samples)}
        if not asked & set(self._lines):
            raise InputError(
                f"{self._paths[0]}: no line answers any of the {len(asked)} requests (first line: "
                f"{next(iter(self._lines), 'none')!r}, first request: {min(asked)!r}). Pass the same "
                "--suite, --system, --samples and --limit as with --to-batch"
            )
        if missing := len(asked - set(self._lines)):
            logging.getLogger("demur").warning(
                "%d of %d requests without a line in the batch output", missing, len(asked)
            )
        if extra := sorted(set(self._lines) - asked):
            logging.getLogger("demur").warning(
                "%d lines answer none of the requests, e.g. %r", len(extra), extra[0]
            )

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Yield the stored answers in input order.

        Raises:
            CapabilityError: `decide` is given; these answers are made.
        """
        if decide is not None:
            raise CapabilityError("answers of a batch file are made; an operating point cannot change them")
        where = (condition or Condition()).name
        files = [path.open("rb") for path in self._paths]
        try:
            jobs = ((p, s) for p in prompts for s in range(samples))
            for done, (prompt, sample) in enumerate(jobs, 1):
                at = self._lines.get(custom_id(prompt.id, where, sample))
                if at is None:
                    yield Reply(
                        prompt_id=prompt.id,
                        condition=where,
                        sample=sample,
                        finish_reason="error",
                        error="no line in the batch output",
                    )
                else:
                    files[at[0]].seek(at[1])
                    row = json.loads(files[at[0]].readline().decode("utf-8", "replace"))
                    yield reply_of(row, prompt.id, condition=where, sample=sample)
                if progress:
                    progress(done, None)
        finally:
            for f in files:
                f.close()


# --- shards ---


def parse_shard(text: str) -> tuple[int, int]:
    """Read "2/8" as (2, 8).

    >>> parse_shard("2/8")
    (2, 8)
    """
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise InputError(f"--shard {text!r}: write i/n with 1 <= i <= n, e.g. 2/8")
    return int(i), int(n)


def shard_of(prompts: Sequence[Prompt], shard: tuple[int, int], window: int = WINDOW) -> Sequence[Prompt]:
    """Part i of n, in whole windows: the model sees the same batches as without shards, so bytes are the same.

    >>> some = [Prompt.of("x", id=str(i)) for i in range(200)]
    >>> [len(shard_of(some, (i, 2))) for i in (1, 2)]
    [128, 72]

    Raises:
        InputError: fewer windows than shards.
    """
    i, n = shard
    windows = -(-len(prompts) // window)
    if n > windows:
        raise InputError(
            f"--shard {i}/{n}: {len(prompts)} prompts make {windows} windows of {window}, too few for {n} shards; "
            f"use at most {windows}"
        )
    cut = [-(-windows * k // n) * window for k in (i - 1, i)]
    return prompts[cut[0] : cut[1]]


# --- what it would cost ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Requests, tokens and seconds of a run. `counted` says that a tokenizer counted the prompt tokens."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    counted: bool
    basis: str

    @property
    def lines(self) -> tuple[str, ...]:
        """The estimate in words."""
        how = "counted with the model's tokenizer" if self.counted else "estimated at 4 characters a token"
        return (
            f"requests:       {self.requests:,}",
            f"prompt tokens:  {self.prompt_tokens:,} ({how})",
            f"answer tokens:  at most {self.answer_tokens:,}",
            f"time:           about {_duration(self.seconds)} ({self.basis})",
        )


def estimate(
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    samples: int,
    tokenizer: Any = None,
    seconds_each: float = 1.0,
    at_once: int = 1,
) -> Estimate:
    """What a run would take, without asking anything.

    Without a tokenizer a token is taken as four ASCII characters or one other character.

    Args:
        tokenizer: counts prompt tokens by its chat template. seconds_each: assumed seconds of one request.
        at_once: requests in flight.

    >>> estimate([Prompt.of("What is a fjord?")], [Condition()], samples=2).requests
    2
    """
    tokens = 0
    for condition in conditions:
        for p in prompts:
            messages = [_message(m) for m in p.with_system(condition.system).messages]
            tokens += _tokens(messages, tokenizer)
    requests = len(prompts) * len(conditions) * samples
    return Estimate(
        requests=requests,
        prompt_tokens=tokens * samples,
        answer_tokens=sum(c.max_new_tokens for c in conditions) * len(prompts) * samples,
        seconds=requests * seconds_each / at_once,
        counted=tokenizer is not None,
        basis=f"assuming {seconds_each:g} s a request and {at_once} at once; not measured",
    )


def _tokens(messages: list[dict[str, Any]], tokenizer: Any) -> int:
    if tokenizer is not None:
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return len(made["input_ids"])
    text = "".join(str(m["content"]) for m in messages)
    ascii_characters = sum(c.isascii() for c in text)
    return -(-ascii_characters // 4) + len(text) - ascii_characters


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
