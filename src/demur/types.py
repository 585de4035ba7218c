"""The nouns of demur. Standard library only, frozen, the same in Python, JSONL and JSON Schema.

Read this file, one method and that method's test, and you know the rest of the house. File forms of these
nouns (with `schema_version` and published JSON Schemas) are in `demur.files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

SCHEMA_VERSION = 1


class Label(StrEnum):
    """The refusal scale. Each answer lands in exactly one of these; nothing is folded into yes or no.

    The first six say what the answer does; the rest say why it could not be read:
    `blocked` a provider's filter, `truncated` the budget ended inside the thinking, `empty` no text and no
    tool call, `unparsed` the judge cannot tell (also: a language it was not built for), `error` no answer came.
    """

    FULL_REFUSAL = "full_refusal"
    PARTIAL_REFUSAL = "partial_refusal"
    COMPLIANCE = "compliance"
    ABSTENTION = "abstention"
    CLARIFICATION = "clarification"
    OFF_TOPIC = "off_topic"
    BLOCKED = "blocked"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    UNPARSED = "unparsed"
    ERROR = "error"


DECLINING = frozenset({Label.FULL_REFUSAL, Label.PARTIAL_REFUSAL, Label.ABSTENTION, Label.CLARIFICATION})
"""Labels that count as "did not simply comply" (the noncompliance of CoCoNot, section 3)."""

UNREADABLE = frozenset({Label.TRUNCATED, Label.EMPTY, Label.UNPARSED, Label.ERROR})
"""Labels that are counted apart and enter no rate."""

EXPECTED_SHORTHANDS: Mapping[str, frozenset[Label]] = {
    "comply": frozenset({Label.COMPLIANCE}),
    "refuse": frozenset({Label.FULL_REFUSAL, Label.PARTIAL_REFUSAL, Label.BLOCKED}),
    "abstain": frozenset({Label.ABSTENTION}),
    "clarify": frozenset({Label.CLARIFICATION}),
    "safe_complete": frozenset({Label.COMPLIANCE, Label.PARTIAL_REFUSAL}),
    "decline": DECLINING | {Label.BLOCKED},
}

RESPOND = "respond"
"""The category name of the control token that announces an answer rather than a refusal."""


def expand_expected(value: str | Iterable[str]) -> frozenset[Label]:
    """Turn `expected` as written in a file (a label, a shorthand, or a list of them) into a set of labels.

    >>> sorted(expand_expected("refuse"))[-1]
    <Label.PARTIAL_REFUSAL: 'partial_refusal'>
    """
    words = [value] if isinstance(value, str) else list(value)
    out: set[Label] = set()
    for word in words:
        if word in EXPECTED_SHORTHANDS:
            out |= EXPECTED_SHORTHANDS[word]
        elif word in Label._value2member_map_:
            out.add(Label(word))
        else:
            known = sorted(EXPECTED_SHORTHANDS) + [label.value for label in Label]
            raise ValueError(f"expected={word!r} is no verdict; use one or more of {', '.join(known)}")
    return frozenset(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message. `content` is plain text; a control or special token in it stays text."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A request, with what a good model may do with it.

    Attributes:
        id: unique within its set.
        messages: the conversation up to the answer; the last one is usually the user's.
        category: free string, or None; a house taxonomy may map it (`demur.prompts.Taxonomy`).
        subcategory: free string, or None.
        expected: the acceptable verdicts; empty when unknown. See `EXPECTED_SHORTHANDS`.
        definition: what "refuse" means to whoever labelled it, since sets differ.
        reference, chosen, rejected: a reference answer and a preference pair, where the source has them.
        group: prompts of one source or minimal pair; intervals can cluster by it.
        license: SPDX id. language: BCP-47 tag.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    category: str | None = None
    subcategory: str | None = None
    expected: frozenset[Label] = frozenset()
    definition: str | None = None
    reference: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    group: str | None = None
    source: str | None = None
    license: str | None = None
    language: str = "en"
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, *, id: str = "prompt", system: str | None = None, **fields: Any) -> Prompt:
        """Make a prompt from plain text.

        >>> Prompt.of("What is a fjord?").text
        'What is a fjord?'
        """
        head = (Message(role="system", content=system),) if system else ()
        return cls(id=id, messages=(*head, Message(role="user", content=text)), **fields)

    @property
    def text(self) -> str:
        """The last user message."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def should_refuse(self) -> bool | None:
        """True when plain compliance is not acceptable, False when it is, None when nobody said."""
        return None if not self.expected else Label.COMPLIANCE not in self.expected

    def with_system(self, system: str | None) -> Prompt:
        """The same prompt under another system message (replacing its own)."""
        if system is None:
            return self
        rest = tuple(m for m in self.messages if m.role != "system")
        return replace(self, messages=(Message(role="system", content=system), *rest))


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A named sequence of prompts with unique ids. `hash` identifies content and order."""

    name: str
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        seen: dict[str, int] = {}
        for i, p in enumerate(self.prompts):
            if p.id in seen:
                raise ValueError(
                    f"prompt set {self.name!r}: id {p.id!r} stands at positions {seen[p.id]} and {i}; "
                    "ids must be unique because results are joined by them"
                )
            seen[p.id] = i

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]

    @property
    def hash(self) -> str:
        """sha256 (first 16 hex digits) over ids, messages, images, categories and expectations."""
        h = hashlib.sha256()
        for p in self.prompts:
            row: list[Any] = [p.id, [[m.role, m.content] for m in p.messages], p.category, sorted(p.expected)]
            if p.images or any(m.tool_calls for m in p.messages):
                row += [p.images, [m.tool_calls for m in p.messages]]
            h.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return h.hexdigest()[:16]

    def where(self, name: str | None = None, **equal: Any) -> PromptSet:
        """The prompts whose attributes equal the given values, e.g. `where(category="safety")`."""
        kept = tuple(p for p in self.prompts if all(getattr(p, k) == v for k, v in equal.items()))
        return PromptSet(name or self.name, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Everything beside the prompt that may change an answer. Headlines name their condition.

    temperature 0 means greedy. `max_new_tokens` bounds thinking and answer together.
    """

    name: str = "default"
    system: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    operating_point: str | None = None
    intervention: str | None = None


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back for (prompt, condition, sample).

    `logprobs` holds the decision position only: {token or category: natural log-probability}. `control_token`
    is the category whose token opened the answer and `control_forced` says that a decision rule put it there.
    `error` is set when no answer came; the row is kept.
    """

    prompt_id: str
    content: str = ""
    condition: str = "default"
    sample: int = 0
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    provider_refusal: str | None = None
    finish_reason: FinishReason = "unknown"
    finish_reason_raw: str | None = None
    logprobs: Mapping[str, float] = field(default_factory=dict)
    control_token: str | None = None
    control_forced: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's label for one reply. On the refusal scale `label` is a `Label`; other scales are free."""

    prompt_id: str
    label: str
    judge: str
    condition: str = "default"
    sample: int = 0
    scale: Literal["refusal", "harm", "support", "validity", "specification", "score"] = "refusal"
    score: float | None = None
    reason: str | None = None
    read: Literal[
        "content", "reasoning", "provider_refusal", "tool_calls", "finish_reason", "logprobs", "error"
    ] = "content"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """First-position probabilities of one prompt, from one forward pass.

    With control tokens, `probabilities` holds one entry per refuse category plus `respond`, each the exact
    softmax over the whole (extended) vocabulary at temperature T; `p_refuse` is the sum over refuse categories
    and `off_control_mass` is 1 - sum of all control probabilities. Without control tokens, `p_refuse` is the
    mass of a list of refusal openings and `kind` is "first_token". `demur score` says of each row what it came
    from: `model`, its `fingerprint` and `dtype`, which calibration hands on to the operating point.
    """

    id: str
    p_refuse: float
    probabilities: Mapping[str, float] = field(default_factory=dict)
    off_control_mass: float | None = None
    token: str | None = None
    T: float = 1.0
    kind: Literal["control", "first_token"] = "control"
    condition: str = "default"
    model: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The cut for one category, with how it was found.

    `tau` is on p_c at the operating point's T; for the rule "bias" on p_c / (p_c + p_respond), for "total_mass" on
    the sum over the steered categories. n and errors are the look-alike benign prompts of the
    calibration part and how many of them the rule refuses; `bound` is the upper confidence bound of that rate.
    """

    tau: float
    bias: float | None = None
    refusal_rate: float | None = None
    refusal_interval: tuple[float, float] | None = None
    n_refuse: int | None = None
    n_benign: int | None = None
    benign_errors: int | None = None
    bound: float | None = None
    mode: Literal["enforce", "shadow"] = "enforce"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """Per-category thresholds and everything needed to trust or refuse them. Small YAML file: `demur.files`.

    Attributes:
        rule: "compare", "threshold" (per category, on p_c), "total_mass" or "bias".
        goal: how the thresholds were chosen, e.g. "max_tpr_fpr<=0.05@delta=0.1".
        guarantee: the wording, or None when nothing is guaranteed.
        calibration_hash: of the scores, labels and categories calibrated on (`calibrate.base.data_hash`), by which
            a check knows them again. Until it is made anew, the point that comes with demur-smollm2 holds the hash
            of its prompts there (`PromptSet.hash` of core/calibrate), which no check knows.
        model_fingerprint, dtype, T: what the scores came from. Another T or fingerprint is refused, another
            dtype warns.
        answers: who writes behind a decided `respond`: the "model" itself, or its "base" without the adapter,
            so that accepted requests are answered as if the adapter were not there.
    """

    id: str
    thresholds: Mapping[str, Threshold]
    rule: Literal["compare", "threshold", "total_mass", "bias"] = "threshold"
    goal: str = "manual"
    alpha: float | None = None
    delta: float | None = None
    guarantee: str | None = None
    calibrated_on: str | None = None
    calibration_hash: str | None = None
    model: str | None = None
    model_fingerprint: str | None = None
    dtype: str | None = None
    T: float = 1.0
    answers: Literal["model", "base"] = "model"

    @property
    def steered(self) -> tuple[str, ...]:
        """Categories the operating point steers, sorted."""
        return tuple(sorted(self.thresholds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share with its count and interval; `value` is None when n is 0 (undefined, never zero).

    `judge` names what made the labels; None when no judge was needed (thresholded scores). `labels` counts people's
    labels where `corrected` is to come from them (it is None where they are too few), and is None elsewhere.
    """

    k: int
    n: int
    low: float | None
    high: float | None
    judge: str | None = None
    unread: int = 0
    corrected: float | None = None
    corrected_interval: tuple[float, float] | None = None
    labels: int | None = None

    @property
    def value(self) -> float | None:
        """k / n, or None for n = 0."""
        return self.k / self.n if self.n else None


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns and rows of plain values (str, int, float, None, Rate)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tables, figures as numbers, and provenance; `demur.report` renders it to text, Markdown, JSON and HTML."""

    title: str
    tables: tuple[Table, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where in a network to read or edit: `layer` 0..n-1 (output of that block), `position` a token index.

    Negative positions count from the prompt's end, -1 being the position whose logits decide the first answer
    token. `part` "block" is the residual stream after the block; "heads" the input of the attention output
    projection, shape (n_heads * head_dim,).
    """

    layer: int
    position: int = -1
    part: Literal["block", "heads"] = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A method's own description, held as `CARD` in its file; `demur.methods` collects them."""

    slug: str
    title: str
    room: str
    tier: Literal["stable", "lab", "planned"]
    paper: str
    url: str
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()
    summary: str = ""
    replicate: str | None = None
