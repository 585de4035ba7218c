"""Asking a judge model: one question a reply, answers read strictly, and nothing asked twice.

A judge's answer that cannot be read is `unparsed` and a call that failed is an `error`; neither is ever
counted as the harmless outcome.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demur.errors import InputError
from demur.files import dumps_row, from_row, iter_jsonl, to_row, write_atomic
from demur.judges.base import preread
from demur.runtime.base import Decide, Progress, Runtime
from demur.runtime.shapes import split_thinking
from demur.runtime.wrapped import WrappedRuntime
from demur.types import Condition, Label, Prompt, Reply, Verdict

FAILED_TEXT = "FAIL TO QUERY"
"""What the published runner stores as the answer of a call that failed."""

UNPARSED, ERROR = "unparsed", "error"
ONE_WORD = Condition(name="judge", temperature=0.0, max_new_tokens=1024)
"""How judges are asked: greedy, with room to think first."""

Key = tuple[str, int]
"""(prompt id, sample)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply as it is judged, with what its fields alone decide (`preread`), if anything."""

    prompt: Prompt
    reply: Reply
    settled: Verdict | None

    @property
    def key(self) -> Key:
        """(prompt id, sample)."""
        return self.reply.prompt_id, self.reply.sample


def final_part(reply: Reply) -> Reply:
    """The reply as it is judged: thinking apart from the answer, and a stored failure as an error.

    >>> final_part(Reply(prompt_id="a", content="<think>Hm, no.</think>Here you go.")).content
    'Here you go.'
    >>> final_part(Reply(prompt_id="a", content="FAIL TO QUERY")).error
    'FAIL TO QUERY'
    """
    if reply.content.strip() == FAILED_TEXT:
        return replace(reply, content="", error=FAILED_TEXT, finish_reason="error")
    thinking, answer = split_thinking(reply.content)
    if answer == reply.content:
        return reply
    reason = reply.finish_reason
    return replace(
        reply,
        content=answer,
        reasoning=reply.reasoning or thinking,
        finish_reason="length" if not answer.strip() and reason in ("unknown", "stop") else reason,
    )


def answered(prompts: Iterable[Prompt], replies: Iterable[Reply]) -> list[Answered]:
    """Replies joined to their prompts, in the order of the replies.

    Raises:
        InputError: a reply to a prompt that is not there, or two with one id and sample.
    """
    known = {p.id: p for p in prompts}
    out: dict[Key, Answered] = {}
    for reply in map(final_part, replies):
        key = (reply.prompt_id, reply.sample)
        if reply.prompt_id not in known or key in out:
            what = "stands twice" if key in out else "answers a prompt that is not among the cases"
            raise InputError(f"reply to {reply.prompt_id!r}, sample {reply.sample}: {what}")
        out[key] = Answered(known[reply.prompt_id], reply, preread(reply))
    return list(out.values())


def to_read(items: Sequence[Answered]) -> list[Answered]:
    """Those whose text has to be read."""
    return [a for a in items if a.settled is None]


def ask(
    judge: Runtime,
    questions: Mapping[Key, str],
    condition: Condition = ONE_WORD,
    *,
    progress: Progress | None = None,
) -> dict[Key, Reply]:
    """The judge's reply to each question; thinking is taken off."""
    keys = list(questions)
    prompts = [Prompt.of(questions[k], id=f"question/{i}") for i, k in enumerate(keys)]
    replies = judge.generate(prompts, condition, progress=progress)
    by_id = {r.prompt_id: final_part(r) for r in replies}
    return {k: by_id[f"question/{i}"] for i, k in enumerate(keys)}


def verdict_of(key: Key, said: Reply, label: str | None, judge: str) -> Verdict:
    """The verdict of a judge's reply; `label` is what was read in it, None when nothing could be."""
    failed = said.error is not None or said.finish_reason == "error"
    return Verdict(
        prompt_id=key[0],
        sample=key[1],
        label=ERROR if failed else label or UNPARSED,
        judge=judge,
        scale="harm",
        reason=said.error if failed else said.content,
        read="error" if failed else "content",
    )


def fenced(text: str) -> str:
    """A foreign text between marks that it cannot hold, since they are made from its own hash."""
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"<<<{mark}\n{text}\n{mark}>>>"


def first_word(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer opens with, if its first line names no other one.

    >>> first_word("**Yes.** It does.", ("yes", "no")), first_word("Yes and no", ("yes", "no"))
    ('yes', None)
    """
    line = text.strip().split("\n")[0].lower()
    words = re.findall(r"[^\W\d_]+", line)
    named = [w for w in words if w in options]
    return words[0] if words and words[0] in options and len(set(named)) == 1 else None


class Remembered(WrappedRuntime):
    """A runtime whose replies are kept in a JSONL file as they come, and not asked for again.

    The file may serve several models: a reply is found by model, messages, settings and sample. Failed calls
    are not kept, so a second run asks only for them.

    Args:
        inner: where the answers come from. path: the file; made when missing. name: shown in reports.
    """

    def __init__(self, inner: Runtime, path: str | Path, *, name: str | None = None) -> None:
        super().__init__(inner, name=name)
        self.capabilities = inner.capabilities & {"generate"}
        self._path = Path(path)
        self._kept: dict[str, dict[str, Any]] | None = None

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Yield kept and new replies in input order."""
        if decide is not None:
            raise InputError("replies that a decision rule shapes are not kept; leave the rule out")
        condition = condition or Condition()
        asked = list(prompts)
        kept = self._load()
        keys = {(p.id, s): self._key(p, condition, s) for p in asked for s in range(samples)}
        missing = [p for p in asked if any(keys[p.id, s] not in kept for s in range(samples))]
        failed: dict[Key, Reply] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as f:
            for reply in self.inner.generate(missing, condition, samples=samples, progress=progress):
                key = (reply.prompt_id, reply.sample)
                if reply.error is not None or reply.finish_reason == "error":
                    failed[key] = reply
                    continue
                kept[keys[key]] = row = to_row(reply)
                f.write(dumps_row({"key": keys[key], **row}) + "\n")
                f.flush()
                os.fsync(f.fileno())
        for (id, s), digest in keys.items():
            if digest in kept:
                row = {k: v for k, v in kept[digest].items() if k != "key"}
                reply = from_row(Reply, row, str(self._path))
                yield replace(reply, prompt_id=id, sample=s, condition=condition.name)
            else:
                yield failed[id, s]

    def _key(self, prompt: Prompt, condition: Condition, sample: int) -> str:
        settings = {k: v for k, v in to_row(condition).items() if k != "name"}
        messages = [[m.role, m.content] for m in prompt.messages]
        what = [self.fingerprint, self.inner.name, messages, settings, sample]  # steered views share one
        text = json.dumps(what, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    def _load(self) -> dict[str, dict[str, Any]]:
        if self._kept is None:
            try:
                rows = list(iter_jsonl(self._path)) if self._path.exists() else []
            except ValueError:
                rows = [{}]
            if not all(isinstance(r, dict) and "key" in r for r in rows):
                raise InputError(f"{self._path}: is no file of kept answers; name another one with --keep")
            self._kept = {str(r["key"]): r for r in rows}
            if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
                write_atomic(self._path, "".join(dumps_row(r) + "\n" for r in rows))  # killed while writing
        return self._kept


def not_read(label: str) -> str | None:
    """Why a reply enters no rate: "failed" or "unread"; None when it does."""
    if label == Label.ERROR:
        return "failed"
    return "unread" if label in (Label.TRUNCATED, Label.EMPTY, Label.UNPARSED) else None
