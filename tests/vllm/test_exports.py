"""What `demur models export` writes, in unmodified vLLM: the stock LoRA, folded steering, and the runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from demur import models
from demur.control.steering import Add
from demur.flows import weights
from demur.flows.load import load_runtime
from tests.vllm.engine import TIE, Local, messages, serving, together

OFFLINE = """
import json, sys
from demur.control.refusal_tokens import RefusalTokens
from demur.flows.load import load_runtime
from demur.types import Condition
from tests.vllm.engine import prompts

if __name__ == "__main__":
    name, n, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    runtime, chosen = load_runtime(name), prompts(n)
    rule = RefusalTokens(runtime.shipped_point)
    ask = Condition(max_new_tokens=8)
    found = {
        "dtype": runtime.dtype,
        "scores": [dict(s.probabilities) for s in runtime.score(chosen)],
        "decided": [[r.control_token, r.control_forced, r.content, r.completion_tokens]
                    for r in runtime.generate(chosen, ask, decide=rule)],
        "own": [[r.control_token, r.content, r.finish_reason] for r in runtime.generate(chosen[:40], ask)],
        "sampled": [r.content for r in runtime.generate(
            chosen[:4], Condition(max_new_tokens=8, temperature=1.0), samples=2)],
    }
    open(out, "w").write(json.dumps(found))
"""


def test_the_runtime_decides_and_writes_as_the_local_one(
    merged: Path, local: Local, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from demur.types import Condition

    n = 200
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    name = f"vllm:{merged}?max_model_len=1024&block_size=32&enforce_eager=true&max_num_seqs=16"
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), name, str(n), str(tmp_path / "out.json")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["dtype"] == "float32"
    some = Local(local.prompts[:n], local.scores[:n], local.rule)
    assert [p.id for p in prompts_again(n)] == [p.id for p in some.prompts]
    apart = max(
        abs(s[c] - p)
        for s, t in zip(found["scores"], some.scores, strict=True)
        for c, p in t.probabilities.items()
    )
    differ, wrong = some.compare([d[0] for d in found["decided"]])
    here = load_runtime("demur-smollm2")
    ask = Condition(max_new_tokens=8)
    texts = list(here.generate(some.prompts[:40], ask, decide=some.rule))
    same = sum(a.content == b[2] for a, b in zip(texts, found["decided"], strict=False))
    own = list(here.generate(some.prompts[:40], ask))
    with capsys.disabled():
        print(f"\nruntime: {n} decisions, {len(differ)} differ, {len(wrong)} without a tie; dp <= {apart:.1e}; "
              f"{same} of 40 texts equal")  # fmt: skip
    assert wrong == [] and apart < TIE
    assert same >= 36  # greedy paths part where two tokens tie
    assert [d[1] for d in found["decided"][:40]] == [t.control_forced for t in texts]
    assert (
        sum(a.control_token == b[0] and a.content == b[1] for a, b in zip(own, found["own"], strict=True))
        >= 36
    )
    assert len(found["sampled"]) == 8 and found["sampled"][0] != found["sampled"][1]


def prompts_again(n: int) -> list[Any]:
    from tests.vllm.engine import prompts

    return prompts(n)


def read(url: str, model: str, rows: list[list[int]], ids: list[int]) -> np.ndarray:
    """Probabilities of chosen ids at the first position, from token ids."""

    async def ask(client: httpx.AsyncClient, row: list[int]) -> list[float]:
        body = {
            "model": model, "prompt": row, "max_tokens": 1, "temperature": 0, "logprobs": len(ids),
            "logprob_token_ids": ids, "return_tokens_as_token_ids": True, "add_special_tokens": False,
        }  # fmt: skip
        answer = await client.post(f"{url}/completions", json=body)
        assert answer.status_code == 200, answer.text
        top = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        return [float(np.exp(top[f"token_id:{i}"])) for i in ids]

    return np.array(together(rows, ask))


def test_the_stock_lora_and_a_folded_vector_give_the_same_probabilities(
    local: Local, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models.resolve("demur-smollm2").path
    runtime: Any = load_runtime("demur-smollm2")
    weights.stock_lora(runtime, tmp_path / "stock", source=source)
    tokens = yaml.safe_load((tmp_path / "stock" / "base" / "control_tokens.yaml").read_text())["tokens"]
    ids = [tokens[c]["id"] for c in runtime.control.names]
    some = local.prompts[:60]
    rows = [runtime.chat.render(p).ids for p in some]
    want = np.array([[s.probabilities[c] for c in runtime.control.names] for s in local.scores[:60]])
    lora = tmp_path / "stock" / "lora"
    with serving(
        tmp_path / "stock" / "base",
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--lora-modules",
        f"tuned={lora}",
    ) as url:
        apart = float(abs(read(url, "tuned", rows, ids) - want).max())
        plain = float(abs(read(url, "demur", rows[:8], ids) - want[:8]).max())
    rng = np.random.default_rng(3)
    vector = rng.normal(size=576)
    add = Add(vector / np.linalg.norm(vector), layer=12, coefficient=20.0, where="all")
    weights.merged(runtime, tmp_path / "steered", source=source, add=[add])
    with add.on(runtime) as steered:
        steered_want = np.array(
            [[s.probabilities[c] for c in runtime.control.names] for s in steered.score(some[:30])]
        )
    with serving(tmp_path / "steered") as url:
        folded = float(abs(read(url, "demur", rows[:30], ids) - steered_want).max())
    moved = float(abs(steered_want - want[:30]).max())
    with capsys.disabled():
        print(f"\nstock LoRA: dp <= {apart:.1e} (base alone {plain:.2f}); folded vector: dp <= {folded:.1e} "
              f"where it moves p by {moved:.2f}")  # fmt: skip
    assert apart < TIE < plain
    assert folded < TIE < moved
    assert messages(some[0])
