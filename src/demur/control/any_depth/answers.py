"""Answers that were written so far, with what is known of them, and the states behind a header put into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.files import read_rows, row_id
from demur.types import Prompt, Site

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        text: the answer; special tokens in it stay text. harmful: whether it should have been stopped.
        opens: category of the control token it opens with, where the model has such tokens.
    """

    prompt: Prompt
    text: str
    harmful: bool
    opens: str | None = None


def load_answers(path: str | Path) -> list[Answer]:
    """Answers of a JSONL or CSV file with the columns prompt, answer, harmful, and maybe id, opens.

    Raises:
        InputError: no rows, a row without prompt or answer, `harmful` that is no yes or no.
    """
    out = []
    for line, row in read_rows(path):
        where = f"{path}, row {line}"
        for key in ("prompt", "answer"):
            if not isinstance(row.get(key), str) or not str(row[key]).strip():
                raise InputError(f"{where}: no text in {key!r}; a row needs prompt, answer and harmful")
        word = str(row.get("harmful")).strip().lower()
        if word not in ("true", "false", "1", "0", "yes", "no"):
            raise InputError(f"{where}: harmful={row.get('harmful')!r}; write true or false")
        prompt = Prompt.of(str(row["prompt"]), id=row_id(row.get("id"), line, where))
        opens = str(row["opens"]) if row.get("opens") else None
        harmful = word in ("true", "1", "yes")
        out.append(Answer(prompt=prompt, text=str(row["answer"]), harmful=harmful, opens=opens))
    if not out:
        raise InputError(f"{path}: no rows; each is an answer with its prompt and whether it is harmful")
    return out


def encoded(runtime: LocalRuntime, answer: Answer) -> tuple[list[int], list[int]]:
    """Token ids of the prompt (with the control token that opens the answer) and of the answer.

    Raises:
        InputError: a control category that the model does not have, a prompt that cannot be written.
    """
    from demur.runtime.chat import encode_text

    head = list(runtime.chat.render(answer.prompt).ids)
    if answer.opens is not None:
        known = runtime.control.ids if runtime.control else {}
        if answer.opens not in known:
            raise InputError(
                f"answer to {answer.prompt.id!r} opens with {answer.opens!r}; {runtime.name!r} has "
                + (", ".join(known) or "no control tokens")
            )
        head.append(known[answer.opens])
    ids = encode_text(runtime.tokenizer, answer.text)
    bos = runtime.tokenizer.bos_token_id
    return head, ids[1:] if bos is not None and ids[:1] == [bos] else ids


def states_at(
    runtime: LocalRuntime,
    answers: Sequence[Answer],
    depths: Sequence[int],
    suffix: Sequence[int],
    layers: Sequence[int],
) -> npt.NDArray[np.float32]:
    """States at the last token of [prompt, answer[:d], suffix] for every depth d.

    Returns:
        (answers, depths, layers, width); NaN where an answer has fewer than d tokens. Without a suffix the last
        token of what was written is read.
    """
    from demur.runtime.depths import DepthRow, header_states

    rows = []
    for answer in answers:
        head, said = encoded(runtime, answer)
        runtime.check_fits(answer.prompt, head, min(max(depths), len(said)) + len(suffix))
        rows.append(DepthRow(head, said))
    if max((len(row.answer) for row in rows), default=-1) < min(depths):
        raise InputError(f"no answer is {min(depths)} tokens long, so there is nothing to read")
    # without a suffix: what stands before any token that is put behind the answer
    behind = list(suffix) or [0]
    sites = [Site(layer=k, position=-1 if suffix else -2) for k in layers]
    return header_states(runtime, rows, depths, behind, sites)
