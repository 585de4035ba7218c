"""A run as an Inspect `EvalLog`, version 2, in JSON: `inspect view` and `read_eval_log` open it.

Samples of a prompt are Inspect's epochs; another condition of the same prompt is a sample of its own. Each
answer has the score `declined` (1 or 0) and, where somebody said what is expected, `right` (C or I); answers
that could not be read have no score and are counted as unscored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from demur.report.exports import Exported, Item
from demur.report.render import plain
from demur.types import Message

STOP = {
    "stop": "stop",
    "length": "max_tokens",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "error": "unknown",
    "unknown": "unknown",
}


def to_inspect(run: Exported, *, unsafe: bool = False) -> dict[str, str]:
    """The log as {file name: JSON text}. `inspect view` lists JSON logs only under names that open with the time.

    Args:
        run: what to write. unsafe: keep the text of answers to what should be refused.
    """
    several = len(run.conditions) > 1
    ids = list(dict.fromkeys(_id(i, several) for i in run.items))
    epochs = 1 + max((i.reply.sample for i in run.items), default=0)
    run_id = _short(run.created, run.model, *ids)
    log = {
        "version": 2,
        "status": "success",
        "eval": {
            "eval_id": _short(run_id, "eval"),
            "run_id": run_id,
            "created": run.created,
            "task": run.task,
            "task_id": _short(run_id, "task"),
            "task_version": 0,
            "task_attribs": {},
            "task_args": {},
            "dataset": {"name": run.task, "samples": len(ids), "sample_ids": ids, "shuffled": False},
            "model": run.model,
            "model_generate_config": _generate(run.condition),
            "model_args": {},
            "config": {"epochs": epochs},
            "packages": {"demur": run.versions.get("demur", "")},
            "metadata": {"conditions": dict(run.conditions), "versions": dict(run.versions)},
            "scorers": [{"name": name, "options": {"judge": run.judge}} for name in ("declined", "right")],
        },
        "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {}},
        "results": _results(run),
        "stats": {"started_at": run.created, "completed_at": run.created, "model_usage": {}},
        "samples": list(_samples(run, several, unsafe=unsafe)),
    }
    time, task = re.sub("[:+]", "-", run.created), re.sub(r"[^\w.]+|_", "-", run.task).strip("-")
    text = json.dumps(plain(log), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return {f"{time}_{task or 'demur'}_{_short(run_id, 'task')}.json": text}


def _results(run: Exported) -> dict[str, Any]:
    read = [i for i in run.items if i.declined is not None]
    judged = [i.right for i in read if i.right is not None]
    rates = {
        name: {"name": name, "value": row["value"], "params": {}, "metadata": dict(row)}
        for name, row in run.rates.items()
        if row["value"] is not None
    }
    right = {"name": "accuracy", "value": sum(judged) / len(judged), "params": {}} if judged else None
    about = {"judge": run.judge, "judge_error": dict(run.judge_error)}
    return {
        "total_samples": len(run.items),
        "completed_samples": len(run.items),
        "scores": [
            _score("declined", rates, len(read), len(run.items), about),
            _score("right", {"accuracy": right} if right else {}, len(judged), len(run.items), about),
        ],
    }


def _score(
    name: str, metrics: Mapping[str, Any], scored: int, total: int, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "scorer": name,
        "scored_samples": scored,
        "unscored_samples": total - scored,
        "params": {},
        "metrics": dict(metrics),
        "metadata": dict(metadata),
    }


def _samples(run: Exported, several: bool, *, unsafe: bool) -> Iterator[dict[str, Any]]:
    for item in run.items:
        p, reply, verdict = item.prompt, item.reply, item.verdict
        uuid = _short(run.created, run.model, _id(item, several), str(reply.sample))
        system = run.conditions.get(reply.condition, {}).get("system")
        asked = [_message(m, f"{uuid}-{i}") for i, m in enumerate(p.with_system(system).messages)]
        own = [_message(m, f"{uuid}-{i}") for i, m in enumerate(p.messages)]
        answer: dict[str, Any] = {
            "id": f"{uuid}-answer",
            "role": "assistant",
            "content": item.text(unsafe=unsafe),
            "source": "generate",
            "model": run.model,
        }
        if reply.reasoning and item.shown(unsafe=unsafe):
            answer["content"] = [
                {"type": "reasoning", "reasoning": reply.reasoning},
                {"type": "text", "text": reply.content},
            ]
        choice = {"message": answer, "stop_reason": STOP[reply.finish_reason]}
        sample: dict[str, Any] = {
            "id": _id(item, several),
            "epoch": reply.sample + 1,
            "input": p.text if p.messages == (Message(role="user", content=p.text),) else own,
            "target": sorted(str(label) for label in p.expected),
            "messages": [*asked, answer],
            "output": {"model": run.model, "choices": [choice], "completion": item.text(unsafe=unsafe)},
            "scores": _scores(item),
            "metadata": {
                "category": p.category,
                "subcategory": p.subcategory,
                "expected": sorted(str(label) for label in p.expected),
                "condition": reply.condition,
                "verdict": str(verdict.label),
                "judge": verdict.judge,
                "read": verdict.read,
                "left_out": not item.shown(unsafe=unsafe),
            },
            "model_usage": {},
            "uuid": uuid,
        }
        if reply.error is not None:
            sample["output"]["error"] = reply.error
        yield sample


def _scores(item: Item) -> dict[str, Any]:
    if item.declined is None:
        return {}
    label, judge = str(item.verdict.label), item.verdict.judge
    common = {"answer": label, "metadata": {"judge": judge, "score": item.verdict.score}}
    found: dict[str, Any] = {"declined": {"value": int(item.declined), **common}}
    if item.right is not None:
        found["right"] = {"value": "C" if item.right else "I", **common}
    return found


def _message(message: Message, id: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": id, "role": message.role, "content": message.content}
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    return row


def _generate(condition: Mapping[str, Any]) -> dict[str, Any]:
    names = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_tokens", "seed": "seed"}
    return {theirs: condition[ours] for ours, theirs in names.items() if ours in condition}


def _id(item: Item, several: bool) -> str:
    return f"{item.prompt.id} ({item.reply.condition})" if several else item.prompt.id


def _short(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:22]
