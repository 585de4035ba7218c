"""Measures a shard in a process of its own and kills that process (SIGKILL) amid a write.

Run as: python -m tests.flows.killed_measure OUT I/N COUNT, where the COUNT-th write is cut in half (0: none is).
"""

from __future__ import annotations

import os
import signal
import sys

from demur.flows.batchfiles import parse_shard
from demur.flows.measure import measure
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition
from tests.flows.synthetic import answer, prompt_set

CONDITIONS = (
    Condition(name="plain", temperature=0.7),
    Condition(name="brief", system="Be brief.", temperature=0.7),
)


def main(out: str, shard: str, count: int) -> None:
    write, left = os.write, [count]

    def dying_write(fd: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            write(fd, data[: len(data) // 2 + 7])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(fd, data)

    os.write = dying_write
    part = parse_shard(shard) if shard != "all" else None
    runtime = ScriptedRuntime(answer, name="m")
    measure(runtime, prompt_set(21), out, conditions=CONDITIONS, samples=2, shard=part, progress=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
