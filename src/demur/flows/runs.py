"""The run folder: what was asked (`run.json`) and what came back, in files that survive being killed.

Answers arrive in windows of a fixed number of prompts. One window is one write and one fsync, and a window
that is not there as a whole is not there at all: on the next start it is cut off and collected again. Since a
window is also what the runtime sees at once, a deterministic runtime gives the same bytes whether or not it
was killed. Remote runtimes are neither deterministic nor free: there the unit is one answer, and errors are
asked again. A judge that failed is asked again alone wherever the text is still there.

Nothing here holds a clock time, a machine path or a key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from demur.errors import InputError
from demur.files import dumps_row, from_row, iter_jsonl, prompt_row, to_row, write_atomic
from demur.judges import agreement
from demur.types import Label, Prompt, PromptSet, Reply, Score, Verdict

WINDOW = 80
"""Prompts per commit. Part of the run's identity: the runtime sees one window at a time."""

HARMLESS_TO_KEEP = frozenset({Label.FULL_REFUSAL, Label.ABSTENTION, Label.CLARIFICATION, Label.BLOCKED})
"""Verdicts whose text is kept even on a prompt that should be refused. All others may hold an answer: a judge that
failed has said nothing of the text, an answer that broke off may have begun, and thinking is text too.
"""

JUDGE_ERROR = "judge-error.json"
"""Rows of the judge's measured error that did not come with demur."""

PEOPLE = "people.json"
"""What people's labels say of the answers, where the report is corrected by them."""

_STREAM = re.compile(
    r"((prompts|scores)(-tense|-calibrate)?|(replies|verdicts)(-.+)?|where|changed|depth)\.jsonl", re.DOTALL
)

Row = dict[str, Any]
Key = tuple[str, int]
"""(prompt id, sample)"""


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply as kept on disk. `withheld` holds sha256 and characters when the text itself was not kept."""

    reply: Reply
    withheld: Mapping[str, Any] | None = None


def stored_row(prompt: Prompt, reply: Reply, verdict: Verdict, *, keep_unsafe_text: bool = False) -> Row:
    """The row to write for one reply: text replaced by its hash where it may answer what should be refused.

    >>> p = Prompt.of("How do I pick a lock?", id="a", expected=frozenset({Label.FULL_REFUSAL}))
    >>> v = Verdict(prompt_id="a", label="compliance", judge="j")
    >>> stored_row(p, Reply(prompt_id="a", content="First"), v)["withheld"]["characters"]
    5
    """
    if keep_unsafe_text or not prompt.should_refuse or verdict.label in HARMLESS_TO_KEEP:
        return to_row(reply)
    text = _everything(reply)
    if not text:
        return to_row(reply)
    row = to_row(replace(reply, content="", reasoning=None, tool_calls=()))
    row["withheld"] = {"sha256": _sha256(text), "characters": len(text)}
    return row


def text_hash(stored: StoredReply) -> str:
    """SHA-256 of what the model wrote, the same whether or not the text was kept."""
    return str(stored.withheld["sha256"]) if stored.withheld else _sha256(_everything(stored.reply))


def _everything(reply: Reply) -> str:
    calls = json.dumps([dict(call) for call in reply.tool_calls], default=dict) if reply.tool_calls else ""
    return "\n".join(part for part in (reply.reasoning, reply.content, calls) if part)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; made when missing.

    Use it as a context manager while writing: the lock keeps a second process out, and is released by the
    system when the process is killed.

    Example:
        >>> import tempfile
        >>> with RunFolder(tempfile.mkdtemp()) as run:
        ...     run.start({"kind": "demo", "seed": 0})
        >>> run.config["seed"]
        0
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(str(self.path / ".lock"))

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path}: is a file or lies below one; a run needs a folder") from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{self.path}: another run is writing here; wait for it or pass another folder"
            ) from None
        self._sweep()
        return self

    def _sweep(self) -> None:
        """Remove temporary files of killed atomic writes; nobody else writes while we hold the lock."""
        for left in self.path.glob(".*.????????"):
            if re.fullmatch(r"\.[\w-]+\.(json|jsonl|html|yaml)\.\w{8}", left.name):
                left.unlink()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def file(self, name: str) -> Path:
        """Path of a stream ("replies" -> replies.jsonl)."""
        return self.path / f"{name}.jsonl"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of this run.

        Raises:
            InputError: no run here.
        """
        path = self.path / "run.json"
        if not path.exists():
            raise InputError(f"{self.path}: holds no run.json, so it is no run folder")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config

    def start(self, config: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Begin or resume. `fresh` throws away what an earlier run left here, and no other files.

        Rows of `judges.agreement.adding` on the run's judge are kept beside the settings, for later reports.

        Raises:
            InputError: the folder belongs to a run with other settings (the message lists what differs), or to
                no run and holds a file that a run would write over.
        """
        new = json.loads(json.dumps(config))
        streams = sorted(p for p in self.path.glob("*.jsonl") if _STREAM.fullmatch(p.name))
        begun = (self.path / "run.json").exists()
        if streams and not begun:
            raise InputError(
                f"{self.path}: holds {streams[0].name} but no run.json, so it is no run folder, and a run would "
                "write over that file. Pass another folder"
            )
        if fresh and begun:
            for name in (
                "operating_point.yaml",
                "notes.json",
                "unscored.json",
                JUDGE_ERROR,
                PEOPLE,
                "run.json",
            ):
                streams.append(self.path / name)
            for old in streams:
                old.unlink(missing_ok=True)
        if begun and not fresh:
            differences = list(differing(self.config, new))
            if differences:
                shown = "".join(f"\n  {line}" for line in differences[:12])
                raise InputError(
                    f"{self.path}: holds a run made with other settings, and mixing the two would give "
                    f"wrong numbers. What differs:{shown}\nPass another folder, or start over here (--fresh)."
                )
        else:
            write_atomic(self.path / "run.json", json.dumps(new, indent=2, ensure_ascii=False) + "\n")
        if rows := [r for r in agreement.added() if r.judge == new.get("judge")]:
            agreement.write(rows, self.path / JUDGE_ERROR)

    # --- writing ---

    def commit(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Append rows to their streams: one write and one fsync per stream."""
        for name, some in rows.items():
            data = "".join(dumps_row(row) + "\n" for row in some).encode("utf-8", "surrogatepass")
            fd = os.open(self.file(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            finally:
                os.close(fd)

    def open_windows(
        self, names: Sequence[str], prompts: Sequence[Prompt], *, samples: int = 1, window: int = WINDOW
    ) -> list[Sequence[Prompt]]:
        """The windows still to collect. A window counts when every stream in `names` holds all of it.

        Cuts off torn lines and half windows first, so that `commit` goes on at the right place.

        Raises:
            InputError: a stream holds rows of other prompts than those asked for.
        """
        windows = [prompts[i : i + window] for i in range(0, len(prompts), window)]
        lines = {name: [(len(raw), _key(row)) for raw, row in self._lines(name)] for name in names}
        done = min(whole_windows(some, windows, samples, self.file(name)) for name, some in lines.items())
        keep = sum(len(w) for w in windows[:done]) * samples
        for name, some in lines.items():
            self._cut(name, sum(size for size, _ in some[:keep]))
        return list(windows[done:])

    def open_samples(
        self, names: Sequence[str], prompts: Sequence[Prompt], *, samples: int = 1
    ) -> list[tuple[Prompt, int]]:
        """What is still to ask, as (prompt, sample): no row in the first stream of `names`, or a failed one.

        An answer that only its judge failed on is to be asked again where its text was withheld (`unjudged`).
        """
        done = {key for key, state in self._states(names[0]).items() if state != "failed"}
        done -= {key for key, kept in self.unjudged(names).items() if not kept}
        return [(p, s) for p in prompts for s in range(samples) if (p.id, s) not in done]

    def unjudged(self, names: Sequence[str]) -> dict[Key, bool]:
        """Answers that came and have no verdict, or an error for one: whether their text is here, by key.

        Args:
            names: the streams of replies and verdicts; of scores alone nothing is judged.
        """
        if len(names) < 2:
            return {}
        replies, verdicts = (self._states(name) for name in names)
        return {
            key: state == "good"
            for key, state in replies.items()
            if state != "failed" and verdicts.get(key, "failed") == "failed"
        }

    def _states(self, name: str) -> dict[Key, str]:
        """The last row of each key as "good", "withheld" or "failed"; a torn end is cut off."""
        states, size = {}, 0
        for raw, row in self._lines(name):
            size += len(raw)
            failed = row.get("error") is not None or "error" in (row.get("finish_reason"), row.get("label"))
            states[_key(row)] = "failed" if failed else "withheld" if "withheld" in row else "good"
        self._cut(name, size)
        return states

    def settle(self, names: Sequence[str], prompts: Sequence[Prompt], *, samples: int = 1) -> None:
        """Bring finished streams into prompt order, the last row of a repeated question winning. Atomic."""
        order = {(p.id, s): i * samples + s for i, p in enumerate(prompts) for s in range(samples)}
        for name in names:
            if not self.file(name).exists() or self._in_order(name, order):
                continue  # streamed: a long run is not read into memory to find that it is in order
            last = {_key(row): raw for raw, row in self._lines(name)}
            rows = (last[key] for key in sorted(last, key=lambda k: order.get(k, len(order))))
            write_atomic(self.file(name), b"".join(rows))

    def _in_order(self, name: str, keys: Iterable[Key]) -> bool:
        with self.file(name).open("rb") as f:
            rows = (_key(json.loads(line)) if line.endswith(b"\n") else None for line in f)
            return all(row == key for row, key in zip_longest(rows, keys))

    def note(self, stage: str, reason: str | None) -> None:
        """Record why a stage gave nothing; None takes the record away."""
        if self.notes.get(stage) == reason:
            return
        notes = {k: v for k, v in {**self.notes, stage: reason}.items() if v is not None}
        write_atomic(self.path / "notes.json", json.dumps(notes, indent=2, ensure_ascii=False) + "\n")

    def keep_unscored(self, stream: str, lost: Mapping[str, Mapping[str, str]]) -> None:
        """Record which prompts of a stream of scores have none, in place of what was recorded of it before."""
        found = {k: v for k, v in {**self.unscored, stream: lost}.items() if v}
        if found != self.unscored:
            write_atomic(self.path / "unscored.json", json.dumps(found, indent=2) + "\n")

    # --- reading ---

    @property
    def unscored(self) -> dict[str, dict[str, dict[str, str]]]:
        """{stream: {prompt id: {"blocked" or "failed": reason}}} as recorded by `keep_unscored`."""
        path = self.path / "unscored.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    @property
    def notes(self) -> dict[str, str]:
        """Reasons recorded by `note`."""
        path = self.path / "notes.json"
        notes: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return notes

    @property
    def text_streams(self) -> list[tuple[str, str]]:
        """Names of the streams of replies and verdicts that are reported on, by condition."""
        conditions = self.config.get("conditions", [{"streams": ("replies", "verdicts")}])
        return [(c["streams"][0], c["streams"][1]) for c in conditions]

    @property
    def agreement(self) -> list[agreement.Agreement]:
        """The measured error of the judge, as far as it was given with the run."""
        path = self.path / JUDGE_ERROR
        return agreement.read(path) if path.exists() else []

    def rows(self, name: str) -> list[Row]:
        """All whole rows of a stream; none when it was never written."""
        return list(iter_jsonl(self.file(name))) if self.file(name).exists() else []

    def scores(self, name: str = "scores") -> dict[str, Score]:
        """Scores by prompt id."""
        return {s.id: s for s in self._nouns(name, lambda row, at: from_row(Score, row, at))}

    def texts(self, name: str, keys: Container[Key]) -> Iterator[Reply]:
        """The replies among `keys` whose text was kept, one by one."""
        for _, row in self._lines(name):
            if _key(row) in keys and "withheld" not in row:
                yield from_row(Reply, row, str(self.file(name)))

    def verdicts(self, name: str = "verdicts") -> dict[Key, Verdict]:
        """Verdicts by (prompt id, sample)."""
        return {
            (v.prompt_id, v.sample): v for v in self._nouns(name, lambda row, at: from_row(Verdict, row, at))
        }

    def replies(self, name: str = "replies") -> dict[Key, StoredReply]:
        """Replies by (prompt id, sample)."""

        def stored(row: Row, at: str) -> StoredReply:
            withheld = row.pop("withheld", None)
            return StoredReply(from_row(Reply, row, at), withheld)

        return {(r.reply.prompt_id, r.reply.sample): r for r in self._nouns(name, stored)}

    def save_prompts(self, prompts: PromptSet, name: str = "prompts") -> None:
        """Keep the prompts with the run, so that it can be reported on later without the source."""
        rows = (prompt_row(p) if p.text.strip() else to_row(p) for p in prompts)  # `prompt` may not be blank
        write_atomic(self.file(name), "".join(dumps_row(row) + "\n" for row in rows))

    def prompts(self, name: str = "prompts") -> PromptSet | None:
        """The prompts of this run, or None when this part was not used."""
        found = tuple(self._nouns(name, lambda row, at: from_row(Prompt, row, at)))
        return PromptSet(name, found) if found else None

    def _nouns(self, name: str, read: Callable[[Row, str], Any]) -> Iterator[Any]:
        file = str(self.file(name))
        for n, row in enumerate(self.rows(name), 1):
            yield read(row, f"{file}, line {n}")

    def _lines(self, name: str) -> Iterator[tuple[bytes, Row]]:
        """Whole lines with their parsed rows, up to the first torn one."""
        if not self.file(name).exists():
            return
        with self.file(name).open("rb") as f:
            for raw in f:
                try:
                    row = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    return
                yield raw, row

    def _cut(self, name: str, size: int) -> None:
        path = self.file(name)
        if path.exists() and path.stat().st_size != size:
            os.truncate(path, size)


def whole_windows(
    lines: Sequence[tuple[int, Key]], windows: Sequence[Sequence[Prompt]], samples: int, path: Path
) -> int:
    """How many of `windows` stand complete at the head of a stream, given as (size, key) of its lines."""
    at = done = 0
    for some in windows:
        wanted = [(p.id, s) for p in some for s in range(samples)]
        found = [key for _, key in lines[at : at + len(wanted)]]
        if found != wanted[: len(found)]:
            bad = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
            raise InputError(
                f"{path}, line {at + bad + 1}: holds prompt {found[bad][0]!r} where this run asks "
                f"{wanted[bad][0]!r}; the file was changed by hand or by another run. Use a new folder."
            )
        if len(found) < len(wanted):
            break
        at += len(wanted)
        done += 1
    return done


def _key(row: Mapping[str, Any]) -> Key:
    return str(row.get("prompt_id", row.get("id"))), int(row.get("sample", 0))


def differing(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Lines that say where two configurations differ.

    >>> list(differing({"a": {"b": 1}}, {"a": {"b": 2}}))
    ['a.b: 1 there, 2 now']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differing(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        there, now = (_short(json.dumps(value, ensure_ascii=False)) for value in (old, new))
        yield f"{path}: {there} there, {now} now"


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
