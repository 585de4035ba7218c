"""Answers from a local model: transformers' own `generate` over left-padded rows, after the decision."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from demur.errors import DemurError, InputError
from demur.runtime import batching, columns
from demur.runtime.chat import begun_by
from demur.runtime.columns import Columns
from demur.runtime.forward import Prefix, run
from demur.runtime.layers import input_device
from demur.runtime.next_words import LOOK
from demur.types import RESPOND, Condition, Prompt, Reply, Score

if TYPE_CHECKING:
    from demur.runtime.base import Decide
    from demur.runtime.chat import ChatFormat
    from demur.runtime.local import LocalRuntime

WINDOW = 80
"""Prompts per window of generation: answers come back, and can be stored, after each."""
STEPS = 16
"""Tokens written before answers that have ended leave their batch."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt on its way to an answer. `bare`: the base model answers, to the prompt as it is."""

    prompt: Prompt
    ids: list[int]
    score: Score | None = None
    forced: str | None = None
    bare: bool = False
    error: str | None = None

    @property
    def begun(self) -> str | None:
        """What the prompt makes the assistant say first, if anything: no control token may follow on that."""
        return begun_by(self.prompt)


def window(
    runtime: LocalRuntime,
    prompts: Sequence[Prompt],
    condition: Condition,
    samples: int,
    decide: Decide | None,
    count: Callable[[int], None],
) -> Iterator[Reply]:
    """Replies to one window of prompts, samples of a prompt side by side, in input order."""
    jobs = [prepare(runtime, p, condition) for p in prompts]
    jobs = decided(runtime, jobs, condition, decide)
    draws = 1 if condition.temperature == 0 else samples
    ends = end_ids(runtime)
    texts: dict[int, list[list[int]]] = {}
    for writer, bare in ((runtime, False), (runtime.base, True)):
        places = [n for n, job in enumerate(jobs) if job.error is None and job.bare is bare]
        if writer is not None:
            rows = _written(writer, [jobs[n] for n in places], condition, draws, ends, count)
            texts.update(zip(places, rows, strict=True))
    for n, job in enumerate(jobs):
        if job.error is not None:
            count(1)
        outputs = texts.get(n, [])
        for sample in range(samples):
            yield reply_of(runtime, job, condition, sample, outputs[sample % draws] if outputs else [], ends)


def _written(
    runtime: LocalRuntime,
    jobs: Sequence[Job],
    condition: Condition,
    draws: int,
    ends: list[int],
    count: Callable[[int], None],
) -> list[list[list[int]]]:
    """New token ids of each job, for each draw."""
    rows = [job.ids if job.bare else with_control(runtime, job) for job in jobs]

    def work(batch: list[int], prefix: Prefix | None) -> list[list[list[int]]]:
        ids = [rows[i] for i in batch]
        closed = torch.tensor([jobs[i].forced is not None or bool(jobs[i].begun) for i in batch])
        out = []
        for sample in range(draws):
            seed = seed_of(condition.seed, jobs[batch[0]].prompt.id, sample)
            out.append(_generate(runtime, ids, prefix, condition, closed, ends, seed))
        count(len(batch))
        return [list(of_row) for of_row in zip(*out, strict=True)]

    return runtime.batched(rows, work, extra=condition.max_new_tokens, share=columns.fit(runtime.model))


def prepare(runtime: LocalRuntime, prompt: Prompt, condition: Condition) -> Job:
    """The prompt as token ids; one that cannot be asked is a job with an error."""
    try:
        ids = runtime.chat.render(prompt.with_system(condition.system)).ids
        runtime.check_fits(prompt, ids, condition.max_new_tokens)
    except DemurError as e:
        return Job(prompt, [], error=str(e))
    return Job(prompt, ids)


def decided(runtime: LocalRuntime, jobs: list[Job], condition: Condition, decide: Decide | None) -> list[Job]:
    """Jobs with their first-position score and the control category that the rule puts in front.

    An answer that the prompt has begun is past that position, and has neither.

    Raises:
        InputError: the rule names a category that the model does not have, or lets a base answer that is not there.
    """
    by_base = getattr(decide, "answers", "model") == "base"
    if by_base and runtime.base is None:
        raise InputError(f"the decision rule lets the base answer, and {runtime.name!r} has none under it")
    if runtime.control is None or (decide is None and runtime.chat.thinks):
        return jobs
    if runtime.chat.thinks:
        runtime.chat.require_decision()
    T = float(getattr(decide, "T", 1.0))
    rows = [(j.prompt, j.ids) for j in jobs if j.error is None and not j.begun]
    scores = iter(runtime.score_rows(rows, condition, T))
    out = []
    for job in jobs:
        if job.error is None and not job.begun:
            score = next(scores)
            forced = decide(job.prompt, score) if decide is not None else None
            if forced is not None and forced not in runtime.control.ids:
                raise InputError(
                    f"the decision rule named {forced!r}; {runtime.name!r} has "
                    + ", ".join(runtime.control.names)
                )
            job = replace(job, score=score, forced=forced, bare=by_base and forced == RESPOND)
        out.append(job)
    return out


def with_control(runtime: LocalRuntime, job: Job) -> list[int]:
    """The prompt's ids, and the control token that was decided behind them."""
    if job.forced is None or runtime.control is None:
        return job.ids
    return [*job.ids, runtime.control.ids[job.forced]]


class _ControlOnlyFirst(LogitsProcessor):
    """Control tokens may open an answer that was neither decided nor begun, and stand nowhere else."""

    def __init__(self, ids: Sequence[int], closed_B: Tensor, start: int) -> None:
        self.ids, self.closed_B, self.start = list(ids), closed_B, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        closed_B = self.closed_B if input_ids.shape[1] == self.start else torch.ones(1, dtype=torch.bool)
        scores = scores.clone()
        part = scores[:, self.ids]
        scores[:, self.ids] = part.masked_fill(closed_B[:, None].to(scores.device), -math.inf)
        return scores


def _generate(
    runtime: LocalRuntime,
    rows: list[list[int]],
    prefix: Prefix | None,
    condition: Condition,
    closed: Tensor,
    ends: list[int],
    seed: int,
) -> list[list[int]]:
    """New token ids of each row, cut behind the first end token.

    Padding stands on the left; transformers counts positions over the mask, so no position is skipped. Where the
    past is keys and values alone, prompts are read beforehand, long ones apart from short ones, and an answer that
    has ended leaves the batch after at most `STEPS` more tokens.
    """
    model, longest = runtime.model, max(map(len, rows))
    device = input_device(model)
    gaps = [[0] * (longest - len(r)) for r in rows]
    ids_BT = torch.tensor([[*g, *r] for r, g in zip(rows, gaps, strict=True)], device=device)
    mask_BT = torch.tensor([[*g, *[1] * len(r)] for r, g in zip(rows, gaps, strict=True)], device=device)
    cache = _past(runtime, rows, prefix) if columns.fit(model) else None
    most = condition.max_new_tokens
    steps = [most] if cache is None else [min(STEPS, most - done) for done in range(0, most, STEPS)]
    control = list(runtime.control.ids.values()) if runtime.control else []
    processors = LogitsProcessorList([_ControlOnlyFirst(control, closed, longest)] if control else [])
    ends_E = torch.tensor(ends, device=device)
    written: list[list[int]] = [[] for _ in rows]
    places = list(range(len(rows)))
    with _own_settings(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for new in steps:
            ids_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=_settings(condition, ends, new),
                logits_processor=processors,
                past_key_values=cache,
            )
            for place, ids in zip(places, ids_BT[:, longest:].tolist(), strict=True):
                written[place] = _until_end(ids, ends)
            going_B = ~torch.isin(ids_BT[:, longest:], ends_E).any(-1)
            if cache is None or not going_B.any():
                break
            mask_BT = nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
            if not going_B.all():
                ids_BT, mask_BT = ids_BT[going_B], mask_BT[going_B]
                places = [p for p, going in zip(places, going_B.tolist(), strict=True) if going]
                cache.batch_select_indices(going_B.nonzero()[:, 0])
    return written


def _past(runtime: LocalRuntime, rows: list[list[int]], prefix: Prefix | None) -> Columns:
    """Keys and values of all tokens of each row but its last."""
    model, head = runtime.model, prefix.length if prefix else 0
    found: dict[int, tuple[Columns, int, int]] = {}
    for batch in batching.plan([len(r) - head for r in rows], runtime.budget(0)):
        part = Columns(model)
        if prefix:
            prefix.expanded(len(batch), part)
        if any(len(rows[n]) - 1 > head for n in batch):
            run(model, [rows[n][head:-1] for n in batch], cache=part)
        found.update({n: (part, k, len(rows[n]) - 1) for k, n in enumerate(batch)})
    return Columns(model).joined(0, [found[n] for n in range(len(rows))])


def _settings(condition: Condition, ends: list[int], new: int) -> GenerationConfig:
    drawn = {"temperature": condition.temperature, "top_p": condition.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=new,
        do_sample=condition.temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **(drawn if condition.temperature else {}),
    )


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Hide the checkpoint's sampling settings, which transformers would otherwise mix into ours."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    at = next((k for k, i in enumerate(ids) if i in ends), None)
    return ids if at is None else ids[: at + 1]


def end_ids(runtime: LocalRuntime) -> list[int]:
    """Ids that end an answer: the checkpoint's, and the tokenizer's."""
    given = getattr(runtime.model.generation_config, "eos_token_id", None)
    ids = list(given) if isinstance(given, (list, tuple)) else [given]
    return list(dict.fromkeys(int(i) for i in [*ids, runtime.tokenizer.eos_token_id] if i is not None))


def seed_of(seed: int, prompt_id: str, sample: int) -> int:
    """A stream of its own for each batch and sample, so that rerunning a batch gives the same text."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt_id}|{sample}".encode()).digest()[:7], "big")


def reply_of(
    runtime: LocalRuntime, job: Job, condition: Condition, sample: int, ids: list[int], ends: Sequence[int]
) -> Reply:
    """The reply that these new ids are, without control and end tokens."""
    reply = Reply(prompt_id=job.prompt.id, condition=condition.name, sample=sample)
    if job.error is not None:
        return replace(reply, error=job.error, finish_reason="error")
    stopped = bool(ids) and ids[-1] in ends
    body = ids[:-1] if stopped else ids
    category = job.forced
    if runtime.control is not None and job.forced is None and body:
        category = next((c for c, i in runtime.control.ids.items() if i == body[0]), None)
        body = body[1:] if category else body
    content, reasoning = runtime.chat.split(body, job.begun)
    log = {c: math.log(p) for c, p in job.score.probabilities.items() if p > 0} if job.score else {}
    return replace(
        reply,
        content=content,
        reasoning=reasoning,
        finish_reason="stop" if stopped else "length",
        logprobs=log,
        control_token=category,
        control_forced=job.forced is not None,
        prompt_tokens=len(job.ids),
        completion_tokens=len(ids) + (job.forced is not None),
    )


def words(
    runtime: LocalRuntime,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    firsts: Mapping[str, Sequence[int]],
    count: Callable[[int], None],
) -> Iterator[Reply]:
    """Log-probability of each word of `firsts` (word -> ids that begin it) behind each prompt of one window."""
    ids: dict[int, list[int]] = {}
    out: dict[int, Reply] = {}
    for n, prompt in enumerate(prompts):
        try:
            row = chat.render(prompt, header=True).ids
            runtime.check_fits(prompt, row, LOOK)
            ids[n] = row
        except DemurError as e:
            out[n] = Reply(prompt_id=prompt.id, error=str(e), finish_reason="error")
    for look in range(1, LOOK + 1):
        asked = sorted(ids)
        found = _word_logprobs(runtime, [ids[n] for n in asked], firsts)
        for n, (top, mass) in zip(asked, found, strict=True):
            if look < LOOK and not runtime.tokenizer.decode([top]).strip():
                ids[n] = [*ids[n], top]  # white space first: look behind it
            else:
                out[n] = Reply(prompt_id=prompts[n].id, logprobs=mass, prompt_tokens=len(ids.pop(n)))
    count(len(prompts))
    yield from (out[n] for n in range(len(prompts)))


def _word_logprobs(
    runtime: LocalRuntime, rows: Sequence[list[int]], firsts: Mapping[str, Sequence[int]]
) -> list[tuple[int, dict[str, float]]]:
    """For each row the likeliest next id, and the log-probability of each word."""

    def work(batch: list[int], prefix: Prefix | None) -> list[tuple[int, dict[str, float]]]:
        start = prefix.length if prefix else 0
        cache = prefix.expanded(len(batch)) if prefix else None
        logits_BV = run(runtime.model, [rows[i][start:] for i in batch], cache=cache)
        assert logits_BV is not None
        z_BV = logits_BV.float().log_softmax(-1)
        mass = {w: z_BV[:, list(ids)].logsumexp(-1).clamp(max=0).tolist() for w, ids in firsts.items()}
        return [(top, {w: m[b] for w, m in mass.items()}) for b, top in enumerate(z_BV.argmax(-1).tolist())]

    return runtime.batched(rows, work)
