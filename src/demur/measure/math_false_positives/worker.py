"""The process in which math-verify runs: a JSON pair (answer, gold) per line in, true / false / null out.

`demur.measure.math_false_positives.grading.Grader` starts it and kills it when a comparison takes too long.
"""

from __future__ import annotations

import json
import logging
import sys

MEMORY = 6 << 30
"""Bytes of address space: a power tower must not take the machine down before its time is up."""


def main() -> None:
    """Serve standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # a library's own printing must not look like an answer
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    _limit_memory()

    def equal(answer: str, gold: str) -> bool | None:
        try:
            right = parse(_boxed(gold), parsing_timeout=None)
            said = parse(_boxed(answer), parsing_timeout=None)
            return bool(verify(right, said, allow_set_relation_comp=True, timeout_seconds=None))
        except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - undecided, then
            return None

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), file=answers, flush=True)


def _boxed(text: str) -> str:
    return "\\boxed{" + text.strip().strip("$") + "}"


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        return


if __name__ == "__main__":
    main()
