"""A small engine on loopback that speaks the parts of vLLM's interface that the gateway uses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from demur.runtime.forward import run as forward
from demur.runtime.local import LocalRuntime
from tests.runtime.tiny import tiny_model, tiny_runtime

CONTROL_TEXT = {"safety": "[refuse]", "respond": "[respond]"}


class Engine:
    """Completions over a tiny random model with control rows; greedy. `seen` holds the bodies that came in."""

    def __init__(self) -> None:
        self.tuned: LocalRuntime = tiny_runtime(control=True)
        self.base = LocalRuntime(tiny_model(), self.tuned.tokenizer, name="base")
        self.seen: list[dict[str, Any]] = []
        self.closed = self.slow = 0
        self.fail: Callable[[str, dict[str, Any]], Response | None] = lambda _path, _body: None
        self.lock = threading.Lock()

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tuned"}, {"id": "base"}]})

    def logits(self, model: str, ids: list[int], bias: dict[str, float]) -> torch.Tensor:
        runtime = self.tuned if model == "tuned" else self.base
        with self.lock, runtime.edited():
            out = forward(runtime.model, [ids])
        assert out is not None
        z = out[0].float().clone()
        if any(int(i) >= len(z) for i in bias):
            raise ValueError("logit_bias: no such token")
        for i, b in bias.items():
            z[int(i)] += b
        return z

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        if (failed := self.fail("completions", body)) is not None:
            return failed
        assert all(isinstance(i, int) for i in body["prompt"]), "token ids only"
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        z = self.logits(body["model"], body["prompt"], body.get("logit_bias") or {})
        p = z.log_softmax(-1)
        best = int(z.argmax())
        wanted = body.get("logprob_token_ids") or []
        assert not wanted or body["logprobs"] == len(wanted), "vLLM wants as many logprobs as ids"
        assert body["return_tokens_as_token_ids"], "ids without text all decode to nothing"
        top = {f"token_id:{i}": float(p[i]) for i in {*wanted, best}}
        told = {"tokens": [f"token_id:{best}"], "token_logprobs": [float(p[best])], "top_logprobs": [top]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": told}
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}})

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        ids, new, finish = list(body["prompt"]), 0, "length"
        try:
            while new < body["max_tokens"]:
                await asyncio.sleep(0.05 if self.slow else 0)
                z = self.logits(body["model"], ids, body.get("logit_bias") or {})
                ids.append(int(z.argmax()))
                new += 1
                if ids[-1] == self.tuned.tokenizer.eos_token_id:
                    finish = "stop"
                    break
                text = self.tuned.tokenizer.decode([ids[-1]], skip_special_tokens=True)
                text = f" {text}" if text and new > 1 else text
                yield event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            yield event({"choices": [{"index": 0, "text": "", "finish_reason": finish}]})
            counts = {"prompt_tokens": len(ids) - new, "completion_tokens": new}
            yield event({"choices": [], "usage": counts}) + "data: [DONE]\n\n"
        finally:
            self.closed += 1

    async def chat(self, request: Request) -> Response:
        """Scripted: control tokens with text, refused where a bomb is mentioned."""
        body = await request.json()
        self.seen.append(body)
        if (failed := self.fail("chat", body)) is not None:
            return failed
        bomb = any("bomb" in str(m["content"]) for m in body["messages"])
        if not body.get("stream"):
            top = [
                {"token": t, "logprob": lp}
                for t, lp in (("[refuse]", -0.1), (" [respond]", -2.5), ("I", -4.0))
            ]
            if not bomb:
                top[0]["logprob"], top[1]["logprob"] = -2.5, -0.1
            best = max(top, key=lambda t: t["logprob"])
            row = {**best, "top_logprobs": top[: body["top_logprobs"]]}
            message = {"role": "assistant", "content": best["token"]}
            return JSONResponse(
                {"choices": [{"message": message, "logprobs": {"content": [row]}, "finish_reason": "length"}]}
            )
        continued = body["messages"][-1]["role"] == "assistant"
        words = ["Sorry", ", no"] if bomb else ["Sure", ", here"]
        if body["model"] == "tuned" and not continued:
            words = [" [ref" if bomb else " [res", "use] " if bomb else "pond] ", *words]
        return StreamingResponse(self.said(words, body), media_type="text/event-stream")

    async def said(self, words: list[str], body: dict[str, Any]) -> AsyncIterator[str]:
        for word in words:
            yield event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        if body.get("tools"):
            for part in (
                {"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"a"'}},
                {"index": 0, "function": {"arguments": ": 1}"}},
            ):
                yield event({"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]})
        finish = "tool_calls" if body.get("tools") else "stop"
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        yield (
            event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}) + "data: [DONE]\n\n"
        )


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
