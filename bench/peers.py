"""Time hidden-state extraction against other libraries, each in a process of its own, on the same weights.

    python bench/peers.py --check          # every side on 20 prompts: do the states agree? (minutes)
    python bench/peers.py                  # check, then time; wants a machine with nothing else to do (hours)

Sides take turns. Every timing runs a whole process twice, on a few prompts and on n more; the difference is what
the n prompts cost, without imports, loading and warming up. States are compared first on 20 prompts, vector by
vector, and again as means in every timed run; a side that differs is listed with the reason and not timed. The
libraries live in `.venv-peers`, laid over the calling environment (same torch, same transformers).
`peer_sides.py` holds the sides.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_runtime import WORDS
from peer_sides import SIDES, TAIL

REPO = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "peers.json"
PEERS = ("repeng==0.4.0", "steering-vectors==0.12.2", "nnsight==0.8.1", "transformer-lens==4.3.0")
THEIR_NEEDS = (
    *("einops==0.8.2", "jaxtyping==0.3.11", "beartype==0.23.1", "fancy-einsum==0.0.3", "typeguard==4.6.0"),
    *(
        "wadler-lindig==0.1.8",
        "greenlet==3.5.6",
        "websocket-client==1.9.2",
        "zstandard==0.25.0",
        "gguf==0.19.0",
    ),
    *("protobuf==7.36.2", "sentencepiece==0.2.3", "cloudpickle==3.1.2"),
)
DEMUR, STOCK, LOOP, ONE = (
    "demur",
    "demur, PyTorch's own kernels",
    "transformers, batch 32",
    "transformers, batch 1, no logits",
)
NNSIGHT, LENS = (
    [f"{name}, batch 16{best}" for best in ("", ", sorted, stopped")]
    for name in ("nnsight", "TransformerBridge")
)
SAME = 1e-4
"""How far a state may be from the reference, as a share of its length."""

Workload = dict[str, Any]


def words(n: int, mean: float, spread: float, most: int, seed: int) -> list[str]:
    """Texts whose word counts are log-normal, about one token a word."""
    rng = random.Random(seed)
    mu = np.log(mean) - spread**2 / 2
    sizes = [min(most, max(3, int(rng.lognormvariate(mu, spread)))) for _ in range(n)]
    return [" ".join(rng.choices(WORDS, k=k)) for k in sizes]


def workloads(middle: int) -> dict[str, Workload]:
    """What is timed: texts, how many of them, which layers, which sides."""
    system = "You are the assistant of a small library. " + words(1, 378, 0, 378, 7)[0]
    mixed = words(540, 80, 1.0, 460, 0)
    return {
        "mixed": {
            "what": "mixed lengths, all layers",
            "texts": mixed,
            "n": 500,
            "layers": None,
            "sides": list(SIDES),
        },
        "middle": {
            "what": "mixed lengths, one middle layer",
            "texts": mixed,
            "n": 250,
            "layers": [middle],
            "sides": [DEMUR, STOCK, LOOP, *NNSIGHT, *LENS],
        },
        "shared": {
            "what": "short prompts behind one long system prompt, all layers",
            "texts": words(256, 45, 0.5, 150, 1),
            "system": system,
            "n": 120,
            "layers": None,
            "sides": [DEMUR, STOCK, LOOP, ONE, "refusal_direction-style loop, batch 32", NNSIGHT[1], LENS[1]],
        },
        "short": {
            "what": "short prompts of like length, all layers",
            "texts": words(256, 45, 0.2, 80, 2),
            "n": 120,
            "layers": None,
            "sides": [DEMUR, STOCK, LOOP, ONE, NNSIGHT[1], LENS[1]],
        },
    }


def write_work(work: Workload, chat: Any, path: Path) -> dict[str, float]:
    """Write the prompts of a workload as every side reads them; returns what their lengths are."""
    from demur.types import Prompt

    rows = []
    for i, text in enumerate(work["texts"]):
        prompt = Prompt.of(text, id=str(i), system=work.get("system"))
        ids = chat.render(prompt).ids
        written = chat.tokenizer.decode(ids)
        assert chat.tokenizer(written)["input_ids"] == ids, "the text does not give the same tokens again"
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        rows.append({"messages": messages, "ids": ids, "text": written})
    path.write_text(json.dumps(rows), encoding="utf-8")
    sizes = [len(r["ids"]) for r in rows]
    return {"mean": round(statistics.mean(sizes), 1), "median": statistics.median(sizes), "max": max(sizes)}


def environment() -> tuple[str, dict[str, str]]:
    """The peers' Python, made once, and why a peer could not be installed."""
    venv = REPO / ".venv-peers"
    python, done = venv / "bin" / "python", venv / "missing.json"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = subprocess.check_output(ask, text=True).strip()
        (Path(own) / "underlay.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # without dependencies: their bounds (numpy<2, transformers<5) are older than what they run with
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *THEIR_NEEDS], check=True)
        missing = {}
        for peer in PEERS:
            try:
                subprocess.run([*pip, peer], check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError as e:
                missing[peer.split("==")[0]] = (e.stderr.strip() or "pip failed").splitlines()[-1]
        done.write_text(json.dumps(missing))
    return str(python), json.loads(done.read_text())


class Runner:
    """Runs sides as processes over the workload files of one folder."""

    def __init__(self, python: str, model: str, folder: Path, threads: int) -> None:
        self.python, self.model, self.folder = python, model, folder
        self.env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": str(REPO / "src"),
        }
        self.versions: dict[str, str] = {}

    def run(self, side: str, name: str, work: Workload, n: int, keep: bool = False) -> dict[str, Any]:
        """One process: wall and processor seconds, peak memory, and the states it left (or the error)."""
        out = self.folder / "out.npz"
        command = [self.python, str(Path(__file__).with_name("peer_sides.py")), side, "--model", self.model]
        command += ["--work", str(self.folder / f"{name}.json"), "--out", str(out), "--n", str(n)]
        command += ["--layers", *map(str, work["layers"])] if work["layers"] else []
        command += ["--keep"] if keep else []
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
            start = time.perf_counter()
            process = subprocess.Popen(command, env=self.env, stdout=said, stderr=errors)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            said.seek(0)
            errors.seek(0)
            if status:
                return {"error": errors.read().decode(errors="replace").strip().splitlines()[-1][:300]}
            self.versions = json.loads(said.read())
        with np.load(out) as arrays:
            states = dict(arrays)
        cpu = used.ru_utime + used.ru_stime
        return {"wall": seconds, "cpu": cpu, "peak_mb": used.ru_maxrss / 1024, "states": states}


def gap(side: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest distance of two states of one prompt (or of the means), as a share of the state's length."""
    both = [key for key in ("rows", "mean") if key in side and key in reference]
    layers = [k for k in side["layers"] if k in reference["layers"]]
    places = [p for p in side["positions"] if p in reference["positions"]]

    def taken(of: dict[str, Any], key: str) -> Any:
        at = [
            [list(of[what]).index(x) for x in of_both]
            for what, of_both in (("layers", layers), ("positions", places))
        ]
        return of[key][..., at[0], :, :][..., at[1], :].astype(float)

    worst = 0.0
    for key in both:
        a, b = taken(side, key), taken(reference, key)
        worst = max(worst, float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max()))
    return worst


def check(
    runner: Runner, sides: list[str], name: str, work: Workload, n: int = 20
) -> tuple[dict[str, float], dict[str, str]]:
    """Gap of each side to one prompt at a time, and why a side drops out."""
    reference = runner.run(ONE, name, {**work, "layers": None}, n, keep=True)
    if "error" in reference:
        raise SystemExit(f"the reference does not run: {reference['error']}")
    gaps, out = {}, {}
    for side in sides:
        found = runner.run(side, name, {**work, "layers": None}, n, keep=True)
        if "error" in found:
            out[side] = found["error"]
        elif not (far := gap(found["states"], reference["states"])) <= SAME:
            out[side] = f"its states differ from those of one prompt at a time by {far:.1e} of their length"
        else:
            gaps[side] = far
        print(f"  {side:46s} {out.get(side) or f'{gaps[side]:.1e}'}", flush=True)
    return gaps, out


def time_sides(
    runner: Runner, sides: list[str], name: str, work: Workload, n: int, repeats: int
) -> list[dict[str, Any]]:
    """Median seconds of n prompts for each side; the order of sides turns round from repeat to repeat."""
    few = max(4, 2 * (n // 32))
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    dropped: dict[str, str] = {}
    for repeat in range(repeats):
        means = {}
        for side in sides if repeat % 2 == 0 else sides[::-1]:
            small, large = (runner.run(side, name, work, size) for size in (few, few + n))
            if bad := small.get("error") or large.get("error"):
                dropped[side] = bad
                continue
            means[side] = large["states"]
            runs[side].append(
                {key: large[key] - small[key] for key in ("wall", "cpu")} | {"peak_mb": large["peak_mb"]}
            )
            print(f"  {repeat + 1}/{repeats} {side:46s} {runs[side][-1]['wall']:8.2f} s", flush=True)
        for side, states in means.items():
            if not gap(states, means[DEMUR]) <= SAME:
                dropped[side] = "its states differed in a timed run"
    own = statistics.median(r["wall"] for r in runs[DEMUR])
    stock = statistics.median(r["wall"] for r in runs[STOCK])
    rows = []
    for side in sides:
        if side in dropped:
            rows.append({"side": side, "why_not": dropped[side]})
            continue
        wall = [r["wall"] for r in runs[side]]
        middle = statistics.median(wall)
        rows.append(
            {
                "side": side,
                "seconds": round(middle, 3),
                "range": [round(min(wall), 3), round(max(wall), 3)],
                "cpu_seconds": round(statistics.median(r["cpu"] for r in runs[side]), 3),
                "ratio": round(middle / own, 3),
                "ratio_to_stock": round(middle / stock, 3),
                "peak_mb": round(max(r["peak_mb"] for r in runs[side])),
            }
        )
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def show(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = []
    for found in results.values():
        size, how = found["tokens"], found["setting"]
        lines += [
            f"**{found['what'].capitalize()}**: {found['n']} prompts of {size['mean']} tokens on average (median "
            f"{size['median']:g}, longest {size['max']}), {how['threads']} threads, {how['repeats']} repeats. "
            f"Peak memory of demur with half the prompts: {found['demur_peak_mb_half']} MB.\n",
            "| side | seconds, median (range) | times demur | times demur, PyTorch's kernels | peak MB |",
            "|---|---|---|---|---|",
        ]
        for r in found["rows"]:
            if "why_not" in r:
                lines.append(f"| {r['side']} | not timed: {r['why_not']} | | | |")
            else:
                low, high = r["range"]
                lines.append(
                    f"| {r['side']} | {r['seconds']:.1f} ({low:.1f} to {high:.1f}) | {r['ratio']:.2f} | "
                    f"{r['ratio_to_stock']:.2f} | {r['peak_mb']} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder of weights; SmolLM2 by default")
    parser.add_argument("--show", action="store_true", help="print the stored results as tables")
    parser.add_argument("--check", action="store_true", help="compare states, time nothing")
    parser.add_argument("--workloads", nargs="*", default=["mixed", "middle", "shared", "short"])
    parser.add_argument("--sides", nargs="*", help="only these (and demur)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts, for a trial")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.show:
        print(show(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    sys.path.insert(0, str(REPO / "src"))
    from transformers import AutoTokenizer

    from demur import models
    from demur.runtime.chat import ChatFormat

    model = args.model or str(models.resolve("smollm2").path)
    layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    python, missing = environment()
    chat = ChatFormat(AutoTokenizer.from_pretrained(model))
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(python, model, Path(folder), args.threads)
        works = {name: w for name, w in workloads(layers // 2).items() if name in args.workloads}
        tokens = {name: write_work(w, chat, Path(folder) / f"{name}.json") for name, w in works.items()}
        sides = [s for s in SIDES if not args.sides or s in {DEMUR, STOCK, *args.sides}]
        first = next(iter(works))
        print(f"States of 20 prompts, distance from one prompt at a time (limit {SAME}):", flush=True)
        gaps, out = check(runner, sides, first, works[first])
        if args.check:
            return
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
        for name, work in works.items():
            n = max(4, 2 * int(work["n"] * args.scale / 2))
            mine = [s for s in work["sides"] if s in gaps]
            setting = {
                "model": Path(model).name if args.model else "smollm2",
                "processor": processor(),
                "threads": args.threads,
                "load_before": [round(x, 2) for x in os.getloadavg()],
                "positions": TAIL,
                "repeats": args.repeats,
                "versions": runner.versions,
            }
            print(f"{work['what']}, {n} prompts:", flush=True)
            rows = time_sides(runner, mine, name, work, n, args.repeats)
            rows += [{"side": s, "why_not": out[s]} for s in work["sides"] if s in out]
            # memory with half the prompts: more than one window of the batch plan where n is 500
            half = runner.run(DEMUR, name, work, n // 2 + 10)["peak_mb"]
            results[name] = {
                "what": work["what"],
                "n": n,
                "tokens": tokens[name],
                "rows": rows,
                "demur_peak_mb_half": round(half),
                "gaps_20": gaps,
                "not_installed": missing,
                "setting": setting,
            }
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n" + show(results))


if __name__ == "__main__":
    main()
