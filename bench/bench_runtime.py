"""Time our states and scores against a plain transformers loop on prompts of mixed length.

Same model object, prompts, dtype and process; the two sides take turns; results are compared before any time
is taken. The plain loop is what most code does: 32 prompts a batch in arrival order, right padding with a
mask, `output_hidden_states=True`, logits everywhere. Run: python bench/bench_runtime.py --model FOLDER
[--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demur.runtime.local import LocalRuntime
from demur.types import Prompt, Site

WORDS = (
    *("the", "a", "of", "river", "letter", "how", "why", "write", "explain", "small"),
    *("garden", "city", "bread", "music", "winter", "number", "story", "please"),
)
TAIL = 5


def prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Prompts whose word counts are log-normal: many short, some ten times longer."""
    rng = random.Random(seed)
    sizes = [min(150, max(3, int(rng.lognormvariate(3.0, 0.9)))) for _ in range(n)]
    return [Prompt.of(" ".join(rng.choices(WORDS, k=k)), id=str(i)) for i, k in enumerate(sizes)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[*[1] * len(r), *[0] * (longest - len(r))] for r in rows])
    return ids, mask


@torch.inference_mode()
def plain_states(model: Any, rows: list[list[int]], layers: list[int]) -> np.ndarray:
    out = []
    for i in range(0, len(rows), 32):
        batch = rows[i : i + 32]
        ids, mask = padded(batch)
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for b, row in enumerate(batch):
            out.append(torch.stack([hidden[k + 1][b, len(row) - TAIL : len(row)] for k in layers]))
    return torch.stack(out).numpy()


@torch.inference_mode()
def plain_scores(model: Any, rows: list[list[int]], columns: list[int]) -> np.ndarray:
    out = []
    for i in range(0, len(rows), 32):
        batch = rows[i : i + 32]
        ids, mask = padded(batch)
        logits = model(input_ids=ids, attention_mask=mask).logits
        last = torch.stack([logits[b, len(row) - 1] for b, row in enumerate(batch)])
        out.append(last.float().softmax(-1)[:, columns].sum(-1))
    return torch.cat(out).numpy()


def our_states(runtime: LocalRuntime, items: list[Prompt], layers: list[int]) -> np.ndarray:
    sites = [Site(layer=k, position=p) for k in layers for p in range(-TAIL, 0)]
    rows = np.stack([s.vectors for s in runtime.states(items, sites)])
    return rows.reshape(len(items), len(layers), TAIL, -1)


def our_scores(runtime: LocalRuntime, items: list[Prompt]) -> np.ndarray:
    return np.array([s.p_refuse for s in runtime.score(items)])


def timed(job: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def bench(runtime: LocalRuntime, items: list[Prompt], repeats: int) -> list[dict[str, Any]]:
    """Pairs of (ours, plain) with their median seconds; raises when the two sides disagree."""
    model, rows = runtime.model, [runtime.chat.render(p).ids for p in items]
    n = model.config.num_hidden_layers
    # the last entry of hidden_states is normed, so the two sides are compared on all layers but the last
    every, middle = list(range(n - 1)), [n // 2]
    pairs: list[tuple[str, Callable[[], np.ndarray], Callable[[], np.ndarray]]] = [
        (
            f"states, {len(every)} layers x {TAIL} tokens",
            lambda: our_states(runtime, items, every),
            lambda: plain_states(model, rows, every),
        ),
        (
            f"states, layer {middle[0]} x {TAIL} tokens",
            lambda: our_states(runtime, items, middle),
            lambda: plain_states(model, rows, middle),
        ),
        (
            "first-position scores",
            lambda: our_scores(runtime, items),
            lambda: plain_scores(model, rows, runtime.openings),
        ),
    ]
    out = []
    for name, ours, plain in pairs:
        a, b = ours(), plain()
        gap = float(np.abs(a - b).max() / np.abs(b).max())
        if gap > 1e-4:
            raise SystemExit(
                f"{name}: the two sides differ by {gap:.1e} of the largest value; no times are reported"
            )
        times = [(timed(ours), timed(plain)) for _ in range(repeats)]
        fast, slow = (statistics.median(t[k] for t in times) for k in (0, 1))
        out.append({"what": name, "ours_s": fast, "plain_s": slow, "ratio": slow / fast, "gap": gap})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=os.environ.get("DEMUR_TEST_SMOLLM2"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.model:
        from demur import models

        args.model = models.resolve("smollm2").path
    runtime = LocalRuntime.from_folder(Path(args.model), dtype="float32")
    items = prompts(args.prompts)
    lengths = sorted(len(runtime.chat.render(p).ids) for p in items)
    results = bench(runtime, items, args.repeats)
    setting = {
        "model": runtime.name,
        "prompts": len(items),
        "tokens_median": lengths[len(lengths) // 2],
        "tokens_max": lengths[-1],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": args.repeats,
    }
    if args.json:
        json.dump({"setting": setting, "results": results}, sys.stdout, indent=2)
        print()
        return
    print(", ".join(f"{k} {v}" for k, v in setting.items()))
    for r in results:
        print(f"{r['what']:36s} ours {r['ours_s']:6.2f} s   plain {r['plain_s']:6.2f} s   {r['ratio']:4.1f}x")


if __name__ == "__main__":
    main()
