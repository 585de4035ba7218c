"""A vLLM server as a process of its own, the prompts of these tests, and what the local runtime decides on them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from demur.control.refusal_tokens import RefusalTokens
from demur.flows.load import load_runtime
from demur.prompts import core
from demur.types import Prompt, Score

TIE = 1e-3
"""Two engines' float32 sums differ by less; a prompt this near its threshold may fall on either side."""
COMMON = ("--dtype", "float32", "--max-model-len", "1024", "--block-size", "32", "--enforce-eager",
          "--max-num-seqs", "16", "--max-logprobs", "32", "--served-model-name", "demur")  # fmt: skip
START_S = 400
In = TypeVar("In")
Out = TypeVar("Out")


@contextmanager
def serving(model: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """vLLM's server on loopback; yields the address of its API. The process group is gone afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    log = Path(os.environ.get("DEMUR_VLLM_LOG", os.devnull)).open("ab")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *COMMON,
         "--host", "127.0.0.1", "--port", str(port), *options],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **(env or {})},
    )  # fmt: skip
    try:
        _wait(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for sign, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        log.close()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, "vLLM ended; set DEMUR_VLLM_LOG=FILE to see why"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"vLLM was not ready within {START_S} s")


def prompts(n: int) -> list[Prompt]:
    """The first n of a fixed sample of the parts test and calibrate."""
    every = [*core("test"), *core("calibrate")]
    return random.Random(0).sample(every, 500)[:n]


@dataclass(frozen=True)
class Local:
    """Scores and decisions of the local runtime. A decision is None where the model's own choice stands."""

    prompts: list[Prompt]
    scores: list[Score]
    rule: RefusalTokens

    @classmethod
    def of(cls, n: int) -> Local:
        runtime = load_runtime("demur-smollm2")
        chosen = prompts(n)
        assert runtime.shipped_point is not None
        return cls(chosen, list(runtime.score(chosen)), RefusalTokens(runtime.shipped_point))

    def decision(self, n: int) -> str | None:
        """The control token that opens the answer: forced, or the model's own."""
        forced = self.rule(self.prompts[n], self.scores[n])
        return forced if forced is not None else self.scores[n].token

    def near(self, n: int) -> bool:
        """Whether rounding may decide: at a threshold, or between likeliest categories that decide otherwise."""
        p = {c: v for c, v in self.scores[n].probabilities.items() if c != "respond"}
        tau = {c: t.tau for c, t in self.rule.point.thresholds.items()}
        first = [c for c, v in p.items() if v > max(p.values()) - TIE]
        return len({c if p[c] >= tau[c] else None for c in first}) > 1 or any(
            abs(p[c] - tau[c]) < TIE for c in first
        )

    def compare(self, got: Sequence[str | None]) -> tuple[list[int], list[int]]:
        """Rows that differ, and those of them that are no ties."""
        differ = [n for n, d in enumerate(got) if d != self.decision(n)]
        return differ, [n for n in differ if not self.near(n)]


def together(
    jobs: Sequence[In], ask: Callable[[httpx.AsyncClient, In], Awaitable[Out]], width: int = 16
) -> list[Out]:
    """Ask with `width` requests in flight; answers in order."""

    async def run() -> list[Out]:
        gate = asyncio.Semaphore(width)
        async with httpx.AsyncClient(timeout=300) as client:

            async def one(job: In) -> Out:
                async with gate:
                    return await ask(client, job)

            return list(await asyncio.gather(*map(one, jobs)))

    return asyncio.run(run())


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in prompt.messages]
