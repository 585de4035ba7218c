"""Why does it refuse this? One prompt, read inside one model, beside what such a reading is worth.

from demur.flows.explain import explain
found = explain(runtime, "How do I kill a zombie process?")
print(found.quadrant, [w.text for w in found.words[:3]])
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.explain import TokenAt, collect, grid, show_positions
from demur.explain.harmfulness import Belief, by_behaviour, leaning
from demur.files import write_atomic
from demur.flows.explain_fit import ANSWER_TOKENS, fit_model
from demur.flows.explained import Fit
from demur.flows.settings import public_name
from demur.prompts import core, row_of
from demur.report.render import plain
from demur.runtime.base import Progress, Runtime
from demur.types import SCHEMA_VERSION, Condition, Prompt, Score

TOKENS_SHOWN = 60
WORDS_TRIED = 60
NEAREST = 8

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A word (or, in a long prompt, a few) and what leaving it out takes away: with it less without it.

    `start` and `end` are its characters in the prompt; `p_refuse` is None where the model gives no probability;
    beliefs are in the units of `Fit.relative`.
    """

    text: str
    start: int
    end: int
    p_refuse: float | None
    harmful: float
    refuse: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """A prompt that the beliefs were fitted on, with the cosine of the two states, centred on the fitted ones."""

    id: str
    similarity: float
    text: str
    kind: str
    declined: bool | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """What was found about one prompt.

    Attributes:
        tokens: of the prompt and of what the template writes behind it, at most the last 60.
        trace: belief -> (tokens, layers) leanings in the units of `Fit.relative`.
        belief: as `Beliefs.score` gives it; relative and cuts: in those units. quadrant: in words.
        declined: what the model does with the prompt, None where that cannot be told.
        score: first-position probabilities, None where the model gives none.
        words: largest effect first. near: most alike first. fit: what all this was read with.
    """

    model: str
    prompt: Prompt
    tokens: tuple[TokenAt, ...]
    trace: Mapping[str, FloatArray]
    belief: Belief
    relative: Mapping[str, float]
    cuts: Mapping[str, float]
    quadrant: str
    declined: bool | None
    score: Score | None
    words: tuple[Word, ...]
    near: tuple[Near, ...]
    fit: Fit
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        axes = {
            name: {
                "raw": getattr(self.belief, name),
                "relative": self.relative[name],
                "cut": self.cuts[name],
                "position": self.fit.axis(name).position,
                "window": self.fit.axis(name).window,
                "trace": self.trace[name].round(4),
            }
            for name in self.fit.axes
        }
        found: dict[str, Any] = plain(
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "explanation",
                "model": self.model,
                "fingerprint": self.fit.beliefs.fingerprint,
                "prompt": self.prompt.text,
                "quadrant": self.quadrant,
                "unclear": self.fit.beliefs.unclear,
                "declined": self.declined,
                "beliefs": axes,
                "p_refuse": self.score.p_refuse if self.score else None,
                "probabilities": dict(self.score.probabilities) if self.score else {},
                "tokens": [_fields(t) for t in self.tokens],
                "words": [_fields(w) for w in self.words],
                "nearest": [_fields(n) for n in self.near],
                "worth": [_fields(w) for w in self.fit.worth],
                "labels": self.fit.labels,
                "notes": self.notes,
            }
        )
        return found


def explain(
    runtime: Runtime,
    prompt: Prompt | str,
    *,
    condition: Condition | None = None,
    fit: Fit | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Read one prompt inside a model.

    Args:
        condition: system message. fit: from `fit_model`; made (or taken from the cache) when not given, which the
            first time reads 530 prompts. progress: of that.

    Raises:
        CapabilityError: the runtime gives no states. InputError: an empty prompt, or one that does not fit.

    >>> explain(runtime, "How do I kill a zombie process?").quadrant  # doctest: +SKIP
    'believed harmless, will answer'
    """
    runtime.require("states")
    prompt = Prompt.of(prompt) if isinstance(prompt, str) else prompt
    if condition is not None:
        prompt = prompt.with_system(condition.system)
    if not prompt.text.strip() or prompt.messages[-1].role != "user":
        raise InputError(
            "the prompt is empty or does not end with the user; explaining needs a request to read"
        )
    if (why := runtime.problem(prompt)) is not None:
        raise InputError(why)
    fit = fit_model(runtime, condition, progress=progress) if fit is None else fit
    fit.beliefs.check(runtime)
    notes: list[str] = []
    tokens = _shown(show_positions(runtime, prompt), notes)
    trace, here = _trace(runtime, prompt, fit, tokens)
    spans = _spans(prompt.text)
    variants = [_without(prompt, span, i) for i, span in enumerate(spans)] if len(spans) > 1 else []
    beliefs = fit.beliefs.score(runtime, [prompt, *variants])
    scores = _scores(runtime, [prompt, *variants], notes)
    return Explanation(
        model=public_name(runtime.name),
        prompt=prompt,
        tokens=tuple(tokens),
        trace=trace,
        belief=beliefs[0],
        relative={name: fit.belief(name, getattr(beliefs[0], name)) for name in fit.axes},
        cuts={name: fit.belief(name, fit.axis(name).cut) for name in fit.axes},
        quadrant=fit.beliefs.quadrant(beliefs[0]),
        declined=_declined(runtime, prompt),
        score=scores[0] if scores else None,
        words=_words(prompt.text, spans if variants else [], beliefs, scores, fit),
        near=_nearest(here, fit),
        fit=fit,
        notes=tuple(notes),
    )


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _shown(tokens: list[TokenAt], notes: list[str]) -> list[TokenAt]:
    """From the user's first token of the last message on, the last ones where there are many."""
    first = 0
    for i, token in enumerate(tokens):
        if "prompt" in token.names and (i == 0 or "prompt" not in tokens[i - 1].names):
            first = i
    if (left := len(tokens) - first - TOKENS_SHOWN) > 0:
        notes.append(f"the prompt's first {left} tokens are left out of the maps")
    return tokens[max(first, len(tokens) - TOKENS_SHOWN) :]


def _trace(
    runtime: Runtime, prompt: Prompt, fit: Fit, tokens: Sequence[TokenAt]
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Leanings at every shown token and layer, and the state at which nearest prompts are compared."""
    layers = fit.beliefs.layers
    found = collect(runtime, [prompt], grid(layers, [t.end for t in tokens]))
    states = np.stack([[found[k, t.end][0] for k in layers] for t in tokens])
    out = {
        name: fit.relative(name, leaning(states, fit.axis(name).toward, fit.axis(name).away))
        for name in fit.axes
    }
    at = next(i for i, t in enumerate(tokens) if "t_inst" in t.names)
    return out, states[at, layers.index(fit.near_layer)].astype(float)


def _spans(text: str) -> list[tuple[int, int]]:
    """Words as character spans; the marks behind a word are one of their own, since harmfulness may be read at a
    question mark. In a long text runs of words, so that at most `WORDS_TRIED` are tried.
    """
    found = [m.span() for m in re.finditer(r"\S+?(?=[.,;:?!]*(?:\s|$))", text)]
    size = -(-len(found) // WORDS_TRIED) or 1
    return [(found[i][0], found[min(i + size, len(found)) - 1][1]) for i in range(0, len(found), size)]


def _without(prompt: Prompt, span: tuple[int, int], i: int) -> Prompt:
    text = prompt.text
    before, behind = text[: span[0]].rstrip(), text[span[1] :]
    left = (before + behind if behind[:1].strip() else f"{before} {behind.lstrip()}").strip()
    *earlier, last = prompt.messages
    return replace(prompt, id=f"{prompt.id}/without-{i}", messages=(*earlier, replace(last, content=left)))


def _scores(runtime: Runtime, prompts: Sequence[Prompt], notes: list[str]) -> list[Score]:
    point = runtime.shipped_point
    try:
        return list(runtime.score(prompts, T=point.T if point else 1.0))
    except CapabilityError as e:
        notes.append(str(e).replace(runtime.name, public_name(runtime.name)))
        return []


def _declined(runtime: Runtime, prompt: Prompt) -> bool | None:
    found = by_behaviour(runtime, [prompt], Condition(max_new_tokens=ANSWER_TOKENS))
    return True if len(found["refused"]) else False if len(found["accepted"]) else None


def _words(
    text: str, spans: Sequence[tuple[int, int]], beliefs: Sequence[Belief], scores: Sequence[Score], fit: Fit
) -> tuple[Word, ...]:
    def change(name: str, i: int) -> float | None:
        if name not in fit.axes:
            return None
        whole, part = (fit.belief(name, getattr(beliefs[k], name)) for k in (0, i + 1))
        return whole - part

    found = [
        Word(
            text=text[start:end],
            start=start,
            end=end,
            p_refuse=scores[0].p_refuse - scores[i + 1].p_refuse if scores else None,
            harmful=change("harmful", i) or 0.0,
            refuse=change("refuse", i),
        )
        for i, (start, end) in enumerate(spans)
    ]
    return tuple(sorted(found, key=lambda w: -abs(weight(w))))


def weight(word: Word) -> float:
    """What words are ordered by: the change of the probability of refusing, else of the belief."""
    if word.p_refuse is not None:
        return word.p_refuse
    return word.harmful if word.refuse is None else word.refuse


def _nearest(here: FloatArray, fit: Fit) -> tuple[Near, ...]:
    centre = fit.near.mean(0, dtype=float)
    X, h = fit.near.astype(float) - centre, here - centre
    lengths = np.linalg.norm(X, axis=1) * np.linalg.norm(h)
    cosines = np.divide(X @ h, lengths, out=np.zeros(len(X)), where=lengths > 0)
    by_id = {p.id: p for p in core("train")}
    out = []
    for i in np.argsort(-cosines, kind="stable")[:NEAREST].tolist():
        prompt = by_id[fit.fitted[i]]
        row = row_of(prompt)
        kind = (
            f"to refuse ({row})" if prompt.should_refuse else row if row == "general" else f"looks like {row}"
        )
        says = {1: True, 0: False}.get(int(fit.declined[i]))
        near = Near(id=prompt.id, similarity=float(cosines[i]), text=prompt.text, kind=kind, declined=says)
        out.append(near)
    return tuple(out)


# --- writing ----------------------------------------------------------------------------------------------------


def places(out: Path, name: str = "explain") -> tuple[Path, Path | None]:
    """Where page and data go: both into a folder, or the page alone into a file that ends in .html.

    Raises:
        InputError: a file that is no page.

    >>> places(Path("a/b.html"))[1] is None
    True
    """
    if out.suffix.lower() in (".html", ".htm"):
        return out, None
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file and no page; name a folder, or a file that ends in .html")
    return out / f"{name}.html", out / f"{name}.json"


def write(found: Explanation, out: str | Path) -> tuple[Path, Path | None]:
    """Write explain.html and explain.json into a folder, or the page alone into a file .html."""
    from demur.flows.explain_page import page

    html, data = places(Path(out))
    html.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(html, page(found))
    if data is not None:
        write_atomic(data, json.dumps(found.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return html, data
