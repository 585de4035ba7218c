"""A run in the files that lm-evaluation-harness writes: `results_<time>.json` and `samples_<task>_<time>.jsonl`.

One row per prompt and condition, its samples as the responses. The metrics are `declined`, the share of its
readable samples that were declined, and `right`, the share that did what is expected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from demur.report.exports import Exported, Item
from demur.report.render import plain


def to_lm_eval(run: Exported, *, unsafe: bool = False) -> dict[str, str]:
    """The files by name.

    Args:
        run: what to write. unsafe: keep the text of answers to what should be refused.
    """
    task = re.sub(r"\W+", "_", run.task).strip("_") or "demur"
    time = run.created.replace(":", "-").replace("+00-00", "")
    rows = list(_rows(run, unsafe=unsafe))
    return {
        f"results_{time}.json": json.dumps(
            plain(_results(run, task, rows)), ensure_ascii=False, indent=2, allow_nan=False
        )
        + "\n",
        f"samples_{task}_{time}.jsonl": "".join(
            json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        ),
    }


def _results(run: Exported, task: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": task}
    for name, rate in run.rates.items():
        if rate["value"] is not None:
            found[f"{name},none"] = rate["value"]
            # their files carry standard errors; a quarter of the 95 % interval also holds for clustered answers
            found[f"{name}_stderr,none"] = (rate["high"] - rate["low"]) / (2 * 1.96)
    settings = {k: run.condition[k] for k in ("temperature", "top_p") if k in run.condition}
    return {
        "results": {task: found},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "generation_kwargs": {
                    **settings,
                    "do_sample": bool(settings.get("temperature")),
                    "max_gen_toks": run.condition.get("max_new_tokens"),
                },
                "repeats": max((len(row["resps"][0]) for row in rows), default=1),
                "metadata": {"version": 0, "judge": run.judge},
            }
        },
        "versions": {task: 0},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"over_refusal": False, "refusal": True}},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
        "config": {"model": "demur", "model_args": f"model={run.model}", "limit": None},
        "date": datetime.fromisoformat(run.created).timestamp(),
        "model_source": "demur",
        "model_name": run.model,
        "model_name_sanitized": re.sub(r"[^\w.-]+", "__", run.model),
        "system_instruction": run.condition.get("system"),
        "demur": {
            "judge": run.judge,
            "judge_error": dict(run.judge_error),
            "rates": {name: dict(rate) for name, rate in run.rates.items()},
            "versions": dict(run.versions),
        },
    }


def _rows(run: Exported, *, unsafe: bool) -> Iterator[dict[str, Any]]:
    by_prompt: dict[tuple[str, str], list[Item]] = {}
    for item in run.items:
        by_prompt.setdefault((item.prompt.id, item.reply.condition), []).append(item)
    for n, some in enumerate(by_prompt.values()):
        p = some[0].prompt
        texts = [i.text(unsafe=unsafe) for i in some]
        target = ", ".join(sorted(str(label) for label in p.expected))
        doc = {
            "id": p.id,
            "prompt": p.text,
            "category": p.category,
            "subcategory": p.subcategory,
            "expected": sorted(str(label) for label in p.expected),
            "condition": some[0].reply.condition,
        }
        asked = json.dumps([{"role": m.role, "content": m.content} for m in p.messages], ensure_ascii=False)
        declined = [i.declined for i in some if i.declined is not None]
        right = [i.right for i in some if i.right is not None]
        yield {
            "doc_id": n,
            "doc": doc,
            "target": target,
            "arguments": {"gen_args_0": {"arg_0": asked, "arg_1": {"until": []}}},
            "resps": [texts],
            "filtered_resps": texts,
            "filter": "none",
            "metrics": ["declined", "right"],
            "doc_hash": _hash(json.dumps(doc, ensure_ascii=False)),
            "prompt_hash": _hash(asked),
            "target_hash": _hash(target),
            "declined": sum(declined) / len(declined) if declined else None,
            "right": sum(right) / len(right) if right else None,
            "demur": {
                "verdicts": [str(i.verdict.label) for i in some],
                "judge": run.judge,
                "left_out": sum(not i.shown(unsafe=unsafe) for i in some),
            },
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
