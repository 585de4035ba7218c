"""Everything a card is drawn from, read back from a run folder; tables that several sections share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.files import from_row
from demur.flows.people import People, kept
from demur.flows.runs import RunFolder, StoredReply
from demur.measure.refusal import Record, Said, categories
from demur.prompts import row_of
from demur.types import RESPOND, OperatingPoint, Prompt, PromptSet, Score, Verdict

FloatArray = npt.NDArray[np.float64]
Choice = str | None
"""Category chosen at the first position, `respond` for an answer, None for no control token."""


STREAMS = ("scores", "scores-tense", "scores-calibrate")
"""The streams of scores that a card may have."""


@dataclass(frozen=True, kw_only=True)
class CardData:
    """A finished run.

    `prompts` are reported on (those that were asked), a guarantee may be fitted on `calibrate`, and
    `tenses` holds some of the prompts in other tenses. `where` and `changed` are what `demur.flows.where` read,
    `depth` what `demur.flows.section_depth` did. Scores are by prompt id, replies and verdicts by (prompt id,
    sample); `baseline_*` belong to the same base without its adapter. `lost` says of each stream
    of scores which prompts have none: {id: "blocked" or "failed"}. `people` are labels that
    correct what is read from texts.
    """

    config: Mapping[str, Any]
    prompts: PromptSet
    scores: Mapping[str, Score] = field(default_factory=dict)
    replies: Mapping[tuple[str, int], StoredReply] = field(default_factory=dict)
    verdicts: Mapping[tuple[str, int], Verdict] = field(default_factory=dict)
    baseline_verdicts: Mapping[tuple[str, int], Verdict] = field(default_factory=dict)
    calibrate: PromptSet | None = None
    calibrate_scores: Mapping[str, Score] = field(default_factory=dict)
    tenses: PromptSet | None = None
    tense_scores: Mapping[str, Score] = field(default_factory=dict)
    where: Mapping[str, Any] | None = None
    changed: Mapping[str, Any] | None = None
    depth: Mapping[str, Any] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    people: People | None = None

    @classmethod
    def read(cls, run: RunFolder) -> CardData:
        """Load a run folder."""
        asked, name = run.prompts(), run.config["prompts"]["name"]
        skipped = run.config.get("skipped", {}).get("prompts", {})
        return cls(
            config=run.config,
            prompts=PromptSet(name, tuple(p for p in asked or () if p.id not in skipped)),
            scores=run.scores(),
            replies=run.replies(),
            verdicts=run.verdicts(),
            baseline_verdicts=run.verdicts("verdicts-baseline"),
            calibrate=run.prompts("prompts-calibrate"),
            calibrate_scores=run.scores("scores-calibrate"),
            tenses=run.prompts("prompts-tense"),
            tense_scores=run.scores("scores-tense"),
            where=next(iter(run.rows("where")), None),
            changed=next(iter(run.rows("changed")), None),
            depth=next(iter(run.rows("depth")), None),
            notes=run.notes,
            lost={k: {i: next(iter(why)) for i, why in v.items()} for k, v in run.unscored.items()},
            people=kept(run),
        )

    # --- what was run ---

    @property
    def names(self) -> tuple[str, ...]:
        """Refuse categories and `respond`, the columns of `table`; empty without control tokens."""
        return tuple(self.config["model"].get("control") or ())

    @property
    def model(self) -> str:
        """What the user called the model."""
        return str(self.config["model"]["name"])

    @property
    def skipped(self) -> Mapping[str, str]:
        """Prompts that the model could not be asked: {id: reason}."""
        found: Mapping[str, str] = self.config.get("skipped", {}).get("prompts", {})
        return found

    @property
    def seed(self) -> int:
        """Seed of samples, resamples and examples."""
        return int(self.config["seed"])

    @cached_property
    def point(self) -> OperatingPoint | None:
        """The operating point the answers were made under; None when the model chose for itself."""
        row = self.config.get("operating_point")
        return from_row(OperatingPoint, row, "run.json, operating_point") if row else None

    # --- first-position scores ---

    @cached_property
    def scored(self) -> tuple[Prompt, ...]:
        """Labelled prompts with a score, in set order."""
        return tuple(p for p in self.prompts if p.should_refuse is not None and p.id in self.scores)

    @cached_property
    def positive(self) -> npt.NDArray[np.bool_]:
        """Shape (n,): should `scored[i]` be refused?"""
        return np.array([bool(p.should_refuse) for p in self.scored], dtype=bool)

    @cached_property
    def p_refuse(self) -> FloatArray:
        """Shape (n,): probability of refusing at the first position."""
        return np.array([self.scores[p.id].p_refuse for p in self.scored], dtype=np.float64)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Shape (n,): the row of the headline that `scored[i]` is counted in."""
        return tuple(row_of(p) for p in self.scored)

    @cached_property
    def clusters(self) -> list[str] | None:
        """Source groups for clustered intervals, or None when every prompt stands alone."""
        groups = [p.group or f"id:{p.id}" for p in self.scored]
        return groups if len(set(groups)) < len(groups) else None

    @cached_property
    def row_names(self) -> tuple[str, ...]:
        """All rows of the headline, without "all"."""
        return categories(self.prompts)

    def choices(self, point: OperatingPoint | None) -> list[Choice]:
        """What would be emitted for each of `scored` under a point (None: the model's own choice)."""
        return choices([self.scores[p.id] for p in self.scored], self.names, point)

    def no_score(self, stream: str = "scores") -> str | None:
        """How many prompts of a stream could not be scored, and why; None where all were, or none was asked."""
        prompts, scores, what = {
            "scores": (self.prompts, self.scores, "prompts"),
            "scores-tense": (self.tenses, self.tense_scores, "reworded prompts"),
            "scores-calibrate": (self.calibrate, self.calibrate_scores, "prompts to calibrate on"),
        }[stream]
        lost = self.lost.get(stream, {})
        skipped = self.config.get("skipped", {}).get("calibrate", {}) if stream == "scores-calibrate" else {}
        asked = [p.id for p in prompts or () if p.id not in skipped]
        gone = [i for i in asked if i not in scores]
        if not gone or not (lost or scores):
            return None
        left_out = "and enter no rate read from scores"
        if self.config["kind"] == "replies":
            return f"{len(gone)} of {len(asked)} prompts came without a score {left_out}."
        kinds = Counter(lost.get(i, "unasked") for i in gone)
        said = {
            "blocked": "blocked by the provider",
            "failed": "failed in spite of retries",
            "unasked": "left open when scoring broke off",
        }
        counts = ", ".join(f"{kinds[kind]} {words}" for kind, words in said.items() if kinds[kind])
        text = f"{len(gone)} of {len(asked)} {what} could not be scored ({counts}) {left_out}."
        why = self.notes.get(stream)
        return f"{text} Scoring broke off with: {why}" if why else text

    # --- texts ---

    @cached_property
    def records(self) -> list[Record]:
        """Judged first samples in set order, labelled or not."""
        return self._records(self.verdicts)

    @cached_property
    def baseline_records(self) -> list[Record]:
        """The baseline's judged answers; their reply is the model's, only the verdict counts."""
        return self._records(self.baseline_verdicts)

    def _records(self, verdicts: Mapping[tuple[str, int], Verdict]) -> list[Record]:
        asked = [p for p in self.prompts if (p.id, 0) in verdicts and (p.id, 0) in self.replies]
        return [Record(p, self.replies[p.id, 0].reply, verdicts[p.id, 0]) for p in asked]

    def said(self, records: Sequence[Record]) -> list[Said] | None:
        """What people's labels know of these answers; None where none were given."""
        return self.people.of(r.reply for r in records) if self.people else None

    @property
    def has_control(self) -> bool:
        """True when refusing and answering are tokens, so that one pass decides every threshold."""
        return bool(self.names) and bool(self.scored) and self.scores[self.scored[0].id].kind == "control"


def table(scores: Sequence[Score], names: Sequence[str]) -> FloatArray:
    """Probabilities as an array of shape (n, K+1), columns in `names` order."""
    return np.array([[s.probabilities.get(c, 0.0) for c in names] for s in scores], dtype=np.float64).reshape(
        len(scores), len(names)
    )


def choices(scores: Sequence[Score], names: Sequence[str], point: OperatingPoint | None) -> list[Choice]:
    """The decision rule on stored scores; where it steers nothing, the model's own likeliest token."""
    own = [s.token for s in scores]
    if point is None or not names or not scores:
        return own
    from demur.calibrate import decide, is_steered
    from demur.control.refusal_tokens import RefusalTokens

    P, tau = table(scores, names), RefusalTokens(point).cuts(names)
    steered = is_steered(P, names, tau)
    picked = decide(P, names, tau, point.rule)
    return [names[i] if mine else token for i, mine, token in zip(picked, steered, own, strict=True)]


def refused(choice: Choice) -> bool | None:
    """Whether a first-position choice is a refusal; None when it was no control token.

    >>> refused("safety"), refused("respond"), refused(None)
    (True, False, None)
    """
    return None if choice is None else choice != RESPOND
