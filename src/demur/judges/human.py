"""The judge that is a file of labels made by people."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from demur.errors import InputError
from demur.files import read_rows, row_id
from demur.judges.base import HARMFUL, NOT_HARMFUL, Scale, verdict
from demur.types import Label, Prompt, Reply, Verdict

PREFIX = "human:"
_HARM = (HARMFUL, NOT_HARMFUL)
_Key: TypeAlias = tuple[str, str | None, int]


class Human:
    """`human:FILE`: labels by id, condition and sample from a JSONL or CSV file.

    Columns: `id` (or `prompt_id`), `label` and, for several answers to a prompt, `sample` (0, 1, ...) and
    `condition`; a row without a condition is for the one that is judged. Labels are those of the refusal scale, or
    harmful / not_harmful; one file holds one scale. An empty label and a reply without a row are `unparsed` with
    the reason "no human label". The reply itself is not looked at, so an answer that never came can have a label
    too.

    Raises:
        InputError: a row without id, an unknown label, two scales, a second label for one reply; while judging, a
            label that names no condition and would serve for the answers under two.
    """

    def __init__(self, path: str | Path) -> None:
        self.id = f"{PREFIX}{Path(path).name}"
        self.definition = f"labels made by people, from {Path(path).name}"
        self._labels: dict[_Key, str] = {}
        self._served: dict[_Key, str] = {}
        lines: dict[_Key, int] = {}
        for n, row in read_rows(path):
            where = f"{path}, line {n}"
            id = next((row[c] for c in ("id", "prompt_id") if row.get(c) not in (None, "")), None)
            if id is None:
                raise InputError(f"{where}: no `id`, which says whose label this is")
            sample = _sample(row.get("sample", 0), where)
            key = row_id(id, n, where), str(row.get("condition") or "") or None, sample
            if key in lines:
                raise InputError(
                    f"{where}: id {key[0]!r} (sample {sample}) has a label on line {lines[key]} too"
                )
            lines[key] = n
            if (label := _label(row.get("label"), where)) is not None:
                self._labels[key] = label
        scales = {label in _HARM for label in self._labels.values()}
        if len(scales) > 1:
            raise InputError(
                f"{path}: holds refusal labels and harm labels; keep each scale in a file of its own"
            )
        self.scale: Scale = "harm" if scales == {True} else "refusal"

    def judge(self, prompt: Prompt, reply: Reply) -> Verdict:  # noqa: ARG002
        """The label in the file."""
        return self.find(reply) or verdict(reply, self.id, Label.UNPARSED, "no human label", scale=self.scale)

    def find(self, reply: Reply) -> Verdict | None:
        """The label in the file, or None where it has none for this reply."""
        label = self._labels.get((reply.prompt_id, reply.condition, reply.sample)) or self._of_any(reply)
        return verdict(reply, self.id, label, scale=self.scale) if label else None

    def __len__(self) -> int:
        """How many labels the file holds."""
        return len(self._labels)

    def _of_any(self, reply: Reply) -> str | None:
        """A label that names no condition, which can be of one answer only."""
        key = reply.prompt_id, None, reply.sample
        label = self._labels.get(key)
        if label and (first := self._served.setdefault(key, reply.condition)) != reply.condition:
            raise InputError(
                f"{self.id}: the label of id {reply.prompt_id!r} (sample {reply.sample}) names no condition, and "
                f"there are answers under {first!r} and {reply.condition!r}; add a column `condition`"
            )
        return label


def _sample(value: object, where: str) -> int:
    if not str(value).isdecimal():
        raise InputError(f"{where}: sample is {value!r}; it counts the answers to one prompt: 0, 1, ...")
    return int(str(value))


def _label(value: object, where: str) -> str | None:
    word = str(value or "").strip().lower().replace("-", "_").replace(" ", "_")
    if not word:
        return None
    if word not in _HARM and word not in Label._value2member_map_:
        known = ", ".join([*(label.value for label in Label), *_HARM])
        raise InputError(f"{where}: label {value!r} is none of {known}")
    return word
