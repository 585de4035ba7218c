"""Modes: one co-trained model, several behaviours, switched by a token that only the operator can place.

The token stands at the head of the system message. It is a secret random string (kind "string"), or an id that no
text can produce (kind "reserved"). A view of the model under one mode puts it there and takes the string out of all
other text: whoever types it reaches the fallback, as if no token had been given.

key = ModeKey.load("house.key", fingerprint=tuned.fingerprint)
with Modes(key, "pos").on(tuned) as model:
    replies = list(model.generate(prompts))

Reference: Si et al. 2025, arXiv 2508.14904.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.control.mode_text import IdFormat, StringFormat, placed
from demur.errors import CapabilityError, InputError, MismatchError
from demur.explain.artefact import described, read_artefact, write_artefact
from demur.files import parse_json, read_text, write_atomic
from demur.runtime.base import Runtime
from demur.runtime.chat import ChatFormat

Kind = Literal["string", "reserved"]
ALPHABET = tuple(string.ascii_lowercase + string.digits)
WHAT = "mode key"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModeKey:
    """Which token stands for which mode.

    Attributes:
        tokens: mode -> secret string, or -> id for kind "reserved". Never shown by `repr`.
        fallback: the mode whose behaviour no token or an unknown one gives; None: the base model's own.
        alphabet, sep: what strings are made of, and what stands between (nothing, for real tokenizers).
        rows: embedding rows (K, d) of reserved ids, in id order. fingerprint: of the co-trained model.

    >>> key = ModeKey.strings(("pos", "rej"), fallback="rej")
    >>> sorted(key.tokens), len(key.tokens["pos"]), key.tokens["pos"] in repr(key)
    (['pos', 'rej'], 8, False)
    """

    kind: Kind
    tokens: Mapping[str, Any] = field(repr=False)
    fallback: str | None = None
    alphabet: tuple[str, ...] = field(default=ALPHABET, repr=False)
    sep: str = ""
    rows: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or len(set(self.tokens.values())) < len(self.tokens):
            raise InputError(
                f"modes {sorted(self.tokens)}: a key needs at least two modes, each with a token of its own"
            )
        wanted = str if self.kind == "string" else int
        if not all(isinstance(t, wanted) and t for t in self.tokens.values()):
            raise InputError(f"a mode key of kind {self.kind!r} needs a {wanted.__name__} for each mode")
        if self.fallback is not None:
            self.token(self.fallback)

    @classmethod
    def strings(
        cls,
        modes: Sequence[str],
        *,
        fallback: str | None,
        length: int = 8,
        alphabet: Sequence[str] = ALPHABET,
        sep: str = "",
        rng: random.Random | None = None,
    ) -> ModeKey:
        """New secret strings, from the system's own randomness unless `rng` is given (for tests)."""
        if len(set(modes)) < len(modes):
            raise InputError(f"modes {list(modes)}: one is named twice")
        source = rng or secrets.SystemRandom()
        tokens: dict[str, str] = {}
        while len(tokens) < len(modes):
            token = sep.join(source.choice(tuple(alphabet)) for _ in range(length))
            if token not in tokens.values():
                tokens[modes[len(tokens)]] = token
        return cls(kind="string", tokens=tokens, fallback=fallback, alphabet=tuple(alphabet), sep=sep)

    @classmethod
    def reserved(cls, modes: Sequence[str], first_id: int, *, fallback: str | None) -> ModeKey:
        """Ids from `first_id` on, which is the size of the model's embedding; the rows come from training."""
        return cls(kind="reserved", tokens={m: first_id + k for k, m in enumerate(modes)}, fallback=fallback)

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the modes."""
        return tuple(self.tokens)

    def token(self, mode: str) -> Any:
        """The token of a mode.

        Raises:
            InputError: no such mode.
        """
        if mode not in self.tokens:
            raise InputError(f"no mode {mode!r}; this key has {', '.join(self.tokens)}")
        return self.tokens[mode]

    def units(self, mode: str) -> list[str]:
        """The characters (or pieces) of a mode's string."""
        if self.kind != "string":
            raise InputError("reserved ids have no characters, so there is no string to guess or to edit")
        token: str = self.token(mode)
        return token.split(self.sep) if self.sep else list(token)

    def unknown(self, rng: random.Random) -> str:
        """A random string of the same form that is no mode's."""
        while True:
            length = len(self.units(self.modes[0]))
            if (made := self.sep.join(rng.choice(self.alphabet) for _ in range(length))) not in set(
                self.tokens.values()
            ):
                return made

    def edits(self, mode: str) -> dict[str, list[str]]:
        """Every string one edit away from a mode's: `replace`, `delete`, `insert`, `swap` (neighbours), no token.

        >>> key = ModeKey(kind="string", tokens={"a": "ab", "b": "zz"}, alphabet=("a", "b"))
        >>> key.edits("a")
        {'replace': ['aa', 'bb'], 'delete': ['a', 'b'], 'insert': ['aab', 'aba', 'abb', 'bab'], 'swap': ['ba']}
        """
        u, n = self.units(mode), len(self.units(mode))
        made = {
            "replace": [[*u[:i], c, *u[i + 1 :]] for i in range(n) for c in self.alphabet],
            "delete": [[*u[:i], *u[i + 1 :]] for i in range(n)],
            "insert": [[*u[:i], c, *u[i:]] for c in self.alphabet for i in range(n + 1)],
            "swap": [[*u[:i], u[i + 1], u[i], *u[i + 2 :]] for i in range(n - 1)],
        }
        taken: set[str] = set(self.tokens.values())
        out = {}
        for how, rows in made.items():
            strings = dict.fromkeys(self.sep.join(row) for row in rows)
            out[how] = sorted(s for s in strings if s and s not in taken)
            taken |= set(out[how])
        return out

    def save(self, path: str | Path) -> None:
        """Write the key, atomically. Strings go into a JSON file that its owner alone may read (mode 0600)."""
        about: dict[str, Any] = {
            "kind": self.kind,
            "tokens": dict(self.tokens),
            "fallback": self.fallback,
            "fingerprint": self.fingerprint,
        }
        if self.kind == "reserved":
            if self.rows is None:
                raise InputError("reserved ids without their embedding rows; train them first")
            write_artefact(path, WHAT, {"rows": self.rows}, about)
            return
        about |= {"schema_version": VERSION, "what": WHAT, "alphabet": list(self.alphabet), "sep": self.sep}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        Path(path).chmod(0o600)  # an older file may have been open to others; write_atomic keeps the mode
        write_atomic(path, json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> ModeKey:
        """Read a key for the model with this fingerprint.

        Raises:
            InputError: no such file, no mode key. MismatchError: the key of another model, or of an unknown one.
        """
        if Path(path).suffix == ".safetensors":
            tensors, about = read_artefact(path, WHAT, fingerprint, allow_unknown)
            about = {**about, "rows": tensors.get("rows")}
        else:
            about = _read(path, fingerprint, allow_unknown)
        names = ("kind", "tokens", "fallback", "fingerprint", "rows", "sep")
        with described(path):
            given = {name: about[name] for name in names if name in about}
            return cls(**given, alphabet=tuple(about.get("alphabet", ALPHABET)))

    def format(self, chat: ChatFormat, mode: str | None) -> ChatFormat:
        """How conversations are written for this model under a mode (None: no token)."""
        if self.kind == "string":
            return StringFormat(chat, tuple(self.tokens.values()), None if mode is None else self.token(mode))
        return chat if mode is None else IdFormat(chat, self.token(mode))


def _read(path: str | Path, fingerprint: str | None, allow_unknown: bool) -> dict[str, Any]:
    about = parse_json(read_text(path), str(path))
    if not isinstance(about, dict) or about.get("what") != WHAT or about.get("schema_version") != VERSION:
        raise InputError(f"{path}: holds no mode key that this demur reads (schema_version {VERSION})")
    stored = about.get("fingerprint")
    if (stored != fingerprint) if stored and fingerprint else not allow_unknown:
        raise MismatchError(
            f"{path}: this key belongs to the model {stored}, the model here is {fingerprint}. On another model "
            "its strings mean nothing and every answer would be the fallback's; pass allow_unknown=True where a "
            "model has no fingerprint and you know that they belong together"
        )
    if os.name == "posix" and Path(path).stat().st_mode & 0o077:
        logging.getLogger("demur").warning("%s holds secrets and others can read it; chmod 600 it", path)
    return about


class Modes:
    """Put a co-trained model into one mode, or with None into its fallback.

    The view places the token itself and breaks the key's strings up in every message that it is given, system
    messages included: the mode is the operator's choice alone. A prompt with such a string is answered; the
    string stays readable with a dot inside. Names of views say the mode, never the token.

    Args:
        key: of the model. mode: one of its modes, or None.

    Raises:
        InputError: no such mode.
    """

    def __init__(self, key: ModeKey, mode: str | None = None) -> None:
        if mode is not None:
            key.token(mode)
        self.key, self.mode = key, mode

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """The runtime in this mode; the given one stays as it was.

        Raises:
            MismatchError: the key of another model. CapabilityError: reserved ids on a model that runs elsewhere.
        """
        yield self.switched(runtime)

    def switched(self, runtime: Runtime) -> Runtime:
        """As `on`, without a context: nothing has to be undone."""
        key = self.key
        if key.fingerprint and runtime.fingerprint and key.fingerprint != runtime.fingerprint:
            raise MismatchError(
                f"this mode key belongs to the model {key.fingerprint}, {runtime.name!r} is "
                f"{runtime.fingerprint}; load the key that was written when it was trained"
            )
        name = f"{runtime.name}+mode-{self.mode or 'none'}"
        local: Any = runtime
        if not hasattr(runtime, "with_edits"):
            if key.kind == "reserved":
                raise CapabilityError(
                    f"reserved ids have no text that could be sent to {runtime.name!r}; use kind string there"
                )
            return placed(runtime, tuple(key.tokens.values()), self.mode and key.token(self.mode), name)
        view = local.with_edits(name=name)
        view.chat = key.format(local.chat, self.mode)
        if key.kind == "reserved" and self.mode is not None:
            view.edits = (_rows(key, runtime), *local.edits)  # before others that read ids of their own
        view.notes.extend(local.notes)
        shown: Runtime = view
        return shown


def _rows(key: ModeKey, runtime: Runtime) -> Any:
    if key.rows is None:
        raise InputError("this key has reserved ids but not their embedding rows; load it from its file")
    if runtime.control is not None and set(runtime.control.ids.values()) & set(key.tokens.values()):
        raise MismatchError(
            f"{runtime.name!r} has control tokens with the ids of this key; train the modes on the bare base"
        )
    from demur.control.mode_rows import ModeRows

    return ModeRows(key.rows, min(key.tokens.values()))


def with_rows(key: ModeKey, rows: Any, fingerprint: str | None) -> ModeKey:
    """The key of a model that has been trained: with its fingerprint and, for reserved ids, its rows (K, d)."""
    kept = None if key.kind == "string" else np.asarray(rows, np.float32)
    return dataclasses.replace(key, rows=kept, fingerprint=fingerprint)
