"""HTTP to an engine: one call, one stream of events, and what goes wrong on the way in words of the gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from demur.errors import InputError, UpstreamError


class Wire:
    """A client of one engine.

    Args:
        url: up to and including the version. key: sent as a bearer token, never shown.
        timeout_s: seconds between two signs of life.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        parts = httpx.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise InputError(f"upstream {url!r}: give the full address, e.g. http://localhost:8000/v1")
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout_s
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def post(self, path: str, body: Mapping[str, Any], *, retry: bool = False) -> dict[str, Any]:
        """The JSON object that comes back; with `retry`, a lost connection is tried once more.

        Raises:
            InputError: the engine finds fault with the request (HTTP 400, 413, 422).
            UpstreamError: everything else.
        """
        try:
            r = await self._client.post(f"{self.url}/{path}", json=body)
        except httpx.TimeoutException:
            raise UpstreamError(f"the engine did not answer within {self._timeout:g} s") from None
        except httpx.TransportError as e:
            if retry:
                return await self.post(path, body)
            raise UpstreamError(f"no connection to the engine ({type(e).__name__})") from None
        self._check(r.status_code, r.content)
        try:
            data = r.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise UpstreamError("the engine's answer is no JSON object")
        return data

    @asynccontextmanager
    async def stream(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Server-sent events of one call; leaving the block closes the connection, which stops the engine."""
        try:
            async with self._client.stream("POST", f"{self.url}/{path}", json=body) as r:
                if r.status_code != 200:
                    self._check(r.status_code, await r.aread())
                yield _events(r)
        except httpx.TimeoutException:
            raise UpstreamError(f"the engine was silent for {self._timeout:g} s") from None
        except httpx.TransportError as e:
            raise UpstreamError(f"the engine's answer broke off ({type(e).__name__})") from None

    async def models(self) -> list[str]:
        """Names that the engine serves, within two seconds; none where it lists them in another form."""
        try:
            r = await self._client.get(f"{self.url}/models", timeout=2.0)
        except httpx.HTTPError as e:
            raise UpstreamError(f"the engine does not answer ({type(e).__name__})") from None
        if r.status_code != 200:
            raise UpstreamError(f"the engine answers HTTP {r.status_code} to GET /models")
        try:
            return [str(m["id"]) for m in r.json()["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _check(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        try:
            error = json.loads(content)
            error = error.get("error", error)
            said = str(error.get("message", "")) if isinstance(error, dict) else str(error)
        except (ValueError, AttributeError):
            said = ""
        said = (said.replace(self._key, "***") if self._key else said)[:300]
        if status in (400, 413, 422):
            raise InputError(f"the engine refused the request: {said or f'HTTP {status}'}")
        raise UpstreamError(f"the engine answered HTTP {status}")


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise UpstreamError("the engine streams something that is no JSON") from None
        if not isinstance(event, dict) or event.get("error"):
            raise UpstreamError("the engine reports an error inside its answer")
        yield event
