"""An explanation as text and as a page: what it says, and beside it what such a reading is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from demur.explain import TokenAt
from demur.explain.harmfulness import AXES
from demur.flows.explain import Explanation, Word, weight
from demur.flows.explained import Worth
from demur.report.explainpage import PageView, Shaded, to_html
from demur.report.layerplots import layer_map
from demur.report.render import percent
from demur.report.view import Figure, Section
from demur.types import Report, Table

WORDS_SHOWN = 10
TEXT_SHOWN = 110
UNIT = (
    "Values are in standard deviations of the fitted prompts within a side; 0 is half way between the means of "
    "the two sides."
)
TITLES = {"harmful": "Harmfulness", "refuse": "Refusing"}
TESTED = {
    "harmful": "harmful against harmless look-alikes",
    "refuse": "prompts that it declines against those it answers",
}


def page(found: Explanation) -> str:
    """The page of an explanation."""
    return to_html(view(found))


def report(found: Explanation) -> Report:
    """The explanation for terminals and as data."""
    return Report(
        title=f"{headline(found)}. {detail(found)}",
        tables=(
            belief_table(found),
            *filter(None, (token_table(found),)),
            *([_word_table(found)] if found.words else []),
            _near_table(found),
            _trace_table(found),
            worth_table(found.fit.worth),
        ),
        values=found.to_dict(),
        notes=(*cautions(found.fit.worth), *found.notes),
    )


def view(found: Explanation) -> PageView:
    """The explanation as a page."""
    return PageView(
        kicker="Why this decision",
        title=found.model,
        verdict=headline(found),
        detail=detail(found),
        text=shaded(found),
        legend=_legend(found),
        warnings=cautions(found.fit.worth),
        facts=_facts(found),
        sections=(_beliefs(found), _maps(found), _word_section(found), _near_section(found)),
    )


# --- words ------------------------------------------------------------------------------------------------------


def headline(found: Explanation) -> str:
    """The explanation in one clause."""
    if found.fit.beliefs.unclear is None:
        return found.quadrant[0].upper() + found.quadrant[1:]
    harmful = found.relative["harmful"] >= found.cuts["harmful"]
    return f"Believed {'harmful' if harmful else 'harmless'}"


def detail(found: Explanation) -> str:
    """What the model does with the prompt, in numbers."""
    does = {True: "The model declines this prompt", False: "The model answers this prompt", None: ""}
    parts = [does[found.declined]]
    if (score := found.score) is not None:
        what = (
            "probability of refusing"
            if score.kind == "control"
            else "probability that it opens like a refusal"
        )
        parts.append(f"{what} {percent(score.p_refuse)}")
    text = ", ".join(p for p in parts if p)
    out = text[0].upper() + text[1:] + "." if text else ""
    if (why := found.fit.beliefs.unclear) is not None:
        reason = found.fit.labels if found.fit.beliefs.refuse is None else why
        out += f" Whether it is about to refuse was not read: {reason}."
    return out.strip()


def cautions(worth: Sequence[Worth]) -> tuple[str, ...]:
    """One line for each belief that does no better than the words of the prompts."""
    return tuple(
        f"{TITLES[w.axis]}: on held-out prompts this reading does no better than a bag of words (AUROC "
        f"{w.auroc:.2f} against {w.words:.2f}; gain {w.gain:+.2f} [{w.gain_low:+.2f} to {w.gain_high:+.2f}], n = "
        f"{w.positive} + {w.negative}). It may be following the topic."
        for w in worth
        if not w.beats_words
    )


def _facts(found: Explanation) -> tuple[tuple[str, str], ...]:
    fit = found.fit
    rows = [
        ("fingerprint", (fit.beliefs.fingerprint or "unknown")[:12]),
        ("fitted on", f"{len(fit.fitted)} prompts"),
    ]
    rows += [(TITLES[w.axis].lower(), f"AUROC {w.auroc:.2f}, bag of words {w.words:.2f}") for w in fit.worth]
    return tuple(rows)


def _layers(window: tuple[int, ...]) -> str:
    return f"{window[0]}" if len(window) == 1 else f"{window[0]} to {window[-1]}"


# --- tables -----------------------------------------------------------------------------------------------------


def belief_table(found: Explanation) -> Table:
    """The beliefs about this prompt."""
    rows = []
    for name in found.fit.axes:
        axis, value, cut = found.fit.axis(name), found.relative[name], found.cuts[name]
        says = {"harmful": ("harmful", "harmless"), "refuse": ("will refuse", "will answer")}[name][
            value < cut
        ]
        shown = f"{value:+.2f}", f"{cut:+.2f}"
        means = (f"{m:+.2f}" for m in found.fit.usual(name))
        rows.append((TITLES[name].lower(), *shown, says, *means, axis.position, _layers(axis.window)))
    columns = (
        "belief",
        "value",
        "cut",
        "says",
        "mean of harmful / declined",
        "mean of others",
        "read at",
        "layers",
    )
    return Table("This prompt", columns, tuple(rows), UNIT)


def token_table(found: Explanation) -> Table | None:
    """First-position probabilities by control token."""
    if found.score is None or not found.score.probabilities:
        return None
    rows = sorted(found.score.probabilities.items(), key=lambda kv: -kv[1])
    return Table("First position", ("control token", "probability"), tuple(rows))


def worth_table(worth: Sequence[Worth]) -> Table:
    """What the beliefs are worth on prompts of core/test."""
    columns = ("belief", "tested on", "AUROC", "bag of words", "gain", "random labels")
    rows = tuple(
        (
            TITLES[w.axis].lower(),
            f"{TESTED[w.axis]}, {w.positive} + {w.negative}",
            f"{w.auroc:.2f} [{w.low:.2f}–{w.high:.2f}]",
            f"{w.words:.2f}",
            f"{w.gain:+.2f} [{w.gain_low:+.2f} to {w.gain_high:+.2f}]",
            f"{w.random:.2f} ({w.random_low:.2f}–{w.random_high:.2f})",
        )
        for w in worth
    )
    return Table(
        "What these readings are worth on held-out prompts",
        columns,
        rows,
        "Fitted on core/train, layers chosen on core/select, cuts set on core/calibrate, tested on core/test. "
        "In brackets 95% intervals, for random labels the middle 95% of 20 draws.",
    )


def _word_table(found: Explanation) -> Table:
    fit, rows = found.fit, []
    for w in found.words[:WORDS_SHOWN]:
        p = None if w.p_refuse is None else f"{100 * w.p_refuse:+.1f}"
        rows.append((w.text, p, f"{w.harmful:+.2f}", None if w.refuse is None else f"{w.refuse:+.2f}"))
    columns = ("word", "probability of refusing, points", "harmfulness", "refusing")
    used = [0, *([1] if found.score else []), 2, *([3] if "refuse" in fit.axes else [])]
    return Table(
        "Words that matter most",
        tuple(columns[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in rows),
        "What the whole prompt has more than the prompt without the word; below 0 the word speaks against it. "
        "A prompt with a hole in it is an odd prompt, so small changes mean nothing.",
    )


def _near_table(found: Explanation) -> Table:
    does = {True: "declines", False: "answers", None: None}
    rows = tuple(
        (n.id, f"{n.similarity:.2f}", n.kind, does[n.declined], _cut(n.text, TEXT_SHOWN)) for n in found.near
    )
    return Table(
        "Nearest prompts among those it was fitted on",
        ("prompt", "cosine", "what it is", "the model", "text"),
        rows,
        f"Cosine of the states at t_inst, layer {found.fit.near_layer}, less the mean of the fitted ones.",
    )


def _trace_table(found: Explanation) -> Table:
    names = found.fit.axes
    keep = {n: [found.fit.beliefs.layers.index(k) for k in found.fit.axis(n).window] for n in names}
    rows = tuple(
        (token_label(t), *(f"{found.trace[n][i, keep[n]].mean():+.2f}" for n in names))
        for i, t in enumerate(found.tokens)
    )
    return Table("Along the tokens", ("token", *(TITLES[n].lower() for n in names)), rows, _TRACE_NOTE)


_TRACE_NOTE = (
    "Mean over each belief's layers. The readers were fitted at t_inst (harmfulness) and t_post (refusing); "
    "at other tokens they say how much the state there resembles those."
)


def _cut(text: str, n: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= n else flat[: n - 1] + "…"


def token_label(token: TokenAt) -> str:
    """A token in a narrow column, with the name of its position."""
    text = " ".join(token.text.split()) or {"\n": "⏎", " ": "␣"}.get(token.text, repr(token.text)[1:-1])
    name = next((n for n in token.names if n in ("t_inst", "t_post")), None)
    return f"{_cut(text, 12)} · {name}" if name else text


# --- sections ---------------------------------------------------------------------------------------------------


def shaded(found: Explanation) -> tuple[Shaded, ...]:
    """The prompt with its words coloured by what leaving them out takes away."""
    text, out, at = found.prompt.text, [], 0
    most = max((abs(weight(w)) for w in found.words), default=0.0)
    floor = 0.005 if found.score else 0.02
    for w in sorted(found.words, key=lambda w: w.start):
        strength = weight(w) / most if most > floor else 0.0
        out += [Shaded(text=text[at : w.start]), Shaded(text=w.text, strength=strength, hint=_hint(w))]
        at = w.end
    return (*out, Shaded(text=text[at:]))


def _hint(word: Word) -> str:
    if word.p_refuse is None:
        return f"{weight(word):+.2f}"
    return f"{100 * word.p_refuse:+.1f} points"


def _legend(found: Explanation) -> str:
    if not found.words:
        return ""
    if found.score is not None:
        what = "the probability of refusing"
    else:
        what = "the belief that it will refuse" if "refuse" in found.fit.axes else "the harmfulness it reads"
    return f"Teal words raise {what}, orange ones lower it: each was left out once. The strongest is full colour."


def _beliefs(found: Explanation) -> Section:
    tables = [belief_table(found), *filter(None, (token_table(found),)), worth_table(found.fit.worth)]
    lead = (
        "Two readings of the state before the answer begins. Each leans to the nearer of two mean states: of "
        "harmful and harmless prompts at the end of the request, and of declined and answered ones where the "
        "answer starts."
    )
    if found.fit.beliefs.refuse is None:
        lead = (
            "A reading of the state at the end of the request, before the answer begins: it leans to the nearer of "
            "the mean states of harmful and of harmless prompts."
        )
    return Section(
        slug="beliefs", title="What it believes", lead=lead, tables=tuple(tables), notes=found.notes
    )


def _maps(found: Explanation) -> Section:
    labels = [token_label(t) for t in found.tokens]
    figures = []
    for name in found.fit.axes:
        axis = found.fit.axis(name)
        at = [i for i, t in enumerate(found.tokens) if axis.position in t.names]
        figures.append(
            Figure(
                svg=layer_map(
                    labels,
                    found.trace[name],
                    limit=2.0,
                    marked=at,
                    window=(axis.window[0], axis.window[-1]),
                ),
                alt=f"{TITLES[name]} at each token and layer; the table of tokens below has the means.",
                title=TITLES[name],
                caption=f"Fitted at {axis.position}. The frame holds the layers whose mean is the belief. "
                f"Teal: towards {AXES[name][1]}, orange: towards {AXES[name][2]} prompts; full colour at two "
                "standard deviations.",
            )
        )
    lead = (
        "How the two readings build up: tokens from top to bottom, layers from left to right. Only the row in dark "
        "ink was fitted and tested; the others show where such a state first appears."
    )
    return Section(
        slug="maps",
        title="Where it arises",
        lead=lead,
        figures=tuple(figures),
        folded=(_trace_table(found),),
    )


def _word_section(found: Explanation) -> Section:
    head: dict[str, Any] = {"slug": "words", "title": "Which words decide"}
    if not found.words:
        return Section(**head, missing="The prompt is one word; there is nothing to leave out.")
    return Section(**head, tables=(_word_table(found),))


def _near_section(found: Explanation) -> Section:
    share = np.mean([n.kind.startswith("to refuse") for n in found.near])
    lead = f"{percent(float(share))} of the {len(found.near)} nearest are requests to refuse."
    return Section(
        slug="nearest", title="What it takes the prompt for", lead=lead, tables=(_near_table(found),)
    )
