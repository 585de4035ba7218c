"""Requests that are wrong, large, slow or without a key: an error in OpenAI's form, never a crash."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import InvalidArgument, Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.live import raw
from tests.serve.wired import AUTH, KEY, chat, failures, gateway

# --- requests that are wrong ------------------------------------------------------------------------------------

GOOD = json.dumps(chat("how do i boil an egg ?", n=2)).encode()
BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'"text"',
    b"{",
    GOOD[:-1],
    GOOD + b"}",
    b"\xef\xbb\xbf" + GOOD,
    GOOD.decode().encode("utf-16"),
    GOOD.replace(b"boil", b"\xff\xfe"),
    GOOD.replace(b"boil", b"\\ud800"),
    GOOD.replace(b"boil", b"\\udc00\\ud800"),
    GOOD.replace(b"boil", b"\\u0000"),
    GOOD.replace(b'"tiny-llama"', b'"\\ud800"'),
    GOOD.replace(b'"user"', b'"\\ud800"'),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": NaN'),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": 1e400'),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": -1'),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": 2.5'),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": ' + b"9" * 5000),
    GOOD.replace(b'"max_tokens": 2', b'"max_tokens": true'),
    GOOD.replace(b'"temperature": 0', b'"temperature": Infinity'),
    GOOD.replace(b'"temperature": 0', b'"temperature": 1e-400'),
    GOOD.replace(b'"temperature": 0', b'"temperature": 1e-45'),
    GOOD.replace(b'"temperature": 0', b'"temperature": 1, "top_p": 1e-300'),
    GOOD.replace(b'"temperature": 0', b'"seed": ' + b"9" * 400),
    GOOD.replace(b'"temperature": 0', b'"seed": -9223372036854775808'),
    GOOD.replace(b'"temperature": 0', b'"stop": ["", "a", "b", "c", "d", "e"]'),
    GOOD.replace(b'"temperature": 0', b'"stop": {"a": 1}'),
    GOOD.replace(b'"temperature": 0', b'"stop": "\\ud800"'),
    GOOD.replace(b'"temperature": 0', b'"n": 1000000'),
    GOOD.replace(b'"temperature": 0', b'"logprobs": true, "top_logprobs": 1000000'),
    GOOD.replace(b'"temperature": 0', b'"logit_bias": {"1": "x"}'),
    GOOD.replace(b'"temperature": 0', b'"demur": {"operating_point": "../../etc/passwd"}'),
    GOOD.replace(b'"temperature": 0', b'"demur": {"operating_point": null, "x": 1}'),
    GOOD.replace(b'"temperature": 0', b'"demur": []'),
    GOOD.replace(b'"temperature": 0', b'"stream_options": {"include_usage": "x"}'),
    GOOD.replace(b'"temperature": 0', b'"tools": [{"type": "function"}]'),
    GOOD.replace(b'"temperature": 0', b'"\\ud800": 1'),
    GOOD.replace(b"[{", b"[" * 100_000 + b"{"),
    GOOD.replace(
        b'"how do i boil an egg ?"', b'[{"type": "image_url", "image_url": {"url": "file:///etc"}}]'
    ),
    GOOD.replace(b'"how do i boil an egg ?"', b"[]"),
    GOOD.replace(b'"how do i boil an egg ?"', b"null"),
    GOOD.replace(b'"how do i boil an egg ?"', b'""'),
    GOOD.replace(b"egg", b"egg " * 20_000),
    GOOD.replace(b"egg", "".join(map(chr, range(0xFDD0, 0xFDF0))).encode()),
    json.dumps({"model": "tiny-llama", "messages": []}).encode(),
    json.dumps({"model": "tiny-llama", "messages": [{"role": "assistant", "content": "x"}]}).encode(),
    json.dumps({"model": "tiny-llama", "messages": [{"role": "tool", "content": "x"}]}).encode(),
    json.dumps({"model": "tiny-llama", "messages": [{"role": "user", "content": "a"}] * 500}).encode(),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    limits = {"body_bytes": 200_000, "header_s": 1.0, "timeout_s": 20.0}
    with gateway(tmp_path_factory.mktemp("g"), limits=limits) as pair:
        yield pair


@pytest.mark.parametrize("k", range(len(BODIES)))
def test_no_body_is_answered_with_a_crash(running: tuple[str, Any], k: int) -> None:
    address, app = running
    for stream in (b"false", b"true"):
        body = BODIES[k].replace(b'"max_tokens"', b'"stream": ' + stream + b', "max_tokens"')
        r = httpx.post(
            f"{address}/v1/chat/completions",
            content=body,
            headers={**AUTH, "content-type": "application/json"},
            timeout=30,
        )
        assert r.status_code in (200, 400, 403, 404, 413), (r.status_code, r.text[:300])
        if r.status_code != 200:
            error = r.json()["error"]
            assert error["message"] and error["type"] == (
                "permission_error" if r.status_code == 403 else "invalid_request_error"
            )
        elif b'"stream": true' in body:
            assert r.text.rstrip().endswith("data: [DONE]"), r.text[-300:]
    assert failures(app)["internal"] == failures(app)["upstream"] == 0


def test_wrong_media_types_methods_and_paths(running: tuple[str, Any]) -> None:
    address, app = running
    url = f"{address}/v1/chat/completions"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        r = httpx.post(url, content=GOOD, headers={**AUTH, "content-type": kind})
        assert r.status_code in (400, 415) and r.json()["error"]["message"], kind
    r = httpx.post(
        url, content=GOOD, headers={**AUTH, "content-type": "application/json", "content-encoding": "gzip"}
    )
    assert r.status_code in (200, 400, 415)
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        r = httpx.request(method, url, headers=AUTH)
        assert r.status_code in (404, 405), method
    for path in (
        "/v1/models/../../etc/passwd",
        "/static/../app.py",
        "/static/%2e%2e%2fapp.py",
        "/%00",
        "/v1",
    ):
        r = httpx.get(address + path, headers=AUTH)
        assert r.status_code in (400, 404), path
    assert failures(app)["internal"] == 0


def test_without_a_key_nothing_answers_but_health(running: tuple[str, Any]) -> None:
    address, app = running
    paths = (
        {getattr(r, "path", "/") for r in app.routes} | set(app.openapi()["paths"]) | {"/openapi.json", "/x"}
    )
    assert len(paths) >= 6
    with httpx.Client(base_url=address) as c:
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                for headers in ({}, {"Authorization": "Bearer wrong" + KEY}):
                    r = c.request(method, path.replace("{name}", "playground.js"), headers=headers)
                    assert (r.status_code == 401) == (path != "/health"), (method, path, r.status_code)


def test_slow_and_oversized_requests_hold_nobody_up(running: tuple[str, Any]) -> None:
    address, app = running
    where = address.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: application/json\r\n"
    ).encode()
    held = []
    for k in range(60):  # twice as many as may run and wait
        s = socket.create_connection((where[0], int(where[1])))
        s.sendall(head if k % 2 else head + b"content-length: 100\r\n\r\n{")
        held.append(s)
    start = time.monotonic()
    r = httpx.post(
        f"{address}/v1/chat/completions", content=GOOD, headers={**AUTH, "content-type": "application/json"}
    )
    assert r.status_code == 200 and time.monotonic() - start < 5
    for k, s in enumerate(held):
        s.settimeout(10)
        got = b""
        while chunk := s.recv(4096):
            got += chunk
        assert got == b"" if k % 2 else b" 408 " in got
        s.close()
    slow_body = [b"content-length: 100\r\n\r\n", *[b"x"] * 30]
    assert b" 408 " in raw(address, head, *slow_body, pause=0.1)
    assert b" 413 " in raw(address, head + b"content-length: 200001\r\n\r\n")
    chunked = head + b"transfer-encoding: chunked\r\n\r\n"
    assert b" 413 " in raw(address, chunked + (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 8)
    for broken in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x01\x02\r\n\r\n", head + b"content-length: x\r\n\r\n"):
        assert raw(address, broken).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 401"))
    assert failures(app)["internal"] == 0


# --- everything that the OpenAPI document allows, and more ------------------------------------------------------

CHECKS = [
    not_a_server_error,
    response_schema_conformance,
    content_type_conformance,
    status_code_conformance,
]


@pytest.mark.parametrize("examples", [20, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_document_describes_is_answered_as_it_says(
    running: tuple[str, Any], mode: GenerationMode, examples: int
) -> None:
    address, app = running
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=AUTH)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 5
    with requests.Session() as session:
        for operation in operations:
            few = examples if operation.method == "post" else 5

            @settings(max_examples=few, suppress_health_check=list(HealthCheck), deadline=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def each(case: Any) -> None:
                case.call_and_validate(headers=AUTH, timeout=30, checks=CHECKS, session=session)

            with suppress(Unsatisfiable, InvalidArgument):  # nothing about it can be wrong
                each()
    assert failures(app)["internal"] == failures(app)["upstream"] == 0
