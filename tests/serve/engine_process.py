"""The engine double in a process of its own, to be killed: python -m tests.serve.engine_process PORT."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

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


def main() -> None:
    import uvicorn

    from tests.serve.double import Engine

    engine: Any = Engine()
    engine.slow = 1  # streams take 50 ms a token
    uvicorn.run(engine.app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", ws="none")


if __name__ == "__main__":
    main()
