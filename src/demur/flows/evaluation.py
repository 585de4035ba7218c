"""Stored first-position probabilities of a prompt set, small enough for a web page: what a dial is turned on.

Every threshold and rule can be tried on stored probabilities alone, so the playground of `demur serve` redraws the
effect of a slider without a model, and the gateway compares what it serves with `reference`, the scores that
calibration saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from demur.cachedir import cache_dir
from demur.errors import InputError
from demur.files import read_text, write_atomic
from demur.flows.asking import askable
from demur.flows.carddata import CardData
from demur.flows.runs import RunFolder
from demur.flows.settings import public_name
from demur.prompts import GENERAL, core, row_of, stratified
from demur.runtime.base import Progress, Runtime
from demur.types import RESPOND, SCHEMA_VERSION, Prompt, PromptSet, Score

MAX_ROWS = 2000
MAX_BYTES = 1_000_000
ID_LENGTH, TEXT_LENGTH = 80, 400
OURS = "demur core"
"""Source of the packaged corpus, whose texts may be shown to anybody."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Row(NamedTuple):
    """One prompt: `own` is the column of the model's own first token, -1 where that is no control token."""

    id: str
    category: str
    kind: Literal["refuse", "lookalike", "general"]
    own: int
    probabilities: tuple[Share, ...]
    text: str | None


class Evaluation(BaseModel):
    """First-position probabilities of labelled prompts.

    Attributes:
        model, fingerprint, dtype, T: what the scores came from.
        prompts, prompts_hash: name and hash of the set; `total` its size where only a sample is stored.
        names: refuse categories, then "respond": the columns of each row's probabilities (7 significant digits).
        reference: p_refuse of the prompts of calibration, else of these.

    Example:
        >>> p = Prompt.of("What is a fjord?", id="a", expected=["compliance"])
        >>> s = Score(id="a", p_refuse=0.1, probabilities={"safety": 0.1, "respond": 0.9}, token="respond")
        >>> made = Evaluation.of(PromptSet("mine", (p,)), {"a": s}, ("safety", "respond"), model="m")
        >>> made.rows[0]
        Row(id='a', category='general', kind='general', own=1, probabilities=(0.1, 0.9), text=None)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["evaluation"] = "evaluation"
    model: str
    fingerprint: str | None = None
    dtype: str | None = None
    T: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    prompts: str
    prompts_hash: str
    total: int
    names: tuple[str, ...]
    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=MAX_ROWS)]
    reference: tuple[Share, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.names) < 2 or self.names[-1] != RESPOND or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be distinct refuse categories, then {RESPOND!r}")
        for i, row in enumerate(self.rows):
            if len(row.probabilities) != len(self.names) or sum(row.probabilities) > 1.01:
                raise ValueError(f"row {i}: needs one probability for each of {', '.join(self.names)}")
            if not -1 <= row.own < len(self.names):
                raise ValueError(f"row {i}: own={row.own} is no column")
        return self

    @classmethod
    def of(
        cls,
        prompts: PromptSet,
        scores: Mapping[str, Score],
        names: Sequence[str],
        *,
        model: str,
        fingerprint: str | None = None,
        dtype: str | None = None,
        reference: Sequence[float] | None = None,
        texts: bool = False,
    ) -> Evaluation:
        """From prompts and their scores by id; at most 2,000 prompts are kept, spread over the categories.

        Args:
            reference: p_refuse of the calibration prompts.
            texts: keep the text of all prompts; by default only of the packaged corpus.

        Raises:
            InputError: no labelled prompt has a score over control tokens.
        """
        labelled = tuple(p for p in prompts if p.should_refuse is not None and p.id in scores)
        if not names or not labelled or any(scores[p.id].kind != "control" for p in labelled):
            raise InputError(
                f"{prompts.name}: a dial is drawn from probabilities of control tokens on prompts whose expected "
                f"behaviour is known; found {len(labelled)} labelled prompts with a score and the control tokens "
                f"[{', '.join(names)}]"
            )
        kept = stratified(PromptSet(prompts.name, labelled), MAX_ROWS)
        made = cls(
            model=public_name(model),
            fingerprint=fingerprint,
            dtype=dtype,
            T=scores[labelled[0].id].T,
            prompts=prompts.name,
            prompts_hash=prompts.hash,
            total=len(labelled),
            names=tuple(names),
            rows=tuple(_row(p, scores[p.id], names, texts=texts) for p in kept),
            reference=tuple(_short(x) for x in reference or [scores[p.id].p_refuse for p in labelled]),
        )
        if len(made.json_text().encode()) >= MAX_BYTES:
            made = made.model_copy(update={"rows": tuple(r._replace(text=None) for r in made.rows)})
        return made

    @classmethod
    def from_run(cls, folder: str | Path, *, texts: bool = False) -> Evaluation:
        """From the run folder of a Refusal Card.

        Raises:
            InputError: no run there, or one without scores over control tokens.
        """
        data = CardData.read(RunFolder(folder))
        model = data.config["model"]
        return cls.of(
            data.prompts,
            data.scores,
            data.names,
            model=data.model,
            fingerprint=model.get("fingerprint"),
            dtype=model.get("dtype"),
            reference=[s.p_refuse for s in data.calibrate_scores.values()],
            texts=texts,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Evaluation:
        """Read what `write` wrote.

        Raises:
            InputError: no such file, more than 1 MB, or no evaluation.
        """
        text = read_text(path)
        if len(text.encode()) > MAX_BYTES:
            raise InputError(
                f"{path}: {len(text):,} characters; an evaluation has at most {MAX_BYTES:,} bytes. Make it from "
                "fewer prompts, or without their texts"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            first = e.errors()[0]
            at = ".".join(str(x) for x in first["loc"]) or "the file"
            raise InputError(
                f"{path}: no stored evaluation ({at}: {first['msg']}). Pass the run folder of `demur card`, or a "
                "file that demur made from one"
            ) from None

    def json_text(self) -> str:
        """The file form: one JSON object."""
        return self.model_dump_json()

    def write(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_atomic(path, self.json_text() + "\n")

    @property
    def table(self) -> npt.NDArray[np.float64]:
        """Probabilities, shape (n, K+1), columns `names`."""
        return np.array([r.probabilities for r in self.rows], dtype=np.float64)


def open_evaluation(where: str | Path, *, texts: bool = False) -> Evaluation:
    """The evaluation at `where`: a run folder of `demur card`, or a file. Errors as there."""
    return Evaluation.from_run(where, texts=texts) if Path(where).is_dir() else Evaluation.from_file(where)


def core_evaluation(runtime: Runtime, *, T: float = 1.0, progress: Progress | None = None) -> Evaluation:
    """The packaged test prompts under a model, with the calibrate part as reference; kept in the user's cache.

    Computed once per model, dtype and T: both parts, a forward pass for each prompt.

    Raises:
        InputError: the model has no control tokens.
    """
    if runtime.control is None:
        raise InputError(f"{public_name(runtime.name)} has no control tokens, so there is no dial to draw")
    test, calibrate = core("test"), core("calibrate")
    key = [runtime.fingerprint, runtime.dtype, T, test.hash, calibrate.hash, SCHEMA_VERSION]
    path = cache_dir() / "evaluations" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
    if runtime.fingerprint and path.exists():
        return Evaluation.from_file(path)
    asked, _ = askable(runtime, test)
    fitted, _ = askable(runtime, calibrate)
    both = PromptSet("core", asked.prompts + fitted.prompts)
    scores = {s.id: s for s in runtime.score(both, T=T, progress=progress)}
    made = Evaluation.of(
        PromptSet(test.name, asked.prompts),
        scores,
        runtime.control.names,
        model=public_name(runtime.name),
        fingerprint=runtime.fingerprint,
        dtype=runtime.dtype,
        reference=[scores[p.id].p_refuse for p in fitted],
    )
    if runtime.fingerprint:
        made.write(path)
    return made


def _row(prompt: Prompt, score: Score, names: Sequence[str], *, texts: bool) -> Row:
    category = row_of(prompt)
    kind: Literal["refuse", "lookalike", "general"] = "lookalike"
    if prompt.should_refuse:
        kind = "refuse"
    elif category == GENERAL:
        kind = "general"
    shown = prompt.text[:TEXT_LENGTH].encode("utf-8", "replace").decode()  # half a character has no JSON form
    text = shown if texts or prompt.source == OURS else None
    return Row(
        id=prompt.id[:ID_LENGTH],
        category=category[:ID_LENGTH],
        kind=kind,
        own=names.index(score.token) if score.token in names else -1,
        probabilities=tuple(_short(score.probabilities.get(c, 0.0)) for c in names),
        text=text,
    )


def _short(p: float) -> float:
    """Seven significant digits: no decision can tell, and the file is half as long."""
    return min(1.0, float(f"{p:.7g}"))
