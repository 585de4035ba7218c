"""What the dial costs in vLLM: throughput with and without the processor, first text with and without the gateway.

    make test-vllm            # makes the environment .venv-vllm
    .venv-vllm/bin/python bench/bench_vllm.py processor [--pairs 7]
    .venv-vllm/bin/python bench/bench_vllm.py gateway [--rounds 40]

`processor`: every run is a process of its own that loads the engine, warms it up and times one batch with fixed
output lengths; runs with and without alternate, and the order within a pair does too. Wall time and the process'
own CPU time are kept: other work on the machine moves the first and hardly the second. `gateway`: one server,
the same prompts asked directly and through the gateway in turn; time to the first piece of text, and the time
of one decode step from the rest of the same answers. Results go to bench/results/vllm.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "vllm.json"
sys.path.insert(0, str(HERE.parent))  # tests.vllm.engine, tests.serve.live

ROWS, NEW = 16, 32
PROCESSOR = "demur.serve.vllm_processor:RefusalTokens"
ENGINE = {"dtype": "float32", "max_model_len": 512, "block_size": 32, "enforce_eager": True, "max_num_seqs": 16,
          "disable_log_stats": True, "enable_prefix_caching": False}  # fmt: skip
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
         "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # fmt: skip


def cpu_seconds() -> float:
    """CPU time of this process and of its children, live ones included (the engine may run in one)."""
    import psutil

    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def one_run(folder: str, with_processor: bool, repeats: int) -> dict[str, Any]:
    """Load, warm up, time `repeats` batches of fixed length; the least of each, since other work only adds."""
    from tests.vllm.engine import prompts

    from demur.runtime.chat import ChatFormat
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, logits_processors=[PROCESSOR] if with_processor else None, **ENGINE)
    chat = ChatFormat(llm.get_tokenizer())
    rows = [{"prompt_token_ids": chat.render(p).ids} for p in prompts(ROWS)]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    llm.generate(rows[:16], params, use_tqdm=False)
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), cpu_seconds()
        out = llm.generate(rows, params, use_tqdm=False)
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
        assert all(len(o.outputs[0].token_ids) == NEW for o in out)
    opened = sum(o.outputs[0].token_ids[0] >= 49152 for o in out)
    return {"wall": min(walls), "cpu": min(cpus), "control": opened}


def processor(folder: Path, pairs: int, repeats: int) -> dict[str, Any]:
    """Alternating runs until enough pairs had a core of their own."""
    runs: list[dict[str, dict[str, Any]]] = []
    while len(alone(runs)) < pairs and len(runs) < 3 * pairs:
        pair = {}
        for side in ("with", "without") if len(runs) % 2 else ("without", "with"):
            done = subprocess.run(
                [sys.executable, __file__, "one", str(folder), side, str(repeats)],
                env={**os.environ, **QUIET}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            pair[side] = json.loads(done.stdout.strip().splitlines()[-1])
            print(side, pair[side], flush=True)
        runs.append(pair)
    return summary(runs, repeats)


def alone(runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Pairs in which both runs got a processor when they wanted one: wall time at most 1.5 times CPU time."""
    return [pair for pair in runs if all(run["wall"] <= 1.5 * run["cpu"] for run in pair.values())]


def summary(runs: list[dict[str, dict[str, Any]]], repeats: int) -> dict[str, Any]:
    """Ratios of throughput with the processor to throughput without."""
    used = alone(runs)
    out: dict[str, Any] = {"pairs": len(used), "pairs_without_a_core": len(runs) - len(used), "rows": ROWS}
    out |= {"new_tokens": NEW, "batches_a_run": repeats, "runs": runs}
    for kind in ("wall", "cpu"):
        out[f"{kind}_ratio"] = interval([pair["without"][kind] / pair["with"][kind] for pair in used])
    out["tokens_per_second_without"] = ROWS * NEW / statistics.median(p["without"]["wall"] for p in used)
    return out


def interval(ratios: list[float]) -> dict[str, Any]:
    """Geometric mean with a t interval over pairs."""
    from scipy import stats

    logs = [__import__("math").log(r) for r in ratios]
    mean, half = (
        statistics.fmean(logs),
        float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / len(logs) ** 0.5,
    )
    low, middle, high = (float(2.718281828459045**x) for x in (mean - half, mean, mean + half))
    return {"mean": middle, "low": low, "high": high, "median": statistics.median(ratios), "each": ratios}


# --- the gateway -------------------------------------------------------------------------------------------------


async def first_text(client: Any, url: str, messages: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds to the first piece of text, and seconds between two pieces behind it."""
    body = {
        "model": "demur",
        "messages": messages,
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    begin, at = time.perf_counter(), []
    async with client.stream("POST", f"{url}/chat/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:]).get("choices") or [{}]
                if (choices[0].get("delta") or {}).get("content"):
                    at.append(time.perf_counter())
    steps = [b - a for a, b in pairwise(at)]
    return at[0] - begin, statistics.median(steps) if steps else float("nan")


async def asked_in_turn(direct: str, through: str, rounds: int) -> dict[str, Any]:
    import httpx
    from tests.vllm.engine import messages, prompts

    rows: list[dict[str, float]] = []
    async with httpx.AsyncClient(timeout=120) as client:
        for n, prompt in enumerate(prompts(rounds + 3)):
            asked: list[tuple[str, str]] = [("direct", direct), ("gateway", through)]
            row: dict[str, float] = {}
            for k, (name, url) in enumerate(asked if n % 2 else asked[::-1]):
                # another first word each time: neither side finds the other's prefix warm
                said = messages(prompt)
                said[-1]["content"] = f"({n}{'ab'[k]}) {said[-1]['content']}"
                row[name], row[f"{name} step"] = await first_text(client, url, said)
            if n >= 3:
                rows.append(row)
    added = [r["gateway"] - r["direct"] for r in rows]
    step = statistics.median(r["direct step"] for r in rows if r["direct step"] == r["direct step"])
    return {
        "rounds": len(rows),
        "first_text_direct_ms": 1e3 * statistics.median(r["direct"] for r in rows),
        "first_text_gateway_ms": 1e3 * statistics.median(r["gateway"] for r in rows),
        "added_ms_median": 1e3 * statistics.median(added),
        "added_ms_quartiles": [1e3 * q for q in statistics.quantiles(added, n=4)],
        "decode_step_ms": 1e3 * step,
        "allowed_ms": 1e3 * step + 10,
    }


def gateway(folder: Path, rounds: int) -> dict[str, Any]:
    """One vLLM server, asked directly and through the gateway."""
    from tests.serve.live import served
    from tests.vllm.engine import serving

    from demur.serve.app import create_app
    from demur.serve.remote import RemoteUpstream
    from demur.serve.settings import Engine, Settings

    with serving(folder) as url:
        engine = Engine(url=url, model="demur", tokenizer=folder)
        settings = Settings(operating_point=folder / "operating_point.yaml", upstream=engine)
        with served(create_app(settings, RemoteUpstream.of(engine))) as address:
            return asyncio.run(asked_in_turn(url, f"{address}/v1", rounds))


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        _, _, folder, side, repeats = sys.argv
        print(json.dumps(one_run(folder, side == "with", int(repeats))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["processor", "gateway"])
    parser.add_argument("--model", type=Path, help="a merged export; default: made anew")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = args.model.resolve() if args.model else export()
    found = (
        processor(folder, args.pairs, args.repeats)
        if args.what == "processor"
        else gateway(folder, args.rounds)
    )
    stored = json.loads(args.out.read_text()) if args.out.is_file() else {}
    stored[args.what] = {**found, "machine": machine()}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "runs"}, indent=1))


def export() -> Path:
    """The embedded model as one checkpoint, in a temporary folder that stays for later runs."""
    import tempfile

    from demur import models
    from demur.flows import weights
    from demur.flows.load import load_runtime

    out = Path(tempfile.gettempdir()) / "demur-bench-merged"
    if not out.exists():
        runtime: Any = load_runtime("demur-smollm2")
        weights.merged(runtime, out, source=models.resolve("demur-smollm2").path)
    return out


def machine() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    load = os.getloadavg()
    return {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(),
            "load_average_at_end": [round(x, 1) for x in load], "vllm-cpu": version("vllm-cpu"),
            "torch": version("torch"), "note": "shared with other work while this ran"}  # fmt: skip


if __name__ == "__main__":
    main()
