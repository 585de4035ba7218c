"""`demur serve` under eight clients that ask short, long, streamed and abandoned requests at once.

The server is the real command in a process of its own on loopback, with an API key and an operating-point file that
is rewritten while it runs. Counted are requests that were lost (no whole answer), mixed up (the probabilities or
the answer of another prompt), or failed, and the growth of the server's memory. Every prompt is asked once alone
at first; greedy answers under load must be those, up to rounding: batches sum in another order, so a near tie may
fall the other way, and `rounded` counts answers that leave the expected text after a common beginning.

Run: python bench/soak.py --minutes 30        (prints JSON; exit 1 when something was lost, mixed up or failed)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from demur.files import dump_operating_point
from demur.types import OperatingPoint, Threshold

KEY = "soak-key-0123456789abcdef"
PLACES = (
    "Bergen",
    "Cairo",
    "Lima",
    "Kyoto",
    "Nairobi",
    "Oslo",
    "Perth",
    "Quito",
    "Riga",
    "Seoul",
    "Tunis",
    "Vienna",
)
DISHES = [(f"Name one dish that people eat in {p}.", 12) for p in PLACES[:8]]
STORIES = [(f"Tell me a long story about a locksmith in {p}.", 96) for p in PLACES[8:]]
PROMPTS = [*DISHES, *STORIES]
"""(request, tokens) pairs."""
KINDS = {"short": 30, "long": 15, "streamed": 25, "left": 12, "abandoned": 8, "sampled": 5, "wrong": 5}
"""How often each kind is drawn. left: closes a stream in the middle; abandoned: closes before any answer."""
SAME = 1e-3
"""Probabilities of one prompt in two batches differ by less; of two prompts of ours, by more."""


@dataclass
class Tally:
    asked: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    points: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def fault(self, what: str, note: str) -> None:
        self.bad[what] += 1
        if len(self.notes) < 20:
            self.notes.append(f"{what}: {note}"[:300])


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str | None
    told: dict[str, Any]
    tokens: int


def body(k: int, **more: Any) -> dict[str, Any]:
    text, n = PROMPTS[k]
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL["name"], "messages": messages, "max_tokens": n, "temperature": 0, **more}


MODEL = {"name": ""}


async def whole(c: httpx.AsyncClient, asked: dict[str, Any], id: str) -> Answer:
    r = await c.post("/v1/chat/completions", json=asked, headers={"x-request-id": id})
    r.raise_for_status()
    if r.headers.get("x-request-id") != id:
        raise AssertionError("another request's id came back")
    d = r.json()
    choice = d["choices"][0]
    return Answer(
        choice["message"]["content"], choice["finish_reason"], d["demur"], d["usage"]["completion_tokens"]
    )


async def streamed(
    c: httpx.AsyncClient, asked: dict[str, Any], id: str, leave: int | None = None
) -> Answer | None:
    """The answer of a stream; None where it was left after `leave` events."""
    asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    text, finish, told, tokens, seen, done = "", None, {}, 0, 0, False
    async with c.stream("POST", "/v1/chat/completions", json=asked, headers={"x-request-id": id}) as r:
        r.raise_for_status()
        async for line in r.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            event = json.loads(line[6:])
            told = event.get("demur") or told
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", []):
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
            seen += 1
            if leave is not None and seen >= leave:
                return None
    if not done:
        raise AssertionError("the stream ended without [DONE]")
    return Answer(text, finish, told, tokens)


def compare(tally: Tally, k: int, got: Answer, alone: list[Answer]) -> None:
    want = alone[k]
    p, q = got.told["probabilities"], want.told["probabilities"]
    if any(abs(p[c] - q[c]) > SAME for c in q):
        tally.fault("mixed", f"{PROMPTS[k][0]!r} came back with other probabilities")
    elif got.text != want.text:
        others = [a.text for j, a in enumerate(alone) if j != k]
        if got.text in others or got.text[:1] != want.text[:1]:
            tally.fault("mixed", f"{PROMPTS[k][0]!r}: {got.text[:80]!r} instead of {want.text[:80]!r}")
        else:
            tally.bad["rounded"] += 1
    if got.finish not in ("stop", "length", "content_filter"):
        tally.fault("lost", f"finish {got.finish!r}")


async def one(c: httpx.AsyncClient, rng: random.Random, tally: Tally, alone: list[Answer], id: str) -> None:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    first, last = {"short": (0, 8), "wrong": (0, 8), "long": (8, 12)}.get(kind, (0, 12))
    k = rng.randrange(first, last)
    tally.asked[kind] += 1
    begun = time.monotonic()
    got: Answer | None = None
    try:
        if kind in ("short", "long"):
            got = await whole(c, body(k), id)
        elif kind == "streamed":
            got = await streamed(c, body(k), id)
        elif kind == "left":
            got = await streamed(c, body(k), id, leave=rng.randint(1, 12))
        elif kind == "sampled":
            await whole(c, body(k, temperature=1.0, seed=rng.randrange(10**6)), id)
        elif kind == "wrong":
            r = await c.post(
                "/v1/chat/completions", json=body(k, messages=[{"role": "nobody", "content": "x"}])
            )
            if r.status_code != 400:
                tally.fault("failed", f"a wrong request got {r.status_code}")
        else:
            try:
                async with asyncio.timeout(rng.uniform(0.01, 1.0)):
                    await whole(c, body(k), id)
            except TimeoutError:
                return
    except (httpx.HTTPError, AssertionError, KeyError, ValueError) as e:
        tally.fault("lost", f"{kind}: {type(e).__name__}: {e}")
        return
    if got is not None:
        compare(tally, k, got, alone)
        tally.tokens += got.tokens
        tally.points[got.told["operating_point"]] += 1
        tally.seconds.setdefault(kind, []).append(time.monotonic() - begun)


async def load(address: str, tally: Tally, alone: list[Answer], until: float, clients: int) -> None:
    async def client(number: int) -> None:
        rng, n = random.Random(number), 0
        async with httpx.AsyncClient(base_url=address, headers=AUTH, timeout=300) as c:
            while time.monotonic() < until:
                n += 1
                await one(c, rng, tally, alone, f"soak-{number}-{n}")

    await asyncio.gather(*(client(n) for n in range(clients)))


AUTH = {"Authorization": f"Bearer {KEY}"}


async def beside(pid: int, point: Path, tally: Tally, until: float, begun: float) -> None:
    """Measure memory and rewrite the operating point: same thresholds, another id, now and then rubbish."""
    process, n = psutil.Process(pid), 0
    while time.monotonic() < until:
        await asyncio.sleep(5)
        n += 1
        tally.memory.append((time.monotonic() - begun, process.memory_info().rss / 2**20))
        if n % 7 == 3:
            point.write_text("thresholds: [")
        elif n % 3 == 0:
            write_point(point, f"soak-{n % 2}")


def write_point(path: Path, id: str) -> None:
    thresholds = {"safety": Threshold(tau=0.5), "humanizing": Threshold(tau=0.5)}
    dump_operating_point(OperatingPoint(id=id, thresholds=thresholds), path)


def growth(memory: list[tuple[float, float]]) -> dict[str, Any]:
    """Slope over the last two thirds (MB an hour) with its 95 % interval, from means of 30 s."""
    if len(memory) < 12:
        return {"samples": len(memory)}
    t, mb = np.array(memory).T
    kept = t >= t[-1] / 3
    blocks = np.array(
        [[t[kept][i : i + 6].mean(), mb[kept][i : i + 6].mean()] for i in range(0, kept.sum() - 5, 6)]
    )
    out = {"start_mb": mb[0], "end_mb": mb[-1], "most_mb": mb.max(), "samples": len(memory)}
    if len(blocks) >= 4:
        from scipy import stats

        fit = stats.linregress(blocks[:, 0] / 3600, blocks[:, 1])
        half = stats.t.ppf(0.975, len(blocks) - 2) * fit.stderr
        out["mb_an_hour"] = [fit.slope, fit.slope - half, fit.slope + half]
    return {k: np.round(v, 1).tolist() for k, v in out.items()}


def start(folder: Path, model: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    (folder / "keys").write_text(KEY)
    settings = {"limits": {"concurrency": 16, "queue": 64, "timeout_s": 280}}
    (folder / "serve.json").write_text(json.dumps(settings))
    command = [
        *(sys.executable, "-m", "demur.cli", "serve", model, "--settings", str(folder / "serve.json")),
        *("--operating-point", str(folder / "point.yaml"), "--keys-file", str(folder / "keys")),
        *("--allow-refusal-lowering", "--port", str(port)),
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit((folder / "log").read_text()[-2000:])
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return server, address
        except httpx.HTTPError:
            time.sleep(0.5)
    server.kill()
    raise SystemExit("the server did not start within 180 s")


async def asked_alone(address: str) -> list[Answer]:
    async with httpx.AsyncClient(base_url=address, headers=AUTH, timeout=300) as c:
        MODEL["name"] = (await c.get("/v1/models")).json()["data"][0]["id"]
        return [await whole(c, body(k), f"alone-{k}") for k in range(len(PROMPTS))]


async def soak(
    address: str, pid: int, point: Path, minutes: float, clients: int
) -> tuple[Tally, bool, dict[str, float]]:
    alone = await asked_alone(address)
    rows = [tuple(a.told["probabilities"].values()) for a in alone]
    least = min(
        max(abs(x - y) for x, y in zip(a, b, strict=True)) for i, a in enumerate(rows) for b in rows[:i]
    )
    if least < 2 * SAME or len({a.text for a in alone}) < len(alone):
        raise SystemExit("two prompts cannot be told apart by their answers; choose others")
    tally, begun = Tally(), time.monotonic()
    until = begun + 60 * minutes
    await asyncio.gather(load(address, tally, alone, until, clients), beside(pid, point, tally, until, begun))
    again = await asked_alone(address)
    same = all(a.text == b.text for a, b in zip(alone, again, strict=True))
    metrics = httpx.get(f"{address}/metrics", headers=AUTH).text
    counts = {
        m.split('"')[1]: float(m.split()[-1])
        for m in metrics.splitlines()
        if m.startswith("demur_failures_total{")
    }
    return tally, same, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="demur-smollm2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        write_point(folder / "point.yaml", "soak-0")
        server, address = start(folder, args.model)
        try:
            run = soak(address, server.pid, folder / "point.yaml", args.minutes, args.clients)
            tally, same, counts = asyncio.run(run)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        log = (folder / "log").read_text(errors="replace")
    faults = {k: tally.bad[k] for k in ("lost", "mixed", "failed")}
    faults["internal"] = int(counts["internal"])
    faults["upstream"] = int(counts["upstream"])
    out = {
        "minutes": args.minutes,
        "clients": args.clients,
        "model": MODEL["name"],
        "requests": sum(tally.asked.values()),
        "by_kind": dict(tally.asked),
        **faults,
        "rounded": tally.bad["rounded"],
        "same_alone_afterwards": same,
        "tokens_per_s": round(tally.tokens / (60 * args.minutes), 1),
        "seconds": {
            k: [round(float(np.quantile(v, q)), 2) for q in (0.5, 0.95)] for k, v in tally.seconds.items()
        },
        "operating_points": dict(tally.points),
        "memory": growth(tally.memory),
        "memory_mb_by_minute": [round(mb) for _, mb in tally.memory[::12]],
        "server_failures": counts,
        "exit_code": code,
        "tracebacks": log.count("Traceback"),
        "notes": tally.notes,
    }
    print(json.dumps(out, indent=1))
    sys.exit(1 if any(faults.values()) or not same or out["tracebacks"] else 0)


if __name__ == "__main__":
    main()
