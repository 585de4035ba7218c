"""Makes a card in a process of its own and kills that process (SIGKILL) at a chosen moment.

Run as: python -m tests.flows.killed OUT MOMENT COUNT, where MOMENT is "call" (the n-th answer), "fsync"
(after the n-th write reached the disk), "half" (amid the n-th write) or "never".
"""

from __future__ import annotations

import os
import signal
import sys

from demur.flows.card import card
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Prompt
from tests.flows.synthetic import CATEGORIES, answer, probabilities, prompt_set


def main(out: str, moment: str, count: int) -> None:
    left = {moment: count}
    fsync, write = os.fsync, os.write

    def die_at(kind: str) -> bool:
        left[kind] = left.get(kind, 0) - 1
        return left[kind] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def slow_answer(prompt: Prompt, condition: object, sample: int) -> str:
        if die_at("call"):
            die()
        return answer(prompt, condition, sample)

    def dying_fsync(fd: int) -> None:
        fsync(fd)
        if die_at("fsync"):
            die()

    def dying_write(fd: int, data: bytes) -> int:
        if die_at("half"):
            write(fd, data[: len(data) // 2 + 7])
            die()
        return write(fd, data)

    os.fsync, os.write = dying_fsync, dying_write
    runtime = ScriptedRuntime(slow_answer, scores=probabilities, control=CATEGORIES, name="m")
    card(runtime, prompt_set(15), out, texts=140, progress=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
