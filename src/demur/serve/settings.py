"""What the operator decides: one YAML file, checked as a whole, with command-line flags on top.

Relative paths are taken from the folder of the file. Secrets never stand in it: API keys come from environment
variables or from a file of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from demur.errors import InputError
from demur.files import read_text

CORE = "core"
"""As `evaluation`: the packaged test prompts under the served model, scored at the first start."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_SELF_HARM = re.compile(r"self[-_ ]?harm|suicid", re.IGNORECASE)
_POINTS_SOMEWHERE = re.compile(r"\d{2,}|\w\.\w{2,}")
SELF_HARM_TEXT = (
    "I'm sorry that things are this hard. I can't help with this request, but please don't stay alone with it: "
    "talk to someone you trust, call your local emergency number if you are in danger, or find a crisis line in "
    "your country at findahelpline.com."
)
"""An example that points to help. It was written by nobody who knows the field: not ready for deployment."""
REFUSALS: Mapping[str, str] = {
    "safety": "I can't help with this request.",
    "humanizing": "I'm an AI model, so I have no body, feelings or life of my own to speak from.",
    "unsupported": "I can't do this: it needs abilities or access that I don't have.",
    "indeterminate": "There is no settled answer that I could give to this.",
    "incomplete": "Something is missing here. Could you tell me more about what you mean?",
    "error": "This request could not be checked just now, so it was not answered. Please try again.",
}
"""Texts of the operator's refusals; "error" is for requests that could not be decided under fail-closed."""


def _from_file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(folder) / path


Where = Annotated[Path, AfterValidator(_from_file)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Canary(_Part):
    """An operating point on trial for a share of the requests, chosen by a hash of the request's id."""

    operating_point: Where
    share: float = Field(gt=0, le=1)


class Engine(_Part):
    """An OpenAI-compatible engine that already runs.

    Attributes:
        url: up to and including the version, e.g. http://localhost:8000/v1. model: its name there.
        key_env: environment variable that holds the engine's API key.
        tokenizer: folder of the model's tokenizer: the gateway then writes token ids itself (vLLM).
        control_tokens: preset or YAML file that names the control tokens; default the tokenizer folder's
            own `control_tokens.yaml` or `demur.json`.
        base_model: the untouched model's name on the engine, for mode "gate" and points with `answers: base`.
        top_logprobs: what the engine lists at most, without a tokenizer.
    """

    url: str
    model: str
    key_env: str | None = None
    tokenizer: Where | None = None
    control_tokens: str | None = None
    base_model: str | None = None
    top_logprobs: int = Field(default=20, ge=1)


class KeySource(_Part):
    """Where the clients' API keys are: an environment variable (separated by commas) or a file, one a line."""

    env: str | None = None
    file: Where | None = None

    @model_validator(mode="after")
    def _one(self) -> KeySource:
        if (self.env is None) == (self.file is None):
            raise ValueError("keys: give `env` or `file`, one of them")
        return self


class Limits(_Part):
    """Bounds of one request and of the server.

    `max_tokens` is both the most a request may ask for and what it gets when it does not say. `timeout_s` bounds a
    whole answer, `header_s` the arrival of a request's head and of each part of its body, `shutdown_s` the time
    answers under way have left after a stop signal.
    """

    body_bytes: int = Field(default=1_000_000, ge=1_000)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(default=32, ge=1)
    queue: int = Field(default=64, ge=0)
    timeout_s: float = Field(default=120.0, gt=0)
    header_s: float = Field(default=10.0, gt=0)
    shutdown_s: float = Field(default=20.0, ge=0)


class AnyDepthChecks(_Part):
    """A check that looks at the answer while it is written (local model only): a fitted probe, or the refuse
    mass from which an answer is stopped.
    """

    probe: Where | None = None
    mass: float | None = Field(default=None, gt=0, le=1)
    every: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _one(self) -> AnyDepthChecks:
        if (self.probe is None) == (self.mass is None):
            raise ValueError("any_depth: name a probe (a file) or a mass (a number up to 1), one of them")
        return self


class Batching(_Part):
    """Dynamic batching of the local model: rows that are written together, and the wait for company."""

    rows: int = Field(default=8, ge=1)
    wait_ms: float = Field(default=5.0, ge=0)


class Settings(_Part):
    """Everything `demur serve` can be told. See docs/serve.md for each line.

    >>> Settings(mode="gate").on_error
    'closed'
    """

    model: str | None = None
    adapter: Where | None = None
    dtype: str | None = None
    control_tokens: str | None = None
    batch: Batching = Batching()
    upstream: Engine | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8321, ge=0, le=65535)
    keys: KeySource | None = None
    no_auth: bool = False
    operating_point: Where | None = None
    points_folder: Where | None = None
    canary: Canary | None = None
    overrides: tuple[str, ...] = ()
    allow_refusal_lowering: bool = False
    mode: Literal["token", "gate"] = "token"
    on_error: Literal["open", "closed"] = "closed"
    refusals: dict[str, str] = {}
    limits: Limits = Limits()
    texts: Where | None = None
    guard: Where | None = None
    any_depth: AnyDepthChecks | None = None
    evaluation: Where | Literal["core"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.upstream is not None:
            local = ("model", "adapter", "dtype", "control_tokens", "guard", "any_depth")
            if given := [name for name in local if getattr(self, name) is not None]:
                raise ValueError(
                    f"{', '.join(given)}: for the local model only, and `upstream` names an engine"
                )
            if self.mode == "gate" and self.upstream.base_model is None:
                raise ValueError(
                    "mode gate hands accepted prompts to the base model: name upstream.base_model"
                )
        if self.canary is not None and self.operating_point is None:
            raise ValueError("canary: there is no operating_point to try it against")
        for category, text in self.refusals.items():
            if not text.strip():
                raise ValueError(f"refusals.{category}: an empty text is no answer")
            if _SELF_HARM.search(category) and not _POINTS_SOMEWHERE.search(text):
                raise ValueError(
                    f"refusals.{category}: a text on self-harm names a telephone line or a site to turn to"
                )
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, **flags: Any) -> Settings:
        """Settings of a YAML file (or the defaults), with flags that are not None on top.

        Raises:
            InputError: no such file, unknown lines, values that clash.
        """
        data: Any = {}
        if path is not None:
            try:
                data = yaml.safe_load(read_text(path)) or {}
            except yaml.YAMLError as e:
                raise InputError(f"{path}: not YAML ({e})") from None
            if not isinstance(data, dict):
                raise InputError(f"{path}: expected settings, e.g. `operating_point: op.yaml`")
        context = {"folder": Path(path).absolute().parent} if path is not None else None
        try:
            read = cls.model_validate(data, context=context)
            given = {k: v for k, v in flags.items() if v is not None}
            whole = {name: getattr(read, name) for name in cls.model_fields}
            return cls.model_validate({**whole, **given})
        except ValidationError as e:
            raise InputError(f"{path or 'settings'}: {explained(e)}") from None

    @property
    def on_loopback(self) -> bool:
        """Whether the server listens on loopback only."""
        return self.host in LOOPBACK

    @property
    def saved_points(self) -> Path:
        """The folder of operating points that are saved and that overrides may name."""
        if self.points_folder is not None:
            return self.points_folder
        return self.operating_point.parent if self.operating_point is not None else Path("operating-points")

    def read_keys(self) -> tuple[str, ...]:
        """The clients' API keys; none where the server is open.

        Raises:
            InputError: the variable or file is missing or empty, or an open server is not on loopback.
        """
        if self.keys is None:
            if not self.on_loopback and not self.no_auth:
                raise InputError(
                    f"host {self.host!r} can be reached from elsewhere and no API keys are set. Name them "
                    "(keys: {env: DEMUR_SERVE_KEYS}, or --keys-env), or say --no-auth if anybody may ask"
                )
            return ()
        if self.keys.env is not None:
            where, text = f"environment variable {self.keys.env}", os.environ.get(self.keys.env, "")
        else:
            assert self.keys.file is not None
            where, text = str(self.keys.file), read_text(self.keys.file)
        lines = [part.strip() for line in text.splitlines() for part in line.split("#")[0].split(",")]
        keys = tuple(dict.fromkeys(filter(None, lines)))
        if not keys:
            raise InputError(f"{where} holds no API key; without one nobody could ask anything")
        return keys

    def refusal_text(self, category: str | None) -> str:
        """The operator's words for a refusal of this category; safety's where there are none."""
        if category is not None:
            if (text := self.refusals.get(category) or REFUSALS.get(category)) is not None:
                return text
            if _SELF_HARM.search(category):
                return SELF_HARM_TEXT
        return self.refusals.get("safety") or REFUSALS["safety"]

    def cautions(self, categories: tuple[str, ...]) -> list[str]:
        """What the operator should settle before real use, one sentence each."""
        found = []
        for category in filter(_SELF_HARM.search, dict.fromkeys((*categories, *self.refusals))):
            own = "your text" if category in self.refusals else "the built-in text"
            found.append(
                f"category {category!r}: {own} has not been checked by people who know the field and is not "
                "ready for deployment"
            )
        if self.keys is None:
            found.append("no API keys: whoever reaches this server can use it")
        return found


def explained(e: ValidationError) -> str:
    """Pydantic's findings in one line, without the values that were passed (they may be secret)."""
    rows = []
    for found in e.errors(include_input=False, include_url=False, include_context=False)[:5]:
        where = ".".join(str(part) for part in found["loc"])
        rows.append(f"{where}: {found['msg']}" if where else found["msg"].removeprefix("Value error, "))
    return "; ".join(rows)
