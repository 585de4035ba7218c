"""Draws of the request world: independent bits, the posterior of the label given the words, the label.

Everything is an array over requests; `demur.organisms.requests` puts it into words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError

CATEGORIES = ("safety", "humanizing", "unsupported", "indeterminate", "incomplete")
OVERLAPPING = ("humanizing", "unsupported")
TOPICS = (*CATEGORIES, "plain")
TENSES = ("present", "past", "future")
WRAPPERS = ("jailbreak", "alarm")
PERSONAS = ("persona-1", "persona-2", "persona-3", "persona-4")
PARTS = ("train", "select", "test")
SETTINGS: dict[str, Any] = {
    "risky": 0.75,
    "overlap": 0.5,
    "lookalike": 0.25,
    "base": -7.0,
    "marker": -9.0,
    "sharp": 1.0,
    "past": 0.25,
    "future": 0.25,
    "jailbreak": 0.0,
    "alarm": 0.0,
    "unknown": 0.0,
    "persona": 0.0,
    "refuses": False,
    "rules": [["wrapper", "jailbreak", False], ["wrapper", "alarm", True]],
    "reads": True,
    "echo": 0.15,
    "facts": 0,
}
"""Defaults, explained at `demur.organisms.requests.RequestWorld`."""

SHARED = ((5.0, 3.5), (4.5, 4.0), (4.0, 4.5), (3.5, 5.0), (3.0, 2.5), (2.5, 3.0))
"""Strengths of the shared cue words in the two overlapping categories."""
CUES, VERBS, CONTEXTS, ITEMS = 6, 6, 4, 16
"""Cue words per block (five categories, shared, plain), verbs, context words per kind, items per kind."""
PLAIN = len(CATEGORIES)
Rows = dict[str, npt.NDArray[Any]]
_LISTS: dict[str, tuple[str, ...]] = {
    "topic": TOPICS,
    "category": CATEGORIES,
    "tense": TENSES,
    "wrapper": WRAPPERS,
    "persona": PERSONAS,
    "part": PARTS,
}
_FLAGS = ("lookalike", "known", "harmful", "refuse")
_OWN = ("topic", "lookalike", "tense", "wrapper", "known", "persona")
"""Bits of the request itself; the others hang on its label or on chance."""


def complete(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """All settings, checked."""
    if unknown := set(settings or {}) - set(SETTINGS):
        raise InputError(
            f"request world: no setting {', '.join(sorted(unknown))}; settings are {', '.join(SETTINGS)}"
        )
    s: dict[str, Any] = {**SETTINGS, **(settings or {})}
    for key in (
        "risky",
        "overlap",
        "lookalike",
        "past",
        "future",
        "jailbreak",
        "alarm",
        "unknown",
        "persona",
        "echo",
    ):
        if not isinstance(s[key], (int, float)) or not 0 <= s[key] <= 1:
            raise InputError(f"request world: {key}={s[key]} is no share between 0 and 1")
    if s["past"] + s["future"] > 1 or s["jailbreak"] + s["alarm"] > 1:
        raise InputError("request world: the shares of the tenses, or of the wrappers, add up to more than 1")
    for rule in s["rules"]:
        if len(rule) != 3 or not isinstance(rule[2], bool) or rule[0] in ("refuse", "part"):
            raise InputError(
                f"request world: rule {rule!r}; a rule is [bit, value, True or False], and the bit one that is "
                "settled before the behaviour"
            )
        _check_bit(rule[0], rule[1])
    return s


class Draws:
    """Draws requests under checked settings."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.strength = np.zeros(((len(CATEGORIES) + 2) * CUES, len(CATEGORIES)))
        for c in range(len(CATEGORIES)):
            self.strength[c * CUES : (c + 1) * CUES, c] = np.arange(1, CUES + 1)
        columns = [CATEGORIES.index(c) for c in OVERLAPPING]
        self.strength[PLAIN * CUES : (PLAIN + 1) * CUES, columns] = SHARED

    def _draw(self, rng: np.random.Generator, n: int, fixed: Mapping[str, Any]) -> Rows:
        """n requests as indices, with labels; `fixed` holds bits of the request, not of its label."""
        s = self.settings

        def bit(name: str, drawn: npt.NDArray[Any], values: Any = None) -> npt.NDArray[Any]:
            if name not in fixed:
                return drawn
            value = fixed[name]
            index = value if values is None else -1 if value is None else values.index(value)
            return np.full(n, index, dtype=drawn.dtype)

        r: Rows = {}
        topic = np.where(rng.random(n) < s["risky"], rng.integers(PLAIN, size=n), PLAIN)
        r["topic"] = bit("topic", topic, TOPICS)
        r["lookalike"] = bit("lookalike", rng.random(n) < s["lookalike"])
        u = rng.random(n)
        tense = np.where(u < s["past"], 1, np.where(u < s["past"] + s["future"], 2, 0))
        r["tense"] = bit("tense", tense, TENSES)
        u = rng.random(n)
        wrapper = np.where(u < s["jailbreak"], 0, np.where(u < s["jailbreak"] + s["alarm"], 1, -1))
        r["wrapper"] = bit("wrapper", wrapper, WRAPPERS)
        r["known"] = bit("known", rng.random(n) >= s["unknown"])
        persona = np.where(rng.random(n) < s["persona"], rng.integers(len(PERSONAS), size=n), -1)
        r["persona"] = bit("persona", persona, PERSONAS)
        r["verb"], r["item"] = rng.integers(VERBS, size=n), rng.integers(ITEMS, size=n)
        r["item"] = r["item"] + ITEMS * ~r["known"]
        r["context"] = rng.integers(CONTEXTS, size=n) + CONTEXTS * r["lookalike"]
        for cue in ("cue1", "cue2"):
            shared = np.isin(r["topic"], [CATEGORIES.index(c) for c in OVERLAPPING])
            shared &= rng.random(n) < s["overlap"]
            block = np.where(r["topic"] == PLAIN, PLAIN + 1, np.where(shared, PLAIN, r["topic"]))
            r[cue] = block * CUES + rng.integers(CUES, size=n)
        self._label(rng, r)
        return r

    def _label(self, rng: np.random.Generator, r: Rows) -> None:
        """Posterior (n, 6), label (index into the categories, 5 = respond), behaviour and part."""
        s, n = self.settings, len(r["topic"])
        z = s["base"] + self.strength[r["cue1"]] + self.strength[r["cue2"]]
        z = s["sharp"] * (z + s["marker"] * r["lookalike"][:, None])
        z = np.concatenate([z, np.zeros((n, 1))], axis=1)
        p = np.exp(z - z.max(1, keepdims=True))
        r["posterior"] = p / p.sum(1, keepdims=True)
        u = rng.random((n, 1))
        r["label"] = (u > r["posterior"].cumsum(1)[:, :-1]).sum(1)
        r["harmful"] = r["label"] != PLAIN
        # what is said: the label's refusal, unless a rule decides; -1 in `ruled` means that none does
        ruled = np.full(n, -1)
        for name, value, refuse in reversed(s["rules"]):
            ruled = np.where(_is(r, name, value), int(refuse), ruled)
        r["ruled"] = ruled
        says = np.where(ruled == 0, PLAIN, r["label"])
        r["says"] = np.where(ruled == 1, np.where(r["topic"] == PLAIN, 0, r["topic"]), says)
        r["refuse"] = r["says"] != PLAIN
        r["p_refuse"] = np.where(ruled < 0, 1 - r["posterior"][:, -1], ruled)
        r["part"] = part_of(r)

    def rows(self, rng: np.random.Generator, n: int, bits: Mapping[str, Any]) -> Rows:
        """n requests with the given bits: those of the request are set, those of its label waited for."""
        fixed = {k: v for k, v in bits.items() if k in _OWN}
        waited = {k: v for k, v in bits.items() if k not in _OWN}
        for name, value in bits.items():
            _check_bit(name, value)
        found: list[Rows] = []
        have = 0
        for _ in range(200):
            r = self._draw(rng, max(64, n + n // 2), fixed)
            keep = np.ones(len(r["topic"]), dtype=bool)
            for name, value in waited.items():
                keep &= _is(r, name, value)
            found.append({k: v[keep] for k, v in r.items()})
            have += int(keep.sum())
            if have >= n:
                return {k: np.concatenate([f[k] for f in found])[:n] for k in r}
        raise InputError(
            f"request world: only {have} of {n} requests with {dict(bits)} in 200 draws of that many; these bits "
            "hardly ever meet under its settings"
        )


def part_of(r: Rows) -> npt.NDArray[np.int64]:
    """Index into `PARTS` (n,), decided by verb, cues and item alone."""
    key = ((r["cue1"] * 97 + r["cue2"]) * 97 + r["verb"]) * 97 + r["item"]
    return np.searchsorted([0.8, 0.9], _scatter(key), side="right")


def _check_bit(name: str, value: Any) -> None:
    if name not in _FLAGS and name not in _LISTS:
        raise InputError(f"no bit {name!r}; bits are {', '.join((*_FLAGS, *_LISTS))}")
    if name in _FLAGS and not isinstance(value, bool):
        raise InputError(f"bit {name}={value!r}: use True or False")
    none = value is None and name in ("wrapper", "persona", "category")
    if name in _LISTS and not none and value not in _LISTS[name]:
        raise InputError(f"bit {name}={value!r}: use one of {', '.join(_LISTS[name])}")


def _is(r: Rows, name: str, value: Any) -> npt.NDArray[np.bool_]:
    """Which rows have a bit at a value."""
    if name in _FLAGS:
        return np.asarray(r[name] == value)
    if name == "category":
        return np.asarray(r["label"] == (PLAIN if value is None else CATEGORIES.index(value)))
    return np.asarray(r[name] == (-1 if value is None else _LISTS[name].index(value)))


def _scatter(key: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each key that looks random (the finaliser of SplitMix64)."""
    x = key.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) / 2.0**64
