"""A small engine in a process of its own, to be killed: python -m tests.serve.engine_process PORT."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.serve.live import wait_for

ROOT = Path(__file__).parents[2]


class EngineProcess:
    """Starts, kills and starts again on one port."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, sys.path)])
        env = {**os.environ, "PYTHONPATH": paths}
        command = [sys.executable, "-m", "tests.serve.engine_process", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env)
        wait_for(self._up, 60)

    def kill(self) -> None:
        """As the kernel would: no goodbye."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def _up(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "the engine has ended"
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/models", timeout=1).status_code == 200
        return False


class Scripted:
    """An engine of few words that starts at once: the same probabilities and words for every prompt."""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tuned"}]})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(self.words(body), media_type="text/event-stream")
        top = {f"token_id:{i}": -2.0 - k for k, i in enumerate(body["logprob_token_ids"])}
        first = next(iter(top))
        told = {"tokens": [first], "token_logprobs": [top[first]], "top_logprobs": [top]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": told}
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}})

    async def words(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for k in range(body["max_tokens"]):
            await asyncio.sleep(0.02)
            yield _event({"choices": [{"index": 0, "text": f" {k}", "finish_reason": None}]})
        yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        yield _event({"choices": [], "usage": counts}) + "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


if __name__ == "__main__":
    uvicorn.run(Scripted().app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", ws="none")
