"""A real uvicorn on loopback in a thread of the test, and small things to talk to it with."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from demur.serve.limits import head_timed


@contextlib.contextmanager
def served(app: Any, *, head_s: float = 10.0, connections: int = 1000, **options: Any) -> Iterator[str]:
    """Serve an ASGI application; yields its address. Leaving waits for a graceful end."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=head_timed(head_s, connections),
        lifespan=options.pop("lifespan", "auto"),
        log_level="critical",
        timeout_graceful_shutdown=5,
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def wait_for(true: Any, seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def raw(address: str, *parts: bytes, pause: float = 0.0, timeout: float = 10.0) -> bytes:
    """Send bytes as they are, `pause` seconds between the parts; what comes back until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as s:
        got = b""
        with contextlib.suppress(ConnectionError):
            for k, part in enumerate(parts):
                if k and select.select([s], [], [], pause)[0]:
                    break  # answered before all was sent
                s.sendall(part)
            while chunk := s.recv(65536):
                got += chunk
        return got
