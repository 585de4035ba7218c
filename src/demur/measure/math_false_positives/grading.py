"""Is a mathematical answer the right one? Extraction from a solution, and comparison with the reference.

Equal text after light normalisation is equal. For AIME only digits and the minus sign count. Everything else
goes to the library math-verify in a process of its own, so that an answer which keeps a computer algebra
system busy for ever costs one timeout, in any thread and on any platform.

    with Grader() as grader:
        grader.grade(r"\\frac{1}{2}", "0.5")
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from demur.errors import DemurError, InputError, MissingExtra

LONGEST = 2000
"""Answers of more characters are no answers; they are not compared."""

START_SECONDS = 120.0

_THOUGHT = re.compile(r".*</think(?:ing)?>", re.DOTALL)
_SAID = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|textnormal)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_WORD = re.compile(r"[A-Za-z]{3,}")
_WHOLE = re.compile(r"\d+")


def answer_part(text: str) -> str:
    """What a solution says after it has finished thinking: the text behind the last `</think>`.

    >>> answer_part("<think>2, no, 3</think>It is 3.")
    'It is 3.'
    """
    return _THOUGHT.sub("", text, count=1).strip()


def extract_answer(text: str) -> str | None:
    r"""The final answer of a solution: the last box, else what follows "answer is", else the last number.

    >>> extract_answer(r"So x is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("The answer is 12."), extract_answer("I do not know.")
    ('12', None)
    """
    text = answer_part(text)
    if (boxed := _last_box(text)) is not None:
        return boxed.strip() or None
    if said := _SAID.findall(text):
        sentence = re.split(r"\.(?:\s|$)", said[-1].strip())[0]
        return sentence.strip(" $*.") or None
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces close."""
    found = None
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, start = 1, match.end()
        for i in range(start, len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
                if depth == 0:
                    found = text[start:i]
                    break
    return found


def normalise(answer: str) -> str:
    r"""An answer without what never changes its meaning: dollar signs, spacing, sizes, text wrappers.

    >>> normalise(r"$\left( 3,\, \dfrac{\pi}{2} \right)$") == normalise(r"(3, \frac{\pi}{2})")
    True
    >>> normalise(r"\text{(C)}"), normalise(r"26,\!000"), normalise("90^\\circ.")
    ('C', '26000', '90')
    """
    out = answer.strip().strip("$").strip()
    out = re.sub(r"^\\[(\[]|\\[)\]]$", "", out).strip()
    while (inner := _WRAPPED.sub(r"\1", out)) != out:
        out = inner
    out = re.sub(r"\\[dt]frac", r"\\frac", out)
    out = re.sub(r",\\!", "", out)
    out = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\^\s*\{?\\circ\}?|\\\$", "", out)
    out = re.sub(r"\s+", "", out).rstrip(".")
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+", out):
        out = out.replace(",", "")
    letter = _LETTER.fullmatch(out)
    return letter[1].upper() if letter and out != letter[1] else out


def aime_number(answer: str) -> int | None:
    """An AIME answer, of which only digits and the minus sign count; None where there is no number.

    >>> aime_number("025"), aime_number("$-7$"), aime_number("none")
    (25, -7, None)
    """
    kept = re.sub(r"[^0-9-]", "", answer)
    return int(kept) if re.fullmatch(r"-?\d{1,30}", kept) else None


class Grader:
    """Compares answers; a context manager, because it may hold a helper process. Safe to share by threads.

    Args:
        timeout: seconds that one comparison may take. What takes longer is undecided (None), never "wrong".

    Raises:
        MissingExtra: at the first answer that needs math-verify, when that is not installed.

    >>> with Grader() as grader:
    ...     grader.grade("12", "012", dataset="AIME 2023"), grader.grade("$x$", "x")
    (True, True)
    """

    def __init__(self, timeout: float = 10.0) -> None:
        if not timeout > 0:
            raise InputError(f"timeout={timeout}: give the seconds that one comparison may take, e.g. 10")
        self.timeout = timeout
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], bool | None] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the helper process. The grader starts another one when it is used again."""
        with self._lock:
            self._stop()

    def grade(self, answer: str | None, gold: str, dataset: str | None = None) -> bool | None:
        """True when `answer` equals `gold`, False when not, None when that could not be found out in time.

        Args:
            answer: as extracted; None (no answer) is wrong. dataset: a name with "aime" in it makes
                answers integers: only digits and the minus sign are read.
        """
        if answer is None:
            return False
        if dataset is not None and "aime" in dataset.lower():
            return (number := aime_number(gold)) is not None and aime_number(answer) == number
        said, right = normalise(answer), normalise(gold)
        if said == right or (_WORD.fullmatch(right) and said.casefold() == right.casefold()):
            return True
        if _WHOLE.fullmatch(said) and _WHOLE.fullmatch(right):
            return said.lstrip("0") == right.lstrip("0")
        if not said or not right or len(answer) > LONGEST or len(gold) > LONGEST:
            return False
        with self._lock:
            if (said, right) not in self._known:
                self._known[said, right] = self._ask(answer, gold)
            return self._known[said, right]

    def _ask(self, answer: str, gold: str) -> bool | None:
        worker = self._start()
        line = self._exchange(worker, json.dumps([answer, gold]), self.timeout)
        if line:
            result: bool | None = json.loads(line)
            return result
        self._stop()
        return None

    def _start(self) -> subprocess.Popen[str]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtra("comparing mathematical answers", "math")
        # a plain child, no multiprocessing: that would run the user's own script once more where it spawns
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "demur.measure.math_false_positives.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        if not self._exchange(self._worker, None, START_SECONDS):
            self._stop()
            raise DemurError(
                "the helper process for math-verify does not start; try: "
                "python -m demur.measure.math_false_positives.worker"
            )
        return self._worker

    @staticmethod
    def _exchange(worker: Any, line: str | None, seconds: float) -> str:
        """Send a line and read one; "" when the worker died, or was killed because time was up."""
        alarm = threading.Timer(seconds, worker.kill)
        alarm.daemon = True
        alarm.start()
        try:
            if line is not None:
                worker.stdin.write(line + "\n")
                worker.stdin.flush()
            return str(worker.stdout.readline())
        except OSError:
            return ""
        finally:
            alarm.cancel()

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was still to be written has no reader any more
                continue
